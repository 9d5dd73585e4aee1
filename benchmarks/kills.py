"""What being killed costs a search beside the work that was lost: Q5.

    python -m benchmarks.kills [--smoke] [--experiment FILE] [--results benchmarks/results]

Runs `munet-evolve run` on an experiment in one go, then again on a new system with ten SIGKILLs at random moments, the same command
being run again after each, then once more in one go. The experiment is the demo's by default.

Q5  wall time with ten random kills / without, by the mean of the two runs in one go. Wall is the sum of the lives of all processes. Two
    things are not counted, and are printed: the work that each kill lost, from the last line of a journal (a child that is finished, a
    generation that is planned) to the kill; and the start-up of each process after the first, from its start to the line that says
    that its search opens, in which it starts Python and torch and reads the data.

The moments are drawn evenly over the time in which a run in one go searches. All runs must end with one lineage hash; otherwise there is no
figure, and the exit status is 1. Prints JSON lines, the last one sums up; without --smoke it takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

from benchmarks.reporting import TOP, Report, Target, add_arguments, rounded
from benchmarks.search import SMOKE_EXPERIMENT
from evolve.lineage import lineage_hash
from evolve.store import System

NUM_KILLS = 10


@dataclasses.dataclass(frozen=True)
class Life:
    """One process from its start to its end.

    Attributes:
        seconds: that it lived.
        start_up: seconds until its first search opened.
        lost: seconds from the last line of a journal to the kill; 0 without one.
        killed: whether it was.
    """

    seconds: float
    start_up: float
    lost: float
    killed: bool


def main() -> None:
    """Runs searches with and without kills and prints what the kills cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=pathlib.Path, metavar="FILE", help="what to run; the demo's by default")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which processes are killed")
    add_arguments(parser)
    arguments = parser.parse_args()
    report = Report("kills", arguments)
    with tempfile.TemporaryDirectory(prefix="munet-kills-") as name:
        folder = pathlib.Path(name)
        experiment = arguments.experiment or TOP / "demo" / "experiment.toml"
        if arguments.smoke:
            experiment = folder / "smoke.toml"
            experiment.write_text(SMOKE_EXPERIMENT)
        before = live(experiment, folder / "before", None)
        num_kills = 2 if arguments.smoke else NUM_KILLS
        lives = live_and_die(experiment, folder / "killed", moments(before, num_kills, arguments.seed))
        after = live(experiment, folder / "after", None)
        hashes = {run: lineage_hash(System.open(folder / run)) for run in ("before", "killed", "after")}
        root = System.open(folder / "killed").root
    report_lives(before, lives, after, report)
    report.line(figure="Q5", lineage_hashes=hashes)
    if len(set(hashes.values())) != 1:
        sys.exit(f"found lineage hashes {hashes}; expected one: what the killed search trained is not what the others trained")
    report.finish(
        f"root of {root.num_blocks} blocks, {root.num_parameters:,} parameters; {experiment.name}; {len(lives) - 1} kills"
    )


def moments(life: Life, number: int, seed: int) -> list[float]:
    """Returns how long each process but the last may search, in seconds: random, and in all as long as a run in one go at most."""
    generator = random.Random(seed)
    at = sorted(generator.uniform(0, life.seconds - life.start_up) for _ in range(number))
    return [later - earlier for earlier, later in zip([0.0, *at], at, strict=False)]


def live_and_die(experiment: pathlib.Path, system: pathlib.Path, searching: Sequence[float]) -> list[Life]:
    """Runs an experiment in so many processes that are killed, and one that is not."""
    lives = [live(experiment, system, seconds) for seconds in searching]
    if not all(life.killed for life in lives):
        sys.exit(
            "found a process that ended before it was killed; expected a machine on which a run takes as long as the one before"
        )
    return [*lives, live(experiment, system, None)]


def live(experiment: pathlib.Path, system: pathlib.Path, searching: float | None) -> Life:
    """Runs munet-evolve to its end, or kills it when it has searched for so many seconds."""
    command = [sys.executable, "-u", "-m", "evolve.cli", "run", str(experiment), "--system", str(system)]
    started = time.time()
    opened = threading.Event()
    start_up = 0.0
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(TOP)}, stdout=subprocess.PIPE, text=True) as process:

        def listen() -> None:
            nonlocal start_up
            for line in process.stdout or ():
                sys.stderr.write(line)
                if ": round " in line and not opened.is_set():
                    start_up = time.time() - started
                    opened.set()
            opened.set()

        listener = threading.Thread(target=listen)
        listener.start()
        opened.wait()
        if searching is not None:
            time.sleep(searching)
            process.kill()
        status = process.wait()
        ended = time.time()
        listener.join()
    if status not in (0, -9):
        sys.exit(f"found exit status {status} of munet-evolve run; expected 0")
    # A journal's time of change is that of its last line.
    written = max((file.stat().st_mtime for file in (system / "journal").glob("*.jsonl")), default=started)
    lost = ended - max(written, started + start_up) if status else 0.0
    return Life(ended - started, start_up, lost, killed=status != 0)


def report_lives(before: Life, lives: Sequence[Life], after: Life, report: Report) -> None:
    """Reports Q5."""
    for life, run in ((before, "in one go"), *((life, "killed") for life in lives), (after, "in one go")):
        seconds = {name: rounded(value) for name, value in dataclasses.asdict(life).items() if name != "killed"}
        report.line(figure="Q5", run=run, was_killed=life.killed, **seconds)
    without = statistics.mean((before.seconds, after.seconds))
    wall, lost = sum(life.seconds for life in lives), sum(life.lost for life in lives)
    start_ups = sum(life.start_up for life in lives[1:])
    report.line(
        figure="Q5",
        without_seconds=rounded(without),
        with_seconds=rounded(wall),
        lost_seconds=rounded(lost),
        start_up_seconds_per_kill=rounded(start_ups / (len(lives) - 1)),
        all_counted=rounded(wall / without),
    )
    note = f"{len(lives) - 1} kills, {start_ups / (len(lives) - 1):.1f} s of start-up each not counted"
    report.figure("Q5", (wall - lost - start_ups) / without, Target("<=", 1.05), note)


if __name__ == "__main__":
    main()
