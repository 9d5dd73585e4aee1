"""Collecting garbage: what nothing refers to is removed, and journals of closed searches are compressed.

What stays: the root; every task's current path with its layers and example images; position embeddings resampled for the system; and
whatever an unfinished journal names, of a search (its snapshot, its survivors) or of a baseline, so that it can go on.

It is safe at any moment. Whoever writes layers, or looks at the system, holds System.storing or System.reading from there until a journal
or a task's record names them, or the work with them is done; this holds System.collecting, which waits for them and keeps them out.
Paths go before their layers, so that a kill leaves garbage, never a path without its layers.

In a store (evolve.working_copy) that others share no lock tells of them: there it is done only for whoever knows that no other machine is
at work. What is there is listed before journals and records are read, so that what others had named by then stays even so.
"""

from __future__ import annotations

import dataclasses
import enum
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from evolve.errors import DamagedError, SystemFolderError
from evolve.journal import compress_journal, read_journal
from evolve.layer import POS_EMBED, Layer, LayerKind
from evolve.position_embedding import resample
from evolve.store import System
from munet.files import remove_unfinished, sync_folder, unfinished_files

_ID = re.compile(r"[0-9a-f]{32}")
_EXAMPLES = re.compile(r"[0-9a-f]{16}\.npy")


class Kind(enum.StrEnum):
    """What garbage consists of."""

    PATH = "path"
    LAYER = "layer"
    EXAMPLES = "example file"
    UNFINISHED = "half-written file"


_KINDS = {
    "paths": (Kind.PATH, "*.json"),
    "layers": (Kind.LAYER, "??/*.safetensors"),
    "examples": (Kind.EXAMPLES, "*.npy"),
}
"""Kind of what is in a folder of a system, and where in it."""


@dataclasses.dataclass(frozen=True)
class Garbage:
    """A file that nothing refers to.

    Attributes:
        kind: what it is.
        file: where it is; of an object in a store, its name there.
        num_bytes: its size.
    """

    kind: Kind
    file: pathlib.Path | pathlib.PurePosixPath
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Compressed:
    """A journal of a closed search or baseline, or one that was set aside.

    Attributes:
        file: the plain journal.
        before: its bytes.
        after: its bytes once compressed.
    """

    file: pathlib.Path
    before: int
    after: int


@dataclasses.dataclass(frozen=True)
class Collection:
    """What a collection removed and compressed, or would.

    Attributes:
        deleted: False if nothing was changed.
        garbage: files that nothing refers to.
        journals: that are compressed.
        unfinished: journals, relative to the system's folder, whose paths and layers stay so that they can be gone on with.
        left: a sentence for each journal that is damaged and was left as it is; nothing depends on these.
    """

    deleted: bool
    garbage: tuple[Garbage, ...]
    journals: tuple[Compressed, ...]
    unfinished: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that it frees."""
        return sum(one.num_bytes for one in self.garbage) + sum(one.before - one.after for one in self.journals)


def collect(system: System, *, delete: bool, alone: bool = False, waits: Callable[[], None] = lambda: None) -> Collection:
    """Finds what nothing refers to and what can be compressed, and does it if told to.

    Args:
        system: may be searched, exported and read by other processes meanwhile; in a store, by those of this machine.
        delete: False changes nothing.
        alone: of a system in a store, that no other machine is at work on it.
        waits: is called if others have to finish first.

    Raises:
        DamagedError: the record of a task, a current path or the journal of an unfinished search cannot be read: what they name cannot be
            known, so nothing is removed.
        SystemFolderError: the folder cannot be written, a journal is of a newer format, or the system is in a store and not alone.
    """
    stored = system.stored_sizes(alone=alone)
    with system.locks.collecting(only_looks=not delete, waits=waits):
        system.pull()
        system.pull_journals()
        unfinished, closed = _journals(system)
        named = _named(system, unfinished)
        garbage = list(_find_garbage(system, named))
        elsewhere = list(_find_stored(stored or {}, named))
        if delete:
            _remove(system, garbage)
            _remove_stored(system, elsewhere)
        journals, left = [], []
        # Where they are compared with those of a store they stay as those are.
        for file in closed if stored is None else ():
            try:
                before = file.stat().st_size
                journals.append(Compressed(file, before, compress_journal(file, write=delete)))
            except DamagedError as error:
                left.append(str(error))
    names = tuple(str(file.relative_to(system.folder)) for file in unfinished)
    return Collection(delete, (*garbage, *elsewhere), tuple(journals), names, tuple(left))


def _journals(system: System) -> tuple[list[pathlib.Path], list[pathlib.Path]]:
    """Returns the journals that somebody may go on with, and those that can be compressed."""
    unfinished: list[pathlib.Path] = []
    closed: list[pathlib.Path] = []
    for journal in system.journals():
        (closed if journal.is_closed else unfinished).append(journal.file)
    for file in system.baseline_journals():
        is_closed = any(record["type"] == "close" for record in read_journal(file))
        (closed if is_closed else unfinished).append(file)
    closed += system.removed_journals()
    return unfinished, [file for file in closed if file.suffix == ".jsonl"]


def _named(system: System, unfinished: Iterable[pathlib.Path]) -> set[str]:
    """Returns the ids of all paths and layers, and the names of all example images, that have to stay."""
    records = system.tasks().values()
    current = {system.root.id, *(record.path_id for record in records)}
    named = current | {record.examples for record in records}
    for file in unfinished:
        # Whatever looks like an id: a journal may name more than this version knows of.
        named.update(_ids_in(read_journal(file)))
    for path_id in list(named):
        if path_id in current or (system.folder / "paths" / f"{path_id}.json").exists():
            try:
                named.update(layer_id for _, layer_id in system.path_document(path_id)["layers"])
            except (KeyError, TypeError, ValueError) as error:
                raise DamagedError(
                    f"found an unreadable path {path_id} ({error})", "what was written", "restore the file"
                ) from error
    return named


def _ids_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if _ID.fullmatch(value) or _EXAMPLES.fullmatch(value):
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _ids_in(part)
    elif isinstance(value, list):
        for part in value:
            yield from _ids_in(part)


def _find_garbage(system: System, named: set[str]) -> Iterator[Garbage]:
    """Yields every file that nothing refers to."""
    for folder, (kind, pattern) in _KINDS.items():
        for file in sorted(system.folder.glob(f"{folder}/{pattern}")):
            if _is_unnamed(kind, file, named) and not (kind is Kind.LAYER and _is_resampled(system, file.stem)):
                yield Garbage(kind, file, file.stat().st_size)
    for written in system.written_folders():
        for file, num_bytes in unfinished_files(written):
            yield Garbage(Kind.UNFINISHED, file, num_bytes)


def _find_stored(stored: Mapping[str, int], named: set[str]) -> Iterator[Garbage]:
    """Yields every object of a store that nothing refers to. Resampled position embeddings too: who needs one puts it there again."""
    for name, num_bytes in sorted(stored.items()):
        file = pathlib.PurePosixPath(name)
        kind, pattern = _KINDS.get(file.parts[0], (None, ""))
        if file.name.startswith("."):
            yield Garbage(Kind.UNFINISHED, file, num_bytes)
        elif kind is not None and file.relative_to(file.parts[0]).match(pattern) and _is_unnamed(kind, file, named):
            yield Garbage(kind, file, num_bytes)


def _is_unnamed(kind: Kind, file: pathlib.PurePath, named: set[str]) -> bool:
    """Tells whether nothing refers to a file; what has another kind of name was put there by somebody else."""
    name, form = (file.name, _EXAMPLES) if kind is Kind.EXAMPLES else (file.stem, _ID)
    return form.fullmatch(name) is not None and name not in named


def _is_resampled(system: System, layer_id: str) -> bool:
    """Whether a layer is the root's position embedding for another size: any search may have found it there and count on it."""
    try:
        spec = system.spec(layer_id)
    except DamagedError:
        return False
    if spec.kind is not LayerKind.POS_EMBED:
        return False
    native = system.root.layer(POS_EMBED)
    return Layer.of(*resample(native.spec, system.tensors(native.id), spec.integer("grid_height"))).id == layer_id


def _remove(system: System, garbage: Iterable[Garbage]) -> None:
    try:
        paths = [pathlib.Path(one.file) for one in garbage if one.kind is Kind.PATH]
        for file in paths:
            file.unlink()
        if paths:
            # They are gone for good before the first of their layers goes.
            sync_folder(paths[0].parent)
        for one in garbage:
            if one.kind in (Kind.LAYER, Kind.EXAMPLES):
                pathlib.Path(one.file).unlink()
        for folder in system.written_folders():
            remove_unfinished(folder)
    except OSError as error:
        raise SystemFolderError(
            f"could not remove files in {system.folder} ({error.strerror})", "a folder that can be written"
        ) from error


def _remove_stored(system: System, garbage: Sequence[Garbage]) -> None:
    paths = [str(one.file) for one in garbage if one.kind is Kind.PATH]
    others = [str(one.file) for one in garbage if one.kind is not Kind.PATH]
    for names in (paths, others):
        if names:
            system.remove_stored(names)
