"""`munet-server classify` against a real server."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator

import pytest

from server.answer_lines import CSV_COLUMNS
from tests.support.images import encode
from tests.support.processes import environment, heed_interrupts
from tests.support.repository import RepositoryBuilder, random_images
from tests.support.serving import Brake, ServerThread, run_here, serving, wait_until


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("repository")
    RepositoryBuilder(root).publish()
    return root


@pytest.fixture(scope="module")
def server(root: pathlib.Path) -> Iterator[ServerThread]:
    with serving(root) as server:
        yield server


@pytest.fixture
def photos(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder with twenty images in two folders, `photos`, in the current folder."""
    for index, image in enumerate(random_images(20, 8, seed=5)):
        file = tmp_path / "photos" / "ab"[index % 2] / f"{index:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(image))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


def files_of(photos: pathlib.Path) -> list[str]:
    return [f"photos/{file.relative_to(photos)}" for file in sorted(photos.rglob("*.png"))]


def test_a_folder_as_lines_for_people(server: ServerThread, photos: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run_here(capsys, "classify", "--server", server.address, "--task", "digits", "photos")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == files_of(photos)
    assert all(re.fullmatch(r".*\.png  digits  digit \d 0\.\d+, digit \d 0\.\d+, digit \d 0\.\d+", line) for line in lines)


def test_json_lines_of_all_tasks(server: ServerThread, photos: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ("--format", "jsonl", "--top", "2", "photos/a/0*.png", "photos/b/01.png")
    status, out, _ = run_here(capsys, "classify", "--server", server.address, *told)
    answers = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [answer["file"] for answer in answers] == [*(f"photos/a/0{digit}.png" for digit in (0, 2, 4, 6, 8)), "photos/b/01.png"]
    assert {answer["generation"] for answer in answers} == {1}
    assert list(answers[0]["tasks"]) == ["digits", "greek", "hebrew", "large", "short"]
    assert len(answers[0]["tasks"]["digits"]["labels"]) == 2


def test_what_fails_is_told_and_the_rest_goes_on(
    server: ServerThread, photos: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a" / "03.png").write_text("no image")
    ask = ("classify", "--server", server.address, "--task", "digits", "photos", "none.png")
    status, out, err = run_here(capsys, *ask)
    assert (status, len(out.splitlines())) == (1, 20)
    refused, missing, counts = err.splitlines()
    assert refused.startswith("munet-server: photos/a/03.png: images[0]: ")
    assert missing == "munet-server: none.png: No such file or directory"
    assert counts == "munet-server: 2 of 22 images failed"

    status, out, err = run_here(capsys, *ask, "--format", "csv", "--top", "1", "--output", "answers.csv")
    assert (status, out, err) == (1, "", counts + "\n")
    rows = list(csv.DictReader(io.StringIO(pathlib.Path("answers.csv").read_text())))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert [row["file"] for row in rows if row["error"]] == ["photos/a/03.png", "none.png"]
    assert [row["label"][:6] for row in rows if not row["error"]] == ["digit "] * 20


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--task", "digit", "photos"), "did you mean 'digits'?"),
        (("--server", "127.0.0.1:1", "--timeout", "30", "photos"), "is `munet-server serve` running there?"),
        (("--output", "nowhere/answers", "photos"), "--output: found 'nowhere/answers', expected a file that can be written"),
        (("photos", "photos/*.gif"), "IMAGE: found 'photos/*.gif', expected files that fit it"),
        (("--format", "xml", "photos"), "text"),
        ((), "IMAGE"),
    ],
)
def test_what_concerns_all_images_ends_it(
    server: ServerThread, photos: pathlib.Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    status, out, err = run_here(capsys, "classify", "--server", server.address, *arguments)
    assert (status, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_a_full_disk_is_no_crash(server: ServerThread, photos: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run_here(capsys, "classify", "--server", server.address, "photos", "--output", "/dev/full")
    assert status == 2
    assert "--output: found '/dev/full', expected a file that can be written (No space left on device)" in err


def test_names_may_be_any_bytes(server: ServerThread, photos: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "a" / "00.png").rename(os.fsdecode(b"odd \xff.png"))
    ask = ("classify", "--server", server.address, "--task", "digits", "o*.png", "--output", "answers.txt")
    assert run_here(capsys, *ask) == (0, "", "")
    assert pathlib.Path("answers.txt").read_bytes().startswith(b"odd \xff.png  digits  ")


def test_progress_is_shown_on_a_terminal_only(
    server: ServerThread, photos: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "a" / "03.png").write_text("no image")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    ask = ("classify", "--server", server.address, "--task", "digits", "photos")
    _, out, err = run_here(capsys, *ask)
    assert "21/21 images, 1 failed" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", err)
    assert len(out.splitlines()) == 20
    # Where the lines themselves are seen to come, nothing else is needed.
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _, _, err = run_here(capsys, *ask)
    assert [line[:29] for line in err.splitlines()] == ["munet-server: photos/a/03.png", "munet-server: 1 of 21 images "]


def test_an_interrupt_leaves_whole_lines_and_waits_for_no_answer(root: pathlib.Path, photos: pathlib.Path) -> None:
    with serving(root, metrics_listen="127.0.0.1:0") as server:
        command = [sys.executable, "-m", "server.cli", "classify", "--server", server.address, "--task", "digits"]
        options = ["--format", "jsonl", "--output", "answers.jsonl", "--in-flight", "1", "-"]
        with subprocess.Popen(
            [*command, *options],
            env=environment(),
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_interrupts,
        ) as asking:
            assert asking.stdin is not None
            assert asking.stderr is not None
            output = pathlib.Path("answers.jsonl")
            # The first sixteen are a request; the list goes on.
            print(*files_of(photos)[:17], sep="\n", file=asking.stdin, flush=True)
            wait_until(lambda: output.exists() and output.read_text().count("\n") == 16, 60)
            brake = Brake(server.server.engine)
            print(*files_of(photos), sep="\n", file=asking.stdin, flush=True)
            assert brake.entered.wait(60)
            asking.send_signal(signal.SIGINT)
            assert asking.wait(60) == 130
            cancelled = 'munet_calls_total{method="InferenceService/Classify",status="CANCELLED"} 1.0'
            metrics = f"http://{server.server.metrics_address}/metrics"
            wait_until(lambda: cancelled in urllib.request.urlopen(metrics).read().decode())
            brake.go_on.set()
            assert "Traceback" not in asking.stderr.read()
    assert [json.loads(line)["file"] for line in output.read_text().splitlines()] == files_of(photos)[:16]


def test_whoever_reads_along_may_have_enough(server: ServerThread, photos: pathlib.Path) -> None:
    command = [sys.executable, "-m", "server.cli", "classify", "--server", server.address, "--in-flight", "1", "photos"]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        assert asking.stderr is not None
        asking.stdout.close()
        errors = asking.stderr.read()
        assert asking.wait(60) == 1
    assert "Traceback" not in errors
