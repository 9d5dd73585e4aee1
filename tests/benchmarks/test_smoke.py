"""Every benchmark runs from end to end, tiny, and ends with the line that sums it up."""

from __future__ import annotations

import json
import math
import pathlib
import re
import subprocess
from collections.abc import Set
from typing import Any

import pytest

from benchmarks.reporting import Ratio, Target
from tests.support.processes import PYTHON, TOP, environment

TIMEOUT_SECONDS = 900
"""Half a minute is enough on a machine of one's own."""


def smoke(what: str, results: pathlib.Path, python: pathlib.Path = PYTHON) -> list[dict[str, Any]]:
    """Runs a benchmark and returns its lines; those that hand functions of their own to other processes need a Python of their own."""
    command = [
        str(python),
        "-m",
        f"benchmarks.{what}",
        "--smoke",
        "--results",
        str(results),
        "--hardware",
        "Some 1 CPU, small",
    ]
    done = subprocess.run(
        command, cwd=TOP, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    (written,) = results.iterdir()
    assert re.fullmatch(rf"{what}_some-1-cpu_\d{{4}}-\d\d\.jsonl", written.name)
    assert written.read_text() == done.stdout
    return [json.loads(line) for line in done.stdout.splitlines()]


def figures_of(lines: list[dict[str, Any]], without_target: Set[str] = frozenset()) -> dict[str, Any]:
    figures = summary_of(lines)
    assert {line["figure"] for line in lines[:-1]} == figures.keys() | without_target
    return figures


def summary_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    summary = lines[-1]
    assert summary.keys() == {"summary", "hardware", "model", "commit"}
    assert summary["hardware"] == "Some 1 CPU, small"
    for figure in summary["summary"].values():
        assert figure.keys() == {"value", "target", "met"}
        relation, bound = figure["target"].split()[:2]
        # Both are printed with four digits: where they are alike then, the value itself may have been on either side.
        assert figure["value"] == float(bound) or figure["met"] == Target(relation, float(bound)).is_met(figure["value"])
    return summary["summary"]


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_serve(tmp_path, warm_python):
    lines = smoke("serve", tmp_path, warm_python)
    figures = figures_of(lines, without_target={"null"})
    assert figures.keys() == {"S1", "S2", "S3", "S4", "S5", "S6", "S7", "S7 p99", "S8", "S9", "S10", "S10 late", "S11"}
    assert all(0 < figure["value"] < math.inf for name, figure in figures.items() if name not in ("S7", "S10 late"))
    # Not one answer failed or was torn, also with models as small as these.
    assert figures["S7"] == {"value": 0.0, "target": "<= 0", "met": True}
    first = next(line for line in lines if line["figure"] == "S1")
    # Two tasks, two of three blocks shared: less than the whole forward pass is saved.
    assert 2 / 3 < first["shared"] < 1
    assert first["bound"] == pytest.approx(2 / (first["shared"] + 2 * (1 - first["shared"])), rel=1e-3)
    seventh = next(line for line in lines if "torn" in line)
    assert seventh["reloads"] == 20
    assert seventh["answers"] > 20
    eighth = next(line for line in lines if "kinds_mib" in line)
    assert {"10", "20"} == eighth["kinds_mib"].keys() == eighth["rss_mib"].keys()
    for mark, kinds in eighth["kinds_mib"].items():
        # The system counts in two ways.
        assert sum(kinds.values()) == pytest.approx(eighth["rss_mib"][mark], rel=0.2)
        assert min(kinds.values()) > 0
    null = next(line for line in lines if "share_of_echo" in line)
    assert null["cpu_us_per_request"].keys() == {"echo", "front door", "with engine"}


def test_answers_during_a_reload_are_those_that_began_in_one():
    from benchmarks.serve.reloads import Record

    record = Record(answers=[(0.5, 1.0), (1.5, 3.0), (2.5, 1.0), (3.9, 2.0), (9.0, 1.0)], reloads=[(1.0, 2.0), (3.0, 4.0)])
    assert record.p99(during=True) == pytest.approx(3.0, rel=0.01)
    assert record.p99(during=False) == 1.0


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_search(tmp_path, warm_python):
    lines = smoke("search", tmp_path, warm_python)
    figures = figures_of(lines)
    assert figures.keys() == {"Q6", "Q7"}
    assert 0 < figures["Q7"]["value"] < 1
    every = next(line for line in lines if line.get("journal") == "all")
    parts = every["seconds_per_child"]
    assert every["children"] == 8
    assert sum(parts.values()) * 8 == pytest.approx(every["wall_seconds"], rel=1e-2)
    for line in lines:
        if "task" in line:
            # It is beyond its own parameters: a journal and a record are there too, and a file has a header.
            assert line["bytes"]["journals"] > 0
            assert 0 < line["own_parameters_share"] < line["ratio"] < 1


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_kills(tmp_path):
    lines = smoke("kills", tmp_path)
    figures = figures_of(lines)
    assert figures.keys() == {"Q5"}
    runs = [line for line in lines if "run" in line]
    assert [line["was_killed"] for line in runs] == [False, True, False, False]
    assert all(line["lost"] > 0 for line in runs if line["was_killed"])
    assert all(0 < line["start_up"] < line["seconds"] for line in runs)
    killed = [line for line in runs if line["run"] == "killed"]
    without = sum(line["seconds"] for line in runs if line["run"] == "in one go") / 2
    counted = sum(line["seconds"] - line["lost"] for line in killed) - sum(line["start_up"] for line in killed[1:])
    assert figures["Q5"]["value"] == pytest.approx(counted / without, rel=1e-2)
    hashes = next(line["lineage_hashes"] for line in lines if "lineage_hashes" in line)
    assert len(set(hashes.values())) == 1


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_train(tmp_path, warm_python):
    lines = smoke("train", tmp_path, warm_python)
    figures = figures_of(lines)
    assert figures.keys() == {"T1", "T2", "T3", "T4", "T5"}
    assert figures["T4"]["met"]
    first, second = (next(line for line in lines if line["figure"] == name) for name in ("T1", "T2"))
    # 16 heads cost next to nothing; two epochs of the frozen two of three blocks become one, and those of 16 children those of one.
    assert 14 < first["bound"] < 16
    assert 1.5 < second["bound"] < 2


def test_a_target_says_whether_it_is_met():
    assert Target(">=", 0.85).is_met(0.85)
    assert not Target(">=", 0.85).is_met(0.84)
    assert not Target("<=", 1.05).is_met(1.06)
    assert not Target("<=", 1.05).is_met(math.nan)
    assert str(Target("<=", 1.05)) == "<= 1.05"


def test_a_ratio_is_taken_within_each_repetition():
    # A burst of other work slows both sides of the second repetition, and moves nothing.
    ratio = Ratio([1.0, 10.0, 1.2], [2.0, 20.0, 2.0])
    assert ratio.median == 0.5
    assert ratio.spread(2.0) == {"median": 1.0, "quartiles": [1.0, 1.1], "range": [1.0, 1.2], "repetitions": 3}


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_triton(tmp_path):
    lines = smoke("triton", tmp_path)
    figures = figures_of(lines)
    assert figures.keys() == {"T4"}
    assert 0 < figures["T4"]["value"] < math.inf
    servers = {(line["engine"], line["layout"]): line for line in lines[:-1] if "layout" in line}
    assert servers.keys() >= {("embedded", "shared"), ("triton", "shared"), ("triton", "one model per task")}
    # The same Triton, and the front door.
    (behind,) = [line for (engine, _), line in servers.items() if engine == "front door on triton"]
    assert behind["pss_mib"] > servers["triton", behind["layout"]]["pss_mib"]
    # Two tasks, one of them with its own last block: stem and two blocks, two last blocks, two heads.
    assert {name: line["segments"] for name, line in servers.items() if name[1] == "shared"} == {
        ("embedded", "shared"): 5,
        ("triton", "shared"): 5,
    }
    assert servers["triton", "one model per task"]["pieces_per_route"] == 1
    for line in servers.values():
        assert 0 < line["pss_mib"] <= line["rss_mib"]
        for load in line["loads"]:
            assert 0 < load["p50_ms"] <= load["p99_ms"]
            assert load["per_second"] > 0


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_early_stop(tmp_path, warm_python):
    lines = smoke("early_stop", tmp_path, warm_python)
    figures = figures_of(lines)
    assert figures.keys() == {"E1", "E2"}
    assert 0 < figures["E1"]["value"] <= 1
    first = lines[0]
    assert first["with_it"]["children"] == first["without"]["children"] == 8
    assert first["without"]["stopped"] == 0
    assert first["without"]["images"] == 8 * 3 * 2 * 16
    assert first["images"] == pytest.approx(first["with_it"]["images"] / first["without"]["images"], rel=1e-3)
    assert first["replay"]["wrong"] <= first["replay"]["stopped"] <= first["replay"]["judged"] < 8


def test_training_choices(tmp_path, warm_python):
    lines = smoke("training_choices", tmp_path, warm_python)
    assert summary_of(lines).keys() == {"C1"}
    assert [line["way"] for line in lines[:-1]] == ["fused, eager", "plain, eager"]
    assert all(line["milliseconds_a_step"] > 0 for line in lines[:-1])


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_whole_search(tmp_path, warm_python):
    lines = smoke("whole_search", tmp_path, warm_python)
    figures = summary_of(lines)
    assert figures.keys() == {"W2", "W3"}
    assert figures["W3"] == {"value": 1.0, "target": ">= 1", "met": True}
    runs = {line["way"]: line for line in lines if "repetition" in line}
    assert runs.keys() == {"before", "side by side"}
    assert {run["children"] for run in runs.values()} == {4}
    # Three figures of four digits, each off by up to one in 2,000.
    assert figures["W2"]["value"] == pytest.approx(
        runs["before"]["wall_seconds"] / runs["side by side"]["wall_seconds"], rel=2e-3
    )


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_scaling(tmp_path, warm_python):
    lines = smoke("scaling", tmp_path, warm_python)
    figures = figures_of(lines)
    assert figures.keys() == {"P1", "P2", "P3", "P4"}
    assert {line["kind"] for line in lines[:-1]} == {"measured", "arithmetic", "simulated"}
    assert next(line for line in lines if "same_lineage" in line)["same_lineage"]
    # 4 + 1, 8 + 1 and 12 + 1 tasks: the search that is measured adds its own, and saw those before it.
    snapshots = [line["last_journal"] for line in lines if "last_journal" in line]
    assert [one["snapshot_rows"] for one in snapshots] == [4, 8, 12]
    assert all(0 < one["compressed"] < one["plain"] for one in snapshots)
    # Twice the tasks, about four times the snapshots: each journal has one.
    stores = [line for line in lines if "gigabytes" in line]
    for store in stores:
        tens = dict(zip(store["tasks"], store["gigabytes"]["snapshots"], strict=True))
        assert tens[10_000] / tens[1000] == pytest.approx(100, rel=0.01)
    for line in lines:
        if "speed_up" in line:
            assert all(0 < share <= 1 for share in line["efficiency"])
            assert line["wall_seconds"] == sorted(line["wall_seconds"], reverse=True)


def test_the_replay_of_early_judgement_counts_what_would_have_stopped_wrongly():
    from benchmarks.early_stop import replay

    def child(curve, parent_score, survived):
        quality = max(curve)
        return {
            "interval_qualities": curve,
            "quality": quality,
            "score": quality,
            "parent_score": parent_score,
            "survived": survived,
        }

    first = {"type": "pack", "generation": 0, "children": [child([0.4, 0.5, 0.5], None, True)]}
    second = {
        "type": "pack",
        "generation": 1,
        "children": [child([0.1, 0.1, 0.1], 0.5, False), child([0.2, 0.2, 0.9], 0.5, True), child([0.45, 0.4, 0.4], 0.5, False)],
    }
    # Two stop after one interval, one of them wrongly; the third might have gained a tenth, until its second interval.
    assert replay([first, second]) == {"judged": 3, "stopped": 3, "wrong": 1, "intervals": round(7 / 12, 4)}
