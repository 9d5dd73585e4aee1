"""Whether a server stays what it is, for as long as it is asked to: mixed load, random faults, and what it holds afterwards.

    python -m benchmarks.soak [--minutes 30 | --reloads 1000] [--seed 0] [--smoke] [--results benchmarks/results]

A real `munet-server serve` serves two generations in turns (the size of the demonstration's root, random weights); one task answers alike
in both though its route is cut otherwise, another differs. Callers ask it in every way at once: encoded and raw images, one and several,
one task and all, streams. Meanwhile strangers do what `benchmarks.soak_faults` lists, drawn at random: damaged images, bytes that are no
request, calls that are left, connections that are half open, streams that nobody reads, callers that are killed; and the repository is
reloaded, altered, damaged and mended.

Every answer's logits are compared with what plain ONNX Runtime says of the generation that the answer names (1e-4, a hundredth of what two
generations differ by and more), and its bits with those of the first answer to the same question. Every call must end with a status that it
may end with.

The load runs in rounds, after each of which the server is left alone until it has closed what is to be closed. The moments of rest after a
warm-up (the first third) are compared, the first half of them with the second: file descriptors and threads by their medians, memory (RSS)
by the least. What is in use is in each of them; what the allocator has not given back yet comes and goes, a tenth of the whole and more.
The verdict is 1 if nothing was wrong, no status unexpected, and memory grew by at most 2 %, file descriptors and threads by at most 2.

With --reloads the server is reloaded so many times as fast as it goes, under the same load, and nothing else is done to the repository.

Prints JSON lines, one a round; the last one sums up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import math
import pathlib
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.held import Held
from benchmarks.published import CHARACTERS, Own, System
from benchmarks.published import SMOKE as SMOKE_ARCHITECTURE
from benchmarks.reporting import TOP, Report, Target, add_arguments, rounded
from benchmarks.soak_faults import Publisher, Strangers
from benchmarks.soak_load import Callers, Question, Tally
from munet.runtime import onnxruntime

MIB = 2**20
NUM_IMAGES = 6
MEMORY_GROWTH = 1.02
"""Of the least memory at rest."""

MOST_MORE = 2
"""File descriptors, and threads."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is done.

    Attributes:
        smoke: tiny models.
        minutes: in all, unless `reloads` is given.
        round_seconds: of load between two moments of rest.
        callers: that ask at the same time.
        pause_seconds: of a caller between two questions, at most.
    """

    smoke: bool
    minutes: float
    round_seconds: float
    callers: int
    pause_seconds: float


FULL = Effort(smoke=False, minutes=30, round_seconds=20, callers=8, pause_seconds=0.02)
SMOKE = Effort(smoke=True, minutes=0.15, round_seconds=2, callers=4, pause_seconds=0.02)


def main() -> None:
    """Soaks a server and prints what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, help=f"how long; {FULL.minutes:g} by default")
    parser.add_argument("--reloads", type=int, help="reload so many times, as fast as it goes, instead of for some minutes")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    add_arguments(parser)
    arguments = parser.parse_args()
    effort = SMOKE if arguments.smoke else FULL
    if arguments.minutes is not None:
        effort = dataclasses.replace(effort, minutes=arguments.minutes)
    report = Report("soak", arguments)
    with tempfile.TemporaryDirectory(prefix="munet-soak-") as name:
        folder = pathlib.Path(name)
        questions = publish(folder, effort)
        with serving(folder) as server:
            soak = Soak(server, folder / "repository", questions, effort, arguments.seed, report)
            asyncio.run(soak.run(arguments.reloads))
    report.finish(
        "tiny random weights" if effort.smoke else "ViT-Ti/16, 3 blocks, 32 px, random weights, float32, two generations"
    )


# What is served


def publish(folder: pathlib.Path, effort: Effort) -> list[Question]:
    """Publishes generations 1 and 2 and returns what may be asked, with the true answers. Needs torch."""
    from benchmarks import random_models

    architecture = SMOKE_ARCHITECTURE if effort.smoke else CHARACTERS
    own = Own((architecture.blocks - 1,))
    generations: tuple[dict[str, Own], ...] = ({"steady": Own(), "moving": Own()}, {"other": own, "moving": own})
    images = np.random.default_rng(0).integers(
        0, 256, (NUM_IMAGES, architecture.image_size, architecture.image_size, 3), np.uint8
    )
    answers: dict[str, dict[int, Any]] = {"steady": {}, "moving": {}}
    # The first generation by itself has the weights that it has among both.
    for number, where in ((1, folder / "first"), (2, folder)):
        published = random_models.publish(where, System(f"soak {number}", architecture, generations[:number], whole=True))
        for task in answers:
            session = onnxruntime.InferenceSession(str(published.whole[task]), providers=["CPUExecutionProvider"])
            answers[task][number] = np.concatenate([session.run(None, {"image": image[None]})[0] for image in images])
    return [
        Question(task, index, image, {number: logits[index] for number, logits in by_number.items()})
        for task, by_number in answers.items()
        for index, image in enumerate(images)
    ]


@dataclasses.dataclass(frozen=True)
class Server:
    """A server in a process of its own.

    Attributes:
        process_id: whose.
        address: for questions.
        admin_address: for administration.
    """

    process_id: int
    address: str
    admin_address: str


@contextlib.contextmanager
def serving(folder: pathlib.Path) -> Iterator[Server]:
    """Serves the repository in a folder, and checks that it ends as it should."""
    settings = folder / "server.toml"
    settings.write_text("watch_interval_seconds = 0.05\ndrain_seconds = 0.0\n[connections]\nhandshake_seconds = 2\n")
    # With -u first, for a test whose Python would else run it in a process that has imported torch.
    command = [sys.executable, "-u", "-m", "server.cli", "serve", "--settings", str(settings), "--log-level", "error"]
    places = ["--repository", str(folder / "repository"), "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen([*command, *places], cwd=TOP, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            found = re.search(r"at (\S+), admin (\S+)", process.stdout.readline())
            if found is None:
                raise RuntimeError(f"found that the server did not start; its log: {(folder / 'log').read_text()[-2000:]}")
            yield Server(process.pid, found[1], found[2])
            process.send_signal(signal.SIGTERM)
            if process.wait(30) != 0:
                raise RuntimeError(f"found exit status {process.returncode}, expected 0")
        finally:
            process.kill()


# The soak


class Soak:
    """Load and faults in rounds, and what the server holds between them.

    Args:
        server: which.
        repository: that it serves.
        questions: what may be asked.
        effort: how much is done.
        seed: of what is drawn at random.
        report: where lines go.
    """

    def __init__(
        self, server: Server, repository: pathlib.Path, questions: Sequence[Question], effort: Effort, seed: int, report: Report
    ) -> None:
        self._server = server
        self._effort = effort
        self._report = report
        self._tally = Tally()
        chance = random.Random(seed)
        self._callers = Callers(server.address, questions, self._tally, random.Random(chance.random()), effort.pause_seconds)
        self._strangers = Strangers(server.address, questions, self._tally, random.Random(chance.random()))
        self._publisher = Publisher(repository, server.admin_address, self._tally, random.Random(chance.random()))
        self._rests: list[Held] = []

    async def run(self, num_reloads: int | None) -> None:
        """Goes on until the time is over, or so many reloads are done, and reports."""
        started = time.monotonic()
        lowest = await self._rest(Held.by(self._server.process_id))
        while True:
            await self._round(num_reloads)
            lowest = await self._rest(lowest)
            self._rests.append(lowest)
            self._tell(time.monotonic() - started)
            is_over = time.monotonic() - started >= 60 * self._effort.minutes
            if self._publisher.num_reloads >= num_reloads if num_reloads is not None else is_over:
                break
        self._judge()

    async def _round(self, num_reloads: int | None) -> None:
        stop = asyncio.Event()
        self._held_most = Held.by(self._server.process_id)
        work = [
            self._callers.ask(self._effort.callers, stop),
            self._strangers.disturb(stop),
            self._publisher.publish(stop, num_reloads),
            self._sample(stop),
        ]
        asyncio.get_running_loop().call_later(self._effort.round_seconds, stop.set)
        await asyncio.gather(*work)

    async def _sample(self, stop: asyncio.Event) -> None:
        while not stop.is_set():
            held = Held.by(self._server.process_id)
            most = dataclasses.astuple(self._held_most)
            self._held_most = Held(*map(max, most, dataclasses.astuple(held)))
            await asyncio.sleep(min(1.0, self._effort.round_seconds / 4))

    async def _rest(self, before: Held) -> Held:
        """Returns what the server holds once nobody is there: no more descriptors than before, or as few as it comes to in a while."""
        # What was replaced last is unloaded meanwhile.
        await asyncio.sleep(0.5)
        fewest, since = math.inf, time.monotonic()
        while (held := Held.by(self._server.process_id)).descriptors > before.descriptors and time.monotonic() - since < 5:
            if held.descriptors < fewest:
                fewest, since = held.descriptors, time.monotonic()
            await asyncio.sleep(0.1)
        return held

    def _tell(self, seconds: float) -> None:
        self._report.line(
            figure="soak",
            round=len(self._rests),
            seconds=round(seconds),
            at_rest=_shown(self._rests[-1]),
            most_under_load=_shown(self._held_most),
            reloads=self._publisher.num_reloads,
            **self._tally.shown(),
        )

    def _judge(self) -> None:
        settled = self._rests[len(self._rests) // 3 :]
        halves = settled[: (len(settled) + 1) // 2], settled[len(settled) // 2 :]
        descriptors, threads, memory = (
            [judge(getattr(held, figure) for held in half) for half in halves]
            for figure, judge in (("descriptors", statistics.median), ("threads", statistics.median), ("memory_bytes", min))
        )
        more_descriptors, more_threads, growth = descriptors[1] - descriptors[0], threads[1] - threads[0], memory[1] / memory[0]
        is_flat = growth <= MEMORY_GROWTH and max(more_descriptors, more_threads) <= MOST_MORE
        self._report.line(
            figure="soak",
            verdict="flat" if is_flat else "growing",
            memory_growth=rounded(growth),
            more_descriptors=more_descriptors,
            more_threads=more_threads,
            wrong=self._tally.num_wrong,
            unexpected=self._tally.num_unexpected,
            examples=self._tally.examples,
        )
        is_right = not self._tally.num_wrong and not self._tally.num_unexpected and self._tally.num_answers > 0
        self._report.figure("soak", float(is_flat and is_right), Target(">=", 1), "flat, nothing wrong, nothing unexpected")


def _shown(held: Held) -> dict[str, float]:
    return {"rss_mib": rounded(held.memory_bytes / MIB), "descriptors": held.descriptors, "threads": held.threads}


if __name__ == "__main__":
    main()
