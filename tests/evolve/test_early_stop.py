"""Early judgement in a search: what stops, what survives, and what no resuming, packing or trainer may change."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence

import pytest

from evolve.closing import ActiveTask
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.errors import SettingsError, TrainerError
from evolve.generation import ChildPlan, ChildResult, GenerationPlan
from evolve.journal import Journal, _checksum, child_records, read_journal
from evolve.judgement import largest_gains
from evolve.layer import NORM
from evolve.lineage import lineage_hash
from evolve.outcomes import Outcomes
from evolve.search import SearchPlan, run_rounds
from evolve.specs import adapter_spec, head_spec, new_parameters
from evolve.store import System
from evolve.summary import summarise
from evolve.vit import new_tensors
from tests.support.fake_trainer import FakeTrainer, QuietObserver, hash_quality, tiny_root

INTERVALS = 4


def plan(*, early_stop: bool = True, **search: object) -> SearchPlan:
    values = {"rounds": 1, "children_per_task": 32, "generation_size": 4, "mutation_rate": 0.3, "auto_tune": True, **search}
    training = TrainingSettings(batch_size=8, intervals=INTERVALS)
    return SearchPlan(0, DefaultSettings(), SearchSettings(early_stop=early_stop, **values), training)


def steady(generation: GenerationPlan, child: ChildPlan) -> Sequence[float]:
    """Curves that differ in height and rise by a fifth at most: many can be judged after one interval."""
    quality = hash_quality(generation, child)
    return [quality * share for share in (0.8, 0.9, 0.95, 1.0)]


class CurveTrainer(FakeTrainer):
    """Answers with whole curves, or stops where the plan says so."""

    def __init__(
        self, curve: Callable[[GenerationPlan, ChildPlan], Sequence[float]] = steady, *, stops: bool = True, lives: int = 10**9
    ) -> None:
        super().__init__(packs=lambda children: [[child] for child in children])
        self.curve, self.stops, self.lives = curve, stops, lives
        self.num_intervals = 0

    def _result(self, generation: GenerationPlan, child: ChildPlan) -> ChildResult:
        if self.lives == 0:
            raise Killed
        self.lives -= 1
        curve = tuple(self.curve(generation, child))
        if self.stops:
            curve = curve[: generation.stops_after(child, curve)]
        self.num_intervals += len(curve)
        result = super()._result(generation, child)
        best = curve.index(max(curve))
        return dataclasses.replace(result, interval_qualities=curve, best_interval=best, num_trained_images=400 * len(curve))


class Killed(Exception):
    pass


def search(folder: pathlib.Path, wanted: SearchPlan, trainer: FakeTrainer, names: Sequence[str] = ("a", "b")) -> System:
    system = System.open(folder) if System.exists(folder) else System.create(folder, tiny_root(), 32)
    tasks = [(ActiveTask(name, ("x", "y", "z"), 50, "f"), lambda: trainer) for name in names]
    run_rounds(system, tasks, wanted, QuietObserver())
    return system


def rows_of(system: System, *names: str) -> list[tuple[dict, dict]]:
    """Plan and result of every child."""
    return [pair for name in names or ("a", "b") for pair in child_records(read_journal(system.journal_file(name, 0)))]


def decisions(system: System) -> list:
    """What the journals say but seconds, and what belongs to the very folder."""
    kept = []
    for name in ("a", "b"):
        for record in read_journal(system.journal_file(name, 0)):
            row = json.loads(
                json.dumps({key: value for key, value in record.items() if key not in ("crc32", "seconds", "system")})
            )
            for child in row.get("children", []):
                child.pop("seconds", None)
            kept.append(row)
    return kept


def test_it_is_off_by_default_and_leaves_no_trace(tmp_path):
    assert not SearchSettings().early_stop
    trainer = CurveTrainer()
    system = search(tmp_path / "system", plan(early_stop=False), trainer)
    assert trainer.num_intervals == 64 * INTERVALS
    assert all(generation.gains == () for generation in trainer.plans)
    assert all(child.quality_to_beat is None for generation in trainer.plans for child in generation.children)
    for planned, row in rows_of(system):
        assert "quality_to_beat" not in planned
        assert "stopped_after" not in row


def test_hopeless_children_stop_and_the_best_is_found_all_the_same(tmp_path):
    without, with_it = CurveTrainer(), CurveTrainer()
    slow = search(tmp_path / "slow", plan(early_stop=False), without)
    fast = search(tmp_path / "fast", plan(), with_it)
    assert with_it.num_intervals < 0.7 * without.num_intervals
    # All curves rise alike, so nobody was stopped wrongly: the same paths, bit by bit.
    strip = [dataclasses.replace(record, settings={}) for record in fast.tasks().values()]
    assert strip == [dataclasses.replace(record, settings={}) for record in slow.tasks().values()]
    for name in ("a", "b"):
        outcomes = Outcomes.of(row for _, row in rows_of(fast, name))
        assert outcomes.stopped_early > 5
        (task,) = [task for task in summarise(fast).tasks if task.name == name]
        assert task.outcomes == outcomes
        assert f"{outcomes.stopped_early} children stopped early" in str(outcomes)
        for planned, row in rows_of(fast, name):
            if "stopped_after" in row:
                beaten = f"could no longer exceed quality {planned['quality_to_beat']:.6g}"
                assert row["reason"] == f"stopped after interval {row['stopped_after']}: {beaten}"
            else:
                assert row["survived"] or row["reason"].startswith("score ")


def test_every_stop_follows_from_the_journal(tmp_path):
    """The rule a second time: gains of earlier generations, the parent's score, the child's curve."""
    system = search(tmp_path / "system", plan(scale_factor=1.0), CurveTrainer())
    stopped = 0
    for name in ("a", "b"):
        records = read_journal(system.journal_file(name, 0))
        planned = {(r["index"], child["index"]): child for r in records if r["type"] == "generation" for child in r["children"]}
        rows = [(r["generation"], row) for r in records if r["type"] == "pack" for row in r["children"]]
        for generation, row in rows:
            # Without scale control a quality is a score.
            assert planned[generation, row["index"]]["quality_to_beat"] == row["parent_score"]
            if "stopped_after" not in row:
                assert len(row["interval_qualities"]) == INTERVALS
                continue
            stopped += 1
            earlier = [r["interval_qualities"] for g, r in rows if g < generation and "stopped_after" not in r]
            gains = largest_gains(earlier) or (1.0,) * INTERVALS
            assert not row["survived"]
            assert len(row["interval_qualities"]) == row["stopped_after"] < INTERVALS
            assert max(row["interval_qualities"]) + gains[row["stopped_after"] - 1] <= row["parent_score"]
    assert stopped > 10


def test_children_of_seeds_are_never_stopped(tmp_path):
    system = search(tmp_path / "system", plan(), CurveTrainer(lambda *_: [0.0] * INTERVALS))
    for planned, row in rows_of(system):
        if row["parent_score"] is None:
            assert planned["quality_to_beat"] is None
            assert row["survived"]
            assert len(row["interval_qualities"]) == INTERVALS


def test_children_of_a_perfect_parent_stop_after_one_interval(tmp_path):
    system = search(tmp_path / "system", plan(), CurveTrainer(lambda *_: [1.0] * INTERVALS), ["a"])
    judged = [row for planned, row in rows_of(system, "a") if planned["quality_to_beat"] is not None]
    assert judged
    assert all(row["stopped_after"] == 1 and not row["survived"] for row in judged)


def test_a_trainer_that_trains_on_changes_no_decision_even_if_the_child_wins_in_the_end(tmp_path):
    def late(generation: GenerationPlan, child: ChildPlan) -> Sequence[float]:
        # From the second generation on, children start low and end far above everybody: nobody before them gained as much.
        if generation.index == 0:
            return [0.5, 0.5, 0.5, 0.5]
        return [0.1, 0.1, 0.1, 0.9]

    ends = [search(tmp_path / str(stops), plan(), CurveTrainer(late, stops=stops)) for stops in (True, False)]
    for system in ends:
        wronged = [row for _, row in rows_of(system) if "stopped_after" in row]
        assert wronged
        for row in wronged:
            assert not row["survived"]
            assert row["quality"] == 0.1
            assert row["interval_qualities"] == [0.1]
    strip = [[dataclasses.replace(record, settings={}) for record in system.tasks().values()] for system in ends]
    assert strip[0] == strip[1]
    assert lineage_hash(ends[0]) == lineage_hash(ends[1])


@pytest.mark.parametrize("lives", [1, 4, 6, 13, 31, 33, 50])
def test_killing_and_resuming_changes_no_stop(tmp_path, lives):
    whole = search(tmp_path / "whole", plan(scale_factor=0.5), CurveTrainer())
    with pytest.raises(Killed):
        search(tmp_path / "broken", plan(scale_factor=0.5), CurveTrainer(lives=lives))
    broken = search(tmp_path / "broken", plan(scale_factor=0.5), CurveTrainer())
    assert decisions(broken) == decisions(whole)
    assert broken.tasks() == whole.tasks()
    assert Outcomes.of(row for _, row in rows_of(whole)).stopped_early > 0


def test_packing_changes_no_stop(tmp_path):
    systems = []
    for number, width in enumerate((1, 3, 4)):
        trainer = CurveTrainer()
        trainer.packs = lambda children, width=width: [
            children[start : start + width] for start in reversed(range(0, len(children), width))
        ]
        systems.append(search(tmp_path / str(number), plan(), trainer))
    first = {row["path_id"]: row.get("stopped_after") for _, row in rows_of(systems[0])}
    for system in systems[1:]:
        assert {row["path_id"]: row.get("stopped_after") for _, row in rows_of(system)} == first
        assert system.tasks() == systems[0].tasks()


def test_diverged_and_stopped_children_show_no_gain(tmp_path):
    class Broken(CurveTrainer):
        def _result(self, generation, child):
            result = super()._result(generation, child)
            return dataclasses.replace(result, diverged=True) if generation.index == 0 else result

    trainer = Broken()
    system = search(tmp_path / "system", plan(children_per_task=12), trainer, ["a"])
    assert trainer.plans[1].gains == ()
    assert trainer.plans[2].gains
    rows = [row for _, row in rows_of(system, "a")]
    assert [row.get("diverged", False) for row in rows] == [True] * 4 + [False] * 8
    assert Outcomes.of(rows).diverged == 4
    for row in rows[:4]:
        assert row["quality"] == row["score"] == 0.0
        assert row["survived"] == (row["parent_score"] is None)


# Settings and journals


def test_a_search_begun_before_there_was_early_judgement_goes_on(tmp_path):
    wanted = plan(early_stop=False)
    whole = search(tmp_path / "whole", wanted, CurveTrainer())
    with pytest.raises(Killed):
        search(tmp_path / "old", wanted, CurveTrainer(lives=10))
    file = tmp_path / "old" / "journal" / "a-0001.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    first = json.loads(lines[0])
    del first["crc32"], first["settings"]["search"]["early_stop"], first["resolved_settings"]["search"]["early_stop"]
    lines[0] = json.dumps({"crc32": _checksum(first), **first}) + "\n"
    file.write_text("".join(lines))
    with pytest.raises(SettingsError, match=r"settings\.search\.early_stop = False then and True now"):
        search(tmp_path / "old", plan(), CurveTrainer())
    old = search(tmp_path / "old", wanted, CurveTrainer())
    assert old.tasks() == whole.tasks()
    assert decisions(old)[1:] == decisions(whole)[1:]


def test_a_search_cannot_change_its_mind(tmp_path):
    with pytest.raises(Killed):
        search(tmp_path / "system", plan(), CurveTrainer(lives=10))
    with pytest.raises(SettingsError, match=r"early_stop = True then and False now"):
        search(tmp_path / "system", plan(early_stop=False), CurveTrainer())


def test_planned_parameters_are_those_that_training_gives():
    for spec in (adapter_spec(16, 8), adapter_spec(12, 32), head_spec(16, 5)):
        assert new_parameters(spec) == sum(tensor.size for tensor in new_tensors(spec, [0, 0]).values())
    with pytest.raises(ValueError, match="expected an adapter or a head"):
        new_parameters(tiny_root()[NORM][0])


@pytest.mark.parametrize(
    "curve", [[0.5, float("nan"), 0.5, 0.5], [0.5, float("inf"), 0.0, 0.0], [0.5, 1.5, 0.0, 0.0], [-0.1] * 4]
)
def test_a_quality_that_is_none_is_the_trainers_fault(tmp_path, curve):
    with pytest.raises(TrainerError, match="expected numbers from 0 to 1"):
        search(tmp_path / "system", plan(early_stop=False), CurveTrainer(lambda *_: curve))
    journal = Journal(tmp_path / "system" / "journal" / "a-0001.jsonl")
    assert journal.of_type("pack") == []
    journal.close()
