import dataclasses
import hashlib
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from evolve.config import TrainingSettings
from evolve.flops import forward_flops, training_flops
from evolve.generation import ChildPlan, ChildResult, GenerationPlan, LayerPlan, Origin
from evolve.layer import HEAD, NORM, PATCH_EMBED, POS_EMBED, Layer, Position, adapter_position, block_position, layer_id
from evolve.training import one_by_one
from evolve.training.child import ChildModel, initial_weights
from evolve.training.one_by_one import OneByOneTrainer
from evolve.vit import reference_logits
from tests.support.training import IMAGE_SIZE, PLAIN, TinyRoot, easy_data, generation, new_adapter

ROOT = TinyRoot()
DATA = easy_data()
SETTINGS = TrainingSettings(threads=1, device="cpu")


class RecordingObserver:
    def __init__(self) -> None:
        self.heard: list[tuple[int, int, float]] = []

    def on_interval(self, child_index: int, interval: int, quality: float) -> None:
        self.heard.append((child_index, interval, quality))


def train(plan: GenerationPlan, root: TinyRoot = ROOT, **options: Any) -> list[ChildResult]:
    packs = list(OneByOneTrainer(DATA, root.stored.__getitem__, SETTINGS, **options).train(plan))
    return [child for pack in packs for child in pack.children]


def digest(result: ChildResult) -> str:
    weights = sorted((str(position), layer_id(ROOT_SPEC, tensors)) for position, tensors in result.trained.items())
    return hashlib.sha256(repr((weights, result.interval_qualities, result.best_interval)).encode()).hexdigest()


ROOT_SPEC = ROOT.layers[NORM].spec  # Any spec will do to hash tensors.

EVERYTHING: dict[str, Any] = {
    "crop_area_min": 0.3,
    "flip": True,
    "brightness": 0.1,
    "contrast": 0.1,
    "saturation": 0.1,
    "hue": 0.1,
}


def busy_plan() -> GenerationPlan:
    wanted = PLAIN.replace(**EVERYTHING)
    return generation(
        ROOT.child(0, hyperparameters=wanted),
        ROOT.child(1, lambda position: True, adapters=(0, 1), hyperparameters=wanted, seed=6),
        ROOT.child(2, lambda position: position == block_position(1), hyperparameters=wanted.replace(momentum=None)),
    )


def test_learns_an_easy_task_and_measures_it() -> None:
    wanted = PLAIN.replace(learning_rate=0.05)
    child = ROOT.child(trainable=lambda position: True, hyperparameters=wanted)
    (result,) = train(generation(child, intervals=3, batches=20))
    assert result.quality > 0.95
    path, stored = ROOT.path(child, result)
    examples = OneByOneTrainer(DATA, stored.__getitem__, SETTINGS).examine(path)
    assert examples.test_accuracy is not None
    assert examples.test_accuracy > 0.95
    assert np.array_equal(examples.images, DATA.validation.resized(IMAGE_SIZE)[:8])
    assert DATA.test is not None
    logits = reference_logits(path, stored.__getitem__, DATA.test.resized(IMAGE_SIZE))
    assert (logits.argmax(1) == DATA.test.labels).mean() == examples.test_accuracy


def test_trains_with_everything_on() -> None:
    results = train(busy_plan())
    assert [result.index for result in results] == [0, 1, 2]
    assert all(np.isfinite(t).all() for result in results for tensors in result.trained.values() for t in tensors.values())


def test_the_same_plan_gives_the_same_bits_also_in_another_process() -> None:
    first = [digest(result) for result in train(busy_plan())]
    assert [digest(result) for result in train(busy_plan())] == first
    script = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('tests_of_trainer', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); sys.modules[spec.name] = module; spec.loader.exec_module(module)\n"
        "print(*[module.digest(result) for result in module.train(module.busy_plan())])\n"
        # None of them is needed to train, and each takes seconds to import.
        "assert not {'timm', 'torchvision', 'torch._dynamo'} & set(sys.modules)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=pathlib.Path(__file__).parents[3]
    )
    assert answer.stdout.split() == first


def test_a_child_does_not_depend_on_its_siblings() -> None:
    plan = busy_plan()
    together = [digest(result) for result in train(plan)]
    alone = [digest(train(dataclasses.replace(plan, children=(child,)))[0]) for child in plan.children]
    assert alone == together


def test_all_children_see_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    step = ChildModel.step

    def spy(self: ChildModel, images: torch.Tensor, labels: torch.Tensor, learning_rate: float) -> None:
        seen.append(hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest())
        step(self, images, labels, learning_rate)

    monkeypatch.setattr(ChildModel, "step", spy)
    plan = busy_plan()
    train(plan)
    steps = plan.length.num_steps
    assert len(seen) == 3 * steps
    assert seen[:steps] == seen[steps : 2 * steps] == seen[2 * steps :]
    assert len(set(seen)) == steps


@pytest.mark.parametrize("trained_position", [HEAD, NORM, block_position(1), block_position(0), POS_EMBED, PATCH_EMBED])
def test_only_trainable_layers_change(trained_position: Position) -> None:
    models: list[ChildModel] = []
    child = ROOT.child(trainable=lambda position: position == trained_position)
    before = {layer.id: layer_id(layer.spec, ROOT.stored[layer.id]) for layer in ROOT.layers.values()}
    build = ChildModel.__init__

    def remember(self: ChildModel, *arguments: Any, **options: Any) -> None:
        build(self, *arguments, **options)
        models.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChildModel, "__init__", remember)
        (result,) = train(generation(child, intervals=1))
    assert set(result.trained) == {trained_position, HEAD}
    # Neither what is stored nor what was trained with has moved in any layer that is shared.
    assert before == {layer.id: layer_id(layer.spec, ROOT.stored[layer.id]) for layer in ROOT.layers.values()}
    for position, module in zip(models[0].model.positions, models[0].model.layers, strict=True):
        if position not in result.trained:
            stored = ROOT.stored[ROOT.layers[position].id]
            assert all(np.array_equal(t.detach().numpy(), stored[name]) for name, t in module.named_parameters())
    for position, tensors in result.trained.items():
        start = initial_weights(
            child, next(layer for layer in child.layers if layer.position == position), ROOT.stored.__getitem__
        )
        assert tensors.keys() == start.keys()
        assert any(not np.array_equal(tensors[name], start[name]) for name in tensors)
        assert all(tensor.dtype == np.float32 for tensor in tensors.values())


def test_one_step_by_hand() -> None:
    # A head of zeros answers alike for all classes: its first gradient is known without a model.
    wanted = PLAIN.replace(schedule="constant", learning_rate=0.2, momentum=None)
    child = ROOT.child(hyperparameters=wanted)
    (result,) = train(generation(child, intervals=1, batches=1, batch_size=90))
    counts = np.bincount(DATA.train.labels, minlength=3) / 90
    bias_gradient = 1 / 3 - counts
    model = ChildModel(child, ROOT.stored.__getitem__, torch.device("cpu"), bf16=False).model
    rows: Any = torch.nn.Sequential(*model.layers[:-1])(torch.from_numpy(DATA.train.resized(IMAGE_SIZE))).detach().numpy()
    errors = 1 / 3 - np.eye(3)[DATA.train.labels]
    weight_gradient = errors.T @ rows / 90
    norm = np.sqrt((weight_gradient**2).sum() + (bias_gradient**2).sum())
    scale = 0.1 * min(1, 1 / norm)
    np.testing.assert_allclose(result.trained[HEAD]["weight"], -scale * weight_gradient, atol=1e-6)
    np.testing.assert_allclose(result.trained[HEAD]["bias"], -scale * bias_gradient, atol=1e-6)


def test_new_adapters_start_from_seed_and_block() -> None:
    child = ROOT.child(adapters=(0, 1), seed=11)
    starts = [initial_weights(child, layer, ROOT.stored.__getitem__) for layer in child.layers]
    adapters = [start for layer, start in zip(child.layers, starts, strict=True) if layer.position == adapter_position(1)]
    assert np.array_equal(adapters[0]["down.weight"], new_adapter(child, 1)["down.weight"])
    assert not np.array_equal(new_adapter(child, 0)["down.weight"], new_adapter(child, 1)["down.weight"])


def test_continued_layers_start_from_their_source() -> None:
    weights = {"weight": np.full((3, 16), 0.25, dtype=np.float32), "bias": np.array([1, 2, 3], dtype=np.float32)}
    root = TinyRoot()
    child = root.child()
    layer = Layer.of(child.layers[-1].spec, weights)
    root.stored[layer.id] = weights
    continued = dataclasses.replace(
        child, layers=(*child.layers[:-1], LayerPlan(HEAD, layer.spec, Origin.CONTINUED, layer)),
        hyperparameters=PLAIN.replace(learning_rate=1e-12),
    )  # fmt: skip
    (result,) = train(generation(continued, intervals=1, batches=1), root)
    np.testing.assert_allclose(result.trained[HEAD]["weight"], weights["weight"], atol=1e-9)
    assert (weights["weight"] == 0.25).all()


def test_a_child_that_diverges_answers_zero_and_fails_nobody() -> None:
    root = TinyRoot()
    child = root.child(0)
    head = {"weight": np.full((3, 16), 3e38, dtype=np.float32), "bias": np.zeros(3, dtype=np.float32)}
    layer = Layer.of(child.layers[-1].spec, head)
    root.stored[layer.id] = head
    broken: ChildPlan = dataclasses.replace(
        child, layers=(*child.layers[:-1], LayerPlan(HEAD, layer.spec, Origin.CONTINUED, layer))
    )
    alone = train(generation(root.child(1), intervals=3), root)
    first, second = train(generation(broken, root.child(1), intervals=3), root)
    assert first.interval_qualities == (0.0, 0.0, 0.0)
    assert first.best_interval == 0
    assert first.num_trained_images == 5 * 16
    assert np.array_equal(first.trained[HEAD]["weight"], head["weight"])
    assert first.diverged
    assert not second.diverged
    assert digest(second) == digest(alone[0])


def test_a_child_that_diverges_later_scores_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, False])
    monkeypatch.setattr(ChildModel, "is_finite", lambda self: next(answers))
    (result,) = train(generation(ROOT.child(), intervals=4))
    assert result.interval_qualities[0] > 0
    assert result.interval_qualities[1:] == (0.0, 0.0, 0.0)
    assert (result.diverged, result.quality) == (True, 0.0)
    assert result.num_trained_images == 2 * 5 * 16


@pytest.mark.parametrize("rate", [1e30, 1e10])
def test_a_learning_rate_that_blows_up_diverges(rate: float) -> None:
    wanted = PLAIN.replace(learning_rate=rate, schedule="constant", momentum=None)
    (result,) = train(generation(ROOT.child(trainable=lambda position: True, hyperparameters=wanted), intervals=3, batches=20))
    assert result.diverged
    assert result.quality == 0.0
    assert all(np.isfinite(t).all() for tensors in result.trained.values() for t in tensors.values())


def test_a_hopeless_child_stops_and_costs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = generation(ROOT.child(0), dataclasses.replace(ROOT.child(1), quality_to_beat=0.6), intervals=4)
    plan = dataclasses.replace(plan, gains=(0.5, 0.25, 0.25, 0.0))
    answers = iter([0.2, 0.3, 0.3, 0.4, 0.2, 0.3])
    monkeypatch.setattr(one_by_one, "accuracy", lambda *_: next(answers))
    observer = RecordingObserver()
    first, second = train(plan, observer=observer)
    assert first.interval_qualities == (0.2, 0.3, 0.3, 0.4)
    assert second.interval_qualities == (0.2, 0.3)
    assert second.num_trained_images == first.num_trained_images / 2
    assert observer.heard[4:] == [(1, 0, 0.2), (1, 1, 0.3)]


@pytest.mark.parametrize(("qualities", "best"), [((0.5, 0.7, 0.7, 0.6), 1), ((0.0, 0.0, 0.0, 0.0), 0), ((0.1, 0.2, 0.3, 0.4), 3)])
def test_keeps_the_weights_of_the_best_interval_the_earliest_on_ties(
    monkeypatch: pytest.MonkeyPatch, qualities: tuple[float, ...], best: int
) -> None:
    full = generation(ROOT.child(hyperparameters=PLAIN.replace(schedule="constant")), intervals=4)
    short = dataclasses.replace(full, length=dataclasses.replace(full.length, intervals=best + 1))
    monkeypatch.setattr(one_by_one, "accuracy", lambda predict, images, batch_parts: next(answers))
    answers = iter(qualities)
    observer = RecordingObserver()
    (result,) = train(full, observer=observer)
    assert result.best_interval == best
    assert result.interval_qualities == qualities
    assert observer.heard == [(0, interval, quality) for interval, quality in enumerate(qualities)]
    answers = iter([*([0.0] * best), 1.0])
    (expected,) = train(short)
    assert np.array_equal(result.trained[HEAD]["weight"], expected.trained[HEAD]["weight"])


def test_counts_images_and_operations() -> None:
    child = ROOT.child()
    (result,) = train(generation(child, intervals=2, batches=5, batch_size=16))
    specs = [layer.spec for layer in child.layers]
    assert result.num_trained_images == 160
    expected = 160 * training_flops([(layer.spec, layer.trainable) for layer in child.layers], IMAGE_SIZE)
    assert result.flops == expected + 2 * len(DATA.validation) * forward_flops(specs, IMAGE_SIZE)
    assert result.train_seconds > 0
    assert result.evaluate_seconds > 0


def test_quality_is_measured_on_the_first_validation_images() -> None:
    plan = generation(ROOT.child(hyperparameters=PLAIN.replace(learning_rate=1e-9)), intervals=1, batches=1, batch_size=5)
    plan = dataclasses.replace(plan, length=dataclasses.replace(plan.length, validation_batches=2))
    (result,) = train(plan)
    path, stored = ROOT.path(plan.children[0], result)
    logits = reference_logits(path, stored.__getitem__, DATA.validation.resized(IMAGE_SIZE, 10))
    assert result.quality == (logits.argmax(1) == DATA.validation.labels[:10]).mean()


def test_images_of_another_size_are_resized_for_the_path() -> None:
    plan = generation(ROOT.child(hyperparameters=PLAIN.replace(crop_area_min=0.2)), intervals=1)
    bigger = easy_data()
    images = dataclasses.replace(
        bigger.train, images=[np.kron(image, np.ones((2, 3, 1), np.uint8)) for image in bigger.train.images]
    )
    trainer = OneByOneTrainer(dataclasses.replace(bigger, train=images), ROOT.stored.__getitem__, SETTINGS)
    (pack,) = trainer.train(plan)
    assert pack.children[0].quality > 0


def test_a_task_without_test_images_has_no_test_accuracy() -> None:
    child = ROOT.child()
    (result,) = train(generation(child, intervals=1, batches=1))
    path, stored = ROOT.path(child, result)
    examples = OneByOneTrainer(easy_data(num_test=0), stored.__getitem__, SETTINGS).examine(path)
    assert examples.test_accuracy is None
    assert examples.images.shape == (8, IMAGE_SIZE, IMAGE_SIZE, 3)


def test_test_splits_are_measured_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    child = ROOT.child()
    (result,) = train(generation(child, intervals=1))
    path, stored = ROOT.path(child, result)
    whole = OneByOneTrainer(DATA, stored.__getitem__, SETTINGS).examine(path)
    monkeypatch.setattr(one_by_one, "TEST_CHUNK", 7)
    assert OneByOneTrainer(DATA, stored.__getitem__, SETTINGS).examine(path).test_accuracy == whole.test_accuracy


def test_plans_that_cannot_be_are_refused() -> None:
    plan = generation(ROOT.child())
    with pytest.raises(ValueError, match="other"):
        train(dataclasses.replace(plan, task="other"))
    child = ROOT.child()
    frozen = dataclasses.replace(child, layers=tuple(dataclasses.replace(layer, origin=Origin.SHARED) for layer in child.layers))
    with pytest.raises(ValueError, match="no trainable layer"):
        train(generation(frozen))
