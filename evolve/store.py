"""A system on disk: layers named by content, immutable paths, tasks as atomic pointers.

    system.json             format, id of the system, id of the root path
    layers/ab/ab….safetensors   one layer each; kind and configuration in the metadata
    paths/<id>.json         one path each
    tasks/<name>.json       a task: which path is current, and what the search must remember of it
    examples/<hash>.npy     a few validation images of a task
    journal/<task>-0001.jsonl   the record of one search, see evolve.journal; `….jsonl.gz` once compressed
    journal/removed/        those of tasks that were removed and of searches that were started over
    baselines/<method>/<task>.jsonl   the record of one baseline, see evolve.baseline
    locks/                  see evolve.locks

Layers, paths and examples never change once written; only a task's file is replaced, in one rename. A crash at any moment leaves files
that nothing refers to, never a torn one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from evolve.documents import TaskRecord, check_document, path_to_dict, read_json, to_json
from evolve.errors import DamagedError, SystemFolderError
from evolve.hyperparameters import Hyperparameters
from evolve.journal import Journal, baseline_journals, compressed_file, free_name_aside, journals_in, search_journals
from evolve.layer import POS_EMBED, Layer, LayerKind, LayerSpec, Position, Tensors
from evolve.locks import Locks
from evolve.objects import is_url
from evolve.path import Path, PlacedLayer
from evolve.position_embedding import resample
from munet.files import remove_unfinished, sync_folder, write_atomically
from munet.preprocessing import Pixels

FORMAT = 1
"""Version of the layout described above."""

Location = str | os.PathLike[str]
"""Where a system is: its folder, or the URL of a store (evolve.working_copy)."""

_REPAIR = (
    "restore the file from a copy; without one, `munet-evolve remove` the tasks whose paths use it and evolve them again, "
    "or start a search that has just trained it over with --restart"
)


@dataclasses.dataclass(frozen=True)
class JournalFile:
    """Where the journal of a search is.

    Attributes:
        task: that was searched.
        round: counted from 0 over the life of the task.
        file: plain, or compressed if there is no plain one; evolve.journal.read_journal takes both.
        is_closed: whether its round is closed; otherwise the search runs, or goes on when it is run again.
    """

    task: str
    round: int
    file: pathlib.Path
    is_closed: bool


class System:
    """One system on disk. Safe for many readers; writers of different tasks do not disturb each other.

    Methods that write raise SystemFolderError if the folder cannot be written or the disk is full; nothing is half-written then.

    Attributes:
        folder: where its files are on this machine.
        location: what others open to have the same system: its absolute folder, or the URL of the store that it is in.
        locks: between processes that use the folder.
        id: drawn when it was made.
        root: the pretrained path it started from.
        root_source: where that came from.
    """

    def __init__(self, folder: pathlib.Path, system_id: str, root: Path, root_source: Mapping[str, Any]) -> None:
        """Use `create` or `open`."""
        self.folder = folder
        self.location = str(folder.absolute())
        self.locks = Locks(folder)
        self.id = system_id
        self.root = root
        self.root_source = root_source
        self._layers: dict[str, Layer] = {}
        self._position_embeddings: dict[int, Layer] = {}

    @staticmethod
    def exists(location: Location) -> bool:
        """Tells whether there is a system.

        Raises:
            SystemFolderError: nobody may look there.
        """
        if is_url(location):
            from evolve.working_copy import has_system

            return has_system(location)
        folder = pathlib.Path(location)
        try:
            return (folder / "system.json").exists()
        except OSError as error:
            raise SystemFolderError(f"could not read {folder} ({error.strerror})", "a folder that can be read") from error

    @staticmethod
    def create(
        location: Location,
        layers: Mapping[Position, tuple[LayerSpec, Tensors]],
        image_size: int,
        root_source: Mapping[str, Any] | None = None,
    ) -> System:
        """Starts a system from a pretrained root.

        Args:
            location: a folder, made if missing, or the URL of a store; must hold no system.
            layers: of the root by position, from the patch embedding to the final norm, the position embedding on its native grid.
            image_size: what the root was pretrained on, in pixels.
            root_source: where the root comes from, JSON values; kept to notice an experiment that asks for another root.

        Raises:
            SystemFolderError: the folder holds a system already or cannot be written.
            ValueError: the layers do not chain.
        """
        if is_url(location):
            from evolve.working_copy import create_system

            return create_system(location, layers, image_size, root_source)
        folder, system_id = pathlib.Path(location), secrets.token_hex(8)
        blank = System(folder, system_id, None, root_source or {})  # type: ignore[arg-type]  # the root's layers are written through it first
        with blank.locks.creating():
            if System.exists(folder):
                raise SystemFolderError(f"found a system in {folder}", "none", "open it, or choose another folder")
            root = blank.put_root(layers, image_size)
            document = {"format": FORMAT, "id": system_id, "root": root.id, "root_source": dict(root_source or {})}
            blank._write(folder / "system.json", to_json(document))
        return System.open(folder)

    def put_root(self, layers: Mapping[Position, tuple[LayerSpec, Tensors]], image_size: int) -> Path:
        """Writes the root's layers and path, and returns it; see `create`."""
        placed = tuple(PlacedLayer(position, self.put_layer(spec, tensors)) for position, (spec, tensors) in layers.items())
        num_blocks = sum(position.kind is LayerKind.BLOCK for position in layers)
        hyperparameters = Hyperparameters(num_blocks=num_blocks, image_size=image_size)
        root = Path.of(task=None, layers=placed, hyperparameters=hyperparameters, parent_id=None, quality=None)
        self.put_path(root)
        return root

    @staticmethod
    def open(location: Location) -> System:
        """Opens a system.

        Args:
            location: its folder, or the URL of the store that it is in.

        Raises:
            SystemFolderError: no system there, one of a newer format, or a folder that cannot be read.
            StoreError: the store cannot be used.
            DamagedError: its root cannot be read.
        """
        if is_url(location):
            from evolve.working_copy import open_copy

            return open_copy(location)
        folder = pathlib.Path(location)
        if not System.exists(folder):
            raise SystemFolderError(f"found no system in {folder}", "a folder with system.json", "`munet-evolve run` starts one")
        system_id, root_id, root_source = check_document(read_json(folder / "system.json"), FORMAT, str(folder))
        system = System(folder, system_id, None, root_source)  # type: ignore[arg-type]  # the next line sets it
        system.root = system.path(root_id)
        return system

    # Others on other machines: a folder needs none of this, see evolve.working_copy for what does.

    def pull(self) -> None:
        """Looks for what others have published since; what was found last is what tasks are."""

    def pull_journals(self) -> None:
        """Brings the journals of others into the folder, for whoever reads all of them."""

    def pull_journal(self, file: pathlib.Path) -> None:
        """Brings one journal into the folder, as far as others have got with it, unless a process of this machine is at work on it."""

    def share(self, journal: Journal) -> None:
        """Makes what a journal says, and all that it names, known to others.

        Raises:
            ConflictError: another machine has gone on with the same round.
        """

    def unshared_layers(self, path: Path) -> list[tuple[LayerSpec, Tensors]]:
        """Returns the layers of a path that others who open this system do not find; a baseline's are of no use to them."""
        return []

    def evolving(self, task: str) -> AbstractContextManager[None]:
        """Held by who evolves a task, from its look at the task's record to the end.

        Raises:
            BusyError: another process holds it.
        """
        return self.locks.evolving(task)

    def comparing(self, baseline: str, task: str) -> AbstractContextManager[None]:
        """Held by who trains a task's baseline; see Locks.comparing.

        Raises:
            BusyError: another process holds it.
        """
        return self.locks.comparing(baseline, task)

    def stored_sizes(self, *, alone: bool) -> dict[str, int] | None:
        """Returns the bytes of what is kept elsewhere than in the folder, by name, to be collected; None if there is nothing elsewhere.

        Args:
            alone: no other machine is at work on it, as whoever asks knows.

        Raises:
            SystemFolderError: there is, and others may write there, where no lock can be seen.
        """
        return None

    def remove_stored(self, names: Sequence[str]) -> None:
        """Removes what `stored_sizes` named.

        Raises:
            SystemFolderError: it is not let.
        """

    def findings(self) -> Iterator[str]:
        """Yields a sentence for each thing wrong with what is kept elsewhere than in the folder."""
        return iter(())

    def _fetch(self, file: pathlib.Path) -> None:
        """Brings a file that never changes into the folder, if there is one; called before it is read."""

    # Layers

    def put_layer(self, spec: LayerSpec, tensors: Tensors) -> Layer:
        """Writes a layer unless it is there whole, and returns it."""
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        layer = Layer.of(spec, contiguous)
        if not (self._layer_file(layer.id).exists() and self._has_layer(layer.id)):
            metadata = {"kind": spec.kind.value, "config": json.dumps(spec.config, sort_keys=True)}
            self._write(self._layer_file(layer.id), safetensors.numpy.save(contiguous, metadata))
        self._layers[layer.id] = layer
        return layer

    def _has_layer(self, layer_id: str) -> bool:
        try:
            self.check_layer(layer_id)
        except DamagedError:
            return False
        return True

    def layer(self, layer_id: str) -> Layer:
        """Returns a stored layer without its weights.

        Raises:
            DamagedError: it is missing, altered or cannot be read.
        """
        if layer_id not in self._layers:
            self._layers[layer_id] = self.check_layer(layer_id)
        return self._layers[layer_id]

    def check_layer(self, layer_id: str) -> Layer:
        """Reads a layer's file, hashes its weights, and returns it without them.

        Raises:
            DamagedError: it is missing, altered or cannot be read.
        """
        found = Layer.of(*self._read_layer(layer_id))
        if found.id != layer_id:
            raise DamagedError(
                f"found altered weights in {self._layer_file(layer_id)} (their hash is {found.id})", "what was written", _REPAIR
            )
        return found

    def spec(self, layer_id: str) -> LayerSpec:
        """Returns kind and configuration of a stored layer without reading its weights.

        Raises:
            DamagedError: it is missing or cannot be read.
        """
        return self._read_layer(layer_id, weights=False)[0]

    def tensors(self, layer_id: str) -> dict[str, Any]:
        """Returns the weights of a stored layer.

        Raises:
            DamagedError: it is missing or cannot be read.
        """
        return self._read_layer(layer_id)[1]

    def position_embedding(self, grid: int) -> Layer:
        """Returns the root's position embedding for a square grid of so many patches a side, resampled from the native one.

        It is the same layer for the whole system, frozen like the root's own.
        """
        if grid not in self._position_embeddings:
            native = self.root.layer(POS_EMBED)
            spec, tensors = resample(native.spec, self.tensors(native.id), grid)
            self._position_embeddings[grid] = native if spec == native.spec else self.put_layer(spec, tensors)
        return self._position_embeddings[grid]

    # Paths

    def put_path(self, path: Path) -> None:
        """Writes a path unless it is there whole. Its layers must be stored already."""
        target, data = self._path_file(path.id), to_json(path_to_dict(path))
        if not target.exists() or target.read_bytes() != data:
            self._write(target, data)

    def path_document(self, path_id: str) -> dict[str, Any]:
        """Returns what `path_to_dict` wrote of a path; its layers are not looked at.

        Raises:
            DamagedError: it is missing or cannot be read.
        """
        self._fetch(self._path_file(path_id))
        return read_json(self._path_file(path_id))

    def path(self, path_id: str) -> Path:
        """Returns a stored path.

        Raises:
            DamagedError: it or one of its layers is missing, altered or cannot be read.
        """
        document = self.path_document(path_id)
        try:
            path = Path.of(
                task=document["task"],
                layers=[PlacedLayer(Position.parse(position), self.layer(layer)) for position, layer in document["layers"]],
                hyperparameters=Hyperparameters.from_dict(document["hyperparameters"]),
                parent_id=document["parent_id"],
                quality=document["quality"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"found an unreadable path {path_id} ({error})", "what was written", "restore the file") from error
        if path.id != path_id:
            raise DamagedError(f"found path {path.id} in the file of path {path_id}", "what was written", "restore the file")
        return path

    # Tasks

    def tasks(self) -> dict[str, TaskRecord]:
        """Returns all tasks by name, in ascending order."""
        records = ((file.stem, self._read_task(file)) for file in sorted((self.folder / "tasks").glob("*.json")))
        return {name: record for name, record in records if record is not None}

    def task(self, name: str) -> TaskRecord | None:
        """Returns a task's record; None if there is no such task.

        Raises:
            DamagedError: it cannot be read.
        """
        return self._read_task(self._task_file(name))

    def put_task(self, record: TaskRecord) -> None:
        """Writes a task's record; the one moment at which a new path becomes current."""
        self._write(self._task_file(record.name), to_json(dataclasses.asdict(record)))

    def task_names(self) -> list[str]:
        """Returns the names of all tasks, also of those whose record is damaged, in ascending order."""
        return sorted(file.stem for file in (self.folder / "tasks").glob("*.json"))

    def publish(self, record: TaskRecord, ancestors: Sequence[str]) -> TaskRecord:
        """Makes a path its task's current one and keeps every parent current. The caller holds `publishing` and is `evolving`.

        Args:
            record: the task's new one.
            ancestors: ids of the path's ancestors, from near to far.

        Returns:
            The task's record now.

        Raises:
            ConflictError: another machine has closed or removed the task meanwhile.
        """
        old = self.task(record.name)
        # In this order: a crash in between leaves every parent current, and whoever closes again ends alike.
        if old is not None and old.path_id != record.path_id:
            self.replace_parent(old.path_id, old.parent_id)
        self.put_task(record)
        return record

    def remove_task(self, name: str) -> None:
        """Forgets a task, also one of which there is but an unfinished search; its path and layers stay until they are collected.

        Tasks whose parent was its path get its own parent. The caller holds `publishing` and the task's lock.

        Raises:
            SystemFolderError: the system has no such task.
        """
        self.check_known(name)
        record = self.tasks().get(name)
        if record is not None:
            self.replace_parent(record.path_id, record.parent_id)
        for journal in self.journals(name):
            self.set_journal_aside(journal)
        try:
            self._task_file(name).unlink(missing_ok=True)
            if record is not None:
                sync_folder(self._task_file(name).parent)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def check_known(self, name: str) -> None:
        """Checks that there is a task, or an unfinished search of one.

        Raises:
            SystemFolderError: there is neither.
        """
        if self.task(name) is None and name not in (known := sorted({one.task for one in self.journals()} | self.tasks().keys())):
            raise SystemFolderError(
                f"found no task {name!r} in {self.folder}", f"one of {known}" if known else "a system with tasks"
            )

    def journal_file(self, task: str, round_number: int) -> pathlib.Path:
        """Returns where the journal of a round is, counted from 0."""
        return self.folder / "journal" / f"{task}-{round_number + 1:04d}.jsonl"

    def journals(self, task: str | None = None) -> list[JournalFile]:
        """Returns the journals of all searches, or of a task's: plain and compressed, by task and round; not those set aside."""
        rounds = {name: record.rounds for name, record in self.tasks().items()}
        return [
            JournalFile(name, number, file, number < rounds.get(name, 0))
            for (name, number), file in search_journals(self.folder).items()
            if task in (None, name)
        ]

    def baseline_journals(self) -> list[pathlib.Path]:
        """Returns the journals of all baselines, plain and compressed, in order."""
        return baseline_journals(self.folder)

    def removed_journals(self) -> list[pathlib.Path]:
        """Returns the journals that were set aside, plain and compressed, in order."""
        return journals_in(self.folder / "journal" / "removed")

    def set_journal_aside(self, journal: JournalFile, *, copy: bool = False) -> pathlib.Path:
        """Moves a journal to journal/removed/, so that a later search of the same round starts afresh, or writes a copy there.

        The caller holds `publishing` and the task's lock.

        Returns:
            Where it is now.
        """
        removed = self.folder / "journal" / "removed"
        try:
            removed.mkdir(exist_ok=True)
            plain = self.journal_file(journal.task, journal.round)
            target = free_name_aside(removed, plain.stem)
            for file, new in ((plain, target), (compressed_file(plain), compressed_file(target))):
                if copy and file.exists():
                    write_atomically(new, file.read_bytes())
                elif file.exists():
                    file.rename(new)
            sync_folder(removed)
            sync_folder(removed.parent)
        except OSError as error:
            raise _unwritable(removed, error) from error
        return target

    def replace_parent(self, old: str, new: str) -> None:
        """Gives every task whose parent is the path `old` the parent `new`. The caller holds `publishing`."""
        for record in self.tasks().values():
            if record.parent_id == old:
                self.put_task(dataclasses.replace(record, parent_id=new))

    def put_examples(self, images: Pixels) -> str:
        """Writes example images, uint8 [images, size, size, 3], and returns their name."""
        buffer = io.BytesIO()
        np.save(buffer, images)
        name = f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.npy"
        if not (self.folder / "examples" / name).exists():
            self._write(self.folder / "examples" / name, buffer.getvalue())
        return name

    def examples(self, record: TaskRecord) -> Pixels:
        """Returns a task's example images, uint8 [images, size, size, 3].

        Raises:
            DamagedError: they are missing or cannot be read.
        """
        file = self.folder / "examples" / record.examples
        self._fetch(file)
        try:
            return np.asarray(np.load(file, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise DamagedError(f"found no readable {file} ({error})", "example images", "restore the file") from error

    def remove_unfinished(self) -> None:
        """Removes what killed processes left half-written; what others are writing stays."""
        try:
            for folder in self.written_folders():
                remove_unfinished(folder)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def written_folders(self) -> list[pathlib.Path]:
        """Returns the folders in which files are written."""
        parts = [self.folder / name for name in ("paths", "tasks", "examples", "journal", "journal/removed")]
        parts += [*(self.folder / "baselines").glob("*/"), *(self.folder / "layers").glob("*/")]
        return [self.folder, *filter(pathlib.Path.is_dir, parts)]

    def check_journal(self, journal: JournalFile, opened: Mapping[str, Any]) -> None:
        """Checks by its first record that a journal is the one that belongs in its place.

        Raises:
            DamagedError: it is of another system, task or round.
        """
        found = tuple(opened.get(name) for name in ("system", "task", "round"))
        if found != (self.id, journal.task, journal.round):
            system, task, number = found
            number = number + 1 if isinstance(number, int) else number
            raise DamagedError(
                f"found the journal of round {number} of task {task!r} of system {system} in {journal.file}",
                f"that of round {journal.round + 1} of task {journal.task!r} of system {self.id}",
                "put the right one back, or start an unfinished round over with `munet-evolve run` and --restart",
            )

    # Files

    def _layer_file(self, layer_id: str) -> pathlib.Path:
        return self.folder / "layers" / layer_id[:2] / f"{layer_id}.safetensors"

    def _path_file(self, path_id: str) -> pathlib.Path:
        return self.folder / "paths" / f"{path_id}.json"

    def _task_file(self, name: str) -> pathlib.Path:
        return self.folder / "tasks" / f"{name}.json"

    def _read_layer(self, layer_id: str, *, weights: bool = True) -> tuple[LayerSpec, dict[str, Any]]:
        file = self._layer_file(layer_id)
        self._fetch(file)
        try:
            with safetensors.safe_open(file, framework="numpy") as content:
                metadata = content.metadata()
                names = content.keys() if weights else ()
                tensors = {name: content.get_tensor(name) for name in names}
            spec = LayerSpec.of(LayerKind(metadata["kind"]), **json.loads(metadata["config"]))
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DamagedError(f"found no readable layer {file} ({error})", "its weights", _REPAIR) from error
        return spec, tensors

    def _read_task(self, file: pathlib.Path) -> TaskRecord | None:
        """Returns the record in a task's file; None if the task was removed meanwhile."""
        try:
            document = read_json(file)
        except DamagedError:
            if not file.exists():
                return None
            raise
        try:
            return TaskRecord.from_dict(document)
        except (KeyError, TypeError) as error:
            raise DamagedError(f"found an unreadable task {file} ({error})", "what was written", "restore the file") from error

    def _write(self, target: pathlib.Path, data: bytes) -> None:
        try:
            write_atomically(target, data)
        except OSError as error:
            raise _unwritable(target.parent, error) from error


def _unwritable(folder: pathlib.Path, error: OSError) -> SystemFolderError:
    reason = error.strerror or str(error)
    return SystemFolderError(f"could not write in {folder} ({reason})", "a writable folder with free space")
