"""Every decision of a search, derived a second time from its journal and the rules, and compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from evolve.closing import ActiveTask
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.documents import TaskRecord
from evolve.errors import DamagedError
from evolve.hyperparameters import DATA_NAMES, Group, Hyperparameters, tunables
from evolve.journal import Record, read_journal
from evolve.layer import HEAD, NORM, POS_EMBED, block_position
from evolve.mutation import select_tunables, step_hyperparameters
from evolve.sampling import derive_generator
from evolve.search import SearchPlan, run_rounds
from evolve.snapshot import Snapshot
from evolve.store import System
from evolve.verification import verify
from tests.support.fake_trainer import FakeTrainer, QuietObserver, derive_path, tiny_root
from tests.support.full_search import NAMES, PLAN, run, unscaled_plan


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[System, FakeTrainer]:
    """Three tasks, two rounds; the root's native grid is not that of the experiment's images."""
    system = System.create(tmp_path_factory.mktemp("searched") / "system", tiny_root(grid=3), 48)
    return system, run(system)


def _journals(system: System) -> Iterator[tuple[str, int, list[Record]]]:
    """Task, round and records of every search, in the order in which they ran."""
    for round_number, name in itertools.product(range(PLAN.search.rounds), NAMES):
        yield name, round_number, read_journal(system.journal_file(name, round_number))


def _parts(records: list[Record]) -> tuple[Record, list[Record], dict[tuple[int, int], Record]]:
    """The first record, the generations, and the results by generation and child."""
    results = {(r["generation"], c["index"]): c for r in records if r["type"] == "pack" for c in r["children"]}
    return records[0], [record for record in records if record["type"] == "generation"], results


def test_scores_follow_from_the_snapshot(searched):
    system, _ = searched
    width, grid = 4, 2
    reference = sum(layer.num_parameters for position, layer in system.root.layers if position != POS_EMBED)
    reference += width * (1 + grid * grid) + 2 * width + 2
    costs_differ = set()
    for name, _, records in _journals(system):
        opened, _, results = _parts(records)
        snapshot = Snapshot.from_list(system, opened["snapshot"])
        for row in results.values():
            accounted = 0.0
            for layer_id in {layer for _, layer in row["layers"]}:
                users = 1 + sum(layer_id in path.layer_ids for task, path in snapshot.current.items() if task != name)
                accounted += _size(system, row, layer_id) / users
            assert row["accounted_parameters"] == pytest.approx(accounted)
            assert row["score"] == pytest.approx(row["quality"] * 0.5 ** (accounted / reference))
            assert row["quality"] == max(row["interval_qualities"])
            costs_differ.add(round(accounted))
    assert len(costs_differ) > 10


def _size(system: System, row: Record, layer_id: str) -> int:
    try:
        return system.layer(layer_id).num_parameters
    except DamagedError:
        # Layers of a child that did not survive are not stored: they have the shape of what stands there.
        position = next(position for position, layer in row["layers"] if layer == layer_id)
        sizes = {"head": 15, "norm": 5, "patch_embed": 5, "class_token": 5}
        if position.startswith("adapter"):
            return 4 * _hyperparameters_of(system, row)["adapter_width"]
        if position == "pos_embed":
            return 4 * (1 + (_hyperparameters_of(system, row)["image_size"] // 16) ** 2)
        return sizes.get(position, 5)


def _hyperparameters_of(system: System, row: Record) -> dict:
    for _, _, records in _journals(system):
        _, generations, results = _parts(records)
        for (generation, index), result in results.items():
            if result is row or result == row:
                return generations[generation]["children"][index]["hyperparameters"]
    raise LookupError(row["path_id"])


def test_parents_and_data_hyperparameters_follow_from_the_rules(searched):
    """Selection again, written from search.md: counts of children over rounds, siblings and rejected ones included."""
    system, _ = searched
    drawn: dict[tuple[str, str], int] = {}
    fell_back = data_moved = 0
    data_tunables = select_tunables(tunables(max_blocks=3, patch_size=16), [Group.DATA], auto_tune=True, mutate_blocks=True)
    for name, round_number, records in _journals(system):
        opened, generations, results = _parts(records)
        snapshot = Snapshot.from_list(system, opened["snapshot"])
        seeds = [path.id for path in snapshot.seeds(name, PLAN.search.seed_limit)]
        members: dict[str, float] = {}
        if name in snapshot.current:
            own = snapshot.current[name]
            members[own.id] = _score_of_own(system, own.id, records, snapshot, name)
        unused = list(seeds)
        for generation in generations:
            names = (PLAN.seed, name, round_number, generation["index"])
            data = PLAN.defaults.hyperparameters(3)
            if members:
                best = system.path(max(members, key=lambda member: members[member])).hyperparameters
                data = data.replace(**{key: getattr(best, key) for key in DATA_NAMES})
            if not unused:
                stepped = step_hyperparameters(data, data_tunables, 0.3, derive_generator(*names, "data hyperparameters"))
                data_moved += stepped.hyperparameters != data
                data = stepped.hyperparameters
            assert generation["data"] == {key: getattr(data, key) for key in DATA_NAMES}
            fell_back += _check_parents(system, generation, names, unused, members, seeds, drawn)
            _check_survival(generation, results, members)
            for child in generation["children"]:
                row = results[generation["index"], child["index"]]
                if row["survived"]:
                    members.setdefault(row["path_id"], row["score"])
        closed = records[-1]
        assert closed["path_id"] == max(members, key=lambda member: members[member])
        assert closed["num_children"] == drawn.get((name, closed["path_id"]), 0)
    assert fell_back > 0
    assert data_moved > 0


def _check_parents(system, generation, names, unused, members, seeds, drawn) -> int:
    """Draws the parents of a generation again and counts them; returns how often the walk over the population chose nobody."""
    fell_back = 0
    for child in generation["children"]:
        if unused:
            expected = unused.pop(0)
            assert child["mutations"] == []
        else:
            expected, fallen = _select(members, seeds, drawn, names[1], derive_generator(*names, child["index"]))
            fell_back += fallen
        assert child["parent_id"] == expected
        drawn[names[1], expected] = drawn.get((names[1], expected), 0) + 1
        if not child["mutations"]:
            is_root = expected == system.root.id
            inherited = PLAN.defaults.hyperparameters(3) if is_root else system.path(expected).hyperparameters
            assert Hyperparameters.from_dict(child["hyperparameters"]) == inherited.replace(**generation["data"])
    return fell_back


def _check_survival(generation, results, members) -> None:
    for child in generation["children"]:
        row = results[generation["index"], child["index"]]
        parent_score = members.get(child["parent_id"])
        assert row["survived"] == (parent_score is None or row["score"] > parent_score)


def _score_of_own(system: System, path_id: str, records: list[Record], snapshot: Snapshot, name: str) -> float:
    """The score of the path that opened the population: that its children were compared with."""
    for record in records:
        for row in record.get("children", []):
            if row.get("parent_id") == path_id and row.get("parent_score") is not None:
                return row["parent_score"]
    from evolve.scoring import accounted_parameters, reference_parameters, score, sharing_counts

    accounted = accounted_parameters(snapshot.current[name], sharing_counts(snapshot.others(name)))
    reference = reference_parameters(system.root, system.position_embedding(2))
    return score(snapshot.current[name].quality or 0, accounted, reference, 0.5)


def _select(members, seeds, drawn, name, generator) -> tuple[str, bool]:
    for member in sorted(members, key=lambda member: -members[member]):
        if generator.random() < 0.5 ** drawn.get((name, member), 0):
            return member, False
    return generator.choice([*seeds, *members]), True


def test_what_others_use_is_never_trained_on_in_place(searched):
    system, trainer = searched
    borrowed = 0
    for plan in trainer.plans:
        opened, *_ = _parts(read_journal(system.journal_file(plan.task, plan.round)))
        snapshot = Snapshot.from_list(system, opened["snapshot"])
        others = {layer for path in snapshot.others(plan.task) for layer in path.layer_ids}
        for child in plan.children:
            for layer in child.layers:
                if layer.source is not None and layer.source.id in others | system.root.layer_ids:
                    assert layer.origin.value in ("shared", "cloned"), f"{layer.position} of another task would be changed"
                    borrowed += layer.source.id not in system.root.layer_ids
    assert borrowed > 10


def test_dropped_paths_supply_no_layers(searched):
    """Whatever a child starts from belongs to the snapshot, to the root, or to this very search."""
    system, trainer = searched
    roots = system.root.layer_ids | {system.position_embedding(grid).id for grid in range(1, 25)}
    restored = 0
    for plan in trainer.plans:
        opened, _, results = _parts(read_journal(system.journal_file(plan.task, plan.round)))
        snapshot = Snapshot.from_list(system, opened["snapshot"])
        allowed = set(roots)
        allowed.update(*(path.layer_ids for path in snapshot.current.values()))
        for (generation, _), row in results.items():
            if generation < plan.index and row["survived"]:
                allowed.update(layer for _, layer in row["layers"])
        for child in plan.children:
            used = {layer.source.id for layer in child.layers if layer.source is not None}
            assert used <= allowed
            restored += child.parent_id in allowed
    assert trainer.plans


def test_a_round_later_a_restored_block_is_the_roots_and_not_a_dropped_paths(tmp_path):
    system = System.create(tmp_path / "system", tiny_root(), 32)

    def short_wins(plan, child):
        trains_top = any(layer.position == block_position(2) and layer.trainable for layer in child.layers)
        if plan.round == 0:
            # First a path with a top block of its own, then its child without that block.
            from_such = child.parent_id in tops
            tops_next[child.index] = trains_top
            return 0.9 if from_such and child.hyperparameters.num_blocks == 2 else 0.5 + 0.001 * plan.index if trains_top else 0.1
        return 0.2

    tops: set[str] = set()
    tops_next: dict[int, bool] = {}

    class Watcher(QuietObserver):
        def child_finished(self, plan, record):
            if tops_next.get(plan.index):
                tops.add(record["path_id"])

    plan = SearchPlan(
        1,
        DefaultSettings(),
        SearchSettings(rounds=1, children_per_task=160, generation_size=8, mutation_rate=0.4),
        TrainingSettings(),
    )
    trainer = FakeTrainer(quality=short_wins)
    task = ActiveTask("a", ("x", "y"), 50, "f")
    run_rounds(system, [(task, lambda: trainer)], plan, Watcher())
    winner = system.path(system.tasks()["a"].path_id)
    assert winner.num_blocks == 2, "the scene was not set"
    assert system.path(winner.parent_id).layer(block_position(2)).id not in system.root.layer_ids, "the scene was not set"
    later = FakeTrainer(quality=short_wins)
    run_rounds(
        system,
        [(task, lambda: later)],
        SearchPlan(1, plan.defaults, plan.search.model_copy(update={"rounds": 2}), plan.training),
        Watcher(),
    )
    restored = [
        layer
        for generation in later.plans
        for child in generation.children
        for layer in child.layers
        if child.parent_id == winner.id and layer.position == block_position(2)
    ]
    assert restored, "the scene was not set"
    assert {layer.source.id for layer in restored} == {system.root.layer(block_position(2)).id}


def test_every_generation_has_batches_of_its_own(searched):
    _, trainer = searched
    seeds = [plan.data_seed for plan in trainer.plans]
    assert len(set(seeds)) == len(seeds) == 18


def test_newest_first_counts_the_latest_round(searched):
    system, _ = searched
    for (name, _, records), expected in zip(_journals(system), ["", "a", "ba", "cb", "ac", "ba"], strict=True):
        snapshot = Snapshot.from_list(system, _parts(records)[0]["snapshot"])
        assert [path.task for path in snapshot.seeds(name, 3)] == [*expected, None]


def test_a_parent_is_the_nearest_ancestor_that_is_still_current(tmp_path):
    """Later generations are better, so winners have dropped ancestors between them and the seed they come from."""
    deep = 0
    for seed in range(6):
        system = System.create(tmp_path / str(seed), tiny_root(), 32)
        plan = SearchPlan(seed, PLAN.defaults, PLAN.search.model_copy(update={"rounds": 1, "mutation_rate": 0.1}), PLAN.training)
        for name in NAMES:
            run(system, [name], plan, FakeTrainer(quality=lambda plan, child: (plan.index + 1) / 4 + child.index / 1000))
            record = system.tasks()[name]
            current = {other.path_id for other in system.tasks().values() if other.name != name} | {system.root.id}
            ancestor = system.path(record.path_id).parent_id
            steps = 0
            while ancestor not in current:
                ancestor = system.path(ancestor).parent_id
                steps += 1
            assert record.parent_id == ancestor
            deep += steps > 0 and ancestor != system.root.id
    assert deep > 0, "no winner had a dropped parent and a seed other than the root above it"


def _only_from(parent_id: str, otherwise: float = 0.1):
    return FakeTrainer(quality=lambda _, child: 0.9 if child.parent_id == parent_id else otherwise)


def _chain(system: System) -> None:
    """root -> a -> b -> c."""
    one_round = unscaled_plan(rounds=1)
    run(system, ["a"], one_round, _only_from(system.root.id))
    run(system, ["b"], one_round, _only_from(system.tasks()["a"].path_id))
    run(system, ["c"], one_round, _only_from(system.tasks()["b"].path_id))
    records = system.tasks()
    assert [records[name].parent_id for name in NAMES] == [system.root.id, records["a"].path_id, records["b"].path_id]


def test_children_of_a_replaced_path_go_to_its_own_parent(tmp_path):
    system = System.create(tmp_path / "system", tiny_root(), 32)
    _chain(system)
    a = system.tasks()["a"].path_id
    run(system, ["b"], unscaled_plan(), FakeTrainer(quality=lambda _, child: 1.0 if child.parent_id == system.root.id else 0.0))
    assert system.tasks()["b"].parent_id == system.root.id
    assert system.tasks()["c"].parent_id == a
    assert verify(system) == []


def test_a_task_that_became_private_supplies_no_layers_to_those_that_descend_from_it(tmp_path):
    """A restored block is found at the nearest ancestor, but no longer at one that has become private."""
    for private in (False, True):
        system = System.create(tmp_path / str(private), tiny_root(), 32)
        top = {block_position(2): 1.0, NORM: 1.0, HEAD: 1.0}
        a = derive_path(system, system.root, "a", top)
        b = derive_path(system, a, "b", {NORM: 2.0, HEAD: 2.0}, num_blocks=2)
        for order, path in enumerate((a, b)):
            system.put_path(path)
            parent_id = path.parent_id or ""
            examples = system.put_examples(np.zeros((1, 32, 32, 3), dtype=np.uint8))
            is_private = private and path is a
            labels = ("x", "y", "z")
            system.put_task(
                TaskRecord(path.task or "", path.id, parent_id, 0, 1, order, is_private, labels, 0.5, None, examples, "f", {})
            )
        trainer = run(system, ["d"], unscaled_plan(rounds=1, children_per_task=64))
        taken = {layer.source for plan in trainer.plans for child in plan.children for layer in child.layers if layer.source}
        assert (a.layer(block_position(2)) in taken) == (not private)


def test_siblings_that_train_alike_are_one_path(tmp_path):
    """Decision 0003: a path is what it is, however often it was drawn."""
    system = System.create(tmp_path / "system", tiny_root(), 32)
    plan = SearchPlan(
        0,
        DefaultSettings(),
        SearchSettings(rounds=1, children_per_task=24, generation_size=8, mutation_rate=0.0),
        TrainingSettings(),
    )
    run(system, ["a"], plan)
    _, _, results = _parts(read_journal(system.journal_file("a", 0)))
    ids = [row["path_id"] for row in results.values()]
    assert len(set(ids)) < len(ids)
