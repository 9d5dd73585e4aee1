"""What is made of finished runs, from made records."""

from __future__ import annotations

import math

import pytest

from benchmarks.comparison import Run, TaskOutcome, best_of, figures_of, margin, rows_of, standard_error, table_of


def _run(method: str, seed: int, *accuracies: float, accounted: float = 100.0, num_tasks: int | None = None) -> Run:
    outcomes = tuple(
        TaskOutcome(f"task-{number}", 0.9, accuracy, accounted, 640, 1e9, 2.0) for number, accuracy in enumerate(accuracies)
    )
    return Run(method, seed, outcomes, num_tasks or len(accuracies))


RUNS = [
    _run("search", 0, 0.80, 0.90, accounted=40),
    _run("search", 1, 0.82, 0.92, accounted=44),
    _run("search scaled", 0, 0.79, 0.86, accounted=20),
    _run("search scaled-fixed", 0, 0.83, 0.90, accounted=15),
    _run("finetune", 0, 0.78, 0.86),
    _run("finetune", 1, 0.78, 0.88),
    _run("freeze:1", 0, 0.70, 0.80, accounted=80),
    _run("freeze:2", 0, 0.75, 0.81, accounted=60),
    _run("freeze:2", 1, 0.90, 0.99, accounted=60),
    _run("adapters:8", 0, 0.60, 0.60, accounted=30),
    _run("finetune (tuned)", 0, 0.81, 0.87),
    _run("freeze:2 (tuned)", 0, 0.80, 0.90, accounted=60),
]


def test_a_row_is_the_mean_over_tasks_and_complete_runs() -> None:
    rows = {row.method: row for row in rows_of([*RUNS, _run("search", 2, 0.1, num_tasks=2)])}
    assert rows["search"].test_accuracy == pytest.approx(0.86)
    assert rows["search"].of_task("task-1") == pytest.approx(0.91)
    assert rows["search"].standard_error == pytest.approx(0.01)
    assert rows["search"].share == pytest.approx(0.42)
    assert rows["finetune"].share == 1
    line = rows["search"].to_json()
    assert line["seeds"] == [0, 1]
    assert (line["total_parameters"], line["num_trained_images"], line["flops"], line["seconds"]) == (84, 1280, 2e9, 4.0)
    assert rows["freeze:1"].to_json()["standard_error"] is None


def test_without_full_finetuning_the_share_is_not_known() -> None:
    (row,) = rows_of([_run("search", 0, 0.5)])
    assert row.to_json()["accounted_share_per_task"] is None


def test_margins_are_taken_seed_by_seed_over_the_seeds_that_both_have() -> None:
    rows = {row.method: row for row in rows_of(RUNS)}
    points, error, seeds = margin(rows["search"], rows["finetune"])
    assert (points, seeds) == (pytest.approx(3.5), [0, 1])
    assert error == pytest.approx(0.5)
    points, error, seeds = margin(rows["search scaled"], rows["finetune"])
    assert (points, seeds) == (pytest.approx(0.5), [0])
    assert math.isnan(error)
    assert math.isnan(margin(rows["search scaled"], rows_of([_run("other", 5, 0.5, 0.5)])[0])[0])


def test_the_best_baseline_is_the_one_on_the_first_seed() -> None:
    rows = rows_of(RUNS)

    def name(**wanted: object) -> str | None:
        best = best_of(rows, **wanted)
        return best.method if best else None

    assert name(tuned=False) == "finetune"
    assert name(tuned=False, kind="freeze") == "freeze:2"
    assert name(tuned=False, kind="adapters") == "adapters:8"
    assert name(tuned=True) == "freeze:2 (tuned)"
    assert best_of(rows_of(RUNS[:2]), tuned=False) is None


def test_figures_are_those_of_the_targets() -> None:
    figures = {figure.name: figure for figure in figures_of(RUNS)}
    assert figures["Q1"].value == pytest.approx(3.5)
    assert figures["Q1"].target.is_met(figures["Q1"].value)
    assert "points above finetune; standard error 0.5, seeds [0, 1]" in figures["Q1"].note
    # Every other baseline counts, over the seeds it shares with the search; tuned ones are Q8's.
    assert figures["Q1 others"].value == pytest.approx(((0.85 - 0.78) + (0.87 - 0.945)) * 50)
    assert not figures["Q1 others"].target.is_met(figures["Q1 others"].value)
    assert "freeze:2;" in figures["Q1 others"].note
    assert figures["Q2"].value == pytest.approx(0.42)
    assert figures["Q2 scaled"].value == pytest.approx(0.20)
    assert figures["Q2 scaled loss"].value == pytest.approx(0.5)
    # Each further search has figures of its own.
    assert figures["Q2 scaled-fixed"].value == pytest.approx(0.15)
    assert figures["Q2 scaled-fixed loss"].value == pytest.approx(4.5)
    assert figures["Q8 scaled-fixed"].value == pytest.approx(1.5)
    assert figures["Q8 scaled-fixed parameters"].value == pytest.approx(15 / 60)
    assert figures["Q8 scaled-fixed"].target.is_met(figures["Q8 scaled-fixed"].value)
    assert figures["Q8"].value == pytest.approx(0.0)
    assert "freeze:2 (tuned)" in figures["Q8"].note
    assert figures["Q8 parameters"].value == pytest.approx(42 / 60)
    assert figures["Q8 scaled"].value == pytest.approx(-2.5)
    assert figures["Q8 scaled parameters"].value == pytest.approx(20 / 60)


def test_figures_that_lack_a_run_are_left_out() -> None:
    assert figures_of([]) == []
    assert figures_of([_run("search", 0, 0.8), _run("finetune", 0, 0.7, num_tasks=2)]) == []
    assert [figure.name for figure in figures_of([*RUNS[:3], RUNS[4]])] == ["Q1", "Q2", "Q2 scaled", "Q2 scaled loss"]


def test_the_table_has_a_line_for_each_method() -> None:
    lines = table_of(rows_of(RUNS)).splitlines()
    assert len(lines) == 2 + 9
    assert lines[2].startswith("| search | 2 | 81.0 | 91.0 | 86.00 | 1.00 | 0.420 | 84 |")
    assert lines[6].startswith("| freeze:1 | 1 | 70.0 | 80.0 | 75.00 | - | 0.800 |")
    assert "no method has a complete run" in table_of([])


def test_the_standard_error_needs_two_values() -> None:
    assert math.isnan(standard_error([0.5]))
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
