"""A system in a store that many machines share, by way of a working copy: a folder on each machine, which its processes share.

What the store holds (evolve.objects), beside what a folder would (evolve.store) or in place of it:

    system.json                       as in a folder, of another format, so that nobody takes the one for the other
    layers/, paths/, examples/        as in a folder, put before anything that names them
    tasks/<name>/<number>.json        versions of a task's record with the ids of its path's ancestors, from near to far; a record
                                      that is null says that the task was removed
    journal/<task>-0001/<number>.jsonl    versions of a journal, the whole of it each; an empty one says that the round starts over
    baselines/<method>/<task>/<number>.jsonl    likewise

**Nothing in it ever changes.** What changes in a folder is a sequence of versions here, of which the greatest number holds. Each is created
only if there is none of that number, so of two machines that go on from one version, one wins and the other is told: nothing is locked,
and no clock is asked. Superseded journals are removed.

The working copy holds whatever was needed so far, by the same names, each journal as one file with its number beside it (`….stored`),
and the locks of this machine's processes. Removing it costs what was not shared yet, nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import safetensors
import safetensors.numpy

from evolve.documents import TaskRecord, check_document, parse_json, read_json, to_json
from evolve.errors import DamagedError, StoreError, SystemFolderError
from evolve.journal import Journal, Record
from evolve.layer import Layer, LayerKind, LayerSpec, Position, Tensors, layer_id
from evolve.objects import LANDMARK, Objects, open_objects
from evolve.path import Path, path_id
from evolve.shared_journals import SharedJournals, newest_versions
from evolve.store import JournalFile, System
from evolve.user_cache import cache_folder

FORMAT = "store-1"
"""Version of the layout described above."""

_NOTE = "working-copy.json"

_COLLECTED = ("layers", "paths", "examples", "tasks", "journal")
"""Where garbage is; of tasks and journals nothing but what killed writers left."""


@dataclasses.dataclass(frozen=True)
class _Version:
    """The version of a task's record that holds.

    Attributes:
        number: counted from 1.
        record: None if the task was removed.
        ancestors: ids of the ancestors of its path, from near to far.
    """

    number: int
    record: TaskRecord | None
    ancestors: tuple[str, ...]


class WorkingCopy(System):
    """A system in a store. What tasks are is what `pull` found last; layers, paths and examples are fetched when they are first read.

    Methods raise StoreError if the store cannot be used.
    """

    def __init__(self, objects: Objects, system_id: str, root_source: Mapping[str, Any]) -> None:
        """Use `System.create` or `System.open`."""
        super().__init__(working_folder(objects.url), system_id, None, root_source)  # type: ignore[arg-type]  # set by `open`
        self.location = objects.url
        self._objects = objects
        self._versions: dict[str, _Version] | None = None
        self._records: dict[str, TaskRecord] = {}
        self._begun: dict[str, int] = {}
        self._is_at_work = False
        self._journals = SharedJournals(self.folder, objects, self.locks, self._write)
        # Names of what is known to be in the store, and of what this process has written here.
        self._shared: set[str] = set()
        self._written: set[str] = set()

    def check_note(self) -> None:
        """Checks that the folder is a working copy of this system, or makes it one.

        Raises:
            SystemFolderError: it is one of another system.
        """
        note = self.folder / _NOTE
        if not note.exists():
            self._write(note, to_json({"url": self.location, "system": self.id}))
        elif (found := read_json(note).get("system")) != self.id:
            raise SystemFolderError(
                f"found system {self.id} in {self.location}, and in {self.folder} a working copy of system {found}",
                "one and the same",
                "check the URL and its endpoint; if the earlier system is gone for good, remove that folder",
            )

    # Files that never change

    def _fetch(self, file: pathlib.Path) -> None:
        if file.exists():
            return
        name = self._name(file)
        # Once for all processes of this machine.
        with self.locks.fetching(file.stem[:2]):
            if file.exists():
                return
            data = self._objects.get(name)
            if data is None:
                # Whoever reads it says that it is missing.
                return
            _check_content(name, data, self.location)
            self._write(file, data)
            self._shared.add(name)

    def position_embedding(self, grid: int) -> Layer:
        """See System.position_embedding; workers elsewhere need it before a path that has it is shared."""
        layer = super().position_embedding(grid)
        if self._is_at_work:
            self._share_file(self._layer_file(layer.id))
        return layer

    def share_path(self, wanted: str) -> None:
        """Puts a path after its layers, unless it is in the store."""
        file = self._path_file(wanted)
        if not self._is_shared(file):
            for _, layer in self.path_document(wanted)["layers"]:
                self._share_file(self._layer_file(layer))
            self._share_file(file)

    def unshared_layers(self, path: Path) -> list[tuple[LayerSpec, Tensors]]:
        """See System.unshared_layers."""
        own = [layer for _, layer in path.layers if not self._is_shared(self._layer_file(layer.id))]
        return [(layer.spec, self.tensors(layer.id)) for layer in own]

    def _share_file(self, file: pathlib.Path) -> None:
        if not self._is_shared(file):
            try:
                data = file.read_bytes()
            except OSError as error:
                raise DamagedError(f"found no readable {file} ({error})", "what was written", "restore the file") from error
            self._objects.put(self._name(file), data)
            self._shared.add(self._name(file))

    def _is_shared(self, file: pathlib.Path) -> bool:
        name = self._name(file)
        # What is new here will hardly be there, and may be put again.
        if name not in self._shared and name not in self._written and self._objects.has(name):
            self._shared.add(name)
        return name in self._shared

    def _write(self, target: pathlib.Path, data: bytes) -> None:
        super()._write(target, data)
        self._written.add(self._name(target))

    def _name(self, file: pathlib.Path) -> str:
        return file.relative_to(self.folder).as_posix()

    # Tasks

    def pull(self) -> None:
        """See System.pull."""
        newest = newest_versions(self._objects.names("tasks"))
        missing = [name for name in map(_version_name, newest.items()) if not (self.folder / f"{name}.json").exists()]
        for name, data in self._objects.get_all([f"{name}.json" for name in missing]).items():
            parse_json(data, f"{self.location}/{name}")
            self._write(self.folder / name, data)
        known = self._versions or {}
        versions = {}
        for folder, number in newest.items():
            task = folder.rpartition("/")[2]
            version = known.get(task)
            versions[task] = version if version is not None and version.number == number else self._read_version(folder, number)
        self._versions = versions
        self._records = dict(_with_parents(versions, self.root.id))

    def _read_version(self, folder: str, number: int) -> _Version:
        file = self.folder / folder / f"{number}.json"
        document = read_json(file)
        try:
            record = document["record"]
            return _Version(
                number, None if record is None else TaskRecord.from_dict(record), tuple(document.get("ancestors", ()))
            )
        except (KeyError, TypeError) as error:
            raise DamagedError(f"found an unreadable task {file} ({error})", "what was written", "restore the file") from error

    def tasks(self) -> dict[str, TaskRecord]:
        """See System.tasks."""
        if self._versions is None:
            self.pull()
        return dict(self._records)

    def task(self, name: str) -> TaskRecord | None:
        """See System.task."""
        return self.tasks().get(name)

    def task_names(self) -> list[str]:
        """See System.task_names."""
        return sorted(self.tasks())

    def publish(self, record: TaskRecord, ancestors: Sequence[str]) -> TaskRecord:
        """See System.publish."""
        document = {"record": dataclasses.asdict(record), "ancestors": [one for one in ancestors if one != self.root.id]}
        if not self._create_version(record.name, document):
            now = self.task(record.name)
            # Of two machines that close one search, each may have been killed before the other came to its end.
            if now is not None and (now.path_id, now.rounds) == (record.path_id, record.rounds):
                return now
            raise self._journals.conflict(self.journal_file(record.name, record.rounds - 1))
        return record

    def _create_version(self, task: str, document: Mapping[str, Any]) -> bool:
        """Creates the version of a task's record that follows what `evolving` found; returns whether that was the first of its number."""
        number = self._begun[task] + 1
        created = self._objects.create(f"tasks/{task}/{number}.json", to_json(document))
        self.pull()
        return created

    def remove_task(self, name: str) -> None:
        """See System.remove_task; whoever is evolving it on another machine is told."""
        self.check_known(name)
        record = self.task(name)
        for number in range(record.rounds + 1 if record is not None else 1):
            file = self.journal_file(name, number)
            self._journals.catch_up(file)
            if file.exists():
                self.set_journal_aside(JournalFile(name, number, file, is_closed=False))
        if record is not None and not self._create_version(name, {"record": None}) and self.task(name) is not None:
            raise self._journals.conflict(self.journal_file(name, record.rounds))

    @contextlib.contextmanager
    def evolving(self, task: str) -> Iterator[None]:
        """See System.evolving."""
        with self.locks.evolving(task):
            self._is_at_work = True
            self.pull()
            versions = self._versions or {}
            self._begun[task] = versions[task].number if task in versions else 0
            record = self.task(task)
            self._journals.catch_up(self.journal_file(task, 0 if record is None else record.rounds))
            yield

    @contextlib.contextmanager
    def comparing(self, baseline: str, task: str) -> Iterator[None]:
        """See System.comparing."""
        with self.locks.comparing(baseline, task):
            self._is_at_work = True
            self._journals.catch_up(self.folder / "baselines" / baseline / f"{task}.jsonl")
            yield

    # Journals

    def journals(self, task: str | None = None) -> list[JournalFile]:
        """See System.journals; the one that is unfinished, or all of them, are brought up to date."""
        if task is None:
            self.pull_journals()
        else:
            record = self.task(task)
            self.pull_journal(self.journal_file(task, 0 if record is None else record.rounds))
        return super().journals(task)

    def pull_journals(self) -> None:
        """See System.pull_journals."""
        self._journals.pull_all()

    def pull_journal(self, file: pathlib.Path) -> None:
        """See System.pull_journal."""
        self._journals.pull(file)

    def share(self, journal: Journal) -> None:
        """See System.share."""
        file = journal.file
        number, length = self._journals.stored(file)
        data = file.read_bytes()
        if len(data) != length:
            self._share_named(journal.records)
            self._journals.create(file, number + 1, data)

    def _share_named(self, records: Iterable[Record]) -> None:
        """Puts what the records of a search name: paths of survivors with their layers, and the examples of the last."""
        for record in records:
            for child in record.get("children", ()) if record["type"] == "pack" else ():
                if child["survived"]:
                    self.share_path(child["path_id"])
            if record["type"] == "close" and "examples" in record:
                self._share_file(self.folder / "examples" / record["examples"])

    def set_journal_aside(self, journal: JournalFile, *, copy: bool = False) -> pathlib.Path:
        """See System.set_journal_aside; on this machine alone, while in the store the round starts over."""
        target = super().set_journal_aside(journal, copy=copy)
        file = self.journal_file(journal.task, journal.round)
        number, length = self._journals.stored(file)
        if not copy and length:
            self._journals.create(file, number + 1, b"")
        return target

    # The rest

    def written_folders(self) -> list[pathlib.Path]:
        """See System.written_folders."""
        return [*super().written_folders(), *(self.folder / "tasks").glob("*/")]

    def stored_sizes(self, *, alone: bool) -> dict[str, int]:
        """See System.stored_sizes."""
        if not alone:
            raise SystemFolderError(
                f"found a system in {self.location}",
                "one in a folder: no lock keeps other machines from counting on what would be removed",
                "--alone collects it while no other machine is at work on it; what nothing refers to costs nothing but room",
            )
        return {name: size for folder in _COLLECTED for name, size in self._objects.sizes(folder).items()}

    def remove_stored(self, names: Sequence[str]) -> None:
        """See System.remove_stored."""
        self._objects.remove(names)
        left = self.stored_sizes(alone=True).keys() & set(names)
        if left:
            raise SystemFolderError(
                f"could not remove {len(left)} of {len(names)} objects in {self.location}, such as {min(left)}",
                "a store that lets this user delete",
            )

    def findings(self) -> Iterator[str]:
        """See System.findings: the store is read, not the copy here."""
        names = {name for folder in ("layers", "paths", "examples") for name in self._objects.names(folder)}
        for name in sorted(names):
            data = self._objects.get(name)
            try:
                if data is not None:
                    _check_content(name, data, self.location)
            except DamagedError as error:
                yield str(error)
        for record in self.tasks().values():
            layers = [self._layer_file(layer) for _, layer in self.path_document(record.path_id)["layers"]]
            for file in (self._path_file(record.path_id), *layers, self.folder / "examples" / record.examples):
                if self._name(file) not in names:
                    yield f"found no {self._name(file)} in {self.location}, which the current path of task {record.name!r} needs"


def has_system(url: str) -> bool:
    """See System.exists."""
    return open_objects(url).has(LANDMARK)


def create_system(
    url: str,
    layers: Mapping[Position, tuple[LayerSpec, Tensors]],
    image_size: int,
    root_source: Mapping[str, Any] | None = None,
) -> System:
    """See System.create."""
    objects = open_objects(url)
    if objects.has(LANDMARK):
        raise _found_one(objects.url)
    objects.prepare()
    _check_exclusive(objects)
    copy = WorkingCopy(objects, secrets.token_hex(8), root_source or {})
    if (copy.folder / _NOTE).exists():
        raise SystemFolderError(
            f"found no system in {copy.location} any more, though {copy.folder} is a working copy of one",
            "the store as it was",
            "check the URL and its endpoint; if the system is gone for good, remove that folder",
        )
    with copy.locks.creating():
        root = copy.put_root(layers, image_size)
        copy.share_path(root.id)
        document = {"format": FORMAT, "id": copy.id, "root": root.id, "root_source": dict(root_source or {})}
        if not objects.create(LANDMARK, to_json(document)):
            raise _found_one(objects.url)
    return open_copy(url)


def open_copy(url: str) -> System:
    """See System.open."""
    objects = open_objects(url)
    data = objects.get(LANDMARK)
    if data is None:
        raise SystemFolderError(f"found no system in {objects.url}", "a store with system.json", "`munet-evolve run` starts one")
    system_id, root_id, root_source = check_document(parse_json(data, f"{objects.url}/{LANDMARK}"), FORMAT, objects.url)
    copy = WorkingCopy(objects, system_id, root_source)
    copy.check_note()
    copy.root = copy.path(root_id)
    return copy


def working_folder(url: str) -> pathlib.Path:
    """Returns the folder of this machine's working copy of what is at a URL."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", url.rstrip("/").rpartition("/")[2])
    return cache_folder() / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def _with_parents(versions: Mapping[str, _Version], root: str) -> Iterator[tuple[str, TaskRecord]]:
    """Yields tasks by name; the parent of each is its nearest ancestor that is current, whatever was when it was published."""
    current = {version.record.path_id for version in versions.values() if version.record is not None}
    for name, version in sorted(versions.items()):
        if version.record is not None:
            parent = next((one for one in version.ancestors if one in current), root)
            yield name, dataclasses.replace(version.record, parent_id=parent)


def _version_name(version: tuple[str, int]) -> str:
    folder, number = version
    return f"{folder}/{number}"


def _check_content(name: str, data: bytes, url: str) -> None:
    """Checks that an object is what its name says.

    Raises:
        DamagedError: it is not.
    """
    stem = name.rpartition("/")[2].partition(".")[0]
    try:
        if name.startswith("layers/"):
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            spec = LayerSpec.of(LayerKind(header["kind"]), **json.loads(header["config"]))
            found = layer_id(spec, safetensors.numpy.load(data))
        elif name.startswith("paths/"):
            found = path_id(**json.loads(data))
        else:
            found = hashlib.sha256(data).hexdigest()[:16]
    except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"found an unreadable {url}/{name} ({error})", "what was written", "restore the object") from error
    if found != stem:
        raise DamagedError(f"found {url}/{name} altered (its hash is {found})", "what was written", "restore the object")


def _check_exclusive(objects: Objects) -> None:
    """Checks that a store keeps what is there from being created again.

    Raises:
        StoreError: it does not.
    """
    name = f"probe-{secrets.token_hex(8)}"
    one, other = objects.create(name, b"one"), objects.create(name, b"other")
    objects.remove([name])
    if not one or other:
        raise StoreError(
            f"found that {objects.url} replaces what is to be created only if it is not there",
            "a store with conditional writes (If-None-Match: * on S3)",
            "another store, or a newer version of it: without them, two machines could publish one task at once",
        )


def _found_one(url: str) -> SystemFolderError:
    return SystemFolderError(f"found a system in {url}", "none", "open it, or choose another folder")
