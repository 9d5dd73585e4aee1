"""How a child is sampled: inheritance, each mutation on its own, and the look-up of layers."""

import random

import pytest

from evolve.generation import ChildPlan, Origin
from evolve.hyperparameters import Group, Hyperparameters, tunables
from evolve.layer import (
    HEAD,
    NORM,
    PATCH_EMBED,
    POS_EMBED,
    LayerKind,
    adapter_position,
    block_position,
)
from evolve.mutation import select_tunables, step_hyperparameters
from evolve.path import Path, PlacedLayer, ordered_positions
from evolve.sampling import Surroundings, derive_generator, derive_seed, sample_child
from evolve.specs import adapter_spec, head_spec
from evolve.store import System
from tests.support.fake_trainer import WIDTH, derive_path, tiny_root

DEFAULTS = Hyperparameters(num_blocks=3)
EVERY = tunables(max_blocks=3, patch_size=16)


@pytest.fixture
def system(tmp_path):
    return System.create(tmp_path / "system", tiny_root(), 32)


def _surroundings(system: System, *, frozen=(), rate=0.0, names=None, classes=5) -> Surroundings:
    return Surroundings(
        task="active",
        num_classes=classes,
        root=system.root,
        frozen=frozenset(frozen) | system.root.layer_ids,
        position_embedding=system.position_embedding,
        tunables=[t for t in EVERY if t.group is not Group.DATA and (names is None or t.name in names)],
        mutation_rate=rate,
    )


def _sample(lineage, surroundings, *, data=DEFAULTS, mutated=True, generator=None) -> ChildPlan:
    return sample_child(
        0, lineage, lineage[0].hyperparameters, data, surroundings, generator or random.Random(0), mutated=mutated
    )


def _origins(child: ChildPlan) -> dict[str, str]:
    return {str(plan.position): plan.origin.value for plan in child.layers}


def test_the_first_child_of_the_root_trains_nothing_but_a_new_head(system):
    child = _sample([system.root], _surroundings(system, rate=1.0), mutated=False)
    assert _origins(child) == {
        **dict.fromkeys(["patch_embed", "class_token", "pos_embed", "block.0", "block.1", "block.2", "norm"], "shared"),
        "head": "new",
    }
    assert child.mutations == ()
    assert child.layers[-1].spec == head_spec(WIDTH, 5)
    assert all(plan.source == system.root.layer(plan.position) for plan in child.layers[:-1])


def test_an_unmutated_child_keeps_the_seeds_structure_and_optimiser_but_not_its_data_hyperparameters(system):
    other = derive_path(
        system,
        system.root,
        "other",
        {adapter_position(1): 1.0, NORM: 1.0, HEAD: 1.0},
        num_blocks=2,
        learning_rate=0.05,
        adapter_width=8,
        image_size=64,
        flip=False,
    )
    child = _sample([other, system.root], _surroundings(system, frozen=other.layer_ids), mutated=False)
    assert child.hyperparameters == DEFAULTS.replace(num_blocks=2, learning_rate=0.05, adapter_width=8)
    assert [str(plan.position) for plan in child.layers] == [
        "patch_embed", "class_token", "pos_embed", "block.0", "adapter.1", "block.1", "norm", "head",
    ]  # fmt: skip
    assert _origins(child)["adapter.1"] == "shared"
    assert _origins(child)["norm"] == "shared"
    assert _origins(child)["head"] == "new"


def test_the_final_norm_is_always_cloned_in_a_mutated_child_and_nothing_else_without_luck(system):
    child = _sample([system.root], _surroundings(system, rate=0.0))
    assert {position for position, origin in _origins(child).items() if origin != "shared"} == {"norm", "head"}
    assert child.mutations == ("norm: clone",)


def test_with_certain_mutations_every_frozen_layer_is_cloned_and_every_block_gets_an_adapter(system):
    child = _sample([system.root], _surroundings(system, rate=1.0, names=()))
    origins = _origins(child)
    assert {name for name, origin in origins.items() if origin == "cloned"} == {
        "patch_embed", "class_token", "pos_embed", "block.0", "block.1", "block.2", "norm",
    }  # fmt: skip
    assert [name for name, origin in origins.items() if origin == "new"] == ["adapter.0", "adapter.1", "adapter.2", "head"]
    assert "adapter.1: insert" in child.mutations


def test_each_mutation_happens_on_its_own_at_the_given_rate(system):
    counts: dict[str, int] = {}
    for number in range(2000):
        child = _sample([system.root], _surroundings(system, rate=0.1), generator=random.Random(number))
        for mutation in child.mutations:
            name = mutation.split(":")[0]
            counts[name] = counts.get(name, 0) + 1
    expected = {"patch_embed", "class_token", "pos_embed", "block.0", "block.1", "adapter.0", "adapter.1"}
    assert expected <= set(counts)
    assert all(150 < counts[name] < 250 for name in expected)
    # A move against the end of the list shows nowhere: three blocks of three can only go down.
    assert 70 < counts["num_blocks"] < 130
    assert 150 < counts["learning_rate"] < 250


def test_own_layers_are_trained_on_and_frozen_ones_shared(system):
    own = derive_path(system, system.root, "active", {block_position(1): 1.0, NORM: 1.0, HEAD: 1.0})
    child = _sample([own, system.root], _surroundings(system))
    assert _origins(child)["block.1"] == "continued"
    assert _origins(child)["norm"] == "continued"
    assert _origins(child)["head"] == "continued"
    assert _origins(child)["block.0"] == "shared"
    by_position = {plan.position: plan for plan in child.layers}
    assert by_position[block_position(1)].source == own.layer(block_position(1))


def test_own_layers_that_another_task_uses_are_frozen(system):
    own = derive_path(system, system.root, "active", {block_position(1): 1.0, NORM: 1.0, HEAD: 1.0})
    child = _sample([own, system.root], _surroundings(system, frozen={own.layer(block_position(1)).id}))
    assert _origins(child)["block.1"] == "shared"


def test_the_head_comes_from_the_nearest_ancestor_of_the_task_even_through_another_tasks_path(system):
    own = derive_path(system, system.root, "active", {NORM: 1.0, HEAD: 1.0})
    other = derive_path(system, own, "other", {NORM: 2.0, HEAD: 2.0})
    surroundings = _surroundings(system, frozen=other.layer_ids)
    for mutated in (False, True):
        child = _sample([other, own, system.root], surroundings, mutated=mutated)
        assert child.layers[-1].source == own.layer(HEAD)
        assert child.layers[-1].origin is Origin.CONTINUED


def test_a_head_of_another_number_of_classes_is_new(system):
    own = derive_path(system, system.root, "active", {NORM: 1.0, HEAD: 1.0})
    child = _sample([own, system.root], _surroundings(system, classes=6))
    assert child.layers[-1].origin is Origin.NEW
    assert child.layers[-1].spec == head_spec(WIDTH, 6)


def test_a_head_that_equals_another_tasks_is_trained_all_the_same(system):
    own = derive_path(system, system.root, "active", {NORM: 1.0, HEAD: 1.0})
    child = _sample([own, system.root], _surroundings(system, frozen={own.layer(HEAD).id}), mutated=False)
    assert child.layers[-1].origin is Origin.CLONED


def test_removing_blocks_takes_the_top_ones_with_their_adapters_and_restoring_finds_them_again(system):
    parent = derive_path(system, system.root, "active", {adapter_position(2): 1.0, block_position(2): 1.0, NORM: 1.0, HEAD: 1.0})
    removed = _search_for(system, [parent, system.root], lambda child: child.hyperparameters.num_blocks == 2)
    assert [str(plan.position) for plan in removed.layers if plan.position.kind in (LayerKind.BLOCK, LayerKind.ADAPTER)] == [
        "block.0", "block.1",
    ]  # fmt: skip
    shorter = derive_path(system, parent, "active", {NORM: 2.0, HEAD: 2.0}, num_blocks=2)
    restored = _search_for(system, [shorter, parent, system.root], lambda child: child.hyperparameters.num_blocks == 3)
    by_position = {plan.position: plan for plan in restored.layers}
    assert by_position[block_position(2)].source == parent.layer(block_position(2))
    assert by_position[block_position(2)].origin is Origin.CONTINUED
    # Adapters of removed blocks went with them: a restored block has one only if it is inserted again.
    assert adapter_position(2) not in by_position


def _search_for(system, lineage, wanted) -> ChildPlan:
    surroundings = _surroundings(system, names={"num_blocks"})
    for number in range(200):
        child = sample_child(
            0, lineage, lineage[0].hyperparameters, DEFAULTS, _half_rate(surroundings), random.Random(number), mutated=True
        )
        if wanted(child) and not any("insert" in mutation for mutation in child.mutations):
            return child
    raise LookupError("no such child among 200")


def _half_rate(surroundings: Surroundings) -> Surroundings:
    import dataclasses

    return dataclasses.replace(surroundings, mutation_rate=0.4)


def test_an_inserted_adapter_takes_an_ancestors_trained_one_before_a_new_one(system):
    ancestor = derive_path(system, system.root, "other", {adapter_position(1): 3.0, NORM: 1.0, HEAD: 1.0})
    parent = derive_path(system, system.root, "second", {NORM: 2.0, HEAD: 2.0})
    surroundings = _surroundings(system, rate=1.0, names=(), frozen=ancestor.layer_ids | parent.layer_ids)
    child = _sample([parent, ancestor, system.root], surroundings)
    by_position = {plan.position: plan for plan in child.layers}
    assert by_position[adapter_position(1)].source == ancestor.layer(adapter_position(1))
    assert by_position[adapter_position(1)].origin is Origin.CLONED
    assert by_position[adapter_position(0)].origin is Origin.NEW


def test_another_adapter_width_replaces_all_adapters_of_the_path(system):
    parent = derive_path(
        system, system.root, "active", {adapter_position(0): 1.0, adapter_position(2): 1.0, NORM: 1.0, HEAD: 1.0}
    )
    surroundings = _surroundings(system, names={"adapter_width"}, rate=0.5)
    for number in range(100):
        child = _sample([parent, system.root], surroundings, generator=random.Random(number))
        width = child.hyperparameters.adapter_width
        adapters = [plan for plan in child.layers if plan.position.kind is LayerKind.ADAPTER]
        assert {plan.spec for plan in adapters} <= {adapter_spec(WIDTH, width)}
        kept = [plan for plan in adapters if plan.source is not None]
        assert len(kept) == (2 if width == 32 else 0)


def test_a_position_embedding_of_an_unknown_size_is_resampled_once_and_frozen_unless_cloned(system):
    data = DEFAULTS.replace(image_size=48)
    child = _sample([system.root], _surroundings(system), data=data)
    plan = next(plan for plan in child.layers if plan.position == POS_EMBED)
    assert plan.source == system.position_embedding(3)
    assert plan.origin is Origin.SHARED
    cloned = _sample([system.root], _surroundings(system, rate=1.0, names=()), data=data)
    assert next(plan for plan in cloned.layers if plan.position == POS_EMBED).origin is Origin.CLONED


def test_a_resampled_position_embedding_is_frozen_even_if_only_the_own_path_uses_it(system):
    resampled = system.position_embedding(3)
    own = Path.of(
        task="active",
        layers=[
            PlacedLayer(position, resampled if position == POS_EMBED else layer)
            for position, layer in derive_path(system, system.root, "active", {NORM: 1.0, HEAD: 1.0}).layers
        ],
        hyperparameters=DEFAULTS.replace(image_size=48),
        parent_id=system.root.id,
        quality=0.5,
    )
    child = _sample([own, system.root], _surroundings(system), data=own.hyperparameters)
    assert next(plan for plan in child.layers if plan.position == POS_EMBED).origin is Origin.SHARED


def test_data_hyperparameters_of_the_generation_replace_the_parents(system):
    own = derive_path(system, system.root, "active", {NORM: 1.0, HEAD: 1.0}, image_size=64, flip=False)
    child = _sample([own, system.root], _surroundings(system), data=DEFAULTS.replace(brightness=0.1))
    assert child.hyperparameters == DEFAULTS.replace(brightness=0.1)


@pytest.mark.parametrize(
    ("auto_tune", "mutate_blocks", "expected"),
    [
        (False, True, {"num_blocks"}),
        (False, False, set()),
        (True, False, {t.name for t in EVERY} - {"num_blocks"}),
        (True, True, {t.name for t in EVERY}),
    ],
)
def test_what_may_be_tuned(auto_tune, mutate_blocks, expected):
    chosen = select_tunables(EVERY, list(Group), auto_tune=auto_tune, mutate_blocks=mutate_blocks)
    assert {tunable.name for tunable in chosen} == expected


def test_what_is_fixed_may_not_be_tuned():
    chosen = select_tunables(EVERY, list(Group), auto_tune=True, mutate_blocks=True, fixed=("image_size", "num_blocks"))
    assert {tunable.name for tunable in chosen} == {t.name for t in EVERY} - {"image_size", "num_blocks"}


def test_steps_go_up_and_down_evenly():
    ups = downs = 0
    learning_rate = [t for t in EVERY if t.name == "learning_rate"]
    for number in range(2000):
        value = step_hyperparameters(DEFAULTS, learning_rate, 1.0, random.Random(number)).hyperparameters.learning_rate
        assert value in (0.005, 0.02)
        ups += value == 0.02
        downs += value == 0.005
    assert abs(ups - downs) < 200


def test_generators_depend_on_every_name_and_on_nothing_else():
    assert derive_seed(0, "task", 1, 2, 3) == derive_seed(0, "task", 1, 2, 3)
    assert (
        len({derive_seed(*names) for names in [(0, "t", 1, 2, 3), (1, "t", 1, 2, 3), (0, "u", 1, 2, 3), (0, "t", 1, 3, 2)]}) == 4
    )
    assert derive_generator("a").random() == derive_generator("a").random()
    assert PATCH_EMBED in ordered_positions(1, ())
