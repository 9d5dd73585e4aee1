"""Every decision of a search, derived a second time from its journal and the rules, and compared."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Iterator

import numpy as np
import pytest

from evolve.closing import ActiveTask
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.documents import TaskRecord
from evolve.errors import DamagedError, SettingsError, SystemFolderError, TrainerError
from evolve.generation import ChildResult, PackResult
from evolve.hyperparameters import DATA_NAMES, Group, Hyperparameters, tunables
from evolve.journal import Journal, Record, read_journal
from evolve.layer import HEAD, NORM, POS_EMBED, block_position
from evolve.mutation import select_tunables, step_hyperparameters
from evolve.sampling import derive_generator
from evolve.search import SearchPlan, run_rounds
from evolve.snapshot import Snapshot
from evolve.store import System
from evolve.verification import verify
from tests.support.fake_trainer import FakeTrainer, QuietObserver, derive_path, tiny_root

PLAN = SearchPlan(
    5,
    DefaultSettings(learning_rate=0.05, crop_area_min=0.2),
    SearchSettings(
        rounds=2, children_per_task=24, generation_size=8, mutation_rate=0.3, auto_tune=True, scale_factor=0.5, max_seeds=3
    ),
    TrainingSettings(batch_size=8, intervals=3),
)
NAMES = ("a", "b", "c")


def _run(system: System, names=NAMES, plan=PLAN, trainer=None, **task) -> FakeTrainer:
    trainer = trainer or FakeTrainer()
    tasks = [(ActiveTask(name, ("x", "y", "z"), 50, "f", **task), lambda: trainer) for name in names]
    run_rounds(system, tasks, plan, QuietObserver())
    return trainer


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[System, FakeTrainer]:
    """Three tasks, two rounds; the root's native grid is not that of the experiment's images."""
    system = System.create(tmp_path_factory.mktemp("searched") / "system", tiny_root(grid=3), 48)
    return system, _run(system)


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
            _run(system, [name], plan, FakeTrainer(quality=lambda plan, child: (plan.index + 1) / 4 + child.index / 1000))
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


def _plan(**search) -> SearchPlan:
    """PLAN without scale control, so that quality alone decides."""
    return SearchPlan(PLAN.seed, PLAN.defaults, PLAN.search.model_copy(update={"scale_factor": 1.0, **search}), PLAN.training)


def _only_from(parent_id: str, otherwise: float = 0.1):
    return FakeTrainer(quality=lambda _, child: 0.9 if child.parent_id == parent_id else otherwise)


def _chain(system: System) -> None:
    """root -> a -> b -> c."""
    one_round = _plan(rounds=1)
    _run(system, ["a"], one_round, _only_from(system.root.id))
    _run(system, ["b"], one_round, _only_from(system.tasks()["a"].path_id))
    _run(system, ["c"], one_round, _only_from(system.tasks()["b"].path_id))
    records = system.tasks()
    assert [records[name].parent_id for name in NAMES] == [system.root.id, records["a"].path_id, records["b"].path_id]


def test_children_of_a_replaced_path_go_to_its_own_parent(tmp_path):
    system = System.create(tmp_path / "system", tiny_root(), 32)
    _chain(system)
    a = system.tasks()["a"].path_id
    _run(system, ["b"], _plan(), FakeTrainer(quality=lambda _, child: 1.0 if child.parent_id == system.root.id else 0.0))
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
        trainer = _run(system, ["d"], _plan(rounds=1, children_per_task=64))
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
    _run(system, ["a"], plan)
    _, _, results = _parts(read_journal(system.journal_file("a", 0)))
    ids = [row["path_id"] for row in results.values()]
    assert len(set(ids)) < len(ids)


class Killed(Exception):
    pass


def _without_seconds(system: System) -> list[Record]:
    rows = []
    for file in sorted((system.folder / "journal").glob("*.jsonl")):
        for record in read_journal(file):
            row = json.loads(json.dumps(record))
            for part in (row, *row.get("children", [])):
                for name in ("seconds", "crc32", "system"):
                    part.pop(name, None)
            rows.append(row)
    return rows


def test_killed_at_any_write_a_search_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)
    plan = SearchPlan(
        3,
        DefaultSettings(),
        SearchSettings(rounds=2, children_per_task=4, generation_size=2, mutation_rate=0.3, auto_tune=True, max_seeds=3),
        TrainingSettings(),
    )

    def newest_seed_wins(generation, child):
        return 0.5 * generation.round + (0.4 if generation.index == child.index == 0 else 0.1)

    whole = System.create(tmp_path / "whole", tiny_root(), 32)
    _run(whole, plan=plan, trainer=FakeTrainer(quality=newest_seed_wins))
    expected = (_without_seconds(whole), whole.tasks())
    # First root -> a -> b -> c, then a new a below c: b, whose parent was replaced, is handed on.
    first_a = read_journal(whole.journal_file("a", 0))[-1]["path_id"]
    assert whole.path(read_journal(whole.journal_file("b", 0))[-1]["path_id"]).parent_id == first_a
    assert first_a != whole.tasks()["a"].path_id
    write, append = System._write, Journal.append
    killed_after = 0
    for deadly in itertools.count():
        left = [deadly]

        def count(left=left) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1

        def counted_write(self, target, data, count=count):
            count()
            write(self, target, data)

        def counted_append(self, kind, fields, count=count):
            count()
            return append(self, kind, fields)

        system = System.create(tmp_path / f"killed-{deadly}", tiny_root(), 32)
        with monkeypatch.context() as patch:
            patch.setattr(System, "_write", counted_write)
            patch.setattr(Journal, "append", counted_append)
            try:
                _run(system, plan=plan, trainer=FakeTrainer(quality=newest_seed_wins))
            except Killed:
                killed_after += 1
            else:
                break
        _run(System.open(system.folder), plan=plan, trainer=FakeTrainer(quality=newest_seed_wins))
        assert (_without_seconds(system), system.tasks()) == expected, f"killed before write {deadly}"
        assert verify(system) == []
    assert killed_after > 50


def test_a_disk_that_is_full_at_any_write_leaves_all_whole_and_the_search_goes_on(tmp_path, monkeypatch):
    plan = SearchPlan(
        3,
        DefaultSettings(),
        SearchSettings(rounds=1, children_per_task=4, generation_size=2, mutation_rate=0.3),
        TrainingSettings(),
    )
    monkeypatch.setattr("os.fsync", lambda _: None)
    whole = System.create(tmp_path / "whole", tiny_root(), 32)
    _run(whole, ["a", "b"], plan)
    expected = (_without_seconds(whole), whole.tasks())
    write = os.write
    num_failures = 0
    # Every fifth: writes come in twos, so that each kind of them is met.
    for room in itertools.count(step=5):
        folder = tmp_path / f"full-{room}"
        left = [room]

        def use_room(left=left) -> None:
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= 1

        def write_some(descriptor, data, use_room=use_room):
            try:
                use_room()
            except OSError:
                write(descriptor, data[: len(data) // 2])
                raise
            return write(descriptor, data)

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda _, use_room=use_room: use_room())
            patch.setattr("os.write", write_some)
            try:
                system = System.open(folder) if System.exists(folder) else System.create(folder, tiny_root(), 32)
                _run(system, ["a", "b"], plan)
                break
            except SystemFolderError as error:
                said = str(error)
        num_failures += 1
        assert str(folder) in said
        assert "(No space left on device); expected a writable folder with free space" in said
        assert not list(folder.rglob("*.part"))
        assert all(file.read_bytes()[-1:] in (b"", b"\n") for file in folder.rglob("*.jsonl")), "a torn line was left"
        system = System.open(folder) if System.exists(folder) else System.create(folder, tiny_root(), 32)
        assert verify(system) == []
        _run(system, ["a", "b"], plan)
        assert (_without_seconds(system), system.tasks()) == expected, f"full after {room} writes"
    assert num_failures > 20


def test_what_killed_processes_left_half_written_goes_when_a_search_opens(tmp_path):
    system = System.create(tmp_path / "system", tiny_root(), 32)
    _run(system, ["a"], _plan(rounds=1))
    for folder in (system.folder, *(entry for entry in system.folder.rglob("*") if entry.is_dir())):
        if folder.name not in ("locks", "journal", "layers"):
            (folder / ".file.0123.part").write_bytes(b"half")
    assert len(list(system.folder.rglob("*.part"))) > 5
    _run(system, ["b"], _plan(rounds=1))
    assert not list(system.folder.rglob(".*.part"))


def test_a_search_begun_on_another_device_is_not_gone_on_with(tmp_path):
    system = System.create(tmp_path / "system", tiny_root(), 32)

    class Mortal(FakeTrainer):
        def train(self, plan):
            yield next(super().train(plan))
            raise Killed

    with pytest.raises(Killed):
        _run(system, ["a"], trainer=Mortal())
    other = FakeTrainer()
    other.versions = {"device": "cuda"}
    with pytest.raises(SettingsError, match="trainer.device = 'none' then and 'cuda' now"):
        _run(system, ["a"], trainer=other)


def test_the_snapshot_is_taken_while_nobody_publishes(tmp_path, monkeypatch):
    """A publication between two reads would show a parent that is no longer current; reading paths, which stay, holds up nobody."""
    system = System.create(tmp_path / "system", tiny_root(), 32)
    _run(system, ["a"])

    def held(name: str) -> bool:
        import fcntl

        with (system.folder / "locks" / f"{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    found = {}

    def watched(name: str, inner):
        def look(*arguments):
            found.setdefault(name, (held("tasks"), held("files")))
            return inner(*arguments)

        return look

    monkeypatch.setattr(System, "tasks", watched("records", System.tasks))
    monkeypatch.setattr(Snapshot, "of", staticmethod(watched("paths", Snapshot.of)))
    _run(system, ["b"])
    assert found == {"records": (True, True), "paths": (False, True)}


class ForgetfulTrainer(FakeTrainer):
    """Leaves out what it is told to."""

    def __init__(self, *, child: bool) -> None:
        super().__init__()
        self.forgets_child = child

    def train(self, plan):
        packs = list(super().train(plan))
        if self.forgets_child:
            packs = packs[:-1]
        else:
            first = packs[0].children[0]
            packs[0] = PackResult((ChildResult(**{**first.__dict__, "trained": {}}),))
        yield from packs


@pytest.mark.parametrize(("child", "message"), [(True, "7 results"), (False, "no weights of head of child 0")])
def test_a_trainer_that_breaks_its_promises_is_told_so(tmp_path, child, message):
    system = System.create(tmp_path / "system", tiny_root(), 32)
    with pytest.raises(TrainerError, match=message):
        _run(system, ["a"], trainer=ForgetfulTrainer(child=child))


def test_a_parent_that_is_not_current_is_damage(tmp_path):
    system = System.create(tmp_path / "system", tiny_root(), 32)
    _run(system, ["a"])
    file = system.folder / "tasks" / "a.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "parent_id": "0" * 32}))
    assert any("parent of task 'a'" in finding for finding in verify(system))
    with pytest.raises(DamagedError, match="current for no task"):
        _run(system, ["b"])
