"""A running search for a person to watch, from another process and from its journals alone: live on a terminal, plain lines elsewhere.

No lock is taken and nothing is written: a search does not notice that it is watched. Journals may appear, grow, end in a torn line or
vanish at any moment; one that cannot be read is said so and tried again when it changes.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import rich.console
import rich.live
import rich.table
import rich.text

from evolve.errors import EvolveError, SystemFolderError
from evolve.journal import read_journal, search_journals
from evolve.objects import is_url
from evolve.report.searches import Child, Search, parse_search
from evolve.store import Location, System

POLL_SECONDS = 1.0
"""How often the journals are looked at."""

PULL_SECONDS = 10.0
"""How often a store is."""

_RECENT = 8
"""Children that time is estimated from, and that are shown."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """A search as it was seen last.

    Attributes:
        search: what its journal said.
        changed: when the journal was written last, in seconds since the epoch.
    """

    search: Search
    changed: float


class Watcher:
    """Follows the journals of a system."""

    def __init__(self, location: Location) -> None:
        """Prepares to follow.

        Args:
            location: of the system, a folder or the URL of a store.

        Raises:
            SystemFolderError: there is no system.
        """
        if not System.exists(location):
            raise SystemFolderError(f"found no system in {location}", "one", "`munet-evolve run` starts one")
        # Of a system in a folder nothing need be readable but the journals.
        self._shared = System.open(location) if is_url(location) else None
        self._folder = pathlib.Path(location) if self._shared is None else self._shared.folder
        self._looked = -math.inf
        self._states: dict[pathlib.Path, tuple[int, int, int]] = {}
        self._seen: dict[pathlib.Path, Seen] = {}
        self._findings: dict[pathlib.Path, str] = {}

    def poll(self) -> list[Search]:
        """Reads what has changed and returns the searches that have something new to tell, in the order of their journals' names."""
        if self._shared is not None and time.monotonic() >= self._looked + PULL_SECONDS:
            self._shared.pull_journals()
            self._looked = time.monotonic()
        files = list(search_journals(self._folder).values())
        for gone in self._states.keys() - set(files):
            for known in (self._states, self._seen, self._findings):
                known.pop(gone, None)
        changed = []
        for file in files:
            try:
                status = file.stat()
            except OSError:
                # It vanished meanwhile: next time it is not listed.
                continue
            state = (status.st_ino, status.st_size, status.st_mtime_ns)
            if self._states.get(file) == state:
                continue
            self._states[file] = state
            self._findings.pop(file, None)
            try:
                search = parse_search(read_journal(file))
            except EvolveError as error:
                self._findings[file] = str(error)
                continue
            if search is not None:
                self._seen[file] = Seen(search, status.st_mtime)
                changed.append(search)
        return changed

    @property
    def findings(self) -> list[str]:
        """A sentence for each journal that cannot be read."""
        return [self._findings[file] for file in sorted(self._findings)]

    @property
    def running(self) -> list[Seen]:
        """Unfinished searches, the one that changed last first. Whether their processes still live, journals do not tell."""
        return sorted((seen for seen in self._seen.values() if seen.search.end is None), key=lambda seen: -seen.changed)

    @property
    def closed(self) -> list[Search]:
        """Finished searches, the one that closed last first."""
        finished = [seen for seen in self._seen.values() if seen.search.end is not None]
        return [seen.search for seen in sorted(finished, key=lambda seen: -seen.changed)]


def seconds_per_child(search: Search) -> float | None:
    """Returns the time that one of the latest children took, on average; None before the first."""
    recent = search.children[-_RECENT:]
    return sum(child.seconds for child in recent) / len(recent) if recent else None


def seconds_left(search: Search) -> float | None:
    """Estimates the time that the rest of a round takes; None before its first child."""
    each = seconds_per_child(search)
    return None if each is None else each * max(0, search.num_planned - len(search.children))


# Words


@dataclasses.dataclass(frozen=True)
class Told:
    """What was told of a search already.

    Attributes:
        num_children: finished.
        closed: whether it has.
    """

    num_children: int = 0
    closed: bool = False

    @staticmethod
    def all_of(search: Search) -> Told:
        """Returns what there is to tell of a search now."""
        return Told(len(search.children), search.end is not None)


def news(search: Search, told: Told) -> Iterator[str]:
    """Yields a line for each child that was not told of, and one if the search has closed since.

    Args:
        search: as it is now; one that has fewer children than were told of was begun anew.
        told: before.
    """
    if told.num_children > len(search.children):
        told = Told()
    name = f"{search.task}, round {search.round + 1}"
    for child in search.children[told.num_children :]:
        yield f"{name}: child {child.number + 1} of {search.num_planned}, {describe(child)}"
    if search.end is not None and not told.closed:
        tested = "" if search.end.test_accuracy is None else f", test accuracy {search.end.test_accuracy:.4f}"
        yield f"{name}: closed with quality {search.end.quality:.4f}{tested}"


def describe(child: Child) -> str:
    """Returns what came of a child, in words."""
    parts = [f"from {child.parent} {child.parent_id[:6]}", f"quality {child.quality:.4f}", f"score {child.score:.4f}"]
    parts += [_fate(child), f"{child.seconds:.1f} s", "; ".join(child.mutations) or "unmutated"]
    return ", ".join(parts)


def _fate(child: Child) -> str:
    fates = {"diverged": child.diverged, "stopped early": child.stopped_early, "survived": child.survived}
    return next((fate for fate, is_so in fates.items() if is_so), "dropped")


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


# The view


def view(watcher: Watcher, now: float) -> rich.console.RenderableType:
    """Returns what there is to see.

    Args:
        watcher: that has polled.
        now: seconds since the epoch.
    """
    running, closed = watcher.running, watcher.closed
    parts: list[rich.console.RenderableType] = []
    if running:
        parts += [_running_table(running, now), rich.text.Text(), _children_table(running[0].search), rich.text.Text()]
    if closed:
        parts.append(_closed_table(closed))
    if not running:
        parts.append(rich.text.Text("no search is under way" if closed else "no search has begun", style="dim"))
    parts += [rich.text.Text(finding, style="red") for finding in watcher.findings]
    return rich.console.Group(*parts)


def _table(title: str, columns: Sequence[str], words: Iterable[str]) -> rich.table.Table:
    table = rich.table.Table(title=rich.text.Text(title), title_justify="left", box=None, padding=(0, 2, 0, 0))
    left = set(words)
    for name in columns:
        # Where there is little room, names give way; numbers are never cut.
        gives_way = name in ("task", "parent", "mutations")
        table.add_column(
            name,
            justify="left" if name in left else "right",
            no_wrap=name != "mutations",
            min_width=None if gives_way else len(name),
            overflow="ellipsis" if name != "mutations" else "fold",
        )
    return table


def _running_table(running: Sequence[Seen], now: float) -> rich.table.Table:
    columns = ("task", "round", "gen.", "children", "before", "quality", "score", "a child", "left", "last")
    table = _table("under way", columns, ("task",))
    for seen in running:
        search, best = seen.search, seen.search.best
        table.add_row(
            rich.text.Text(search.task),
            str(search.round + 1),
            f"{search.generation + 1}/{search.num_generations}",
            f"{len(search.children)}/{search.num_planned}",
            "-" if search.quality_before is None else f"{search.quality_before:.4f}",
            "-" if best is None else f"{best.quality:.4f}",
            "-" if best is None else f"{best.score:.4f}",
            _duration(seconds_per_child(search)),
            _duration(seconds_left(search)),
            _duration(max(0.0, now - seen.changed)),
        )
    return table


def _children_table(search: Search) -> rich.table.Table:
    # Where nothing is scaled, the score is the quality.
    scored = search.scale_factor != 1
    columns = ("child", "parent", "quality", *(("score",) if scored else ()), "fate", "time", "mutations")
    table = _table(f"{search.task}: the last children", columns, ("parent", "fate", "mutations"))
    for child in reversed(search.children[-_RECENT:]):
        style = "red" if child.diverged else "green" if child.survived else "dim"
        table.add_row(
            str(child.number + 1),
            rich.text.Text(f"{child.parent} {child.parent_id[:6]}"),
            f"{child.quality:.4f}",
            *((f"{child.score:.4f}",) if scored else ()),
            rich.text.Text(_fate(child), style=style),
            _duration(child.seconds),
            rich.text.Text("; ".join(child.mutations) or "unmutated"),
        )
    return table


def _closed_table(closed: Sequence[Search]) -> rich.table.Table:
    hidden = len(closed) - _RECENT
    title = "closed" + (f" ({len(closed)}, the last {_RECENT})" if hidden > 0 else "")
    table = _table(title, ("task", "round", "children", "survived", "quality", "test"), ("task",))
    for search in closed[:_RECENT]:
        end = search.end
        table.add_row(
            rich.text.Text(search.task),
            str(search.round + 1),
            str(len(search.children)),
            str(search.num_survived),
            "-" if end is None else f"{end.quality:.4f}",
            "-" if end is None or end.test_accuracy is None else f"{end.test_accuracy:.4f}",
        )
    return table


def follow(watcher: Watcher, console: rich.console.Console, sleep: Callable[[float], None] = time.sleep) -> None:
    """Shows what happens until it is interrupted.

    Args:
        watcher: what to show.
        console: decides whether it is a terminal.
        sleep: waits so many seconds; what it raises ends the watch.
    """
    watcher.poll()
    if console.is_terminal:
        with rich.live.Live(console=console, auto_refresh=False, screen=False) as live:
            while True:
                live.update(view(watcher, time.time()), refresh=True)
                sleep(POLL_SECONDS)
                watcher.poll()
    console.print(view(watcher, time.time()))
    told = {(search.task, search.round): Told.all_of(search) for search in _all(watcher)}
    while True:
        sleep(POLL_SECONDS)
        for search in watcher.poll():
            key = (search.task, search.round)
            for line in news(search, told.get(key, Told())):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
            told[key] = Told.all_of(search)


def _all(watcher: Watcher) -> list[Search]:
    return [seen.search for seen in watcher.running] + watcher.closed
