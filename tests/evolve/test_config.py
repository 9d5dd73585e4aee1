"""Experiment files: read whole, refused with what was found, what was expected and what to do."""

import pathlib
import typing
from typing import Any

import pydantic
import pytest

from evolve.config import (
    CharactersTask,
    DefaultSettings,
    DigitsTask,
    Experiment,
    RootSettings,
    SearchSettings,
    TrainingSettings,
    load_settings,
)
from evolve.errors import SettingsError
from munet.settings import findings, validate

MNIST = '[[tasks]]\nname = "a"\nsource = "torchvision"\ndataset = "MNIST"\nfolder = "x"\n'
TASKS = '[[tasks]]\nname = "digits"\nsource = "digits"\n'


def _load(folder: pathlib.Path, text: str) -> Experiment:
    file = folder / "experiment.toml"
    file.write_text(text, encoding="utf-8")
    return load_settings(file, Experiment)


def test_published_defaults(tmp_path):
    settings = _load(tmp_path, TASKS)
    assert (settings.search.rounds, settings.search.children_per_task, settings.search.generation_size) == (2, 64, 8)
    assert settings.search.mutation_rate == 0.1
    assert settings.search.num_generations == 8
    hyperparameters = settings.defaults.hyperparameters(3)
    assert (hyperparameters.learning_rate, hyperparameters.schedule, hyperparameters.momentum) == (0.01, "cosine", 0.9)
    assert (hyperparameters.crop_area_min, hyperparameters.crop_aspect_min, hyperparameters.flip) == (0.05, 0.75, True)
    assert (hyperparameters.adapter_width, hyperparameters.nesterov, hyperparameters.num_blocks) == (32, False, 3)


def test_no_momentum_is_written_none(tmp_path):
    settings = _load(tmp_path, '[defaults]\nmomentum = "none"\n' + TASKS)
    assert settings.defaults.hyperparameters(3).momentum is None


def test_relative_folders_start_at_the_file(tmp_path):
    settings = _load(tmp_path, '[[tasks]]\nname = "pets"\nsource = "folder"\nfolder = "images/pets"\n')
    assert settings.tasks[0].folder == tmp_path / "images" / "pets"


def test_relative_paths_of_every_source_start_at_the_file(tmp_path):
    folder, table, arrays = _load(
        tmp_path,
        '[[tasks]]\nname = "a"\nsource = "folder"\nfolder = "a"\nclasses = "names.txt"\ncache = "cache"\n'
        '[[tasks]]\nname = "b"\nsource = "csv"\nfile = "b.csv"\nfolder = "/b"\nclasses = ["x", "y"]\n'
        '[[tasks]]\nname = "c"\nsource = "arrays"\nfile = "c.npz"\n',
    ).tasks
    assert (folder.classes, folder.cache) == (tmp_path / "names.txt", tmp_path / "cache")
    assert (table.file, table.folder, table.classes) == (tmp_path / "b.csv", pathlib.Path("/b"), ("x", "y"))
    assert arrays.file == tmp_path / "c.npz"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[search]\nrouds = 2\n" + TASKS, "search.rouds: unknown setting; did you mean 'rounds'"),
        ("sed = 1\n" + TASKS, "sed: unknown setting; did you mean 'seed'"),
        (
            "batch_size = 1\n" + TASKS,
            "batch_size: unknown setting here; it belongs to another table, or to tasks of another source",
        ),
        ('[search]\nrounds = "two"\n' + TASKS, "search.rounds: found 'two', expected a whole number of at least 1"),
        ("[search]\nrounds = 1.5\n" + TASKS, "search.rounds: found 1.5, expected a whole number of at least 1"),
        ('[search]\nmutation_rate = "0.1"\n' + TASKS, "search.mutation_rate: found '0.1', expected a number from 0 to 1"),
        ("[search]\nmutation_rate = nan\n" + TASKS, "search.mutation_rate: found nan, expected a number from 0 to 1"),
        ("[search]\nauto_tune = 1\n" + TASKS, "search.auto_tune: found 1, expected true or false"),
        ("search = 3\n" + TASKS, "search: found 3, expected a table"),
        ("[search]\nrounds = []\n" + TASKS, "search.rounds: found a list, expected a whole number of at least 1"),
        ("[search.rounds]\n" + TASKS, "search.rounds: found a table, expected a whole number of at least 1"),
        ("tasks = 3", "tasks: found 3, expected a list"),
        ('[[tasks]]\nname = 3\nsource = "digits"\n', "tasks.0.name: found 3, expected text"),
        ('[[tasks]]\nname = "a"\nsource = "arrays"\nfile = 3\n', "tasks.0.file: found 3, expected a path"),
        (
            '[[tasks]]\nname = "a"\nsource = "arrays"\nfile = "a.npz"\nclasses = 3\n',
            "tasks.0.classes: found 3, expected a list or a path",
        ),
        ('[[tasks]]\nname = "a"\nsource = "csv"\nfile = "a"\ndelimiter = "::"\n', "found '::', expected text of 1 character"),
        (
            '[defaults]\nschedule = "linear"\n' + TASKS,
            "defaults.schedule: found 'linear', expected 'constant', 'cosine' or 'restarts'",
        ),
        ("", "tasks: Field required"),
        ("tasks = []", "tasks: .*at least 1 item"),
        (TASKS + TASKS, r"\['digits'\] appear more than once"),
        ('[[tasks]]\nname = "Two Words"\nsource = "digits"\n', "'Two Words' is not allowed.*try 'two-words'"),
        ('[[tasks]]\nname = "a"\nsource = "ftp"\n', "'folder', 'csv', 'arrays', 'digits', 'characters'"),
        ('[[tasks]]\nname = "a"\nsource = "folder"\n', "tasks.0.folder: Field required"),
        (MNIST + "arguments = 3\n", "tasks.0.arguments: found 3, expected a table"),
        (
            MNIST + "arguments = { split = [1] }\n",
            r"tasks.0.arguments: argument 'split' is \[1\]; expected text, a number, true or",
        ),
        (MNIST + "download = 1\n", "tasks.0.download: found 1, expected true or false"),
        ('[[tasks]]\nname = "a"\nsource = "huggingface"\n', "tasks.0.path: Field required"),
        ('[root]\nsource = "timm"\n' + TASKS, "source 'timm' needs model"),
        ('[root]\nsource = "file"\n' + TASKS, "source 'file' needs file"),
        ('[root]\nfile = "a.pth"\n' + TASKS, "use source = 'file'"),
        (
            "[search]\nfixed = ['image_sise']\n" + TASKS,
            "search.fixed: .*'image_sise' is no hyperparameter; they are num_blocks, .*hue",
        ),
        ("[root\n", "no TOML in .*experiment.toml"),
        ("a = '\xff", "no TOML"),
        ("a = " + "[" * 5000, "no TOML"),
    ],
)
def test_bad_settings_are_named(tmp_path, text, message):
    with pytest.raises(SettingsError, match=message):
        _load(tmp_path, text)


def test_all_findings_are_named_at_once(tmp_path):
    with pytest.raises(SettingsError) as caught:
        _load(tmp_path, "[search]\nrouds = 2\nmutation_rate = 3\n" + TASKS)
    assert "rouds" in str(caught.value)
    assert "mutation_rate" in str(caught.value)


AT_LEAST_1 = ([0, -1], "a whole number of at least 1")
UNIT_INTERVAL = ([-0.1, 1.1], "a number from 0 to 1")
SHARE = ([0, 1.1], "a number above 0 and at most 1")
RANGES = {
    "seed": ([-1], "a whole number of at least 0"),
    "root.blocks": AT_LEAST_1,
    "defaults.adapter_width": ([0, 4097, 10**9], "a whole number from 1 to 4096"),
    "defaults.learning_rate": ([0, -1, 1e300], "a number above 0 and at most 1000"),
    "defaults.warmup_ratio": UNIT_INTERVAL,
    "defaults.momentum": ([-0.1, 1], "a number of at least 0 and below 1 or 'none'"),
    "defaults.image_size": ([7, 1025], "a whole number from 8 to 1024"),
    "defaults.crop_area_min": SHARE,
    "defaults.crop_aspect_min": SHARE,
    "defaults.brightness": UNIT_INTERVAL,
    "defaults.contrast": UNIT_INTERVAL,
    "defaults.saturation": UNIT_INTERVAL,
    "defaults.hue": ([-0.1, 0.6], "a number from 0 to 0.5"),
    "search.rounds": AT_LEAST_1,
    "search.children_per_task": AT_LEAST_1,
    "search.generation_size": ([0, 4097], "a whole number from 1 to 4096"),
    "search.mutation_rate": UNIT_INTERVAL,
    "search.data_mutation_rate": UNIT_INTERVAL,
    "search.scale_factor": SHARE,
    "search.max_seeds": AT_LEAST_1,
    "training.batch_size": ([0, 65537], "a whole number from 1 to 65536"),
    "training.intervals": ([0, 10_001], "a whole number from 1 to 10000"),
    "training.batches_per_interval": AT_LEAST_1,
    "training.validation_batches": AT_LEAST_1,
    "training.threads": ([0, 513], "a whole number from 1 to 512"),
    "training.workers": ([0, 257], "a whole number from 1 to 256"),
    "training.pack_size": ([0, 1025], "a whole number from 1 to 1024"),
    "training.cpus_per_worker": ([-1, 4097], "a number from 0 to 4096"),
    "training.gpus_per_worker": ([-0.5, 65], "a number from 0 to 64"),
    "tasks.0.limit_per_class": AT_LEAST_1,
    "tasks.0.split_seed": ([], "a whole number"),
    "tasks.1.train_per_class": ([0, 10_001], "a whole number from 1 to 10000"),
    "tasks.1.validation_per_class": ([0, 10_001], "a whole number from 1 to 10000"),
    "tasks.1.test_per_class": ([0, 10_001], "a whole number from 1 to 10000"),
    "tasks.1.distortion": ([-0.1, 3.1], "a number from 0 to 3"),
    "tasks.1.render_seed": ([], "a whole number"),
    "tasks.1.max_classes": ([1], "a whole number of at least 2"),
}
"""Of every setting that is a number: values beyond each end of its range, and what is said of it."""


@pytest.mark.parametrize("name", RANGES)
def test_a_number_of_the_wrong_type_or_range_is_refused_with_the_allowed_range(tmp_path, name):
    beyond, words = RANGES[name]
    for value in (*beyond, "text", True):
        settings: dict = {
            "tasks": [{"name": "a", "source": "digits"}, {"name": "b", "source": "characters", "script": "GREEK"}],
        }
        *tables, key = name.split(".")
        table: Any = settings
        for part in tables:
            table = table[int(part)] if part.isdigit() else table.setdefault(part, {})
        table[key] = value
        with pytest.raises(pydantic.ValidationError) as caught:
            validate(Experiment, settings)
        (finding,) = findings(caught.value, Experiment)
        assert (finding.name, finding.found, finding.expected) == (name, value, words)


def test_every_number_is_in_the_table_of_ranges():
    kinds = {
        "": Experiment,
        "root.": RootSettings,
        "defaults.": DefaultSettings,
        "search.": SearchSettings,
        "training.": TrainingSettings,
        "tasks.0.": DigitsTask,
        "tasks.1.": CharactersTask,
    }
    numbers = {
        prefix + name
        for prefix, kind in kinds.items()
        for name, field in kind.model_fields.items()
        if {int, float} & {field.annotation, *typing.get_args(field.annotation)} or "ge=" in repr(field.annotation)
    }
    assert numbers == RANGES.keys()


def test_a_missing_file(tmp_path):
    with pytest.raises(SettingsError, match=r"could not read .*nowhere.toml \(No such file"):
        load_settings(tmp_path / "nowhere.toml", Experiment)
