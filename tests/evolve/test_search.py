"""The rounds over the tasks, with a trainer that answers at once."""

import dataclasses
import itertools
import json

import pytest

from evolve.closing import ActiveTask
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.errors import DamagedError, DataError, SettingsError
from evolve.hyperparameters import DATA_NAMES
from evolve.journal import child_records, read_journal
from evolve.layer import HEAD, LayerKind
from evolve.search import SearchPlan, run_rounds
from evolve.store import System
from evolve.verification import verify
from tests.support.fake_trainer import FakeTrainer, QuietObserver, hash_quality, tiny_root
from tests.support.journals import forget_settings


@pytest.fixture
def system(tmp_path):
    return System.create(tmp_path / "system", tiny_root(), 32)


def _plan(seed=0, *, defaults=None, training=None, **search) -> SearchPlan:
    values = {"rounds": 1, "children_per_task": 16, "generation_size": 4, **search}
    return SearchPlan(
        seed,
        DefaultSettings(**(defaults or {})),
        SearchSettings(**values),
        TrainingSettings(**{"batch_size": 8, "batches_per_interval": 5, **(training or {})}),
    )


def _task(name, *, classes=3, private=False, images=100, fingerprint="f"):
    return ActiveTask(name, tuple("abcdefgh"[:classes]), images, f"{fingerprint}-{name}", private)


def _run(system, names, plan=None, trainer=None, observer=None, **task):
    trainer = trainer or FakeTrainer()
    observer = observer or QuietObserver()
    tasks = [(_task(name, **task) if isinstance(name, str) else name, lambda: trainer) for name in names]
    run_rounds(system, tasks, plan or _plan(), observer)
    return trainer, observer


def _data_of(hyperparameters) -> tuple:
    return tuple(getattr(hyperparameters, name) for name in DATA_NAMES)


def _data_of_generations(trainer) -> list[tuple]:
    return [_data_of(generation.children[0].hyperparameters) for generation in trainer.plans]


def _lineage(folder) -> list:
    """Everything the journals say but seconds."""
    rows = []
    for file in sorted((folder / "journal").glob("*.jsonl")):
        for record in read_journal(file):
            row = json.loads(json.dumps(record))
            for part in (row, *row.get("children", [])):
                part.pop("seconds", None)
                part.pop("crc32", None)
            row.pop("system", None)
            rows.append(row)
    return rows


# Opening


def test_seeds_are_the_newest_other_tasks_first_then_the_root(system):
    _, observer = _run(system, ["one", "two", "three"])
    records = system.tasks()
    assert [seeds for _, _, seeds, _, _ in observer.opened] == [
        [system.root.id],
        [records["one"].path_id, system.root.id],
        [records["two"].path_id, records["one"].path_id, system.root.id],
    ]


def test_there_are_at_most_so_many_seeds_and_the_root_is_one_of_them(system):
    _, observer = _run(system, ["one", "two", "three", "four"], _plan(max_seeds=2))
    assert [len(seeds) for _, _, seeds, _, _ in observer.opened] == [1, 2, 2, 2]
    assert observer.opened[-1][2] == [system.tasks()["three"].path_id, system.root.id]


def test_by_default_a_quarter_of_the_children_are_seeds():
    assert SearchSettings().seed_limit == 16
    assert SearchSettings(children_per_task=2).seed_limit == 1


def test_paths_of_private_tasks_are_no_seeds_but_their_layers_are_accounted_for(system):
    _, observer = _run(system, [_task("one", private=True), _task("two")])
    assert observer.opened[1][2] == [system.root.id]
    header = read_journal(system.folder / "journal" / "two-0001.jsonl")[0]
    assert [row["name"] for row in header["snapshot"]] == ["one"]
    shared = {layer.id for _, layer in system.path(system.tasks()["one"].path_id).layers} & system.root.layer_ids
    assert shared
    rows = [child for _, child in child_records(read_journal(system.folder / "journal" / "two-0001.jsonl"))]
    path = system.path(rows[0]["path_id"])
    assert rows[0]["accounted_parameters"] < path.num_parameters


def test_the_own_current_path_opens_the_population_with_its_quality_and_count(system):
    _run(system, ["one"])
    first = system.tasks()["one"]
    # Nothing beats it: it stays, with more children to its count.
    _run(system, ["one"], _plan(rounds=2), FakeTrainer(quality=lambda *_: 0.0))
    second = system.tasks()["one"]
    assert (second.path_id, second.quality, second.rounds) == (first.path_id, first.quality, 2)
    assert second.num_children > first.num_children
    assert second.parent_id == system.root.id


# Generations


def test_children_are_rounded_up_to_whole_generations(system):
    trainer, _ = _run(system, ["one"], _plan(children_per_task=9))
    assert [len(plan.children) for plan in trainer.plans] == [4, 4, 4]


def test_each_seed_gives_one_unmutated_child_first(system):
    trainer, _ = _run(system, ["one", "two", "three"])
    plans = [plan for plan in trainer.plans if plan.task == "three"]
    children = list(itertools.chain.from_iterable(plan.children for plan in plans))
    records = system.tasks()
    assert [child.parent_id for child in children[:3]] == [records["two"].path_id, records["one"].path_id, system.root.id]
    assert all(child.mutations == () for child in children[:3])
    assert all("norm: clone" in child.mutations or "norm" in _continued(child) for child in children[3:])


def _continued(child):
    return {str(plan.position) for plan in child.layers if plan.origin.value == "continued"}


def test_siblings_are_never_parents_of_each_other(system):
    trainer, _ = _run(system, ["one"], _plan(children_per_task=32))
    seen = {system.root.id}
    for plan in trainer.plans:
        assert {child.parent_id for child in plan.children} <= seen
        rows = _children(system, "one", plan.index)
        seen |= {row["path_id"] for row in rows if row["survived"]}


def _children(system, task, generation, round_number=1):
    file = system.folder / "journal" / f"{task}-{round_number:04d}.jsonl"
    rows = [
        child
        for record in read_journal(file)
        if record["type"] == "pack" and record["generation"] == generation
        for child in record["children"]
    ]
    return sorted(rows, key=lambda row: row["index"])


def test_all_children_of_a_generation_share_their_data_hyperparameters(system):
    trainer, _ = _run(system, ["one"], _plan(auto_tune=True, mutation_rate=0.5, children_per_task=32))
    seen = []
    for plan in trainer.plans:
        values = {_data_of(child.hyperparameters) for child in plan.children}
        assert len(values) == 1
        seen.append(values.pop())
    assert len(set(seen)) > 1


def test_data_hyperparameters_start_from_the_best_path_so_far_and_mutate_only_after_all_seeds_were_used(system):
    plan = _plan(auto_tune=True, mutation_rate=0.7, children_per_task=24, generation_size=2, max_seeds=6)
    _run(system, ["a", "b", "c", "d"], plan)
    trainer, _ = _run(system, ["e"], plan)
    # Five seeds at two a generation: those of e mutate from the fourth generation on.
    data = _data_of_generations(trainer)
    defaults = _data_of(DefaultSettings().hyperparameters(3))
    assert data[:3] == [defaults] * 3
    assert any(values != defaults for values in data[3:])


def test_inherited_data_hyperparameters_are_those_of_each_generations_first_seed_until_the_task_has_a_path(system):
    plan = _plan(
        auto_tune=True, mutation_rate=0.7, children_per_task=24, generation_size=2, max_seeds=6, inherit_data=True, rounds=2
    )
    one_round = dataclasses.replace(plan, search=plan.search.model_copy(update={"rounds": 1}))
    _run(system, ["a", "b", "c", "d"], one_round)
    newest_first = [system.path(system.task(name).path_id) for name in "dcba"]
    of_paths = [_data_of(path.hyperparameters) for path in newest_first]
    defaults = _data_of(DefaultSettings().hyperparameters(3))
    assert len({*of_paths, defaults}) > 3, "paths alike show nothing"
    trainer, _ = _run(system, ["e"], one_round)
    # Seeds are d and c, b and a, and the root, whose generation is filled up with a mutated child.
    assert _data_of_generations(trainer)[:3] == [of_paths[0], of_paths[2], defaults]
    own = system.path(system.task("e").path_id)
    trainer, _ = _run(system, ["e"], plan)
    assert _data_of_generations(trainer)[0] == _data_of(own.hyperparameters)


@pytest.mark.parametrize(("rate", "data_rate", "moves"), [(0.0, 0.7, True), (0.7, 0.0, False)])
def test_data_hyperparameters_have_a_rate_of_mutation_of_their_own(system, rate, data_rate, moves):
    plan = _plan(auto_tune=True, mutation_rate=rate, data_mutation_rate=data_rate, children_per_task=24, generation_size=2)
    trainer, _ = _run(system, ["one"], plan)
    assert (len(set(_data_of_generations(trainer))) > 1) == moves
    mutations = {mutation for generation in trainer.plans for child in generation.children for mutation in child.mutations}
    assert bool(mutations - {"norm: clone"}) != moves


def test_what_is_fixed_keeps_its_default(system):
    plan = _plan(
        auto_tune=True, mutation_rate=0.7, children_per_task=24, generation_size=2, fixed=("image_size", "learning_rate")
    )
    trainer, _ = _run(system, ["one"], plan)
    children = [child.hyperparameters for generation in trainer.plans for child in generation.children]
    assert {(child.image_size, child.learning_rate) for child in children} == {(32, 0.01)}
    assert len({child.crop_area_min for child in children}) > 1
    assert len({child.warmup_ratio for child in children}) > 1


def test_without_auto_tune_only_the_number_of_blocks_changes(system):
    trainer, _ = _run(system, ["one"], _plan(children_per_task=64, mutation_rate=0.5))
    children = [child for plan in trainer.plans for child in plan.children]
    defaults = DefaultSettings().hyperparameters(3)
    assert {child.hyperparameters.replace(num_blocks=3) for child in children} == {defaults}
    assert {child.hyperparameters.num_blocks for child in children} == {1, 2, 3}


def test_training_length(system):
    trainer, _ = _run(system, ["one"], _plan(training={"batch_size": 8, "batches_per_interval": 50, "intervals": 3}))
    length = trainer.plans[0].length
    assert (length.batches_per_interval, length.num_steps) == (13, 39)
    trainer, _ = _run(system, ["two"], _plan(training={"batch_size": 8, "batches_per_interval": 2, "intervals": 3}))
    assert trainer.plans[0].length.num_steps == 6


# Survival


def test_a_child_of_the_same_task_survives_only_with_a_strictly_greater_score(system):
    _run(system, ["one"], _plan(children_per_task=32), FakeTrainer(quality=lambda *_: 0.5))
    rows = [row for generation in range(8) for row in _children(system, "one", generation)]
    for row in rows:
        assert row["survived"] == (row["parent_id"] == system.root.id)
    assert any(row["parent_id"] != system.root.id for row in rows)


def test_children_of_seeds_always_survive(system):
    _run(system, ["one"])
    _run(system, ["two"], trainer=FakeTrainer(quality=lambda *_: 0.0))
    rows = [row for generation in range(4) for row in _children(system, "two", generation)]
    seeds = {system.root.id, system.tasks()["one"].path_id}
    assert all(row["survived"] == (row["parent_id"] in seeds) for row in rows)


def test_scale_control_prefers_the_path_that_adds_less(system):
    def quality(plan, child):
        return 0.8 + 0.0001 * sum(layer.trainable for layer in child.layers)

    _run(system, ["free"], _plan(children_per_task=64, mutation_rate=0.5), FakeTrainer(quality=quality))
    _run(system, ["tight"], _plan(children_per_task=64, mutation_rate=0.5, scale_factor=0.02), FakeTrainer(quality=quality))
    records = system.tasks()
    own = {
        name: sum(
            layer.num_parameters for _, layer in system.path(record.path_id).layers if layer.id not in system.root.layer_ids
        )
        for name, record in records.items()
    }
    assert own["tight"] < own["free"]


# Closing


def test_the_best_score_becomes_current_the_earlier_on_ties(system):
    qualities = itertools.chain([0.1, 0.7, 0.7], itertools.repeat(0.2))
    _run(system, ["one"], trainer=FakeTrainer(quality=lambda *_: next(qualities)))
    rows = _children(system, "one", 0)
    assert system.tasks()["one"].path_id == rows[1]["path_id"]


def test_the_test_split_is_looked_at_once_a_round_and_only_for_the_winner(system):
    trainer, _ = _run(system, ["one", "two"], _plan(rounds=2))
    assert len(trainer.examined) == 4
    for record in system.tasks().values():
        assert record.test_accuracy == 0.5


def test_a_task_without_a_test_split_has_no_test_accuracy(system):
    _run(system, ["one"], trainer=FakeTrainer(test_accuracy=None))
    assert system.tasks()["one"].test_accuracy is None


def test_parents_of_current_paths_are_current_or_the_root(system):
    for rounds in (1, 2, 3):
        _run(system, ["a", "b", "c"], _plan(rounds=rounds, children_per_task=32))
        current = {record.path_id for record in system.tasks().values()} | {system.root.id}
        assert all(record.parent_id in current for record in system.tasks().values())


def test_replacing_a_path_hands_its_children_to_its_own_parent(system):
    _run(system, ["a"])
    old = system.tasks()["a"]
    # Only the child of a's path is any good: b hangs below a.
    _run(system, ["b"], trainer=FakeTrainer(quality=lambda _p, child: 0.9 if child.parent_id == old.path_id else 0.1))
    assert system.tasks()["b"].parent_id == old.path_id
    _run(system, ["a"], _plan(rounds=2), FakeTrainer(quality=lambda *_: 1.0))
    assert system.tasks()["a"].path_id != old.path_id
    assert system.tasks()["b"].parent_id == system.root.id


def test_rounds_go_over_all_tasks_before_the_next_begins(system):
    _, observer = _run(system, ["a", "b"], _plan(rounds=2))
    assert [(task, number) for task, number, *_ in observer.opened] == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_a_finished_run_has_nothing_left_to_do_and_more_rounds_go_on(system):
    _run(system, ["a", "b"])
    trainer, _ = _run(system, ["a", "b"])
    assert trainer.plans == []
    trainer, _ = _run(system, ["a", "b"], _plan(rounds=2))
    assert {plan.round for plan in trainer.plans} == {1}


# What must hold


def test_publishing_never_changes_a_file_that_was_there(system):
    _run(system, ["a", "b"])
    before = {file: file.read_bytes() for file in system.folder.rglob("*.safetensors")}
    before |= {file: file.read_bytes() for file in system.folder.glob("paths/*.json")}
    _run(system, ["a", "b", "c"], _plan(rounds=2, mutation_rate=0.5))
    assert all(file.read_bytes() == content for file, content in before.items())
    assert verify(system) == []


def test_same_seed_same_lineage_and_another_seed_another(tmp_path):
    lineages = []
    for number, seed in enumerate((3, 3, 4)):
        system = System.create(tmp_path / str(number), tiny_root(), 32)
        _run(system, ["a", "b"], _plan(seed, rounds=2, auto_tune=True))
        lineages.append(_lineage(system.folder))
    assert lineages[0] == lineages[1]
    assert lineages[0] != lineages[2]


def test_packs_of_any_size_and_order_give_the_same_system(tmp_path):
    def pairs_backwards(children):
        children = list(reversed(children))
        return [children[i : i + 2] for i in range(0, len(children), 2)]

    ends = []
    for number, packs in enumerate((lambda children: [[c] for c in children], lambda children: [children], pairs_backwards)):
        system = System.create(tmp_path / str(number), tiny_root(), 32)
        _run(system, ["a", "b"], _plan(rounds=2, auto_tune=True), FakeTrainer(packs=packs))
        ends.append({name: dataclasses.replace(record, settings={}) for name, record in system.tasks().items()})
    assert ends[0] == ends[1] == ends[2]


class Killed(Exception):
    pass


class MortalTrainer(FakeTrainer):
    """Dies after so many children, in the middle of a generation."""

    def __init__(self, lives):
        super().__init__()
        self.lives = lives

    def train(self, plan):
        for pack in super().train(plan):
            if self.lives == 0:
                raise Killed
            self.lives -= 1
            yield pack

    def examine(self, path):
        if self.lives == 0:
            raise Killed
        return super().examine(path)


@pytest.mark.parametrize("lives", [0, 1, 3, 4, 7, 15, 16, 17, 31])
def test_a_killed_search_goes_on_and_ends_as_if_nothing_had_happened(tmp_path, lives):
    plan = _plan(rounds=1, auto_tune=True, mutation_rate=0.3)
    whole = System.create(tmp_path / "whole", tiny_root(), 32)
    _run(whole, ["a", "b"], plan)
    broken = System.create(tmp_path / "broken", tiny_root(), 32)
    with pytest.raises(Killed):
        _run(broken, ["a", "b"], plan, MortalTrainer(lives))
    trainer, observer = _run(System.open(broken.folder), ["a", "b"], plan)
    assert _lineage(broken.folder) == _lineage(whole.folder)
    assert broken.tasks() == whole.tasks()
    assert sum(len(plan.children) for plan in trainer.plans) == 32 - lives
    # Children whose results were there already are told too, so that progress counts all of a search that goes on.
    assert len(observer.children) == 16 * len(observer.opened)
    records = read_journal(broken.journal_file("ab"[lives // 16], 0))
    seconds = [sum(child["seconds"].values()) for _, child in child_records(records)]
    assert all(seconds)
    assert records[-1]["seconds"]["reused"] == pytest.approx(sum(seconds[: lives % 16]))


def test_a_search_that_was_killed_between_its_last_record_and_its_publication_publishes(system, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(System, "put_task", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            _run(system, ["a"])
    assert system.tasks() == {}
    trainer, _ = _run(system, ["a"])
    assert trainer.plans == []
    assert trainer.examined == []
    assert system.tasks()["a"].test_accuracy == 0.5


def test_an_unfinished_search_keeps_to_the_snapshot_it_opened_with(system):
    _run(system, ["a"])
    with pytest.raises(Killed):
        _run(system, ["b"], trainer=MortalTrainer(5))
    _run(system, ["c"])
    _, observer = _run(system, ["b"])
    assert observer.opened[0][2] == [system.tasks()["a"].path_id, system.root.id]


def test_an_unfinished_search_with_other_settings_is_refused_and_nothing_changes(system):
    with pytest.raises(Killed):
        _run(system, ["a"], trainer=MortalTrainer(5))
    before = {file: file.read_bytes() for file in system.folder.rglob("*") if file.is_file()}
    with pytest.raises(SettingsError, match=r"begun otherwise: settings.seed = 0 then and 1 now; .*add --restart"):
        _run(system, ["a"], _plan(seed=1))
    assert {file: file.read_bytes() for file in system.folder.rglob("*") if file.is_file()} == before


def test_a_search_begun_before_a_setting_was_known_goes_on_with_its_default(system):
    with pytest.raises(Killed):
        _run(system, ["a"], trainer=MortalTrainer(5))
    forget_settings(system.folder / "journal" / "a-0001.jsonl", search="fixed", training="pack_size", defaults="hue")
    with pytest.raises(SettingsError, match=r"settings.search.fixed = \[\] then and \['flip'\] now"):
        _run(system, ["a"], _plan(fixed=("flip",)))
    _, observer = _run(system, ["a"])
    assert observer.opened[0][-1] > 0, "what was trained is taken over"


def test_a_journal_of_another_lineage_is_refused(system):
    with pytest.raises(Killed):
        _run(system, ["a"], trainer=MortalTrainer(6))
    file = system.folder / "journal" / "a-0001.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    from evolve.journal import _checksum  # the journal's own sum, to forge a line that only its content betrays

    record = json.loads(lines[1])
    del record["crc32"]
    record["children"][0]["mutations"] = ["forged"]
    lines[1] = json.dumps({"crc32": _checksum(record), **record}) + "\n"
    file.write_text("".join(lines))
    with pytest.raises(DamagedError, match="generation 0 .* planned otherwise"):
        _run(system, ["a"])


def test_a_task_whose_data_changed_is_refused(system):
    _run(system, ["a"])
    with pytest.raises(DataError, match="'a' with fingerprint g-a.*expected f-a"):
        _run(system, ["a"], _plan(rounds=2), fingerprint="g")


def test_an_image_size_that_the_patch_does_not_divide_is_refused(system):
    with pytest.raises(SettingsError, match="image_size = 40; expected a multiple of .* 16; try 32"):
        _run(system, ["a"], _plan(defaults={"image_size": 40}))


def test_a_removed_task_can_be_evolved_again_from_nothing(system):
    _run(system, ["a", "b"])
    system.remove_task("a")
    assert "a" not in system.tasks()
    trainer, _ = _run(system, ["a"])
    assert trainer.plans
    assert system.tasks()["a"].rounds == 1
    assert (system.folder / "journal" / "removed" / "a-0001.1.jsonl").exists()


def test_every_child_is_a_valid_path(system):
    _run(system, ["a", "b"], _plan(rounds=2, children_per_task=64, auto_tune=True, mutation_rate=0.4))
    for file in (system.folder / "paths").glob("*.json"):
        path = system.path(file.stem)  # checks that the layers chain
        if path.task is not None:
            assert path.layer(HEAD).spec.integer("classes") == 3
            assert all(block < path.num_blocks for block in path.adapter_blocks)
            widths = {layer.spec.integer("adapter_width") for _, layer in path.layers if layer.kind is LayerKind.ADAPTER}
            assert widths <= {path.hyperparameters.adapter_width}


def test_qualities_that_look_random_still_leave_the_best(system):
    _run(system, ["a"], _plan(children_per_task=64), FakeTrainer(quality=hash_quality))
    rows = [row for generation in range(16) for row in _children(system, "a", generation)]
    assert system.tasks()["a"].quality == max(row["quality"] for row in rows)
