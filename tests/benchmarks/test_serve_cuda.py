"""The GPU script on a CPU: all it does but what a GPU alone reports, and what it makes of a GPU's report."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from tests.support.processes import TOP, environment

SCRIPT = TOP / "benchmarks" / "gpu" / "serve_cuda.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("serve_cuda", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def printed() -> list[dict[str, Any]]:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--device", "cpu", "--small", "--images", "256"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_claim_holds_on_the_cpu(printed: list[dict[str, Any]]) -> None:
    summary = printed[-1]
    assert (summary["failed"], summary["unproven"]) == ([], [])
    assert set(summary["summary"]) == {
        "sessions on another provider",
        "golden answers",
        "float32 parity",
        "float16 parity",
        "same question twice",
        "float16 best classes",
        "float32 copies between segments, by the engine's counters",
        "float16 copies between segments, by the engine's counters",
    }
    assert all(claim["met"] is True for claim in summary["summary"].values())


def test_the_system_is_worth_looking_at(printed: list[dict[str, Any]]) -> None:
    differences = {(line["precision"], line["task"]): line["max_difference"] for line in printed if "max_difference" in line}
    assert {task for _, task in differences} == {"plain-a", "plain-b", "cloned", "adapted"}
    # Float16 really is float16: its errors are far from float32's.
    assert all(differences["float16", task] > 20 * differences["float32", task] for _, task in differences)
    operators = [line["operators"] for line in printed if line.get("operators")]
    assert not operators or all(list(each) == ["CPUExecutionProvider"] for each in operators)
    crossed = [line for line in printed if "image_bytes" in line]
    assert len(crossed) == 2
    assert all(line["executions"] > line["segments"] >= 8 for line in crossed)


def test_a_failed_claim_is_exit_status_1_and_an_unproven_one_is_named(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    report = script.Report()
    assert report.summarise() == 1, "nothing claimed is nothing shown"
    report.claim("good", 0, "0", True)
    report.claim("dark", None, "0", None)
    assert report.summarise() == 0
    report.claim("bad", 1, "0", False)
    assert report.summarise() == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["failed"], last["unproven"]) == (["bad"], ["dark"])


def trace(**copied: int) -> dict[str, Any]:
    """What torch.profiler writes about some copies, between other events."""
    events: list[dict[str, Any]] = [
        {"ph": "X", "cat": "kernel", "name": "Memcpy-like kernel", "args": {"bytes": 7}},
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    ]
    for direction, num_bytes in copied.items():
        kinds = {"HtoD": "Pageable -> Device", "DtoH": "Device -> Pageable", "DtoD": "Device -> Device"}[direction]
        name = f"Memcpy {direction} ({kinds})"
        events += [{"ph": "X", "cat": "gpu_memcpy", "name": name, "args": {"bytes": part}} for part in (num_bytes - 1, 1)]
    return {"traceEvents": events}


def test_copies_are_read_from_a_trace(script: Any) -> None:
    assert script.copied_bytes(trace(HtoD=1000, DtoH=64, DtoD=5)) == {"HtoD": 1000, "DtoH": 64, "DtoD": 5}


@pytest.mark.parametrize(
    ("copied", "met"),
    [
        ({"HtoD": 1000, "DtoH": 64}, True),
        ({"HtoD": 1000, "DtoH": 64 + 40}, True),
        ({"HtoD": 1000, "DtoH": 64 + 100}, False),
        # A profiler that did not even see what must cross has seen nothing.
        ({"HtoD": 1000}, None),
        ({}, None),
    ],
)
def test_what_the_gpu_reports_is_held_against_what_must_cross(script: Any, copied: dict[str, int], met: bool | None) -> None:
    report = script.Report()
    script.claim_nothing_between_by_the_gpu(report, trace(**copied), image_bytes=1000, logit_bytes=64, row_bytes=100)
    (claim,) = report.claims.values()
    assert claim["met"] is met


def test_the_wrapper_keeps_and_joins_pieces(tmp_path: pathlib.Path) -> None:
    wheels, kept = tmp_path / "wheels", tmp_path / "kept"
    wheels.mkdir()
    wrapper = SCRIPT.with_suffix(".sh")
    for part, content in (("aa", b"first "), ("ab", b"second")):
        for file in wheels.iterdir():
            file.unlink()
        (wheels / f"big.whl.piece-{part}").write_bytes(content)
        places = {"KEPT": str(kept), "SITE": str(tmp_path / "site")}
        command = ["sh", str(wrapper), "--keep", str(wheels)]
        assert subprocess.run(command, env=environment() | places, capture_output=True, check=False).returncode == 0
    assert {file.name for file in kept.iterdir()} == {"big.whl.piece-aa", "big.whl.piece-ab"}
    # The bytes are no wheel, so that installing stops: by then they are whole.
    done = subprocess.run(["sh", str(wrapper), str(wheels)], env=environment() | places, capture_output=True, check=False)
    assert done.returncode != 0
    assert (kept / "big.whl").read_bytes() == b"first second"
