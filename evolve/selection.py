"""Choosing the parent of a child.

Source: muNet (arXiv 2205.10937), parent sampling; the decision of each draw depends on this child's own random generator alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from evolve.path import Path
from evolve.population import Population


def choose_parent(seeds: Sequence[Path], population: Population, generator: random.Random) -> Path:
    """Returns the parent of a mutated child.

    Walks the population from best score to worst and accepts a path with probability 0.5 ** (children ever drawn from it). If none is
    accepted, any seed or member is as likely as any other.

    Args:
        seeds: paths the search may start from, the root among them.
        population: the active task's scored paths.
        generator: this child's own.
    """
    for member in population.ranked():
        if generator.random() < 0.5**member.num_children:
            return member.path
    return generator.choice([*seeds, *(member.path for member in population.members())])
