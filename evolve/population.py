"""The scored paths of the active task, and how often each has been drawn from."""

from __future__ import annotations

import dataclasses

from evolve.path import Path


@dataclasses.dataclass
class Member:
    """A path of the population.

    Attributes:
        path: the path.
        score: under the snapshot of this search.
        num_children: children ever drawn from it for its own task.
    """

    path: Path
    score: float
    num_children: int = 0


class Population:
    """Scored paths in the order in which they joined. It has no cap."""

    def __init__(self) -> None:
        """Starts empty."""
        self._members: dict[str, Member] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, path_id: object) -> bool:
        return path_id in self._members

    def __getitem__(self, path_id: str) -> Member:
        """Returns the member with this path id.

        Raises:
            KeyError: there is none.
        """
        return self._members[path_id]

    def add(self, path: Path, score: float, num_children: int = 0) -> None:
        """Adds a path; one that is a member already stays as it is."""
        self._members.setdefault(path.id, Member(path, score, num_children))

    def ranked(self) -> list[Member]:
        """Returns the members from best score to worst, the earlier first on ties."""
        return sorted(self._members.values(), key=lambda member: -member.score)

    def best(self) -> Member | None:
        """Returns the best member, the earlier on ties; None if there is none."""
        return max(self._members.values(), key=lambda member: member.score, default=None)

    def members(self) -> list[Member]:
        """Returns the members in the order in which they joined."""
        return list(self._members.values())
