"""What a script or notebook calls: the command line is tested beside it, so these are the parts that it does not use."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import evolve
from evolve.api import prepare_search
from evolve.errors import DataError, SettingsError, TrainerError
from evolve.generation import PackResult
from evolve.root import save_root
from evolve.search import SearchPlan
from tests.support.fake_trainer import FakeTrainer, tiny_root
from tests.support.processes import environment
from tests.support.searches import Killed, MortalTrainer
from tests.support.system import IMAGE_SIZE, random_tensors, root_specs

PLAN = SearchPlan(
    search=evolve.SearchSettings(rounds=1, children_per_task=4, generation_size=2),
    training=evolve.TrainingSettings(batch_size=8, intervals=2),
)


def data(name: str = "shades", **changes: object) -> evolve.TaskData:
    def split(count: int) -> evolve.ImageSet:
        labels = np.arange(count) % 2
        images = [np.full((8, 8, 3), 50 + 100 * label, dtype=np.uint8) for label in labels]
        return evolve.ImageSet(images, labels, [str(number) for number in range(count)])

    made = evolve.TaskData(name, ("dark", "bright"), split(20), split(6), split(4))
    return dataclasses.replace(made, **changes)


@pytest.fixture
def system(tmp_path: pathlib.Path) -> evolve.System:
    return evolve.System.create(tmp_path / "system", tiny_root(), 32)


def run_tasks(system: evolve.System, listed: list[evolve.TaskData], trainer: object = None, **options: object) -> list[str]:
    return evolve.run_tasks(system, listed, PLAN, make_trainer=lambda *_: trainer or FakeTrainer(), **options)


# Names


def test_importing_costs_nothing():
    script = "import sys; before = set(sys.modules); import evolve; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"torch", "timm", "numpy", "pydantic", "safetensors"})


def test_everything_but_loading_and_training_does_without_torch():
    script = (
        "import sys, evolve\n"
        "for name in evolve.__all__: getattr(evolve, name)\n"
        "print(evolve.SearchPlan(), evolve.Experiment(tasks=[evolve.DigitsTask(name='a', source='digits')]))\n"
        "assert not {'torch', 'timm', 'torchvision'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, text=True, check=True)


def test_names_are_where_they_are_said_to_be():
    assert sorted(evolve.__all__) == sorted(name for names in evolve._HOMES.values() for name in names)
    for module, names in evolve._HOMES.items():
        for name in names:
            assert getattr(evolve, name) is getattr(importlib.import_module(module), name)
    assert set(evolve.__all__) <= set(dir(evolve))
    with pytest.raises(AttributeError, match="no attribute 'serach'"):
        evolve.serach  # noqa: B018
    # A module of the same name would take the place of a call as soon as anything imports it.
    modules = {file.stem for file in pathlib.Path(evolve.__file__).parent.iterdir()}
    assert modules.isdisjoint(evolve.__all__)


# Tasks and trainers of one's own


def test_a_task_of_ones_own_with_a_trainer_of_ones_own(system):
    trainer = FakeTrainer()
    told: list[str] = []

    class Observer(evolve.SilentObserver):
        def child_finished(self, plan, record):
            told.append(record["path_id"])

    assert run_tasks(system, [data(), data("others")], trainer, observer=Observer(), private=["shades"]) == ["shades", "others"]
    assert len(told) == 8
    records = system.tasks()
    assert (records["shades"].private, records["others"].private) == (True, False)
    assert records["shades"].labels == ("dark", "bright")
    assert records["shades"].data_fingerprint == data().fingerprint
    assert records["others"].parent_id == system.root.id
    # Nothing is left to do, and nobody is asked to.
    assert run_tasks(system, [data(), data("others")], private=["shades"]) == []


@pytest.mark.parametrize(
    ("listed", "error", "message"),
    [
        ([data("Shades")], DataError, "task name 'Shades' is not allowed"),
        ([data("../x")], DataError, "is not allowed"),
        ([data(), data()], SettingsError, r"\['shades'\] more than once"),
        ([data(labels=("dark",))], DataError, "one class only"),
        ([data(labels=("dark", "bright", "grey"))], DataError, "no training images of class 'grey'"),
        ([data(train=dataclasses.replace(data().train, labels=np.full(20, 2)))], DataError, "found label 2 for '0'"),
        ([data(validation=evolve.ImageSet([], np.empty(0, np.int64), []))], DataError, "no validation images"),
        ([data(test=dataclasses.replace(data().train, labels=np.zeros(3, np.int64)))], DataError, "3 labels for 20"),
    ],
)
def test_data_that_cannot_be_used_are_refused_before_anything_is_written(system, listed, error, message):
    before = sorted(system.folder.rglob("*"))
    with pytest.raises(error, match=message):
        run_tasks(system, listed)
    assert sorted(system.folder.rglob("*")) == before


def test_changed_data_are_refused(system):
    run_tasks(system, [data()])
    changed = data(labels=("night", "day"))
    with pytest.raises(DataError, match="'shades' with fingerprint"):
        evolve.run_tasks(
            system,
            [changed],
            dataclasses.replace(PLAN, search=evolve.SearchSettings(rounds=2, children_per_task=4, generation_size=2)),
            make_trainer=lambda *_: FakeTrainer(),
        )


def test_a_trainer_that_forgets_a_child_is_named(system):
    class Forgetful(FakeTrainer):
        def train(self, plan):
            for pack in super().train(plan):
                yield PackResult(pack.children[:0])

    with pytest.raises(TrainerError, match="found 0 results from the trainer"):
        run_tasks(system, [data()], Forgetful())


# Systems


def test_a_system_is_made_once_and_keeps_its_root(tmp_path):
    random = np.random.default_rng(0)
    layers = {position: (spec, random_tensors(spec, random)) for position, spec in root_specs().items()}
    save_root(tmp_path / "root.safetensors", layers, IMAGE_SIZE)
    root = evolve.RootSettings(source="file", file=tmp_path / "root.safetensors")
    made = evolve.open_or_create(str(tmp_path / "system"), root)
    assert evolve.open_or_create(tmp_path / "system", root).id == made.id == evolve.System.open(str(tmp_path / "system")).id
    assert made.root.num_blocks == 3
    with pytest.raises(SettingsError, match="a system keeps its root for life"):
        evolve.open_or_create(tmp_path / "system")


def test_removing_a_task(system):
    run_tasks(system, [data()])
    evolve.remove_task(system, "shades")
    assert system.tasks() == {}
    with pytest.raises(evolve.EvolveError, match="no task 'shades'"):
        evolve.remove_task(system, "shades")


def test_the_experiments_tasks_are_chosen_by_name(tmp_path):
    experiment = evolve.Experiment(tasks=(evolve.DigitsTask(name="digits", source="digits"),))
    with pytest.raises(SettingsError, match="did you mean 'digits'"):
        evolve.run(experiment, tmp_path / "system", tasks=["digit"])
    assert not (tmp_path / "system").exists()


def test_an_unfinished_search_goes_on_starts_over_or_is_recovered(tmp_path, monkeypatch):
    def experiment(**changes: object) -> evolve.Experiment:
        return evolve.Experiment(
            search=evolve.SearchSettings(rounds=1, children_per_task=4, generation_size=2, **changes),
            training=evolve.TrainingSettings(batch_size=8, intervals=1, batches_per_interval=1),
            tasks=(evolve.DigitsTask(name="digits", source="digits", limit_per_class=10),),
        )

    folder = tmp_path / "system"
    with pytest.raises(Killed):
        evolve.run(experiment(), folder, make_trainer=lambda *_: MortalTrainer(1))
    with monkeypatch.context() as patch:
        patch.setattr("evolve.data.load.load_task", lambda *_: pytest.fail("data were loaded first"))
        with pytest.raises(SettingsError, match=r"mutation_rate = 0\.1 then and 0\.5 now"):
            evolve.run(experiment(mutation_rate=0.5), folder)
    trainer = FakeTrainer()
    system = evolve.run(experiment(mutation_rate=0.5), folder, unfinished="restart", make_trainer=lambda *_: trainer)
    assert sum(len(plan.children) for plan in trainer.plans) == 4
    assert len(system.removed_journals()) == 1

    with system.locks.publishing():
        system.remove_task("digits")
    with pytest.raises(Killed):
        evolve.run(experiment(), folder, make_trainer=lambda *_: MortalTrainer(3))
    file = system.journal_file("digits", 0)
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]) + b"{}\n")
    with pytest.raises(evolve.EvolveError, match="altered line"):
        evolve.run(experiment(), folder, make_trainer=lambda *_: FakeTrainer())
    trainer = FakeTrainer()
    evolve.run(experiment(), folder, unfinished="recover", make_trainer=lambda *_: trainer)
    assert sum(len(plan.children) for plan in trainer.plans) == 2
    assert evolve.verify(evolve.System.open(folder)) != [], "the altered copy is kept, and named"


def test_no_tasks_are_none_and_not_all(tmp_path):
    experiment = evolve.Experiment(tasks=(evolve.DigitsTask(name="digits", source="digits"),))
    prepared = prepare_search(experiment, tmp_path / "system", tasks=[])
    assert prepared.data == ()
    assert evolve.run(experiment, tmp_path / "system", tasks=[]).tasks() == {}


def test_folders_may_be_strings(tmp_path):
    made = evolve.System.create(str(tmp_path / "system"), tiny_root(), 32)
    evolve.write_report(made, str(tmp_path / "report"))
    assert (tmp_path / "report" / "report.html").is_file()
