"""A model repository as its publisher sees it: what it holds, who may write, what may go.

    CURRENT                         number of the generation that servers are to answer from
    CANARY                          a newer one that they are to try beside it, and how much, if there is one
    generation-<number>.json        a generation, see proto/munet/v1/generation.proto
    generation-<number>.sig         its signature, if somebody signed it, see munet.signatures
    golden-<size>.<hash>.npy        images that golden logits belong to
    seg-<hash>/                     a segment: config.pbtxt, 1/model.onnx
    <task>.<hash>/, all-<size>.<hash>/   ensembles: config.pbtxt, label files, 1/
    <task>/                         alias: the task's ensemble under its plain name
    .publishing.lock                held by the one publisher

Everything but CURRENT, CANARY and the aliases is named by its content and never changes. Files and folders of other names are never
touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping

from google.protobuf import json_format

from evolve.errors import ExportError
from evolve.export.triton import CONFIG_FILE, VERSION_FOLDER, Ensemble
from munet.files import sha256_of, sync_folder, write_atomically
from munet.signatures import PrivateKey, is_signed, signature_name
from munet.v1 import generation_pb2

FORMAT = 1
"""Version of the generation format that this code reads and writes."""

KEPT_GENERATIONS = 3
"""So many of the newest generations stay for rollback."""

MODEL_FILE = f"{VERSION_FOLDER}/model.onnx"

_GENERATION = re.compile(r"generation-([1-9][0-9]*)\.json")
_SIGNATURE = re.compile(r"generation-([1-9][0-9]*)\.sig")
_GOLDEN = re.compile(r"golden-[0-9]+\.[0-9a-f]{12}\.npy")
_MODEL = re.compile(r"seg-[0-9a-f]{12}|[a-z0-9][a-z0-9_-]*\.[0-9a-f]{12}")
_IN_MODEL = re.compile(r"config\.pbtxt|labels(_[a-z0-9_-]+)?\.txt|model\.onnx")
_UNFINISHED = re.compile(r"\.(.+)\.[^.]+\.part")
"""What munet.files.write_atomically leaves behind when it is killed."""


class Repository:
    """A model repository, held. Made by `open_for_publishing` or `open_for_release`; use it within that context only.

    Attributes:
        folder: the repository.
        generations: every generation there, by number, in ascending order.
        current: number of the current one; 0 if there is none yet.
        canary: what is tried beside it; none if nothing is.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        generations: Mapping[int, generation_pb2.Generation],
        current: int,
        signing_key: PrivateKey | None = None,
        canary: generation_pb2.Canary | None = None,
    ) -> None:
        """Use `open_for_publishing`."""
        self.folder = folder
        self.generations = dict(generations)
        self.current = current
        self.canary = canary
        self._signing_key = signing_key
        # A signature vouches for all that its generation names. What others may have put there is made anew.
        self._trusted = {number for number in generations if signing_key is None or _is_signed_by(folder, number, signing_key)}
        trusted = [generation for number, generation in generations.items() if number in self._trusted]
        self._checksums = {file.path: file for generation in trusted for file in generation.files}
        self._aliases = {task.name for generation in generations.values() for task in generation.tasks}

    @property
    def next_number(self) -> int:
        """A number that no generation here ever had."""
        return max([self.current, *self.generations]) + 1

    @property
    def current_generation(self) -> generation_pb2.Generation | None:
        """The generation that servers are to answer from, if there is one; whoever signs has only what the same key signed."""
        return self.generations.get(self.current) if self.current in self._trusted else None

    @property
    def leaves_signatures(self) -> bool:
        """Whether the current generation is signed and what is published now will not be."""
        return self._signing_key is None and (self.folder / signature_name(self.current)).exists()

    def intact(self, path: str) -> generation_pb2.File | None:
        """Returns what some generation says of a file if the file is as it says; else None. Whoever signs has only what the same key
        signed.
        """
        expected = self._checksums.get(path)
        file = self.folder / path
        if expected is None or not file.is_file() or file.stat().st_size != expected.num_bytes:
            return None
        return expected if sha256_of(file) == expected.sha256 else None

    def put(self, path: str, data: bytes) -> generation_pb2.File:
        """Writes a file durably unless it is there with these bytes, and returns what a generation says of it."""
        file = self.folder / path
        if not file.is_file() or file.stat().st_size != len(data) or file.read_bytes() != data:
            write_atomically(file, data)
        return generation_pb2.File(path=path, sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data))

    def put_ensemble(self, ensemble: Ensemble) -> list[generation_pb2.File]:
        """Writes an ensemble's folder, its configuration last, and returns its files."""
        folder = self.folder / ensemble.name
        (folder / VERSION_FOLDER).mkdir(parents=True, exist_ok=True)
        names = sorted(ensemble.files, key=lambda name: (name == CONFIG_FILE, name))
        return [self.put(f"{ensemble.name}/{name}", ensemble.files[name]) for name in names]

    def publish(self, generation: generation_pb2.Generation, canary: generation_pb2.Canary | None = None) -> None:
        """Makes a generation the current one, which ends a canary. All its files must be there.

        It becomes so by the renaming of CURRENT; before that nobody sees it.

        Args:
            generation: which.
            canary: makes it the canary instead, with this part of the requests.
        """
        # Also of files that a killed publisher wrote and this one found: nobody knows whether their names are on the disk yet.
        fresh = (pathlib.PurePosixPath(file.path) for file in generation.files if file.path not in self._checksums)
        for inner in sorted({parent for path in fresh for parent in path.parents}, reverse=True):
            sync_folder(self.folder / inner)
        text = json_format.MessageToJson(generation, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        content = f"{text}\n".encode()
        signature = self.folder / signature_name(generation.number)
        # Before the generation, so that no server ever sees one whose signature is still to come.
        if self._signing_key is not None:
            write_atomically(signature, self._signing_key.sign(content))
        else:
            # Of a publisher that was killed before it wrote its generation.
            signature.unlink(missing_ok=True)
        write_atomically(self.folder / f"generation-{generation.number}.json", content)
        # From here on it stays, whatever becomes of CURRENT.
        self.generations[generation.number] = generation
        self._trusted.add(generation.number)
        self._aliases.update(task.name for task in generation.tasks)
        if canary is None:
            self._set_current(generation.number)
        else:
            self.put_canary(canary)

    def put_canary(self, canary: generation_pb2.Canary) -> None:
        """Has servers try a generation that is there beside the current one, which must be older."""
        text = json_format.MessageToJson(canary, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        write_atomically(self.folder / "CANARY", f"{text}\n".encode())
        self.canary = canary

    def remove_canary(self) -> None:
        """Has servers try nothing beside the current generation."""
        (self.folder / "CANARY").unlink(missing_ok=True)
        sync_folder(self.folder)
        self.canary = None

    def make_current(self, number: int) -> None:
        """Makes a generation that is there the current one, and the aliases follow. The canary ends, whichever it is.

        Raises:
            ExportError: something that no generation knows of has the name of an alias.
        """
        generation = self.generations[number]
        for task in generation.tasks:
            self.check_alias(task.name)
        if self.canary is not None and self.canary.generation != number:
            # Before CURRENT: it may be older than what is current now, and must not come back with what was current before.
            self.remove_canary()
        self._set_current(number)
        for task in generation.tasks:
            folder = self.folder / task.ensemble
            files = {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if _IN_MODEL.fullmatch(file.name)}
            self.put_ensemble(Ensemble(task.ensemble, files).renamed(task.name))
        self.remove_aliases([task.name for task in generation.tasks])

    def _set_current(self, number: int) -> None:
        write_atomically(self.folder / "CURRENT", f"{number}\n".encode())
        self.current = number
        # After CURRENT: a server that has loaded the canary goes on with it where it was promoted.
        self.remove_canary()

    def check_alias(self, task: str) -> None:
        """Checks that an alias may be written.

        Raises:
            ExportError: something that no generation knows of has its name.
        """
        folder = self.folder / task
        if folder.exists() and task not in self._aliases:
            raise ExportError(
                f"found {folder}, which munet did not write", f"no other model of the name of task {task!r}", "move it elsewhere"
            )

    def remove_aliases(self, tasks: Collection[str]) -> None:
        """Removes the aliases of all tasks but these."""
        for task in sorted(self._aliases.difference(tasks)):
            _remove_model(self.folder / task)

    def collect(self) -> None:
        """Removes all but the newest generations and what only those removed named, and what killed publishers left unfinished.

        The current generation, the one that it was published on top of, and the canary stay as well, however old they are. A generation
        goes before its files, so that each one there is whole at any moment.
        """
        kept = {*sorted(self.generations)[-KEPT_GENERATIONS:], self.current}
        kept |= {self.generations[self.current].previous} if self.current in self.generations else set()
        kept |= {self.canary.generation} if self.canary is not None else set()
        self.generations = {number: generation for number, generation in self.generations.items() if number in kept}
        for file in sorted(self.folder.iterdir()):
            match = _GENERATION.fullmatch(file.name) or _SIGNATURE.fullmatch(file.name)
            if match and int(match[1]) not in kept:
                file.unlink()
        sync_folder(self.folder)
        named = {
            pathlib.PurePosixPath(file.path).parts[0] for generation in self.generations.values() for file in generation.files
        }
        for entry in sorted(self.folder.iterdir()):
            if entry.name in named or entry.name in self._aliases:
                _remove_unfinished(entry)
            elif entry.is_dir() and _MODEL.fullmatch(entry.name):
                _remove_model(entry)
            elif _GOLDEN.fullmatch(entry.name) or _is_unfinished(entry):
                entry.unlink()


@contextlib.contextmanager
def open_for_publishing(
    folder: pathlib.Path, system_id: str, tell: Callable[[str], None], signing_key: PrivateKey | None = None
) -> Iterator[Repository]:
    """Holds a repository for publishing; makes the folder if missing and waits while another process holds it.

    The end of the process, however it comes, releases it.

    Args:
        folder: the repository.
        system_id: of the system that is to be published.
        tell: takes a sentence if there is a reason to wait.
        signing_key: signs what is published; none publishes without a signature.

    Raises:
        ExportError: a newer format, another system, or an unreadable generation.
        OSError: the folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, tell):
        generations = _read_generations(folder)
        for number, generation in generations.items():
            if generation.system_id != system_id:
                raise ExportError(
                    f"found generation {number} of system {generation.system_id} in {folder}",
                    f"a repository of system {system_id}",
                    "publish to another folder, one for each system",
                )
        yield Repository(folder, generations, _read_current(folder), signing_key, _read_canary(folder))


@contextlib.contextmanager
def open_for_release(folder: pathlib.Path, tell: Callable[[str], None]) -> Iterator[Repository]:
    """Holds a repository whose generations stay as they are, to say which of them is current.

    One that cannot be read is passed over, and so is a CURRENT that makes no sense: they may be why somebody goes back.

    Args:
        folder: the repository.
        tell: takes a sentence if there is a reason to wait.

    Raises:
        ExportError: nothing was published there.
        OSError: the folder cannot be written.
    """
    if not any(folder.glob("generation-*.json")):
        raise ExportError(f"found nothing published in {folder}", "a model repository", "`munet-evolve export` makes one")
    with _locked(folder, tell):
        current = 0
        with contextlib.suppress(ExportError):
            current = _read_current(folder)
        yield Repository(folder, _read_generations(folder, tell), current, canary=_read_canary(folder))


@contextlib.contextmanager
def _locked(folder: pathlib.Path, tell: Callable[[str], None]) -> Iterator[None]:
    descriptor = os.open(folder / ".publishing.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"waiting for another process that publishes to {folder}")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read_generations(
    folder: pathlib.Path, tell_damaged: Callable[[str], None] | None = None
) -> dict[int, generation_pb2.Generation]:
    numbers = [int(match[1]) for file in folder.iterdir() if (match := _GENERATION.fullmatch(file.name))]
    generations = {}
    for number in sorted(numbers):
        try:
            generations[number] = _read_generation(folder / f"generation-{number}.json")
        except ExportError as error:
            if tell_damaged is None:
                raise
            tell_damaged(f"passed over generation {number}: {error}")
    return generations


def _read_generation(file: pathlib.Path) -> generation_pb2.Generation:
    try:
        document = json.loads(file.read_bytes())
        found = document["format"]
        if found == FORMAT:
            generation = json_format.ParseDict(document, generation_pb2.Generation())
            _check_routes(generation)
            return generation
    except (ValueError, TypeError, KeyError, json_format.ParseError) as error:
        raise ExportError(f"found no generation in {file} ({error})", "what was published", "restore the file") from error
    raise ExportError(
        f"found a generation of format {found!r} in {file}", f"format {FORMAT}", "use the version of munet that wrote it"
    )


def _is_signed_by(folder: pathlib.Path, number: int, key: PrivateKey) -> bool:
    try:
        signature = (folder / signature_name(number)).read_bytes()
        return is_signed((folder / f"generation-{number}.json").read_bytes(), signature, [key.public_key()])
    except OSError:
        return False


def _check_routes(generation: generation_pb2.Generation) -> None:
    known = {segment.name for segment in generation.segments if segment.units}
    for task in generation.tasks:
        if not task.route or not known.issuperset(task.route):
            raise ValueError(f"the route of task {task.name!r} names segments that it does not describe")


def _read_current(folder: pathlib.Path) -> int:
    file = folder / "CURRENT"
    try:
        return int(file.read_text("ascii"))
    except FileNotFoundError:
        return 0
    except ValueError as error:
        raise ExportError(f"found no number in {file} ({error})", "the number of a generation", "write it there") from error


def _read_canary(folder: pathlib.Path) -> generation_pb2.Canary | None:
    """Returns the canary; none also if nobody can read it, for servers cannot either."""
    try:
        return json_format.Parse((folder / "CANARY").read_bytes(), generation_pb2.Canary(), ignore_unknown_fields=True)
    except (FileNotFoundError, ValueError, TypeError, AttributeError, json_format.ParseError):
        return None


def _remove_model(folder: pathlib.Path) -> None:
    """Removes a model's folder; whatever munet did not write stays, and the folder with it."""
    if not folder.is_dir():
        return
    for inner in (folder / VERSION_FOLDER, folder):
        if not inner.is_dir():
            continue
        for file in sorted(inner.iterdir()):
            if file.is_file() and (_IN_MODEL.fullmatch(file.name) or _is_unfinished(file)):
                file.unlink()
        if not any(inner.iterdir()):
            inner.rmdir()


def _remove_unfinished(entry: pathlib.Path) -> None:
    for inner in (entry, entry / VERSION_FOLDER):
        if inner.is_dir():
            for file in sorted(inner.iterdir()):
                if _is_unfinished(file):
                    file.unlink()


def _is_unfinished(file: pathlib.Path) -> bool:
    match = _UNFINISHED.fullmatch(file.name)
    if match is None or not file.is_file():
        return False
    ours = match[1]
    return ours in ("CURRENT", "CANARY") or any(
        pattern.fullmatch(ours) for pattern in (_GENERATION, _SIGNATURE, _GOLDEN, _IN_MODEL)
    )
