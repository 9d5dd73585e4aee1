"""How fast routes in pieces answer, beside whole ONNX models of the same weights on the same cores in the same minutes.

    python -m benchmarks.serve [--only S1 S7 ...] [--smoke] [--results benchmarks/results]

The modules that `FIGURES` names say what each figure is. Weights are random: what is measured does not depend on them. Both sides are
warmed up, then measured in turns, several times; figures are medians of the ratio within each repetition, lines hold their spread. What
shares a process with nothing is measured in a fresh one without torch. Prints JSON lines, the last one sums up.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence

from benchmarks.reporting import Report, add_arguments
from benchmarks.serve import (
    front_door,
    hundred_tasks,
    memory,
    mixed_traffic,
    one_call,
    overload,
    pieces,
    reloads,
    rival,
    served,
    swaps,
)
from benchmarks.serve.workbench import FULL, SMOKE, Workbench


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What gives one or more figures.

    Attributes:
        figures: their ids.
        measure: does it.
    """

    figures: tuple[str, ...]
    measure: Callable[[Workbench], None]


FIGURES: Sequence[Measurement] = (
    Measurement(("S1",), one_call.measure),
    Measurement(("S2",), mixed_traffic.measure),
    Measurement(("S3",), hundred_tasks.measure),
    Measurement(("S4",), pieces.measure),
    Measurement(("S5",), served.measure),
    Measurement(("S6",), memory.measure),
    Measurement(("S7", "S8"), reloads.measure),
    Measurement(("S9",), swaps.measure),
    Measurement(("S10",), overload.measure_goodput),
    Measurement(("S11",), overload.measure_fairness),
    Measurement(("null",), front_door.measure),
    Measurement(("rival",), rival.measure),
)
"""Every figure there is, in the order in which they are measured."""

NOT_IN_SMOKE = frozenset({"rival"})
"""It has to be installed first."""


def main() -> None:
    """Measures what is asked for and prints it."""
    names = [name for measurement in FIGURES for name in measurement.figures]
    parser = argparse.ArgumentParser(
        prog="benchmarks.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=names, help="figures; all by default, for a smoke test all in one process")
    add_arguments(parser)
    arguments = parser.parse_args()
    chosen = set(arguments.only or names) - (NOT_IN_SMOKE if arguments.smoke and not arguments.only else set())
    if "rival" in chosen:
        rival.prepare()
    report = Report("serve", arguments)
    with tempfile.TemporaryDirectory(prefix="munet-serve-") as folder:
        bench = Workbench(pathlib.Path(folder), SMOKE if arguments.smoke else FULL, report)
        for measurement in FIGURES:
            if not chosen.isdisjoint(measurement.figures):
                started = time.monotonic()
                measurement.measure(bench)
                report.line(figure=measurement.figures[0], measured_in_seconds=round(time.monotonic() - started, 1))
    report.finish("tiny random weights" if arguments.smoke else "ViT-S/16 (S1, S3), ViT-Ti/16 at 224 px, random weights, float32")


if __name__ == "__main__":
    main()
