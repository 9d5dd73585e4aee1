"""What being killed costs a search beside the work that was lost: Q5.

    python -m benchmarks.kills [--smoke] [--experiment FILE] [--results benchmarks/results]

Runs `munet-evolve run` on an experiment in one go, then again on a new system with ten SIGKILLs at random moments, the same command
being run again after each, then once more in one go. The experiment is the demo's by default.

Q5  wall time with ten random kills / without, by the mean of the two runs in one go. Wall is the sum of the lives of all processes. Two
    things are not counted, and are printed: the work that each kill lost, from the last line of a journal (a child that is finished, a
    generation that is planned) to the kill; and the start-up of each process after the first, from its start to the line that says
    that its search opens, in which it starts Python and torch and reads the data.

A process is killed after a record, a random one of all that a run writes, and a random part of the time that a record takes in the
mean, but no later than at the next one. All runs must end with one lineage hash; otherwise there is no figure, and the exit status is 1.
Prints JSON lines, the last one sums up; without --smoke it takes about 15 minutes on two cores.
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

POLL_SECONDS = 0.01
"""Between two looks at the journals."""


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
        moments = draw_moments(folder / "before", before, 1 if arguments.smoke else NUM_KILLS, arguments.seed)
        lives = [live(experiment, folder / "killed", moment) for moment in (*moments, None)]
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


@dataclasses.dataclass(frozen=True)
class Moment:
    """When a process is killed.

    Attributes:
        num_records: that all journals have by then.
        seconds: after the last of them, unless another one comes before.
    """

    num_records: int
    seconds: float


def draw_moments(system: pathlib.Path, life: Life, number: int, seed: int) -> list[Moment]:
    """Draws so many moments of a run that went as `life` did and left this system, in order."""
    generator = random.Random(seed)
    total = count_records(system)
    mean_seconds = (life.seconds - life.start_up) / total
    # The last three records leave too little time to be sure of a kill.
    at = sorted(generator.sample(range(1, total - 2), number))
    return [Moment(num_records, generator.uniform(0, mean_seconds)) for num_records in at]


def count_records(system: pathlib.Path) -> int:
    """Returns the whole lines of all journals."""
    return sum(file.read_bytes().count(b"\n") for file in (system / "journal").glob("*.jsonl"))


def wait_for(system: pathlib.Path, moment: Moment, process: subprocess.Popen[str]) -> None:
    """Returns when the moment has come, or the process has ended."""
    while count_records(system) < moment.num_records and process.poll() is None:
        time.sleep(POLL_SECONDS)
    deadline = time.monotonic() + moment.seconds
    while count_records(system) == moment.num_records and time.monotonic() < deadline:
        time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def live(experiment: pathlib.Path, system: pathlib.Path, moment: Moment | None) -> Life:
    """Runs munet-evolve to its end, or kills it at a moment."""
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
        if moment is not None:
            wait_for(system, moment, process)
            process.kill()
        status = process.wait()
        ended = time.time()
        listener.join()
    if status != (0 if moment is None else -9):
        sys.exit(
            f"found exit status {status} of munet-evolve run; expected {'0' if moment is None else 'to kill it before it ends'}"
        )
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
