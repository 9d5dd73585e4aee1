"""Learning rates over a child's training."""

from __future__ import annotations

import math

from evolve.generation import TrainingLength
from evolve.hyperparameters import Hyperparameters

WARMUP_START = 0.01
"""Share of the learning rate that a warm-up starts from."""


def learning_rate(hyperparameters: Hyperparameters, length: TrainingLength, step: int) -> float:
    """Returns the learning rate of one step.

    Args:
        hyperparameters: `learning_rate`, `schedule` and `warmup_ratio` matter.
        length: of the child's training.
        step: counted from 0 over the whole training.
    """
    peak, ratio = hyperparameters.learning_rate, hyperparameters.warmup_ratio
    match hyperparameters.schedule:
        case "constant":
            return peak / 2
        case "cosine":
            return peak * cosine(step, length.num_steps, ratio)
        case "restarts":
            return peak * cosine(step % length.batches_per_interval, length.batches_per_interval, ratio)


def cosine(step: int, num_steps: int, warmup_ratio: float) -> float:
    """Returns the share of the peak: a straight line from 1/100 to 1 over the warm-up, then half a cosine that would be 0 at the end.

    Args:
        step: counted from 0.
        num_steps: length of the whole curve; the step of that number, never taken, would have 0.
        warmup_ratio: share of the steps that warm up, rounded down to whole steps.
    """
    warmup = int(warmup_ratio * num_steps)
    if step < warmup:
        return WARMUP_START + (1 - WARMUP_START) * step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup))) / 2
