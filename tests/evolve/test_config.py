"""Experiment files: read whole, refused with what was found, what was expected and what to do."""

import pathlib

import pytest

from evolve.config import Experiment, load_settings
from evolve.errors import SettingsError

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
        ("[search]\nmutation_rate = 3\n" + TASKS, r"search.mutation_rate: .*less than or equal to 1 \(found 3\)"),
        ("[search]\nrounds = 0\n" + TASKS, r"search.rounds: .*greater than or equal to 1 \(found 0\)"),
        ("[search]\nscale_factor = 0\n" + TASKS, r"search.scale_factor: .*greater than 0 \(found 0\)"),
        ('[search]\nrounds = "two"\n' + TASKS, r"search.rounds: .*integer.* \(found 'two'\)"),
        (
            '[defaults]\nschedule = "linear"\n' + TASKS,
            r"defaults.schedule: .*'constant', 'cosine' or 'restarts' \(found 'linear'\)",
        ),
        ("[defaults]\nlearning_rate = -1\n" + TASKS, r"learning_rate: .*greater than 0 \(found -1\)"),
        ("", "tasks: Field required"),
        ("tasks = []", "tasks: .*at least 1 item"),
        (TASKS + TASKS, r"\['digits'\] appear more than once"),
        ('[[tasks]]\nname = "Two Words"\nsource = "digits"\n', "'Two Words' is not allowed.*try 'two-words'"),
        ('[[tasks]]\nname = "a"\nsource = "ftp"\n', "'folder', 'csv', 'arrays', 'digits', 'characters'"),
        ('[[tasks]]\nname = "a"\nsource = "folder"\n', "tasks.0.folder.folder: Field required"),
        ('[root]\nsource = "timm"\n' + TASKS, "source 'timm' needs model"),
        ('[root]\nsource = "file"\n' + TASKS, "source 'file' needs file"),
        ('[root]\nfile = "a.pth"\n' + TASKS, "use source = 'file'"),
        ("[root\n", "no TOML in .*experiment.toml"),
        ("a = '\xff", "no TOML"),
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


def test_a_missing_file(tmp_path):
    with pytest.raises(SettingsError, match=r"could not read .*nowhere.toml \(No such file"):
        load_settings(tmp_path / "nowhere.toml", Experiment)
