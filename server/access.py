"""What a caller may do: its role, and the tasks that exist for it.

The grant of the call under way travels in a context variable, which the front door sets before anything else happens. Without a door that
asks for tokens everybody may do everything.
"""

from __future__ import annotations

import contextvars
import dataclasses
import enum
import fnmatch
from collections.abc import Mapping

from server.generation import Task


class Role(enum.IntEnum):
    """What a caller may do; each role includes those before it."""

    NOBODY = 0
    READ = 1
    INFER = 2
    ADMIN = 3


@dataclasses.dataclass(frozen=True, slots=True)
class Grant:
    """What a caller may do.

    Attributes:
        role: which calls.
        tasks: names of the tasks that exist for the caller, or patterns with `*` and `?`; none means all.
    """

    role: Role
    tasks: tuple[str, ...] | None = None

    def sees(self, task: str) -> bool:
        """Whether a task exists for the caller."""
        return self.tasks is None or any(fnmatch.fnmatchcase(task, pattern) for pattern in self.tasks)

    def visible(self, tasks: Mapping[str, Task]) -> Mapping[str, Task]:
        """Returns those of some tasks that exist for the caller, in the same order."""
        return tasks if self.tasks is None else {name: task for name, task in tasks.items() if self.sees(name)}


EVERYTHING = Grant(Role.ADMIN)
"""Where nobody is asked for a token."""

NOTHING = Grant(Role.NOBODY, ())
"""A stranger's, where tokens are asked for."""

_grant = contextvars.ContextVar("grant", default=EVERYTHING)


def current_grant() -> Grant:
    """Returns what the caller may do whose call is under way."""
    return _grant.get()


def set_grant(grant: Grant) -> None:
    """Says what the caller may do whose call is under way, for the rest of this asyncio task."""
    _grant.set(grant)
