"""The command line in real processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import types
import urllib.request
from collections.abc import Iterator

import pytest

from server.client import AdminClient, Client, SegmentMemory
from server.client_commands import _memory_line
from server.config import ServerSettings
from server.embedded.sessions import open_session, probe_model
from server.triton.process import TritonProcess
from tests.support.images import encode
from tests.support.ports import lasting_port
from tests.support.repository import DIGITS, HEBREW, RepositoryBuilder, random_images
from tests.support.serving import ENGINE, Brake, run_here, serving, wait_until
from tests.support.triton import triton_settings

READY = re.compile(
    r"serving generation (\d+) \((\d+) tasks?\) at (127\.0\.0\.1:\d+), admin (127\.0\.0\.1:\d+)(?:, metrics (127\.0\.0\.1:\d+))?\n"
)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "server.cli", *map(str, arguments)]


def run(*arguments: object) -> tuple[int, str, str]:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, check=False, timeout=240)
    return done.returncode, done.stdout, done.stderr


class Process:
    """A served repository in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        match = READY.fullmatch(process.stdout.readline())
        assert match is not None
        self.generation, self.num_tasks, self.address, self.admin, self.metrics = match.groups()


@contextlib.contextmanager
def served(root: pathlib.Path, *arguments: str) -> Iterator[Process]:
    addresses = ("--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--drain", "0")
    with subprocess.Popen(
        command("serve", "--repository", root, *addresses, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Process(process)
        finally:
            process.kill()


@pytest.fixture
def builder(tmp_path: pathlib.Path) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish()
    return builder


def test_serve_answer_watch_and_stop(
    builder: RepositoryBuilder, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(encode(random_images(1, 20)[0]))
    with served(builder.root, "--metrics-listen", "127.0.0.1:0") as server:
        assert (server.generation, server.num_tasks) == ("1", "5")

        status, out, _ = run("classify", "--server", server.address, "--task", "digits", "--task", "large", image, image)
        assert status == 0
        assert len(out.splitlines()) == 4
        assert re.fullmatch(r".*image\.png  digits  digit \d 0\.\d+, digit \d 0\.\d+, digit \d 0\.\d+", out.splitlines()[0])

        status, _, err = run_here(capsys, "classify", "--server", server.address, "--task", "digit", image)
        assert status == 2
        assert "did you mean 'digits'?" in err

        builder.publish({"digits": HEBREW})
        status, out, _ = run_here(capsys, "reload", "--admin", server.admin)
        assert (status, out.startswith("serving generation 2")) == (0, True)
        status, out, _ = run_here(capsys, "status", "--admin", server.admin)
        assert (status, "generation 2, 1 task, up" in out) == (0, True)
        status, out, _ = run_here(capsys, "status", "--admin", server.admin, "--json")
        assert json.loads(out)["generation"] == 2
        with urllib.request.urlopen(f"http://{server.metrics}/metrics") as page:
            metrics = page.read().decode()
        assert "munet_generation 2.0" in metrics
        assert 'munet_reloads_total{outcome="served"} 2.0' in metrics
        assert 'munet_calls_total{method="InferenceService/Classify",status="NOT_FOUND"} 1.0' in metrics

        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(120) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_under_load_lose_no_answer(builder: RepositoryBuilder, number: signal.Signals) -> None:
    image = random_images(1, 8)[0]
    stopped = threading.Event()
    outcomes: list[str] = []

    def ask(address: str) -> None:
        with Client(address) as client:
            while True:
                try:
                    client.classify("digits", image, timeout_seconds=10)
                    outcomes.append("answered")
                except Exception as error:
                    outcomes.append("refused" if stopped.is_set() else repr(error))
                    return

    with served(builder.root) as server:
        callers = [threading.Thread(target=ask, args=(server.address,)) for _ in range(4)]
        for caller in callers:
            caller.start()
        wait_until(lambda: len(outcomes) >= 40)
        stopped.set()
        server.process.send_signal(number)
        assert server.process.wait(120) == 0
        for caller in callers:
            caller.join()
        assert "Traceback" not in server.process.stderr.read()
    assert set(outcomes) == {"answered", "refused"}
    assert outcomes.count("refused") == 4


def test_killed_and_started_again_on_the_same_address(builder: RepositoryBuilder) -> None:
    address = f"127.0.0.1:{lasting_port()}"
    with served(builder.root, "--listen", address) as server:
        assert server.address == address
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(120)
    with served(builder.root, "--listen", address) as server, AdminClient(server.admin) as admin:
        assert server.address == address
        assert admin.status().generation == 1


def test_check(builder: RepositoryBuilder) -> None:
    assert run("check", "--repository", builder.root)[:2] == (
        0,
        f"generation 1 in {builder.root} is whole: 5 tasks, 10 segments\n",
    )
    files = builder.read_manifest(1).files
    builder.alter(files[0].path)
    (builder.root / files[3].path).unlink()
    status, out, err = run("check", "--repository", builder.root)
    assert (status, out) == (2, "")
    assert files[0].path in err
    assert files[3].path in err
    assert err.endswith(f"generation 1 in {builder.root}: 2 faults\n")


def test_bad_input_is_told_with_status_2(
    builder: RepositoryBuilder, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "server.toml"
    settings.write_text("[limits]\nmax_imagess = 3\n")
    builder.publish({"digits": DIGITS})
    builder.alter(builder.read_manifest(2).files[0].path)
    cases = (
        (("serve", "--repository", tmp_path), "without the file CURRENT"),
        (("serve", "--repository", builder.root), "generation 2 is refused: files: "),
        (("serve", "--listen", "nowhere"), "listen: found 'nowhere', expected HOST:PORT"),
        (("serve", "--settings", settings), "limits.max_imagess: found 3, expected no such key"),
        (("serve", "--repository", builder.root, "--device", "tpu"), "engine.device: found 'tpu', expected 'cpu' or 'cuda'"),
        (("check", "--repository", builder.root, "--device", "tpu"), "engine.device: found 'tpu'"),
        (("check", "--repository", tmp_path / "none"), "found no folder"),
        (("status", "--admin", "127.0.0.1:1"), "(UNAVAILABLE); is `munet-server serve` running there?"),
    )
    for index, (arguments, words) in enumerate(cases):
        status, out, err = run(*arguments) if index < 2 else run_here(capsys, *arguments)
        assert (status, out) == (2, ""), err
        assert words in err
        assert "Traceback" not in err


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_gpu_that_is_not_there_ends_it_before_anything_is_served(builder: RepositoryBuilder, command: str) -> None:
    if "CUDAExecutionProvider" in usable_providers():
        pytest.skip("this machine can use cuda")
    status, out, err = run(command, "--repository", builder.root, "--device", "cuda")
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("munet-server: device 'cuda': found ")
    assert last.endswith("or serve with --device cpu")
    assert "expected CUDAExecutionProvider" in last
    assert "Traceback" not in err


def usable_providers() -> list[str]:
    try:
        return list(open_session(probe_model(), "cuda").get_providers())
    except Exception:
        return []


def test_status_tells_of_each_triton(
    capsys: pytest.CaptureFixture[str], triton: TritonProcess, triton_folder: pathlib.Path
) -> None:
    number = RepositoryBuilder(triton_folder).publish({"digits": DIGITS})
    told = triton_settings(triton_folder, triton)
    with serving(triton_folder, engine=told.engine, triton=told.triton) as server:
        status, out, _ = run_here(capsys, "status", "--admin", server.admin_address)
    assert status == 0
    assert f"triton 2.51.0 at {triton.addresses.grpc}, version" in out
    assert re.search(rf"^Triton {triton.addresses.grpc} is serving since .* UTC, generation {number}$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--triton", "127.0.0.1:8001"), "engine.kind: found 'embedded', expected triton where Tritons are named"),
        (("--engine", "triton"), "triton.endpoints: found 'none', expected HOST:PORT of a Triton"),
        (("--engine", "triton", "--triton", "here"), "triton.endpoints.0: found 'here', expected HOST:PORT"),
        (("--engine", "tritons"), "engine.kind: found 'tritons'"),
        (("--memory-limit", "2 sacks"), "engine.memory_limit_bytes: found '2 sacks', expected a number of bytes of at least 1"),
        (
            ("--engine", "triton", "--triton", "127.0.0.1:1", "--memory-limit", "1GiB"),
            "engine.memory_limit_bytes: found 1073741824, expected none where Tritons hold the segments",
        ),
    ],
)
def test_tritons_that_cannot_be_are_told_with_status_2(
    capsys: pytest.CaptureFixture[str], builder: RepositoryBuilder, arguments: tuple[str, ...], words: str
) -> None:
    status, out, err = run_here(capsys, "serve", "--repository", builder.root, *arguments)
    assert (status, out) == (2, "")
    assert words in err


def watched(capsys: pytest.CaptureFixture[str], address: str, *arguments: str) -> str:
    """Returns what `watch` says within half a second, or, where that is too short for it to say anything, in ten times as long."""
    for seconds in (0.5, 5.0, 50.0):
        status, out, err = run_here(capsys, "watch", "--server", address, "--timeout", seconds, *arguments)
        assert (status, err) == (0, "")
        if out:
            break
    return out


def test_releases_from_the_shell(capsys: pytest.CaptureFixture[str], builder: RepositoryBuilder) -> None:
    builder.publish({"digits": HEBREW})
    builder.publish({"digits": DIGITS}, current=False)
    builder.set_canary(3, 20, digits=50)
    with serving(builder.root, watch_interval_seconds=60) as server:
        admin = ("--admin", server.admin_address)
        out = run_here(capsys, "status", *admin)[1]
        assert "kept generations: 1 2 3\ncanary: generation 3, 20 %, 50 % of digits; 0 requests\n" in out
        assert re.search(r"^memory: (\d+) of \1 segments, \d+\.\d MiB$", out, re.MULTILINE)
        assert watched(capsys, server.address) == "generation 2: +digits (0 unchanged)\n"
        out = watched(capsys, server.address, "--json")
        assert [json.loads(line)["generation"] for line in out.splitlines()] == [2]
        words = "serving generation 1 instead of 2, until CURRENT changes or `munet-server reload`\n"
        assert run_here(capsys, "rollback", *admin) == (0, words, "")
        status, _, err = run_here(capsys, "rollback", *admin)
        assert (status, "expected one of those that are kept: 1, 2, 3; name one of them" in err) == (2, True)
        assert "\nrolled back from generation 2, until CURRENT changes" in run_here(capsys, "status", *admin)[1]
        assert run_here(capsys, "rollback", *admin, "--to", 3)[1].startswith("serving generation 3 instead of 1")
        assert run_here(capsys, "drain", *admin)[1].startswith("drained: nothing is in flight")
        assert "\ndraining: health says NOT_SERVING" in run_here(capsys, "status", *admin)[1]
        assert run_here(capsys, "drain", *admin, "--cancel") == (0, "in service\n", "")
        brake = Brake(server.server.engine)
        with concurrent.futures.ThreadPoolExecutor() as threads, Client(server.address) as client:
            asking = threads.submit(client.classify, "digits", random_images(1, 8)[0])
            assert brake.entered.wait(60)
            status, _, err = run_here(capsys, "drain", *admin, "--timeout", 0.2)
            assert (status, err) == (2, "munet-server: 1 call still in flight after 0.2 s; it takes no new ones\n")
            brake.go_on.set()
            assert asking.result(10).generation == 3


def test_status_says_what_segments_take_of_a_limit(capsys: pytest.CaptureFixture[str], builder: RepositoryBuilder) -> None:
    builder.publish()
    limited = ENGINE.model_copy(update={"memory_limit_bytes": 450 * 2**10})
    with (
        serving(builder.root, engine=limited) as server,
        Client(server.address) as client,
        AdminClient(server.admin_address) as admin,
    ):
        before = admin.status().memory
        assert before is not None
        assert before.limit_bytes == 450 * 2**10
        assert 0 < before.num_resident < before.num_segments
        assert 0 < before.resident_bytes <= before.limit_bytes
        for name in ("digits", "greek", "hebrew"):
            client.classify(name, random_images(1, 8)[0])
        after = admin.status().memory
        assert after is not None
        assert (after.loads > before.loads, after.evictions > before.evictions, after.failed_loads) == (True, True, 0)
        line = re.search(r"^memory: .*$", run_here(capsys, "status", "--admin", server.admin_address)[1], re.MULTILINE)
    assert line is not None
    assert line[0] == (
        f"memory: {after.num_resident} of {after.num_segments} segments, {after.resident_bytes / 2**20:.1f} MiB of 0.4 MiB; "
        f"{after.loads} loaded for questions, {after.evictions} evicted for room"
    )


def test_loads_that_failed_are_told_beside_those_that_did_not() -> None:
    memory = SegmentMemory(2 * 2**20, 2**20, num_segments=3, num_resident=1, loads=7, failed_loads=2, evictions=6)
    words = "memory: 1 of 3 segments, 1.0 MiB of 2.0 MiB; 7 loaded for questions (2 more failed), 6 evicted for room"
    assert _memory_line(memory) == words


def test_top_shows_what_is_asked_and_computed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, builder: RepositoryBuilder
) -> None:
    stop = threading.Event()
    answered: list[object] = []
    intervals: list[float] = []

    def ask(address: str) -> None:
        with Client(address) as client:
            while not stop.is_set():
                answered.append(client.classify_tasks(random_images(1, 8)[0], ["digits", "greek"]))

    def sleep(seconds: float) -> None:
        intervals.append(seconds)
        enough = len(answered) + 10
        wait_until(lambda: len(answered) >= enough)

    monkeypatch.setattr("server.top.time", types.SimpleNamespace(sleep=sleep))
    with serving(builder.root) as server:
        asking = threading.Thread(target=ask, args=(server.address,))
        asking.start()
        try:
            status, out, _ = run_here(capsys, "top", "--admin", server.admin_address, "--once", "--interval", "0.3", "--json")
            shown_status, shown, _ = run_here(capsys, "top", "--admin", server.admin_address, "--once", "--interval", "0.2")
        finally:
            stop.set()
            asking.join()
    (line,) = out.splitlines()
    rates = json.loads(line)
    assert (status, shown_status, intervals) == (0, 0, [0.3, 0.2])
    assert [task["name"] for task in rates["tasks"]] == ["digits", "greek"]
    assert all(task["requests_per_second"] > 0 and task["latency_p99_seconds"] > 0 for task in rates["tasks"])
    saved = {segment["name"]: segment["saved_share"] for segment in rates["segments"]}
    assert sorted(saved.values())[0] == 0
    assert max(saved.values()) == pytest.approx(0.5, abs=0.01)
    assert re.search(r"^digits +\d+\.\d", shown, re.MULTILINE)


def test_logs_are_json_if_asked_for(builder: RepositoryBuilder) -> None:
    with served(builder.root, "--log-format", "json", "--access-log") as server:
        with Client(server.address) as client:
            client.classify("digits", random_images(1, 8)[0])
        server.process.terminate()
        _, err = server.process.communicate(timeout=120)
    lines = [json.loads(line) for line in err.splitlines()]
    assert {"server.reload", "server.access_log"} <= {line["logger"] for line in lines}
    (access,) = [line for line in lines if line["logger"] == "server.access_log"]
    assert (access["method"], access["tasks"], access["status"]) == ("InferenceService/Classify", ["digits"], "OK")


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run_here(capsys, "--help")
    assert status == 0
    assert all(name in out for name in ("serve", "check", "classify", "status", "reload", "top"))


def test_help_states_the_true_defaults(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run_here(capsys, "serve", "--help")
    settings = ServerSettings()
    assert status == 0
    for value in (settings.repository, settings.listen, settings.admin_listen, settings.engine.threads):
        assert f"[default: ({value})]" in out
    for seconds in (settings.watch_interval_seconds, settings.drain_seconds, settings.grace_seconds):
        assert f"[default: ({seconds:g})]" in out


def test_the_server_never_imports_torch_nor_what_nobody_asked_for(builder: RepositoryBuilder) -> None:
    names = ("torch", "timm", "torchvision", "evolve", "opentelemetry")
    code = f"import server.cli, sys; print([name for name in {names} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
