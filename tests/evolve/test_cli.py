"""munet-evolve: a small real search from end to end, and every bad input with its message and exit status."""

from __future__ import annotations

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from evolve import cli
from evolve.export.coarsening import ENGINE_COSTS, Choice, Coarseness, Outcome
from evolve.export.publish import PublishResult
from evolve.interruption import Interrupted
from evolve.root import save_root
from evolve.store import System
from evolve.vit import reference_logits
from tests.support.processes import environment, evolve, heed_interrupts
from tests.support.searched import add_baseline, searched_system
from tests.support.searches import evolve_tasks
from tests.support.system import IMAGE_SIZE, SKETCHES, build_system, random_tensors, root_specs

SETTINGS = f"""
[root]
source = "file"
file = "root.safetensors"

[defaults]
image_size = {IMAGE_SIZE}
learning_rate = 0.05
crop_area_min = 0.5
flip = false

[search]
rounds = 1
children_per_task = 6
generation_size = 3
mutation_rate = 0.3

[training]
batch_size = 16
intervals = 2
batches_per_interval = 4
device = "cpu"
threads = 1
"""
DIGITS = '\n[[tasks]]\nname = "digits"\nsource = "digits"\n'
COLOURS = '\n[[tasks]]\nname = "colours"\nsource = "folder"\nfolder = "colours"\n'


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A root, and a folder of images of two colours."""
    random = np.random.default_rng(0)
    layers = {position: (spec, random_tensors(spec, random)) for position, spec in root_specs().items()}
    save_root(tmp_path / "root.safetensors", layers, IMAGE_SIZE)
    for channel, name in enumerate(("red", "green")):
        (tmp_path / "colours" / name).mkdir(parents=True)
        for number in range(20):
            pixels = random.integers(0, 100, (12, 20, 3), dtype=np.uint8)
            pixels[:, :, channel] += 150
            Image.fromarray(pixels).save(tmp_path / "colours" / name / f"{number}.png")
    return tmp_path


def _write(folder: pathlib.Path, text: str) -> pathlib.Path:
    file = folder / "experiment.toml"
    file.write_text(text, encoding="utf-8")
    return file


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str | pathlib.Path) -> int:
    monkeypatch.setattr(sys, "argv", ["munet-evolve", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_a_small_real_search_from_end_to_end(folder, monkeypatch, capsys):
    file = _write(folder, SETTINGS + COLOURS + DIGITS)
    system_folder, repository = folder / "system", folder / "repository"
    # In a process of its own, as a user runs it.
    result = evolve("run", file, "--system", system_folder, "--task", "colours", "--repository", repository)
    assert result.returncode == 0, result.stderr
    assert "colours: round 1, 6 children from root" in result.stdout
    assert "published generation 1" in result.stdout
    system = System.open(system_folder)
    colours = system.path(system.tasks()["colours"].path_id)
    assert system.tasks()["colours"].quality > 0.9, "two colours are easy to tell apart"
    images = system.examples(system.tasks()["colours"])
    before = reference_logits(colours, system.tensors, images)

    assert _main(monkeypatch, "run", file, "--system", system_folder, "--repository", repository) == 0
    assert "published generation 2" in capsys.readouterr().out
    system = System.open(system_folder)
    assert system.tasks()["colours"].path_id == colours.id
    # The property that all else serves: another task's logits are the same bits.
    assert reference_logits(colours, system.tensors, images).tobytes() == before.tobytes()

    assert _main(monkeypatch, "run", file, "--system", system_folder) == 0
    assert "nothing to do: every task has 1 round;" in capsys.readouterr().out
    assert _main(monkeypatch, "verify", "--system", system_folder) == 0
    capsys.readouterr()
    assert _main(monkeypatch, "show", "--system", system_folder, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [task["name"] for task in shown["tasks"]] == ["colours", "digits"]
    assert shown["num_parameters"] < shown["separate_parameters"]
    assert sum(task["accounted_parameters"] for task in shown["tasks"]) == pytest.approx(shown["num_parameters"])
    assert _main(monkeypatch, "show", "--system", system_folder) == 0
    assert "distinct layers" in capsys.readouterr().out

    assert _main(monkeypatch, "remove", "--system", system_folder, "--task", "digits") == 0
    assert _main(monkeypatch, "export", "--system", system_folder, "--repository", repository) == 0
    assert "published generation 3" in capsys.readouterr().out
    assert _main(monkeypatch, "export", "--system", system_folder, "--repository", repository) == 0
    assert "generation 3 is up to date" in capsys.readouterr().out


def test_the_same_search_in_another_process_gives_the_same_lineage(folder, monkeypatch):
    file = _write(folder, SETTINGS + COLOURS)
    assert _main(monkeypatch, "run", file, "--system", folder / "one") == 0
    assert evolve("run", file, "--system", folder / "two").returncode == 0
    one, two = System.open(folder / "one"), System.open(folder / "two")
    assert one.tasks() == two.tasks()
    layers = [sorted(file.name for file in system.folder.glob("layers/*/*")) for system in (one, two)]
    assert layers[0] == layers[1]


def test_garbage_in_a_store_goes_for_who_says_that_nobody_else_is_there(tmp_path, monkeypatch, capsys):
    url = (tmp_path / "store").as_uri()
    evolve_tasks(url, "a")
    assert _main(monkeypatch, "gc", "--system", url, "--delete") == 2
    assert "--alone collects it while no other machine is at work on it" in capsys.readouterr().err
    assert _main(monkeypatch, "gc", "--system", url, "--delete", "--alone", "--json") == 0
    collection = json.loads(capsys.readouterr().out)
    assert collection["num_bytes"] > 0
    names = {one["file"] for one in collection["garbage"] if not one["file"].startswith("/")}
    assert names
    assert not [name for name in names if (tmp_path / "store" / name).exists()]
    assert _main(monkeypatch, "verify", "--system", url) == 0


def test_a_search_in_which_all_children_diverge_has_an_end_and_says_so(folder, monkeypatch, capsys):
    from evolve.training.child import ChildModel

    monkeypatch.setattr(ChildModel, "is_finite", lambda self: False)
    assert _main(monkeypatch, "run", _write(folder, SETTINGS + COLOURS), "--system", folder / "system") == 0
    assert re.search(r"6/6 children, \d survived, 6 children diverged", capsys.readouterr().out)
    assert System.open(folder / "system").tasks()["colours"].quality == 0.0
    assert _main(monkeypatch, "show", "--system", folder / "system") == 0
    assert "; 6 children trained; 6 children diverged" in capsys.readouterr().out
    assert _main(monkeypatch, "show", "--system", folder / "system", "--json") == 0
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    del task["outcomes"]["survived"]
    assert task["outcomes"] == {"trained": 6, "diverged": 6, "stopped_early": 0, "in_parts": 0}
    assert _main(monkeypatch, "verify", "--system", folder / "system") == 0


def test_want_of_memory_exits_2_and_the_same_command_goes_on(folder, monkeypatch, capsys):
    import torch

    from evolve.training import child

    file = _write(folder, SETTINGS + COLOURS)
    with monkeypatch.context() as patch:

        def full(*_):
            raise torch.OutOfMemoryError("CUDA out of memory.")

        patch.setattr(child, "run_layers", full)
        assert _main(monkeypatch, "run", file, "--system", folder / "system") == 2
    error = capsys.readouterr().err
    assert "\nerror: found too little memory for child 0 of colours" in error
    assert "Traceback" not in error
    assert _main(monkeypatch, "run", file, "--system", folder / "system") == 0


BAD_SETTINGS = {
    "unknown key": (SETTINGS.replace("rounds", "rouds") + DIGITS, "search.rouds: unknown setting; did you mean 'rounds'"),
    "impossible value": (
        SETTINGS.replace("rounds = 1", "rounds = 0") + DIGITS,
        "search.rounds: found 0, expected a whole number of at least 1",
    ),
    "wrong type": (SETTINGS.replace("rounds = 1", 'rounds = "1"') + DIGITS, "search.rounds: found '1', expected a whole number"),
    "beyond a range": (
        SETTINGS.replace("mutation_rate = 0.3", "mutation_rate = 1.5") + DIGITS,
        "search.mutation_rate: found 1.5, expected a number from 0 to 1",
    ),
    "missing folder": (SETTINGS + COLOURS.replace('"colours"\n', '"nowhere"\n'), "nowhere"),
    "image size": (
        SETTINGS.replace(f"image_size = {IMAGE_SIZE}", "image_size = 20") + DIGITS,
        "found defaults.image_size = 20; expected a multiple of the root's patch size 8; try 16",
    ),
    "blocks above the root's": (
        SETTINGS.replace("[defaults]", "blocks = 9\n[defaults]") + DIGITS,
        "root.blocks = 9; expected 1 to 3",
    ),
    "missing root": (SETTINGS.replace("root.safetensors", "gone.safetensors") + DIGITS, "gone.safetensors"),
    "script": (SETTINGS + '\n[[tasks]]\nname = "x"\nsource = "characters"\nscript = "GREEEK"\n', "GREEK"),
    "no cuda": (SETTINGS.replace('device = "cpu"', 'device = "cuda"') + DIGITS, "set device = 'auto' or 'cpu'"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_exit_2_before_anything_is_written(folder, monkeypatch, capsys, case):
    import torch

    if case == "no cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    text, message = BAD_SETTINGS[case]
    assert _main(monkeypatch, "run", _write(folder, text), "--system", folder / "system") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert not (folder / "system").exists()


def test_an_unreadable_image_is_named(folder, monkeypatch, capsys):
    (folder / "colours" / "red" / "broken.png").write_bytes(b"no image at all")
    assert _main(monkeypatch, "run", _write(folder, SETTINGS + COLOURS), "--system", folder / "system") == 2
    assert "broken.png" in capsys.readouterr().err
    assert not (folder / "system").exists()


def test_unreadable_images_can_be_left_out_with_a_warning_that_counts_them(folder, monkeypatch, capsys):
    (folder / "colours" / "red" / "broken.png").write_bytes(b"no image at all")
    file = _write(folder, SETTINGS + COLOURS + "skip_unreadable = true\n")
    assert _main(monkeypatch, "run", file, "--system", folder / "system") == 0
    assert "warning: colours: left out 1 image of folder" in capsys.readouterr().err


def test_a_class_without_images_is_named(folder, monkeypatch, capsys):
    (folder / "colours" / "blue").mkdir()
    assert _main(monkeypatch, "run", _write(folder, SETTINGS + COLOURS), "--system", folder / "system") == 2
    assert "blue" in capsys.readouterr().err
    assert not (folder / "system").exists()


def test_a_checkpoint_of_another_architecture_is_refused(folder, monkeypatch, capsys):
    import safetensors.numpy

    safetensors.numpy.save_file({"conv1.weight": np.zeros((8, 3, 3, 3), np.float32)}, folder / "resnet.safetensors")
    text = SETTINGS.replace('file = "root.safetensors"', 'file = "resnet.safetensors"\nmodel = "vit_tiny_patch16_224"')
    assert _main(monkeypatch, "run", _write(folder, text + COLOURS), "--system", folder / "system") == 2
    error = capsys.readouterr().err
    assert "expected" in error
    assert "resnet.safetensors" in error
    assert not (folder / "system").exists()


def test_a_misspelt_task_is_refused_with_similar_names(folder, monkeypatch, capsys):
    file = _write(folder, SETTINGS + COLOURS + DIGITS)
    assert _main(monkeypatch, "run", file, "--system", folder / "system", "--task", "digit") == 2
    assert "did you mean 'digits'" in capsys.readouterr().err


def test_a_system_keeps_its_root(folder, monkeypatch, capsys):
    file = _write(folder, SETTINGS + COLOURS)
    assert _main(monkeypatch, "run", file, "--system", folder / "system") == 0
    other = _write(folder, SETTINGS.replace("[defaults]", "blocks = 2\n[defaults]") + COLOURS + DIGITS)
    assert _main(monkeypatch, "run", other, "--system", folder / "system") == 2
    assert "a system keeps its root for life" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["show", "verify", "export"])
def test_a_folder_without_a_system(tmp_path, monkeypatch, capsys, command):
    assert _main(monkeypatch, command, "--system", tmp_path) == 2
    assert f"found no system in {tmp_path}" in capsys.readouterr().err


def test_a_report_and_a_watch_of_a_folder_without_a_system(tmp_path, monkeypatch, capsys):
    for arguments in (("report", "--out", tmp_path / "out"), ("watch", "--once")):
        assert _main(monkeypatch, *arguments, "--system", tmp_path) == 2
        assert f"found no system in {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_system_is_reported_and_watched(tmp_path, monkeypatch, capsys):
    system = searched_system(tmp_path / "system", 1, children=8)
    add_baseline(system, "finetune", "digits", is_finished=False)
    monkeypatch.setenv("COLUMNS", "80")
    assert _main(monkeypatch, "watch", "--once", "--system", system.folder) == 0
    assert "no search is under way" in capsys.readouterr().out
    assert _main(monkeypatch, "report", "--system", system.folder, "--out", tmp_path / "out") == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out' / 'report.html'}: 1 task, 1 search\n"
    assert said.err == "warning: the baseline finetune of digits is unfinished; it is left out\n"
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_system_is_shown_although_a_journal_of_a_closed_search_is_altered(tmp_path, monkeypatch, capsys):
    system = searched_system(tmp_path / "system", 1, children=8)
    file = system.journal_file("digits", 0)
    file.write_bytes(file.read_bytes().replace(b"quality", b"quantity"))
    assert _main(monkeypatch, "show", "--system", system.folder) == 0
    said = capsys.readouterr()
    assert f"{system.tasks()['digits'].quality:.4f}" in said.out
    assert said.out.endswith("lineage unknown\n")
    assert said.err.startswith(f"warning: no lineage: found an altered line 3 in {file};")


def test_scalars_are_written_on_request(folder, monkeypatch):
    file = _write(folder, SETTINGS + COLOURS)
    assert _main(monkeypatch, "run", file, "--system", folder / "system", "--tensorboard", folder / "scalars") == 0
    (events,) = (folder / "scalars" / "colours" / "round-1").iterdir()
    assert events.read_bytes().count(b"child/quality") == 6


def test_without_tensorboardx_scalars_are_refused_before_anything_is_read(folder, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "evolve.tensorboard", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboardX"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    file = _write(folder, SETTINGS + COLOURS)
    assert _main(monkeypatch, "run", file, "--system", folder / "system", "--tensorboard", folder / "scalars") == 2
    assert "pip install '.[tensorboard]'" in capsys.readouterr().err
    assert not (folder / "system").exists()


def test_verify_exits_1_and_names_what_is_damaged(folder, monkeypatch, capsys):
    assert _main(monkeypatch, "run", _write(folder, SETTINGS + COLOURS), "--system", folder / "system") == 0
    file = next((folder / "system" / "layers").glob("*/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert _main(monkeypatch, "verify", "--system", folder / "system") == 1
    assert file.stem in capsys.readouterr().err


def test_verify_exits_1_if_not_even_the_root_can_be_read(folder, monkeypatch, capsys):
    assert _main(monkeypatch, "run", _write(folder, SETTINGS + COLOURS), "--system", folder / "system") == 0
    for file in (folder / "system" / "layers").glob("*/*.safetensors"):
        file.write_bytes(b"")
    assert _main(monkeypatch, "verify", "--system", folder / "system") == 1
    assert "no readable layer" in capsys.readouterr().err


def test_removing_what_is_not_there_leaves_no_trace(folder, monkeypatch, capsys):
    assert _main(monkeypatch, "run", _write(folder, SETTINGS + COLOURS), "--system", folder / "system") == 0
    before = sorted(folder.rglob("*"))
    for name in ("colour", "../../x"):
        assert _main(monkeypatch, "remove", "--system", folder / "system", "--task", name) == 2
        assert f"no task {name!r}" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def _interrupt(python, command, journal):
    """Starts a command and ends it by SIGINT once its journal has four packs."""
    with subprocess.Popen(
        [python, "-m", "evolve.cli", *map(str, command)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    ) as process:
        deadline = time.monotonic() + 240
        while not (journal.exists() and journal.read_text().count('"type": "pack"') > 3):
            assert time.monotonic() < deadline
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "the same command goes on from here" in errors
    assert "Traceback" not in errors


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(folder, warm_python):
    file = _write(folder, SETTINGS.replace("children_per_task = 6", "children_per_task = 120") + COLOURS)
    command = ("run", file, "--system", folder / "system")
    journal = folder / "system" / "journal" / "colours-0001.jsonl"
    _interrupt(warm_python, command, journal)
    _write(folder, SETTINGS + COLOURS)
    other = evolve("run", file, "--system", folder / "system", python=warm_python)
    assert other.returncode == 2
    assert "search.children_per_task = 120 then and 6 now" in other.stderr
    assert evolve("remove", "--system", folder / "system", "--task", "colours", python=warm_python).returncode == 0
    assert evolve("run", file, "--system", folder / "system", python=warm_python).returncode == 0


@pytest.mark.parametrize("moment", ["prepare", "run_tasks"])
def test_a_restart_that_was_interrupted_before_it_began_is_still_to_be_done(folder, monkeypatch, capsys, moment):
    file = _write(folder, SETTINGS + COLOURS)

    def interrupt(*_arguments, **_options):
        raise Interrupted(signal.SIGINT)

    monkeypatch.setattr(f"evolve.api.{moment}", interrupt)
    assert _main(monkeypatch, "run", file, "--system", folder / "system", "--restart") == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"munet-evolve run {file} --system {folder / 'system'}" + " --restart" * (moment == "prepare"))


def test_the_same_task_twice_at_once_is_refused(folder, monkeypatch, capsys):
    file = _write(folder, SETTINGS + COLOURS)
    assert _main(monkeypatch, "run", file, "--system", folder / "system") == 0
    with System.open(folder / "system").locks.evolving("colours"):
        assert _main(monkeypatch, "run", file, "--system", folder / "system", "--rounds", "2") == 2
    error = capsys.readouterr().err
    assert "found another process at work on task 'colours'" in error
    assert "wait until it ends; other tasks can be evolved meanwhile, each with --task" in error


@pytest.mark.parametrize("command", ["run", "export"])
def test_a_precision_that_is_none_is_refused_before_anything_is_read(folder, monkeypatch, capsys, command):
    what = [folder / "none.toml"] if command == "run" else []
    assert _main(monkeypatch, command, *what, "--system", folder / "system", "--precision", "half") == 2
    assert "found precision 'half'; expected float32 or float16" in capsys.readouterr().err
    assert not (folder / "system").exists()


def test_the_precision_reaches_the_export(folder, monkeypatch, capsys):
    told = []

    def export_system(system, repository, **settings):
        told.append((settings["target"], settings["precision"]))
        return PublishResult(generation=1, new_segments=(), reused_segments=(), seconds=0.0, changed=True)

    monkeypatch.setattr("evolve.export.publish.export_system", export_system)
    build_system(folder / "small", {"plain": SKETCHES["plain"]})
    where = ("--system", folder / "small", "--repository", folder / "repository")
    assert _main(monkeypatch, "export", *where) == 0
    assert _main(monkeypatch, "export", *where, "--target", "gpu", "--precision", "float16") == 0
    file = _write(folder, SETTINGS + COLOURS)
    evolved = ("--system", folder / "system", "--repository", folder / "repository")
    assert _main(monkeypatch, "run", file, *evolved, "--precision", "float16") == 0
    assert told == [("cpu", "float32"), ("gpu", "float16"), ("cpu", "float16")]


@pytest.mark.parametrize("command", ["run", "export"])
def test_segments_that_are_none_are_refused_before_anything_is_read(folder, monkeypatch, capsys, command):
    what = [folder / "none.toml"] if command == "run" else []
    assert _main(monkeypatch, command, *what, "--system", folder / "system", "--segments", "long") == 2
    assert "found segments 'long'; expected shared, embedded or triton" in capsys.readouterr().err
    assert not (folder / "system").exists()


def test_coarse_segments_for_a_gpu_are_refused(folder, monkeypatch, capsys):
    assert _main(monkeypatch, "export", "--system", folder / "system", "--segments", "triton", "--target", "gpu") == 2
    assert "found segments 'triton' for a GPU; expected costs, which were measured on CPUs alone" in capsys.readouterr().err


def test_what_coarse_segments_are_chosen_by_reaches_the_export_and_the_choice_is_said(folder, monkeypatch, capsys):
    told = []

    def export_system(system, repository, **settings):
        told.append(settings["coarseness"])
        outcome = Outcome(seconds=1e-3, num_hops=2, num_pieces=2, num_bytes=100)
        choice = None if told[-1] is None else Choice({}, outcome, outcome)
        return PublishResult(generation=1, new_segments=(), reused_segments=(), seconds=0.0, changed=True, choice=choice)

    monkeypatch.setattr("evolve.export.publish.export_system", export_system)
    build_system(folder / "small", {"plain": SKETCHES["plain"]})
    where = ("--system", folder / "small", "--repository", folder / "repository")
    assert _main(monkeypatch, "export", *where) == 0
    assert "shared segments" not in capsys.readouterr().out
    options = ("--segments", "embedded", "--tasks-per-image", "3", "--memory-factor", "1.5")
    assert _main(monkeypatch, "export", *where, *options) == 0
    assert "shared segments, as coarser ones gain too little: 1.00 ms" in capsys.readouterr().out
    assert told == [None, Coarseness(ENGINE_COSTS["embedded"], tasks_per_image=3, memory_factor=1.5)]


@pytest.mark.parametrize(
    "command", ["run", "baseline", "show", "report", "watch", "verify", "remove", "gc", "pretrain", "export"]
)
def test_help_explains(monkeypatch, capsys, command):
    assert _main(monkeypatch, command, "--help") == 0
    assert len(capsys.readouterr().out) > 300


# Baselines


def test_a_baseline_from_end_to_end_beside_a_search(folder, monkeypatch, capsys):
    file = _write(folder, SETTINGS + COLOURS + DIGITS)
    command = ("baseline", file, "--system", folder / "system", "--task", "colours")
    # In a process of its own, as a user runs it; it makes the system.
    result = evolve(*command, "--method", "freeze:1")
    assert result.returncode == 0, result.stderr
    assert "colours: freeze:1, 3 replicas" in result.stdout
    journal = folder / "system" / "baselines" / "freeze-1" / "colours.jsonl"
    before = journal.read_bytes()
    assert _main(monkeypatch, *command, "--method", "freeze:1") == 0
    assert "nothing to do: freeze:1 is finished for every task" in capsys.readouterr().out
    assert journal.read_bytes() == before
    assert _main(monkeypatch, *command, "--method", "finetune", "--tune") == 0
    assert "colours: finetune (tuned), quality" in capsys.readouterr().out
    assert _main(monkeypatch, *command, "--method", "freeze:1", "--rounds", "2") == 2
    assert "settings.intervals = 4 then and 8 now" in capsys.readouterr().err
    assert System.open(folder / "system").tasks() == {}
    assert _main(monkeypatch, "run", file, "--system", folder / "system", "--task", "colours") == 0
    assert _main(monkeypatch, "verify", "--system", folder / "system") == 0
    assert _main(monkeypatch, *command, "--method", "freeze:1") == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "freez:1"), "found method 'freez:1'; expected finetune, freeze:K or adapters:D; did you mean 'freeze:K'?"),
        (("--method", "adapters:0"), "expected adapters of a width from 1 to 4096"),
        (("--method", "freeze:9"), "found method 'freeze:9'; expected at most freeze:3, the blocks of the root"),
        (("--method", "finetune", "--task", "colour"), "found no task 'colour' in the experiment"),
        (("--method", "finetune", "--replicas", "13"), "found 13 replicas; expected at most 12"),
        (("--method", "finetune", "--device", "gpu"), "found device 'gpu'; expected auto, cpu or cuda"),
    ],
)
def test_a_baseline_that_cannot_be_run_is_refused_before_anything_is_written(folder, monkeypatch, capsys, arguments, message):
    file = _write(folder, SETTINGS + COLOURS)
    assert _main(monkeypatch, "baseline", file, "--system", folder / "system", *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "system").exists()


def test_a_baseline_needs_a_method(folder, monkeypatch, capsys):
    assert _main(monkeypatch, "baseline", _write(folder, SETTINGS + COLOURS), "--system", folder / "system") == 2
    assert "--method" in capsys.readouterr().err


def test_an_interrupted_baseline_says_how_to_go_on_and_goes_on(folder, warm_python):
    settings = SETTINGS.replace("generation_size = 3", "generation_size = 40").replace(
        "children_per_task = 6", "children_per_task = 40"
    )
    file = _write(folder, settings + COLOURS)
    command = ("baseline", file, "--system", folder / "system", "--method", "freeze:2")
    journal = folder / "system" / "baselines" / "freeze-2" / "colours.jsonl"
    _interrupt(warm_python, command, journal)
    result = evolve(*command, python=warm_python)
    assert result.returncode == 0
    assert "going on after" in result.stdout
    assert journal.read_text().count('"type": "pack"') == 40
    assert "colours: freeze:2, quality" in result.stdout


def test_the_same_baseline_twice_at_once_is_refused(folder, monkeypatch, capsys):
    file = _write(folder, SETTINGS + COLOURS)
    command = ("baseline", file, "--system", folder / "system", "--method", "finetune")
    assert _main(monkeypatch, *command, "--tune") == 0
    with System.open(folder / "system").locks.comparing("finetune", "colours"):
        assert _main(monkeypatch, *command) == 2
    assert "found another process at work on the baseline finetune of task 'colours'" in capsys.readouterr().err


def test_a_gpu_that_fails_is_said_in_words_and_other_errors_are_not_swallowed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(words: str) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(cli, "app", lambda: fail("CUDA error: an illegal memory access was encountered\nCompile with ..."))
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "found CUDA error: an illegal memory access was encountered; expected a device that computes" in said
    assert "run the same command again" in said
    monkeypatch.setattr(cli, "app", lambda: fail("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        cli.main()
