"""Which mutations paid: of the children that carried one, how many beat their parent, and by how much. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from evolve.hyperparameters import DATA_NAMES
from evolve.report.searches import Child, Search


@dataclasses.dataclass(frozen=True)
class Payoff:
    """What came of one kind of mutation. A child that carried several counts for each.

    Attributes:
        kind: such as `learning_rate up`, `schedule to cosine`, `adapter insert` or `block clone`; `any child` for all children together.
        num_children: children of a parent of their own task that carried it.
        num_better: of these, those that beat their parent.
        mean_gain: score minus the parent's, mean over them.
    """

    kind: str
    num_children: int
    num_better: int
    mean_gain: float

    @property
    def share(self) -> float:
        """Share that beat their parent, 0 to 1."""
        return self.num_better / self.num_children


ANY = "any child"
"""Kind of the row that all others are to be compared with."""


def payoffs(searches: Iterable[Search]) -> list[Payoff]:
    """Returns what came of each kind of mutation, that of all children first, then from the best share to the worst.

    Children of seeds are left out: they have no score to beat. So is nothing else: a mutation is not the cause of all that its child
    reached. Data hyperparameters are drawn for a whole generation; where they differ from the parent's, that counts as a mutation too.

    Args:
        searches: in the order in which they opened.
    """
    gains: dict[str, list[tuple[float, bool]]] = {}
    inherited: dict[str, Mapping[str, object]] = {}
    for search in searches:
        for child in search.children:
            if child.parent_score is not None:
                for kind in {ANY, *kinds_of(child, inherited.get(child.parent_id))}:
                    gains.setdefault(kind, []).append((child.score - child.parent_score, child.survived))
            inherited.setdefault(child.path_id, child.hyperparameters)
    rows = [
        Payoff(kind, len(those), sum(better for _, better in those), sum(gain for gain, _ in those) / len(those))
        for kind, those in gains.items()
    ]
    return sorted(rows, key=lambda row: (row.kind != ANY, -row.share, -row.num_children, row.kind))


def kinds_of(child: Child, parent: Mapping[str, object] | None) -> set[str]:
    """Returns the kinds of mutations that a child carried.

    Args:
        child: the child.
        parent: hyperparameters of its parent, if known.
    """
    kinds = {_kind(mutation) for mutation in child.mutations}
    if parent is not None:
        kinds.update(_data_kinds(child.hyperparameters, parent))
    return kinds


def _data_kinds(new: Mapping[str, object], old: Mapping[str, object]) -> Iterator[str]:
    for name in DATA_NAMES:
        if new[name] != old[name]:
            yield _step(name, str(old[name]).lower(), str(new[name]).lower())


def _kind(mutation: str) -> str:
    """Returns the kind of a mutation as it is written in a plan."""
    name, _, change = mutation.partition(": ")
    if " -> " not in change:
        # Of which block is left out: there are few children and many blocks.
        return f"{name.partition('.')[0]} {change}"
    old, _, new = change.partition(" -> ")
    return _step(name, old, new)


def _step(name: str, old: str, new: str) -> str:
    values = [_number(value) for value in (old, new)]
    if values[0] is None or values[1] is None:
        return f"{name} to {new}"
    return f"{name} {'up' if values[1] > values[0] else 'down'}"


def _number(value: str) -> float | None:
    """Returns the value of a number; that of `none`, which momentum may be, is below all others."""
    try:
        return -1.0 if value == "none" else float(value)
    except ValueError:
        return None
