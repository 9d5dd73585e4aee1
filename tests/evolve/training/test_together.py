"""Children that train together train as they do one by one, and what they share is computed once."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from evolve.config import TrainingSettings
from evolve.generation import ChildPlan, ChildResult, GenerationPlan
from evolve.layer import HEAD, NORM, PATCH_EMBED, POS_EMBED, Layer, Position, block_position
from evolve.training import pack, together
from evolve.training.one_by_one import OneByOneTrainer
from evolve.training.together import TogetherTrainer
from tests.support.training import PLAIN, TinyRoot, easy_data, generation

ROOT = TinyRoot()
DATA = easy_data()
SETTINGS = TrainingSettings(threads=1, device="cpu", pack_size=16)
AUGMENTED = PLAIN.replace(crop_area_min=0.3, flip=True, brightness=0.1, contrast=0.1, saturation=0.1, hue=0.1)


def children(wanted: Any = PLAIN) -> list[ChildPlan]:
    """Of every sort: head only, in the middle, at the bottom, all of it, with adapters of two widths, with other optimisers."""
    wide = wanted.replace(adapter_width=16, learning_rate=0.02)

    def clone(*positions: Position) -> Any:
        return lambda position: position in positions

    return [
        ROOT.child(0, hyperparameters=wanted),
        ROOT.child(1, hyperparameters=wanted.replace(learning_rate=0.05, nesterov=True)),
        ROOT.child(2, clone(NORM), hyperparameters=wanted.replace(momentum=None)),
        ROOT.child(3, clone(NORM, block_position(1)), hyperparameters=wanted.replace(schedule="restarts")),
        ROOT.child(4, clone(NORM, block_position(1)), hyperparameters=wanted.replace(schedule="constant")),
        ROOT.child(5, clone(block_position(0)), hyperparameters=wanted),
        ROOT.child(6, clone(POS_EMBED), adapters=(1,), hyperparameters=wanted, seed=1),
        ROOT.child(7, clone(PATCH_EMBED, NORM), adapters=(0, 1), hyperparameters=wide, seed=2),
        ROOT.child(8, lambda _: True, adapters=(0, 1), hyperparameters=wanted, seed=3),
        _shorter(ROOT.child(9, clone(NORM), hyperparameters=wanted)),
    ]


def _shorter(child: ChildPlan) -> ChildPlan:
    """Without the top block."""
    return dataclasses.replace(child, layers=tuple(layer for layer in child.layers if layer.position != block_position(1)))


@functools.cache
def one_by_one(plan: GenerationPlan) -> list[ChildResult]:
    return [one for pack in OneByOneTrainer(DATA, ROOT.stored.__getitem__, SETTINGS).train(plan) for one in pack.children]


def trained(plan: GenerationPlan, **options: Any) -> list[ChildResult]:
    settings = SETTINGS.model_copy(update={"pack_size": options.pop("pack_size", 16)})
    packs = TogetherTrainer(DATA, ROOT.stored.__getitem__, settings, **options).train(plan)
    return [one for pack in packs for one in pack.children]


def assert_alike(found: list[ChildResult], expected: list[ChildResult], tolerance: float = 1e-5) -> None:
    assert [one.index for one in found] == [one.index for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.interval_qualities == other.interval_qualities
        assert (one.best_interval, one.diverged, one.batch_parts) == (other.best_interval, other.diverged, other.batch_parts)
        assert (one.num_trained_images, one.flops) == (other.num_trained_images, other.flops)
        assert one.trained.keys() == other.trained.keys()
        for position, tensors in one.trained.items():
            assert tensors.keys() == other.trained[position].keys()
            for name, tensor in tensors.items():
                np.testing.assert_allclose(tensor, other.trained[position][name], atol=tolerance, rtol=0, err_msg=f"{position}")


@pytest.mark.parametrize("stacks", [False, True], ids=["in turn", "stacked"])
@pytest.mark.parametrize("wanted", [PLAIN, AUGMENTED], ids=["plain", "augmented"])
@pytest.mark.parametrize("feature_bytes", [0, 2**30], ids=["no cache", "cache"])
def test_together_as_one_by_one(wanted: Any, stacks: bool, feature_bytes: int) -> None:
    plan = generation(*children(wanted), intervals=3)
    assert_alike(trained(plan, stacks=stacks, feature_bytes=feature_bytes), one_by_one(plan))


def test_the_same_plan_gives_the_same_bits() -> None:
    plan = generation(*children(AUGMENTED))
    first, second = (trained(plan, stacks=True) for _ in range(2))
    assert_alike(first, second, tolerance=0.0)


def test_packs_are_formed_from_the_plan_alone_and_go_on_where_they_stopped() -> None:
    plan = generation(*children(AUGMENTED))
    settings = SETTINGS.model_copy(update={"pack_size": 4})
    trainer = TogetherTrainer(DATA, ROOT.stored.__getitem__, settings)
    packs = list(trainer.train(plan))
    assert [[one.index for one in pack.children] for pack in packs] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    rest = list(trainer.train(dataclasses.replace(plan, children=plan.children[4:])))
    assert_alike([one for pack in rest for one in pack.children], [one for pack in packs[1:] for one in pack.children], 0.0)


def test_what_is_shared_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    build = pack.build_module

    def counting(spec: Any, *arguments: Any, **options: Any) -> torch.nn.Module:
        module = build(spec, *arguments, **options)

        def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: Any) -> None:
            if not any(parameter.requires_grad for parameter in module.parameters()):
                rows[spec.kind.value] += len(inputs[0])
                calls[spec.kind.value] += 1

        module.register_forward_hook(count)
        return module

    monkeypatch.setattr(pack, "build_module", counting)
    monkeypatch.setattr(together, "EVALUATION_BATCH", 1000)
    few = [ROOT.child(number, hyperparameters=AUGMENTED) for number in range(4)]
    few.append(ROOT.child(4, lambda position: position == block_position(0), hyperparameters=AUGMENTED))
    trained(generation(*few, intervals=1, batches=1), feature_bytes=0)
    # 16 images of one batch and 24 of validation. Below the fork all children share every row, above it the fifth has rows of its own.
    assert rows["patch_embed"] == 16 + 24
    assert rows["norm"] == 2 * (16 + 24)
    # In one batch where nobody needs a gradient, as in validation, and apart in training, where one does.
    assert calls["norm"] == 2 + 1
    assert calls["patch_embed"] == 2


def test_nothing_below_the_lowest_trainable_layer_keeps_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: Counter[str] = Counter()
    ran: Counter[str] = Counter()
    build = pack.build_module

    def watching(spec: Any, *arguments: Any, **options: Any) -> torch.nn.Module:
        module = build(spec, *arguments, **options)

        def look(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
            if torch.is_grad_enabled() and not any(parameter.requires_grad for parameter in module.parameters()):
                ran[spec.kind.value] += 1
                kept[spec.kind.value] += output.requires_grad

        module.register_forward_hook(look)
        return module

    monkeypatch.setattr(pack, "build_module", watching)
    low = [ROOT.child(0, hyperparameters=AUGMENTED), ROOT.child(1, lambda position: position == NORM, hyperparameters=AUGMENTED)]
    trained(generation(*low, intervals=1, batches=3), feature_bytes=0)
    assert ran == {"patch_embed": 3, "class_token": 3, "pos_embed": 3, "block": 6, "norm": 3}
    assert not +kept
    kept.clear()
    higher = [*low, ROOT.child(2, lambda position: position == block_position(0), hyperparameters=AUGMENTED)]
    trained(generation(*higher, intervals=1, batches=3), feature_bytes=0)
    # The third child's gradient goes down through the second block and the norm; nobody's goes further.
    assert +kept == {"block": 3, "norm": 3}


def test_frozen_prefixes_of_what_never_changes_are_computed_once_for_all_epochs_and_generations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows: Counter[str] = Counter()
    run = pack.PackModel.run_frozen

    def counting(self: Any, layers: Any, values: torch.Tensor) -> torch.Tensor:
        listed = list(layers)
        for layer in listed:
            rows[str(layer.position)] += len(values)
        return run(self, listed, values)

    monkeypatch.setattr(pack.PackModel, "run_frozen", counting)
    trainer = TogetherTrainer(DATA, ROOT.stored.__getitem__, SETTINGS)
    plan = generation(*children(PLAIN)[:4], intervals=4, batches=20)
    for _ in range(2):
        list(trainer.train(plan))
    # 90 training images and 24 of validation; deeper prefixes go on from shallower ones.
    assert rows == dict.fromkeys(("patch_embed", "class_token", "pos_embed", "block.0", "block.1", "norm"), 90 + 24)


def test_a_cache_without_room_forgets_what_was_used_longest_ago() -> None:
    plan = generation(*children(PLAIN), intervals=2)
    trainer = TogetherTrainer(DATA, ROOT.stored.__getitem__, SETTINGS, feature_bytes=40_000)
    found = [one for pack in trainer.train(plan) for one in pack.children]
    assert 0 < trainer._cache.num_bytes <= 40_000
    assert_alike(found, one_by_one(plan))


def test_a_child_that_diverges_leaves_its_pack() -> None:
    root = TinyRoot()
    whole = children(PLAIN)
    head = {"weight": np.full((3, 16), 3e38, dtype=np.float32), "bias": np.zeros(3, dtype=np.float32)}
    layer = Layer.of(whole[1].layers[-1].spec, head)
    root.stored[layer.id] = head
    broken = dataclasses.replace(whole[1], layers=(*whole[1].layers[:-1], dataclasses.replace(whole[1].layers[-1], source=layer)))
    plan = generation(whole[0], broken, *whole[2:], intervals=3)
    expected = [one for pack in OneByOneTrainer(DATA, root.stored.__getitem__, SETTINGS).train(plan) for one in pack.children]
    for stacks in (False, True):
        trainer = TogetherTrainer(DATA, root.stored.__getitem__, SETTINGS, stacks=stacks)
        found = [one for pack in trainer.train(plan) for one in pack.children]
        assert found[1].diverged
        assert found[1].interval_qualities == (0.0, 0.0, 0.0)
        assert_alike(found, expected)


def test_a_hopeless_child_leaves_its_pack_and_costs_no_more() -> None:
    whole = children(AUGMENTED)
    hopeless = dataclasses.replace(whole[3], quality_to_beat=1.0)
    plan = dataclasses.replace(generation(*whole[:3], hopeless, *whole[4:], intervals=4), gains=(0.0, 0.0, 0.0, 0.0))
    expected = one_by_one(plan)
    assert len(expected[3].interval_qualities) < 4
    for stacks in (False, True):
        assert_alike(trained(plan, stacks=stacks), expected)


class _Observer:
    def __init__(self) -> None:
        self.heard: list[tuple[int, int, float]] = []

    def on_interval(self, child_index: int, interval: int, quality: float) -> None:
        self.heard.append((child_index, interval, quality))


def test_every_validation_is_told() -> None:
    plan = generation(*children(PLAIN)[:3], intervals=2)
    observer = _Observer()
    results = trained(plan, observer=observer)
    assert observer.heard == [(one.index, interval, one.interval_qualities[interval]) for interval in range(2) for one in results]


def test_a_pack_that_does_not_fit_is_halved_until_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = generation(*children(AUGMENTED)[:6])
    build = pack.PackModel.__init__

    def small(self: Any, plans: list[ChildPlan], *arguments: Any, **options: Any) -> None:
        if len(plans) > 2:
            raise torch.OutOfMemoryError
        build(self, plans, *arguments, **options)

    monkeypatch.setattr(pack.PackModel, "__init__", small)
    packs = list(TogetherTrainer(DATA, ROOT.stored.__getitem__, SETTINGS).train(plan))
    assert [[one.index for one in pack.children] for pack in packs] == [[0], [1, 2], [3], [4, 5]]
    assert_alike([one for pack in packs for one in pack.children], one_by_one(plan))


def test_a_child_that_does_not_even_fit_alone_is_trained_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = generation(*children(AUGMENTED)[:2])

    def never(self: Any, *arguments: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(pack.PackModel, "__init__", never)
    assert_alike(trained(plan), one_by_one(plan))


def test_an_error_that_is_no_want_of_memory_goes_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, *arguments: Any, **options: Any) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr(pack.PackModel, "step", fails)
    with pytest.raises(RuntimeError, match="something else"):
        trained(generation(*children(PLAIN)))


def test_plans_that_cannot_be_are_refused() -> None:
    plan = generation(ROOT.child())
    with pytest.raises(ValueError, match="other"):
        trained(dataclasses.replace(plan, task="other"))
    frozen = dataclasses.replace(
        plan.children[0], layers=tuple(layer for layer in plan.children[0].layers if layer.position != HEAD)
    )
    with pytest.raises(ValueError, match="no trainable layer"):
        trained(dataclasses.replace(plan, children=(frozen,)))


def test_its_results_are_not_those_of_another_trainer() -> None:
    trainer = TogetherTrainer(DATA, ROOT.stored.__getitem__, SETTINGS)
    assert trainer.identity != OneByOneTrainer(DATA, ROOT.stored.__getitem__, SETTINGS).identity
