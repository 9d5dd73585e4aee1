"""Baselines as their journals tell them: what a task reaches without a search, in as many training steps. Torch-free."""

from __future__ import annotations

import dataclasses
import pathlib

from evolve.errors import EvolveError
from evolve.journal import baseline_journals, read_journal


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One finished baseline of one task.

    Attributes:
        method: such as `finetune`, `freeze:2`, `adapters:32` or `finetune (tuned)`.
        task: the task.
        quality: validation accuracy of the best replica, 0 to 1.
        test_accuracy: 0 to 1; None without a test split.
        accounted_parameters: as its journal says: what it trains in full, what it leaves frozen divided among the tasks.
        num_trained_images: of all replicas, counted with repetition.
        flops: of training and validation.
        train_seconds: spent training.
        evaluate_seconds: spent validating.
        wall_seconds: of the process that closed it.
        num_diverged: replicas whose losses or weights were not finite.
        data_fingerprint: hash of the images, labels and splits that it was trained and tested on; None if it is not known.
    """

    method: str
    task: str
    quality: float
    test_accuracy: float | None
    accounted_parameters: float
    num_trained_images: int
    flops: float
    train_seconds: float
    evaluate_seconds: float
    wall_seconds: float
    num_diverged: int = 0
    data_fingerprint: str | None = None


def read_baselines(folder: pathlib.Path) -> tuple[list[Baseline], list[str]]:
    """Returns the finished baselines of a system by method and task, and a sentence for each that is unfinished or cannot be read.

    Args:
        folder: of the system; baselines/<method>/<task>.jsonl in it, or none.
    """
    baselines, findings = [], []
    for file in baseline_journals(folder):
        try:
            records = read_journal(file)
        except EvolveError as error:
            findings.append(str(error))
            continue
        closed = records[-1] if records else None
        if closed is None or closed["type"] != "close":
            findings.append(f"the baseline {file.parent.name} of {file.name.partition('.')[0]} is unfinished; it is left out")
            continue
        method, seconds = closed["method"], closed["seconds"]
        if file.parent.name.endswith("-tuned") and "tuned" not in method:
            method += " (tuned)"
        baselines.append(
            Baseline(
                method=method,
                task=closed["task"],
                quality=closed["quality"],
                test_accuracy=closed["test_accuracy"],
                accounted_parameters=closed["accounted_parameters"],
                num_trained_images=closed["num_trained_images"],
                flops=closed["flops"],
                train_seconds=seconds["train"],
                evaluate_seconds=seconds["evaluate"],
                wall_seconds=seconds["wall"],
                num_diverged=sum(bool(record.get("diverged")) for record in records),
                data_fingerprint=records[0].get("data_fingerprint"),
            )
        )
    return baselines, findings
