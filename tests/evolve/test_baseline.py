"""Baselines with a trainer that answers at once, and one that really trains."""

from __future__ import annotations

import dataclasses
import json

import pytest
import rich.console

from evolve.baseline import BaselinePlan, Method, baseline_file, is_finished, run_baselines
from evolve.closing import ActiveTask
from evolve.collecting import collect
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.errors import BusyError, DamagedError, SettingsError
from evolve.generation import Origin
from evolve.hyperparameters import Hyperparameters, tunables
from evolve.journal import Journal, read_journal
from evolve.path import ordered_positions
from evolve.progress import BaselineProgressObserver
from evolve.search import SearchPlan, run_rounds
from evolve.store import System
from evolve.training.one_by_one import OneByOneTrainer
from evolve.verification import verify
from tests.support.fake_trainer import FakeTrainer, QuietObserver, tiny_root
from tests.support.journals import forget_settings
from tests.support.training import IMAGE_SIZE, NUM_BLOCKS, TinyRoot, easy_data

TASK = ActiveTask("one", tuple("abc"), 100, "f")
FINETUNE = Method("finetune")


class RecordingObserver:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, int, int]] = []
        self.replicas: list[dict[str, object]] = []
        self.closed: list[dict[str, object]] = []

    def baseline_opened(self, task, method, num_replicas, reused):
        self.opened.append((task, num_replicas, reused))

    def replica_finished(self, task, method, record):
        self.replicas.append(record)

    def baseline_closed(self, task, method, record):
        self.closed.append(record)


class Stop(Exception):
    """What ends a baseline early."""


class StoppingTrainer(FakeTrainer):
    """Stops after so many replicas."""

    def __init__(self, replicas: int) -> None:
        super().__init__()
        self.left = replicas

    def train(self, plan):
        if self.left == 0:
            raise Stop
        self.left -= 1
        return super().train(plan)


@pytest.fixture
def system(tmp_path):
    return System.create(tmp_path / "system", tiny_root(), 32)


def _plan(seed=0, *, defaults=None, training=None, **search) -> SearchPlan:
    return SearchPlan(
        seed,
        DefaultSettings(**(defaults or {})),
        SearchSettings(**{"rounds": 2, "children_per_task": 10, "generation_size": 4, **search}),
        TrainingSettings(**{"batch_size": 8, "batches_per_interval": 5, "intervals": 2, **(training or {})}),
    )


def _run(system, method=FINETUNE, plan=None, trainer=None, task=TASK, num_tasks=5, replicas=None):
    trainer = trainer or FakeTrainer()
    observer = RecordingObserver()
    run_baselines(system, [(task, lambda: trainer)], method, BaselinePlan(plan or _plan(), num_tasks, replicas), observer)
    return trainer, observer


def _is_finished(system, method=FINETUNE, plan=None, num_tasks=5, replicas=None):
    return is_finished(system, method, "one", BaselinePlan(plan or _plan(), num_tasks, replicas))


def _records(system, method=FINETUNE):
    return read_journal(baseline_file(system, method, "one"))


def _without_seconds(records):
    return [{name: value for name, value in record.items() if name not in ("seconds", "crc32")} for record in records]


# Methods


@pytest.mark.parametrize(
    ("text", "tuned", "folder"),
    [
        ("finetune", False, "finetune"),
        ("freeze:0", False, "freeze-0"),
        ("adapters:32", False, "adapters-32"),
        ("freeze:12", True, "freeze-12-tuned"),
    ],
)
def test_a_method_has_a_name_and_a_folder(text, tuned, folder):
    method = Method.parse(text, tuned=tuned)
    assert (method.name, method.folder) == (text, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("finetun", "did you mean 'finetune'?"),
        ("adapter:8", "did you mean 'adapters:D'?"),
        ("", "expected finetune, freeze:K or adapters:D"),
        ("finetune:3", "finetune without a number"),
        ("freeze", "followed by the number of blocks to freeze"),
        ("freeze:-1", "followed by the number of blocks to freeze"),
        ("freeze:1.5", "followed by the number of blocks to freeze"),
        ("freeze:1234567", "followed by the number of blocks to freeze"),
        ("freeze:²", "followed by the number of blocks to freeze"),
        ("adapters:", "followed by the width of the adapters"),
        ("adapters:0", "a width from 1 to 4096"),
        ("adapters:5000", "a width from 1 to 4096"),
    ],
)
def test_what_is_no_method_is_refused(text, message):
    with pytest.raises(SettingsError, match=".*") as refused:
        Method.parse(text)
    assert message in str(refused.value)


def test_more_blocks_than_the_root_has_cannot_be_frozen(system):
    with pytest.raises(SettingsError, match="at most freeze:3"):
        _run(system, Method("freeze", 4))
    assert not (system.folder / "baselines").exists()


def _origins(system, method):
    trainer, _ = _run(system, method)
    (child,) = trainer.plans[0].children
    return {str(layer.position): layer.origin for layer in child.layers}


def test_finetuning_trains_every_layer(system):
    origins = _origins(system, FINETUNE)
    assert origins.pop("head") is Origin.NEW
    assert set(origins) == {"patch_embed", "class_token", "pos_embed", "block.0", "block.1", "block.2", "norm"}
    assert set(origins.values()) == {Origin.CLONED}


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_frozen_are_the_embeddings_and_the_first_blocks(system, blocks):
    origins = _origins(system, Method("freeze", blocks))
    frozen = {position for position, origin in origins.items() if origin is Origin.SHARED}
    assert frozen == {"patch_embed", "class_token", "pos_embed", *(f"block.{block}" for block in range(blocks))}
    assert origins["head"] is Origin.NEW


def test_adapters_of_the_width_asked_for_come_before_every_block(system):
    trainer, _ = _run(system, Method("adapters", 64))
    (child,) = trainer.plans[0].children
    trained = {str(layer.position): layer for layer in child.layers if layer.trainable}
    assert trained.keys() == {"adapter.0", "adapter.1", "adapter.2", "norm", "head"}
    assert {trained[f"adapter.{block}"].spec.integer("adapter_width") for block in range(3)} == {64}
    assert child.hyperparameters.adapter_width == 64
    assert all(trained[f"adapter.{block}"].origin is Origin.NEW for block in range(3))


# Length and seeds


def test_training_takes_as_many_steps_as_the_whole_search_of_the_task(system):
    plan = _plan()
    baseline, _ = _run(system, plan=plan)
    search = FakeTrainer()
    run_rounds(system, [(TASK, lambda: search)], plan, QuietObserver())

    def steps(plans):
        return sum(generation.length.num_steps * len(generation.children) for generation in plans)

    assert steps(baseline.plans) == steps(search.plans) == 2 * 12 * 2 * 5
    assert [(generation.length.intervals, len(generation.children)) for generation in baseline.plans] == [(12, 1)] * 4


@pytest.mark.parametrize(("replicas", "intervals"), [(1, 48), (5, 9), (48, 1)])
def test_another_number_of_replicas_shares_the_same_steps(system, replicas, intervals):
    trainer, _ = _run(system, replicas=replicas)
    assert [generation.length.intervals for generation in trainer.plans] == [intervals] * replicas


def test_more_replicas_than_there_are_intervals_are_refused(system):
    with pytest.raises(SettingsError, match="found 49 replicas; expected at most 48"):
        _run(system, replicas=49)


def test_replicas_have_seeds_of_their_own_and_methods_the_same_batches(system):
    finetuned, _ = _run(system)
    frozen, _ = _run(system, Method("freeze", 1))
    seeds = [generation.data_seed for generation in finetuned.plans]
    assert len(set(seeds)) == 4
    assert len({generation.children[0].seed for generation in finetuned.plans}) == 4
    assert [generation.data_seed for generation in frozen.plans] == seeds
    other, _ = _run(system, plan=_plan(seed=1), method=Method("freeze", 2))
    assert not {generation.data_seed for generation in other.plans} & set(seeds)


def test_every_replica_starts_from_the_defaults(system):
    trainer, _ = _run(system, plan=_plan(defaults={"learning_rate": 0.3}))
    expected = DefaultSettings(learning_rate=0.3).hyperparameters(3)
    assert {generation.children[0].hyperparameters for generation in trainer.plans} == {expected}


def test_tuned_replicas_draw_learning_rate_warmup_and_augmentation_from_the_steps_of_the_search(system):
    trainer, _ = _run(system, Method("adapters", 8, tuned=True), _plan(generation_size=64, children_per_task=64))
    drawn = [generation.children[0].hyperparameters for generation in trainer.plans]
    options = {tunable.name: tunable.options for tunable in tunables(max_blocks=3, patch_size=16)}
    tuned = {"learning_rate", "warmup_ratio", "crop_area_min", "crop_aspect_min", "flip"}
    tuned |= {"brightness", "contrast", "saturation", "hue"}
    for name in tuned:
        values = {getattr(hyperparameters, name) for hyperparameters in drawn}
        assert values <= set(options[name])
        assert len(values) > len(options[name]) / 2
    plain = DefaultSettings().hyperparameters(3).replace(adapter_width=8)
    fixed = {field.name for field in dataclasses.fields(Hyperparameters)} - tuned
    for hyperparameters in drawn:
        assert {name: getattr(hyperparameters, name) for name in fixed} == {name: getattr(plain, name) for name in fixed}


# Results


def test_the_best_replica_is_tested_once_and_its_cost_is_that_of_all(system):
    qualities = {0: 0.4, 1: 0.7, 2: 0.7, 3: 0.1}
    trainer = FakeTrainer(quality=lambda generation, _: qualities[generation.index])
    _, observer = _run(system, Method("freeze", 2), trainer=trainer)
    (path,) = trainer.examined
    assert path.quality == 0.7
    assert path.parent_id == system.root.id
    *_, closed = _records(system, Method("freeze", 2))
    assert observer.closed == [closed]
    assert closed["type"] == "close"
    assert (closed["method"], closed["tuned"], closed["task"], closed["replica"]) == ("freeze:2", False, "one", 1)
    assert (closed["quality"], closed["test_accuracy"], closed["path_id"]) == (0.7, 0.5, path.id)
    assert (closed["num_trained_images"], closed["flops"]) == (40, 4e3)
    assert closed["seconds"].keys() == {"train", "evaluate", "wall"}
    assert [replica["best_interval"] for replica in observer.replicas] == [1] * 4
    # What was tested is what was trained.
    assert all(system.tensors(layer.id) for _, layer in path.layers)


def test_frozen_layers_are_shared_by_all_tasks_of_the_experiment(system):
    def accounted(method):
        _, observer = _run(system, method)
        return observer.closed[0]["accounted_parameters"], observer.closed[0]["parameters"]

    root = {str(position): layer.num_parameters for position, layer in system.root.layers}
    stem = root["patch_embed"] + root["class_token"] + root["pos_embed"]
    full, parameters = accounted(FINETUNE)
    assert full == parameters
    share, parameters = accounted(Method("freeze", 1))
    assert share == pytest.approx(parameters - (stem + root["block.0"]) * 4 / 5)
    share, parameters = accounted(Method("adapters", 8))
    blocks = root["block.0"] + root["block.1"] + root["block.2"]
    assert share == pytest.approx(parameters - (stem + blocks) * 4 / 5)


def test_tasks_and_searches_of_the_system_are_left_alone(system):
    run_rounds(system, [(TASK, FakeTrainer)], _plan(), QuietObserver())
    before = {file: file.read_bytes() for file in system.folder.rglob("*") if file.is_file()}
    _run(system)
    after = {file: file.read_bytes() for file in system.folder.rglob("*") if file.is_file()}
    assert after.items() >= before.items()
    assert {file.relative_to(system.folder).parts[0] for file in after.keys() - before.keys()} == {"baselines", "layers", "locks"}
    assert verify(system) == []


# Going on


@pytest.mark.parametrize("replicas", [0, 1, 3])
def test_stopped_and_gone_on_with_it_ends_as_in_one_go(system, tmp_path, replicas):
    _run(system)
    other = System.create(tmp_path / "other", tiny_root(), 32)
    with pytest.raises(Stop):
        _run(other, trainer=StoppingTrainer(replicas))
    trainer, observer = _run(other)
    assert observer.opened == [("one", 4, replicas)]
    assert [replica["replica"] for replica in observer.replicas] == list(range(replicas, 4))
    # At most the best replica is trained again, for its weights.
    assert 4 - replicas <= len(trainer.plans) <= 5 - replicas
    one, two = _without_seconds(_records(system)), _without_seconds(_records(other))
    assert one[0].pop("system") != two[0].pop("system")
    assert one == two


def test_weights_of_an_earlier_process_are_trained_again_only_if_they_are_the_best(system, tmp_path):
    # All replicas are in the journal, only the last record is missing.
    _, observer = _run(system)
    file = baseline_file(system, FINETUNE, "one")
    *lines, closed = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines))
    trainer, again = _run(system)
    assert [generation.index for generation in trainer.plans] == [observer.closed[0]["replica"]]
    assert again.closed[0]["path_id"] == json.loads(closed)["path_id"]


def test_what_is_finished_is_not_done_again(system):
    assert not _is_finished(system)
    _run(system)
    assert _is_finished(system)
    assert not _is_finished(system, Method("finetune", tuned=True))
    trainer, observer = _run(system)
    assert (trainer.plans, trainer.examined, observer.opened, observer.closed) == ([], [], [], [])


def test_searches_that_differ_in_what_shapes_no_baseline_are_compared_with_the_same_one(system):
    _run(system)
    assert _is_finished(system, plan=_plan(auto_tune=True, scale_factor=0.3, mutation_rate=0.2))
    assert _is_finished(system, plan=_plan(rounds=3, children_per_task=8))


@pytest.mark.parametrize(
    ("plan", "num_tasks", "named"),
    [
        (_plan(seed=1), 5, "settings.seed = 0 then and 1 now"),
        (_plan(generation_size=2), 5, "settings.replicas = 4 then and 2 now"),
        (_plan(rounds=1), 5, "settings.intervals = 12 then and 6 now"),
        (_plan(defaults={"learning_rate": 0.1}), 5, "settings.defaults.learning_rate = 0.01 then and 0.1 now"),
        (_plan(training={"intervals": 3}), 5, "settings.intervals = 12 then and 18 now"),
        (_plan(), 6, "settings.num_tasks = 5 then and 6 now"),
    ],
)
def test_other_settings_than_it_began_with_are_refused(system, plan, num_tasks, named):
    with pytest.raises(Stop):
        _run(system, trainer=StoppingTrainer(1))
    before = baseline_file(system, FINETUNE, "one").read_bytes()
    for attempt in (
        lambda: _run(system, plan=plan, num_tasks=num_tasks),
        lambda: _is_finished(system, plan=plan, num_tasks=num_tasks),
    ):
        with pytest.raises(SettingsError) as refused:
            attempt()
        assert named in str(refused.value)
    assert baseline_file(system, FINETUNE, "one").read_bytes() == before


def test_other_data_and_another_trainer_are_refused(system):
    with pytest.raises(Stop):
        _run(system, trainer=StoppingTrainer(1))
    with pytest.raises(SettingsError, match="data_fingerprint = 'f' then and 'g' now"):
        _run(system, task=dataclasses.replace(TASK, data_fingerprint="g"))
    elsewhere = FakeTrainer()
    elsewhere.versions = {"device": "cuda"}
    with pytest.raises(SettingsError, match=r"trainer.device = 'none' then and 'cuda' now"):
        _run(system, trainer=elsewhere)


def test_an_altered_journal_is_named(system):
    _run(system)
    file = baseline_file(system, FINETUNE, "one")
    file.write_text(file.read_text().replace('"quality": 0.', '"quality": 1.'))
    with pytest.raises(DamagedError, match="altered line 2.* a baseline starts over once its file is removed"):
        _run(system)


def test_a_baseline_of_a_time_before_a_setting_was_known_has_its_default(system):
    _run(system)
    forget_settings(baseline_file(system, FINETUNE, "one"), training="pack_size", defaults="hue")
    assert _is_finished(system)
    with pytest.raises(SettingsError, match=r"settings.training.pack_size = 1 then and 2 now"):
        _is_finished(system, plan=_plan(training={"pack_size": 2}))


def test_a_compressed_journal_of_other_settings_is_named_as_it_is(system):
    _run(system)
    collect(system, delete=True)
    with pytest.raises(SettingsError, match=r"found a baseline in \S+/finetune/one\.jsonl\.gz begun otherwise"):
        _is_finished(system, plan=_plan(1))


def test_a_journal_is_opened_while_nobody_collects_garbage(system, monkeypatch):
    class WatchedJournal(Journal):
        def __init__(self, file):
            with pytest.raises(_Waits), system.locks.collecting(only_looks=False, waits=_wait):
                pass
            super().__init__(file)

    monkeypatch.setattr("evolve.baseline.Journal", WatchedJournal)
    _run(system)
    assert _is_finished(system)


class _Waits(Exception):
    pass


def _wait():
    raise _Waits


def test_replicas_that_diverge_say_so_and_are_not_chosen(system, capsys):
    class DivergingTrainer(FakeTrainer):
        def _result(self, plan, child):
            return dataclasses.replace(super()._result(plan, child), diverged=plan.index != 2, batch_parts=1 + plan.index // 3)

    observer = BaselineProgressObserver(rich.console.Console(width=200))
    trainer = DivergingTrainer(quality=lambda *_: 0.3)
    run_baselines(system, [(TASK, lambda: trainer)], FINETUNE, BaselinePlan(_plan(), 5), observer)
    *replicas, closed = _records(system)[1:]
    assert [(row.get("diverged"), row.get("batch_parts")) for row in replicas] == [
        *((True, None), (True, None), (None, None), (True, 2))
    ]
    assert (closed["replica"], closed["quality"]) == (2, 0.3)
    assert capsys.readouterr().out.count(", quality 0.0000, diverged, ") == 3


def test_the_same_baseline_twice_at_once_is_refused_and_others_are_not(system):
    with system.locks.comparing("finetune", "one"):
        with pytest.raises(BusyError, match="another process at work on the baseline finetune of task 'one'"):
            _run(system)
        _run(system, Method("finetune", tuned=True))
        run_rounds(system, [(TASK, FakeTrainer)], _plan(), QuietObserver())


# Really trained


def test_a_tiny_real_baseline_learns_and_is_the_same_twice(tmp_path):
    data = easy_data()
    task = ActiveTask("easy", data.labels, len(data.train), data.fingerprint)
    plan = SearchPlan(
        3,
        DefaultSettings(image_size=IMAGE_SIZE, learning_rate=0.05, crop_area_min=0.5, flip=False),
        SearchSettings(rounds=1, children_per_task=8, generation_size=2),
        TrainingSettings(batch_size=16, intervals=2, batches_per_interval=5, device="cpu", threads=1),
    )
    root = TinyRoot()
    placed = {position: root.layers[position] for position in ordered_positions(NUM_BLOCKS, (), with_head=False)}
    layers = {position: (layer.spec, root.stored[layer.id]) for position, layer in placed.items()}
    closed = []
    for name in ("one", "two"):
        system = System.create(tmp_path / name, layers, IMAGE_SIZE)
        for method in (FINETUNE, Method("freeze", 2), Method("adapters", 4)):
            observer = RecordingObserver()
            trainer = OneByOneTrainer(data, system.tensors, plan.training)
            run_baselines(system, [(task, lambda trainer=trainer: trainer)], method, BaselinePlan(plan, 1), observer)
            closed.append(observer.closed[0])
            assert closed[-1]["test_accuracy"] > 0.8
            # Two replicas of 4 generations x 2 intervals x 5 batches of 16 images.
            assert closed[-1]["num_trained_images"] == 2 * 8 * 5 * 16
    assert [record["path_id"] for record in closed[:3]] == [record["path_id"] for record in closed[3:]]
    # More trained layers are more arithmetic for the same images.
    assert closed[0]["flops"] > closed[1]["flops"]
