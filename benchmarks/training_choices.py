"""Which ways of computing a child's training step pay on a device: C1 to C5, behind the choices of docs/decisions/0013.

    python -m benchmarks.training_choices [--smoke] [--device auto|cpu|cuda] [--results benchmarks/results]

A child that trains a block, an adapter, the final norm and its head takes the same steps in each way, in turns.

C1  plain attention / torch's fused attention, seconds a step: at 1 or more the fused one is the right choice, and it is what trains.
C2  eager / torch.compile of every layer, seconds a step once it is compiled.
C3  steps after which the time of compiling is won back, for one child; a compiled layer serves further children of its shape. A published
    child takes some hundred steps. Infinite where a compiled step is no faster.
C4  float32 / bfloat16 autocast, seconds a step. CUDA only.
C5  eager / torch.compile with CUDA graphs, seconds a step. CUDA only.

A way is worth its risk where it saves a tenth: those are the bounds. Prints JSON lines, the last one sums up; without --smoke it takes some
three minutes on two cores, and a C++ compiler. --smoke compiles nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.published import SMOKE
from benchmarks.reporting import Ratio, Report, Target, add_arguments, rounded, seconds_of
from benchmarks.train import CHARACTERS, DEEP, NUM_CLASSES, Root, finish
from evolve.config import TrainingSettings
from evolve.generation import ChildPlan
from evolve.hyperparameters import Hyperparameters
from evolve.layer import NORM, block_position
from evolve.training.child import ChildModel
from evolve.training.device import repeatable, resolve_device
from evolve.vit import Attention

WORTH = Target(">=", 1.1)
STEPS_OF_A_CHILD = 500

Step = Callable[[], None]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args()
    report = Report("training_choices", arguments)
    settings = TrainingSettings(device=arguments.device, threads=len(os.sched_getaffinity(0)))
    device = resolve_device(settings)
    architectures = (SMOKE,) if arguments.smoke else (CHARACTERS, DEEP)
    batch, repetitions, steps = (4, 2, 2) if arguments.smoke else (64, 7, 10)
    with repeatable(settings.threads):
        for number, architecture in enumerate(architectures):
            found = compare(Root(architecture), device, batch, repetitions, steps, compiles=not arguments.smoke)
            for way, (first, seconds) in found.items():
                report.line(
                    model=architecture.name,
                    way=way,
                    first_step_seconds=rounded(first),
                    milliseconds_a_step=rounded(1000 * statistics.median(seconds)),
                    fused_eager_over_it=Ratio(found["fused, eager"][1], seconds).spread(),
                )
            figures(report, found, "" if not number else f" {architecture.blocks} blocks")
    report.finish(f"{', '.join(architecture.name for architecture in architectures)}; batches of {batch}, random weights")


def compare(
    root: Root, device: torch.device, batch: int, repetitions: int, steps: int, *, compiles: bool
) -> dict[str, tuple[float, list[float]]]:
    """Returns of each way the seconds of its first step, and those of a later one in each repetition."""
    size = root.architecture.image_size
    random = np.random.default_rng(0)
    images = torch.from_numpy(random.uniform(-1, 1, (batch, size, size, 3)).astype(np.float32)).to(device)
    labels = torch.from_numpy(random.integers(0, NUM_CLASSES, batch)).to(device)
    top = root.architecture.blocks - 1
    plan = root.child(
        0,
        lambda position: position in (block_position(top), NORM),
        Hyperparameters(num_blocks=root.architecture.blocks, image_size=size),
        adapters=(top - 1,),
    )

    def taking(child: ChildModel) -> Step:
        def step() -> None:
            child.step(images, labels, 0.001)
            finish(device)

        return step

    ways = {way: taking(child) for way, child in children(plan, root, device, compiles=compiles).items()}
    first = {way: seconds_of(step) for way, step in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repetitions):
        for way, step in ways.items():
            step()
            seconds[way].append(seconds_of(lambda step=step: [step() for _ in range(steps)]) / steps)
    return {way: (first[way], seconds[way]) for way in ways}


def children(plan: ChildPlan, root: Root, device: torch.device, *, compiles: bool) -> dict[str, ChildModel]:
    """Returns the same child in each way that the device has, those that compile only if so wanted."""

    def made(*, bf16: bool = False, fused: bool = True, mode: str | None = None) -> ChildModel:
        child = ChildModel(plan, root.stored.__getitem__, device, bf16=bf16)
        for module in child.model.modules():
            if isinstance(module, Attention):
                module.fused = fused
        if mode is not None:
            for layer in child.model.layers:
                layer.compile(mode=mode)
        return child

    ways = {"fused, eager": made(), "plain, eager": made(fused=False)}
    if compiles:
        ways["fused, compiled"] = made(mode="default")
    if device.type == "cuda":
        ways["fused, eager, bf16"] = made(bf16=True)
        if compiles:
            ways["fused, CUDA graphs"] = made(mode="reduce-overhead")
    return ways


def figures(report: Report, found: dict[str, tuple[float, list[float]]], which: str) -> None:
    """Notes the figures of one model."""
    first, eager = found["fused, eager"]
    report.figure(f"C1{which}", Ratio(found["plain, eager"][1], eager).median, Target(">=", 1.0))
    if "fused, compiled" in found:
        compiling, compiled = found["fused, compiled"]
        report.figure(f"C2{which}", Ratio(eager, compiled).median, WORTH)
        saved = statistics.median(eager) - statistics.median(compiled)
        until = (compiling - first) / saved if saved > 0 else math.inf
        report.figure(f"C3{which}", until, Target("<=", STEPS_OF_A_CHILD), "steps of one child")
    for name, way in (("C4", "fused, eager, bf16"), ("C5", "fused, CUDA graphs")):
        if way in found:
            report.figure(f"{name}{which}", Ratio(eager, found[way][1]).median, WORTH)


if __name__ == "__main__":
    main()
