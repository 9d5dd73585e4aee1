"""Mutations: a tunable hyperparameter moves one step, an adapter is inserted, a frozen layer is cloned. Each draws on its own.

Source: muNet (arXiv 2205.10937), section on mutations.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from evolve.hyperparameters import Group, Hyperparameters, Tunable
from evolve.layer import adapter_position


class Stepped(NamedTuple):
    """Hyperparameters after mutation, and what was changed in words such as `learning_rate: 0.01 -> 0.02`."""

    hyperparameters: Hyperparameters
    mutations: tuple[str, ...]


def select_tunables(
    tunables: Iterable[Tunable], groups: Iterable[Group], *, auto_tune: bool, mutate_blocks: bool, fixed: Collection[str] = ()
) -> tuple[Tunable, ...]:
    """Returns the tunables of these groups that the settings let mutate.

    Args:
        tunables: all of them, in order.
        groups: which groups are wanted.
        auto_tune: False leaves only the number of blocks.
        mutate_blocks: whether the number of blocks may mutate.
        fixed: names of those that may not, whatever else is said.
    """
    wanted = frozenset(groups)
    return tuple(
        tunable
        for tunable in tunables
        if tunable.group in wanted
        and tunable.name not in fixed
        and (mutate_blocks if tunable.name == "num_blocks" else auto_tune)
    )


def step_hyperparameters(
    hyperparameters: Hyperparameters, tunables: Sequence[Tunable], rate: float, generator: random.Random
) -> Stepped:
    """Moves each tunable one step up or down its list with probability `rate`, even odds, clamped at the ends.

    A move against the end of a list changes nothing and is not reported.
    """
    mutations = []
    for tunable in tunables:
        if generator.random() >= rate:
            continue
        old = getattr(hyperparameters, tunable.name)
        new = tunable.step(old, up=generator.random() < 0.5)
        if new != old:
            hyperparameters = hyperparameters.replace(**{tunable.name: new})
            mutations.append(f"{tunable.name}: {_word(old)} -> {_word(new)}")
    return Stepped(hyperparameters, tuple(mutations))


def insert_adapters(
    num_blocks: int, adapter_blocks: Iterable[int], rate: float, generator: random.Random
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Inserts an adapter before each block that has none with probability `rate`.

    Returns:
        Indices of all blocks with adapters, ascending, and what was changed in words.
    """
    present = set(adapter_blocks)
    inserted = [block for block in range(num_blocks) if block not in present and generator.random() < rate]
    return tuple(sorted(present.union(inserted))), tuple(f"{adapter_position(block)}: insert" for block in inserted)


def _word(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
