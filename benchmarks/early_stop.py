"""What early judgement saves, and what it costs in quality.

    python -m benchmarks.early_stop [--smoke] [--experiment FILE] [--task NAME ...] [--children N] [--seeds N] [--results DIR]

Searches each task twice from the same root, alone in a system of its own: every child trained to its end, and with `early_stop`. One
round, same seed, same data; the first generation is the same in both. By default the characters benchmark's digits, greek and hebrew.

E1  images trained with / without, summed over tasks and seeds. Seconds are in the lines: of training and validation by the clock, which
    other work on the machine moves at will, and of this process on its CPUs for the whole search, which it hardly moves.
E2  test accuracy with minus without, mean over tasks and seeds. A child stopped wrongly turns the search another way, which may end
    better or worse: with few seeds this is mostly luck, and `wrong` says more.

Each line also has a replay of the rule on the search without it, where all curves are whole: how many children it would have stopped
there, what that saves, and how many of them (`wrong`) came to beat their parent after all.

No target was set for it beforehand: the bounds say when it would be worth having, a tenth saved at no loss of half a point. Prints JSON
lines, the last one sums up; without --smoke it takes about 20 minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
import time
from typing import Any

import evolve
from benchmarks.reporting import TOP, Ratio, Report, Target, add_arguments, rounded
from evolve.journal import Record, child_records, read_journal
from evolve.judgement import intervals_until_hopeless, largest_gains, quality_to_beat
from evolve.outcomes import Outcomes

EXPERIMENT = TOP / "evolve" / "recipes" / "characters.toml"
TASKS = ("digits", "greek", "hebrew")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a search took and what it gave.

    Attributes:
        images: trained on, with repetition.
        seconds: of training and validation, by the clock.
        cpu_seconds: that this process computed, all of the search counted.
        quality: of the path it closed with, 0 to 1.
        test_accuracy: of that path, 0 to 1.
        outcomes: of its children.
    """

    images: int
    seconds: float
    cpu_seconds: float
    quality: float
    test_accuracy: float
    outcomes: Outcomes

    def to_json(self) -> dict[str, Any]:
        """Returns what a line says of it."""
        return {
            "images": self.images,
            "seconds": rounded(self.seconds),
            "cpu_seconds": rounded(self.cpu_seconds),
            "quality": rounded(self.quality),
            "test_accuracy": rounded(self.test_accuracy),
            "children": self.outcomes.trained,
            "survived": self.outcomes.survived,
            "stopped": self.outcomes.stopped_early,
        }


def main() -> None:
    """Runs the searches and prints what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=pathlib.Path, metavar="FILE", default=EXPERIMENT)
    parser.add_argument("--task", action="append", metavar="NAME", help="only this task; may be repeated")
    parser.add_argument("--children", type=int, default=32, help="of each search")
    parser.add_argument("--seeds", type=int, default=1, help="searches of each task, both ways")
    add_arguments(parser)
    arguments = parser.parse_args()
    report = Report("early_stop", arguments)
    experiment = evolve.load_experiment(arguments.experiment)
    children, names = arguments.children, arguments.task or TASKS
    training, generation_size = experiment.training, experiment.search.generation_size
    if arguments.smoke:
        children, names, generation_size = 8, ("digits",), 2
        training = training.model_copy(update={"batch_size": 16, "batches_per_interval": 2, "intervals": 3, "device": "cpu"})
    search = experiment.search.model_copy(update={"rounds": 1, "children_per_task": children, "generation_size": generation_size})
    pairs = []
    for settings in (task for task in experiment.tasks if task.name in names):
        data = evolve.load_task(settings)
        for seed in range(experiment.seed, experiment.seed + arguments.seeds):
            plan = evolve.SearchPlan(seed, experiment.defaults, search, training)
            pairs.append(_both(data, plan, experiment.root, report))
    with_it, without = zip(*pairs, strict=True)
    images = Ratio([sum(cost.images for cost in with_it)], [sum(cost.images for cost in without)])
    report.figure("E1", images.median, Target("<=", 0.9))
    gained = [one.test_accuracy - other.test_accuracy for one, other in pairs]
    report.figure("E2", statistics.mean(gained), Target(">=", -0.005))
    report.line(figure="E1", images=rounded(images.median), cpu_seconds=rounded(_seconds(with_it) / _seconds(without)))
    report.line(figure="E2", each=[rounded(value) for value in gained])
    report.finish(f"root {experiment.root.model or experiment.root.source}; {children} children, {arguments.experiment.name}")


def _seconds(costs: tuple[Cost, ...]) -> float:
    return sum(cost.cpu_seconds for cost in costs)


def _both(data: evolve.TaskData, plan: evolve.SearchPlan, root: evolve.RootSettings, report: Report) -> tuple[Cost, Cost]:
    """Searches with and without, and reports both."""
    costs, whole = [], []
    for early_stop in (True, False):
        changed = dataclasses.replace(plan, search=plan.search.model_copy(update={"early_stop": early_stop}))
        with tempfile.TemporaryDirectory(prefix="munet-early-stop-") as name:
            system = evolve.open_or_create(pathlib.Path(name) / "system", root)
            started = time.process_time()
            evolve.run_tasks(system, [data], changed)
            spent = time.process_time() - started
            whole = read_journal(system.journal_file(data.name, 0))
            costs.append(_cost(whole, system.tasks()[data.name].quality, spent))
    with_it, without = costs
    report.line(
        figure="E1",
        task=data.name,
        seed=plan.seed,
        with_it=with_it.to_json(),
        without=without.to_json(),
        images=rounded(with_it.images / without.images),
        cpu_seconds=rounded(with_it.cpu_seconds / without.cpu_seconds),
        replay=replay(whole),
    )
    return with_it, without


def _cost(records: list[Record], quality: float, cpu_seconds: float) -> Cost:
    rows = [row for _, row in child_records(records)]
    return Cost(
        images=sum(row["num_trained_images"] for row in rows),
        seconds=sum(row["seconds"]["train"] + row["seconds"]["evaluate"] for row in rows),
        cpu_seconds=cpu_seconds,
        quality=quality,
        test_accuracy=records[-1]["test_accuracy"] or 0.0,
        outcomes=Outcomes.of(rows),
    )


def replay(records: list[Record]) -> dict[str, Any]:
    """Applies the rule to a search whose children were all trained to their end.

    Args:
        records: its journal.

    Returns:
        How many children could be judged, how many would have stopped, how many of these survived in truth, and the share of all
        intervals that would have been trained.
    """
    packs = [record for record in records if record["type"] == "pack"]
    finished: list[list[float]] = []
    counts = {"judged": 0, "stopped": 0, "wrong": 0}
    trained = every = 0
    for index in sorted({pack["generation"] for pack in packs}):
        rows = [row for pack in packs if pack["generation"] == index for row in pack["children"]]
        gains = largest_gains(finished)
        for row in rows:
            curve, stop = row["interval_qualities"], None
            if row["parent_score"] is not None:
                counts["judged"] += 1
                factor = row["score"] / row["quality"] if row["quality"] else 1.0
                stop = intervals_until_hopeless(curve, quality_to_beat(row["parent_score"], factor), gains, len(curve))
            every += len(curve)
            trained += stop or len(curve)
            counts["stopped"] += stop is not None
            counts["wrong"] += stop is not None and row["survived"]
            if stop is None and not row.get("diverged"):
                finished.append(curve)
    return {**counts, "intervals": rounded(trained / every)}


if __name__ == "__main__":
    main()
