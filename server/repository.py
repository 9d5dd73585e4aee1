"""A model repository on disk: which generation is current, and whether its files are what it says.

Everything but CURRENT, CANARY and the aliases is named by content and never changes, so a generation that was read whole stays true. What
the files say to each other (routes' shapes, Triton's configs) is the matter of `server.verification`, which `Repository.read` asks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import types
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from google.protobuf import json_format

from munet.signatures import SIGNATURE_BYTES, PublicKey, is_signed, read_public_key, signature_name
from munet.v1 import generation_pb2
from server import verification
from server.canary import CanaryPointer
from server.errors import Finding, GenerationRefusedError, NewerFormatError, NoGenerationError, RepositoryError, SettingsError
from server.generation import Generation, Golden, Segment, Task, TensorSpec

FORMAT = 1
"""The newest format of generation-<number>.json that this module reads."""

CURRENT = "CURRENT"
CANARY = "CANARY"

_GENERATION = re.compile(r"generation-([1-9][0-9]{0,18})\.json")
_NUMBER = re.compile(rb"\s*[0-9]{1,18}\s*")
"""What CURRENT may hold: greater numbers fit into no message."""

_MAX_CANARY_BYTES = 1 << 20
_MAX_MANIFEST_BYTES = 1 << 30
_DATA_TYPES: dict[int, str] = {
    generation_pb2.DATA_TYPE_UINT8: "uint8",
    generation_pb2.DATA_TYPE_FLOAT32: "float32",
    generation_pb2.DATA_TYPE_FLOAT16: "float16",
}

_PUBLISHED = re.compile(
    r"seg-[0-9a-f]{12}/1/model\.onnx|[a-z0-9][a-z0-9_-]*(\.[0-9a-f]+)?/(config\.pbtxt|labels(_[a-z0-9_-]+)?\.txt)|golden-[0-9]+\.[0-9a-f]+\.npy"
)
"""Paths that a generation may name: nothing that anybody would run."""

_Signature = tuple[int, int, int, int] | None

_NO_CANARY = CanaryPointer(0, 0.0, {})


class Repository:
    """Reads the generations of one model repository.

    Not thread-safe: one reader at a time. A file is hashed again only if its size, times or inode changed since this object hashed
    it, so that reading a generation costs what is new in it.

    Args:
        root: the repository's folder.
        keys: only generations that one of them signed are read; none means all.
    """

    def __init__(self, root: pathlib.Path, keys: Sequence[PublicKey] = ()) -> None:
        self.root = root
        self._keys = tuple(keys)
        self._hashes: dict[str, tuple[_Signature, str]] = {}
        self._configs = verification.ConfigCache()

    def current_number(self) -> int:
        """Returns the number of the generation that is to be served.

        Raises:
            NoGenerationError: nothing was published here.
            RepositoryError: CURRENT cannot be read or holds no number.
        """
        text = self._read_small(CURRENT, 64)
        if text is None:
            raise NoGenerationError(self.root)
        if not _NUMBER.fullmatch(text):
            raise RepositoryError(
                f"{self.root / CURRENT}: found {text!r}, expected the number of a generation; "
                "write the number of the newest generation-<number>.json there"
            )
        return int(text)

    def canary(self) -> CanaryPointer | None:
        """Returns which generation is to be tried beside the current one, and how much; none if none is.

        Raises:
            RepositoryError: CANARY cannot be read or makes no sense.
        """
        text = self._read_small(CANARY, _MAX_CANARY_BYTES)
        if text is None:
            return None
        try:
            message = json_format.Parse(text, generation_pb2.Canary(), ignore_unknown_fields=True)
        except (ValueError, TypeError, AttributeError, RecursionError, json_format.ParseError) as error:
            message, found = generation_pb2.Canary(), str(error)[:300]
        else:
            found = repr(text[:200])
        percents = [message.percent, *message.percent_of_task.values()]
        if not message.generation or not all(0 <= percent <= 100 for percent in percents):
            raise RepositoryError(
                f"{self.root / CANARY}: found {found}, expected a generation's number and percentages from 0 to 100; "
                "`munet-evolve canary` writes it"
            )
        return CanaryPointer(message.generation, message.percent, dict(message.percent_of_task))

    def kept_numbers(self) -> list[int]:
        """Returns the numbers of the generations that are there, ascending; none if the repository cannot be read."""
        try:
            names = os.listdir(self.root)  # noqa: PTH208  # thousands of models: no object for each
        except OSError:
            return []
        return sorted(int(match[1]) for match in map(_GENERATION.fullmatch, names) if match)

    def fingerprint(self) -> Hashable:
        """Returns a value that changes when another generation becomes current or the canary, or one of their files changes."""
        named = self._named()
        signatures = (_signature(self.root / file) for number in named for file in _files_of(number))
        return tuple(named), tuple(signatures), _signature(self.root / CANARY)

    def fingerprint_of_files(self) -> Hashable:
        """Returns a value that changes when any file of the current generation or of the canary changes, appears or goes."""
        signatures: list[Hashable] = []
        for number in self._named():
            with contextlib.suppress(_OutsideError, OSError, ValueError, TypeError, KeyError, RuntimeError):
                manifest = json.loads(_inside(self.root, f"generation-{number}.json").read_bytes())
                signatures += [_signature(self.root / entry["path"]) for entry in manifest["files"]]
        return (self.fingerprint(), *signatures) if signatures else self.fingerprint()

    def _named(self) -> list[int | str]:
        """Returns the numbers of the current generation and of the canary; of one that cannot be read, why."""
        named: list[int | str] = []
        for read in (self.current_number, lambda: (self.canary() or _NO_CANARY).number):
            try:
                named.append(read())
            except RepositoryError as error:
                named.append(str(error))
        return named

    def _read_small(self, name: str, most_bytes: int) -> bytes | None:
        """Returns what is in a file that says what is to be served; None if it is not there."""
        try:
            with _inside(self.root, name).open("rb") as file:
                return file.read(most_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, RuntimeError, _OutsideError) as error:
            raise RepositoryError(f"{self.root / name}: found {error}, expected a readable file") from error

    def read(self, number: int | None = None) -> Generation:
        """Reads and verifies a generation: its signature, its own form, every file's checksum, routes' shapes, Triton's configs.

        Args:
            number: which one; none means the current one.

        Raises:
            NoGenerationError: nothing was published here.
            NewerFormatError: a newer publisher wrote it.
            GenerationRefusedError: it has faults; the error carries every one that was found.
            RepositoryError: CURRENT cannot be read.
        """
        generation, findings = self.inspect(number)
        if generation is None or findings:
            raise GenerationRefusedError(generation.number if generation else number or self.current_number(), findings)
        return generation

    def inspect(self, number: int | None = None) -> tuple[Generation | None, list[Finding]]:
        """Returns a generation and every fault found in it; no generation if its own file makes no sense.

        Args:
            number: which one; none means the current one.

        Raises:
            NoGenerationError, NewerFormatError, RepositoryError: as `read`.
        """
        number = self.current_number() if number is None else number
        message, digest, findings = self._read_manifest(number)
        if message is None:
            return None, findings
        findings += self._verify_files(message)
        findings += verification.check_names(message)
        if findings:
            return None, findings
        generation = self._to_generation(message, digest)
        findings += verification.check_routes(generation)
        findings += verification.check_configs(message, generation, self.root, self._configs)
        return generation, findings

    def _read_manifest(self, number: int) -> tuple[generation_pb2.Generation | None, str, list[Finding]]:
        name = f"generation-{number}.json"
        advice = "publish again, or write the number of a whole generation to CURRENT"
        try:
            with _inside(self.root, name).open("rb") as file:
                content = file.read(_MAX_MANIFEST_BYTES)
        except (OSError, RuntimeError, _OutsideError) as error:
            return (
                None,
                "",
                [Finding(name, getattr(error, "strerror", None) or str(error), "the file that CURRENT names", advice)],
            )
        unsigned = self._check_signature(number, content) if self._keys else None
        if unsigned is not None:
            # Nothing of it is even parsed.
            return None, "", [unsigned]
        try:
            values = json.loads(content)
            if not isinstance(values, dict):
                raise json_format.ParseError(f"a JSON {type(values).__name__}")
            found = values.get("format", 0)
            if isinstance(found, int) and found > FORMAT:
                raise NewerFormatError(str(self.root / name), found, FORMAT)
            message = generation_pb2.Generation()
            json_format.ParseDict(values, message, ignore_unknown_fields=True)
        except (ValueError, TypeError, AttributeError, RecursionError, json_format.ParseError) as error:
            return None, "", [Finding(name, str(error)[:300], "the protobuf JSON of munet.v1.Generation", advice)]
        findings = []
        if message.format != FORMAT:
            findings.append(Finding(f"{name}: format", repr(message.format), str(FORMAT), advice))
        if message.number != number:
            findings.append(Finding(f"{name}: number", repr(message.number), str(number), advice))
        return message, hashlib.sha256(content).hexdigest(), findings

    def _check_signature(self, number: int, content: bytes) -> Finding | None:
        name = signature_name(number)
        expected = f"the signature of generation-{number}.json by one of {len(self._keys)} keys"
        advice = "sign it with `munet-evolve export --sign KEYFILE`, or make its public key one of --require-signature"
        try:
            with _inside(self.root, name).open("rb") as file:
                signature = file.read(SIGNATURE_BYTES + 1)
        except (OSError, RuntimeError, _OutsideError) as error:
            return Finding(name, getattr(error, "strerror", None) or str(error), expected, advice)
        if not is_signed(content, signature, self._keys):
            return Finding(name, "what none of them signed", expected, advice)
        return None

    def _verify_files(self, message: generation_pb2.Generation) -> list[Finding]:
        findings: list[Finding] = []
        listed = set()
        for file in message.files:
            if file.path in listed:
                findings.append(Finding(f"files: {file.path}", "it twice", "each file once"))
            listed.add(file.path)
            finding = self._verify_file(file)
            if finding is not None:
                findings.append(finding)
        # What earlier generations needed is forgotten once it outweighs what this one needs.
        if len(self._hashes) > 4 * len(listed) + 1024:
            self._hashes = {path: entry for path, entry in self._hashes.items() if path in listed}
        expected = "the path, checksum and size of each file it needs"
        findings += [Finding(f"files: {needed}", "no entry", expected) for needed in sorted(_needed_files(message) - listed)]
        return findings

    def _verify_file(self, file: generation_pb2.File) -> Finding | None:
        where = f"files: {file.path[:200]!r}"
        if not _is_plain(file.path):
            return Finding(where, "a path that leaves the repository", "a relative path with / and without . or ..")
        if not _PUBLISHED.fullmatch(file.path):
            return Finding(
                where, "a file of another kind", "ONNX models, configs, labels and golden images, named as they are published"
            )
        path = self.root / file.path
        try:
            resolved = _inside(self.root, file.path)
            signature = _signature(path)
            known = self._hashes.get(file.path)
            if known is None or signature is None or known[0] != signature:
                with resolved.open("rb") as content:
                    # The signature taken before is kept: if the file changed meanwhile, it is hashed again next time.
                    known = (signature, hashlib.file_digest(content, "sha256").hexdigest())
                self._hashes[file.path] = known
        except _OutsideError as error:
            return Finding(where, str(error), "a file inside the repository")
        except (OSError, RuntimeError) as error:
            return Finding(where, getattr(error, "strerror", None) or str(error), "a readable file", "publish again")
        if signature is not None and signature[3] != file.num_bytes:
            return Finding(where, f"{signature[3]} bytes", f"{file.num_bytes} bytes", "it was altered; publish again")
        if known[1] != file.sha256:
            return Finding(where, f"sha256 {known[1]}", f"sha256 {file.sha256}", "it was altered; publish again")
        return None

    def _to_generation(self, message: generation_pb2.Generation, digest: str) -> Generation:
        checksums = {file.path: file.sha256 for file in message.files}
        segments = {
            segment.name: self._to_segment(segment, checksums) for segment in sorted(message.segments, key=lambda s: s.name)
        }
        tasks = {task.name: self._to_task(task) for task in sorted(message.tasks, key=lambda t: t.name)}
        ensembles = {ensemble.image_size: ensemble.name for ensemble in message.multi_task_ensembles}
        return Generation(
            number=message.number,
            digest=digest,
            segments=types.MappingProxyType(segments),
            tasks=types.MappingProxyType(tasks),
            ensembles=types.MappingProxyType(ensembles),
            previous=message.previous,
        )

    def _to_segment(self, segment: generation_pb2.Segment, checksums: Mapping[str, str]) -> Segment:
        return Segment(
            name=segment.name,
            model=self.root / model_path(segment.name),
            input=_to_tensor_spec(segment.input),
            output=_to_tensor_spec(segment.output),
            max_batch_size=segment.max_batch_size,
            num_parameters=segment.num_parameters,
            sha256=checksums[model_path(segment.name)],
        )

    def _to_task(self, task: generation_pb2.Task) -> Task:
        logits = np.array(task.golden.logits, dtype=np.float32).reshape(-1, len(task.labels))
        logits.setflags(write=False)
        return Task(
            name=task.name,
            path_id=task.path_id,
            route=tuple(task.route),
            ensemble=task.ensemble,
            labels=tuple(task.labels),
            image_size=task.preprocessing.image_size,
            quality=task.quality,
            test_accuracy=task.test_accuracy if task.HasField("test_accuracy") else None,
            golden=Golden(self.root / task.golden.images, logits, task.golden.tolerance),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class PublishedModels:
    """Triton models that a repository holds, by name.

    Attributes:
        current: those of the current generation, with its aliases.
        kept: those of every generation that is there, with their aliases.
    """

    current: frozenset[str]
    kept: frozenset[str]


def published_models(root: pathlib.Path) -> PublishedModels:
    """Returns which models a repository holds, as its generations say; verifies nothing.

    Args:
        root: the repository.

    Raises:
        RepositoryError: it cannot be read.
    """
    current = Repository(root).current_number()
    models: dict[str, frozenset[str]] = {}
    try:
        for path in root.glob("generation-*.json"):
            manifest = json.loads(path.read_bytes())
            folders = {entry["path"].partition("/")[0] for entry in manifest["files"] if "/" in entry["path"]}
            models[path.name] = frozenset(folders | {task["name"] for task in manifest["tasks"]})
        return PublishedModels(models[f"generation-{current}.json"], frozenset().union(*models.values()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RepositoryError(f"{root}: found {error!r}, expected generations that can be read") from error


def read_keys(files: Iterable[pathlib.Path]) -> tuple[PublicKey, ...]:
    """Returns the public keys in some files, one in each.

    Raises:
        SettingsError: one cannot be read or holds no such key.
    """
    keys = []
    for file in files:
        try:
            keys.append(read_public_key(file.read_bytes()))
        except OSError as error:
            raise SettingsError("require_signature", str(file), f"a readable file ({error.strerror or error})") from error
        except ValueError as error:
            raise SettingsError("require_signature", str(file), str(error)) from error
    return tuple(keys)


def model_path(segment: str) -> str:
    """Returns the path of a segment's ONNX file, relative to the repository."""
    return f"{segment}/1/model.onnx"


def config_path(model: str) -> str:
    """Returns the path of a segment's or an ensemble's Triton config, relative to the repository."""
    return f"{model}/config.pbtxt"


def _needed_files(message: generation_pb2.Generation) -> set[str]:
    models = [segment.name for segment in message.segments]
    ensembles = [task.ensemble for task in message.tasks] + [ensemble.name for ensemble in message.multi_task_ensembles]
    goldens: Iterable[str] = (task.golden.images for task in message.tasks if task.golden.images)
    return {*map(model_path, models), *map(config_path, models), *map(config_path, ensembles), *goldens}


def _to_tensor_spec(spec: generation_pb2.TensorSpec) -> TensorSpec:
    return TensorSpec(spec.name, _DATA_TYPES.get(spec.data_type, "unspecified"), tuple(spec.shape))


class _OutsideError(Exception):
    """Something that is no file inside the repository."""


def _inside(root: pathlib.Path, path: str) -> pathlib.Path:
    """Returns where a file of the repository really lies.

    Raises:
        OSError, RuntimeError: it is not there, or links go in a circle.
        _OutsideError: it lies elsewhere, or is no file: whoever opened a pipe would wait for ever.
    """
    resolved = (root / path).resolve(strict=True)
    if not resolved.is_relative_to(root.resolve()):
        raise _OutsideError(f"a link to {str(resolved)!r}")
    if not resolved.is_file():
        raise _OutsideError("something that is no file")
    return resolved


def _is_plain(path: str) -> bool:
    parts = path.split("/")
    return bool(path) and "\\" not in path and "\0" not in path and not any(part in ("", ".", "..") for part in parts)


def _files_of(number: int | str) -> tuple[str, ...]:
    return (f"generation-{number}.json", signature_name(number)) if isinstance(number, int) else ()


def _signature(path: pathlib.Path) -> _Signature:
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return None
    return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_size
