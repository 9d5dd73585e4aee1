"""Keeps a Triton of ours serving: loads a generation in order, notices what died within it or all of it, and brings that back.

Triton itself reports a segment as ready whose process was killed, and fails every request to it from then on. So a segment is alive only
if it answers: requests that others asked meanwhile count, and where there were none an inference is tried.
"""

from __future__ import annotations

import logging
import pathlib
import shutil
import threading
from collections.abc import Iterator

import numpy as np
from tritonclient.grpc import model_config_pb2

from munet.parity import find_disagreement
from server.config import TritonSettings
from server.errors import (
    EndpointError,
    EndpointGoneError,
    EndpointSilentError,
    Finding,
    GenerationRefusedError,
    ModelDeadError,
    ModelMissingError,
    SharedMemoryError,
)
from server.generation import Generation, Task
from server.repository import Repository, config_path
from server.triton.asking import noise
from server.triton.endpoint import Access, Endpoint, to_request
from server.triton.process import TritonProcess
from server.triton.shared_memory import FOLDER
from server.verification import parse_config

_log = logging.getLogger(__name__)

LOAD_SECONDS = 120.0
ANSWER_SECONDS = 30.0
"""What an answer may take: much, because an inference that is tried waits behind those of others."""

MIB = 1024 * 1024
_REGION_BYTES = MIB
"""Shared memory that Triton's Python backend takes for each segment before the first request."""

_TYPES = {
    model_config_pb2.TYPE_UINT8: "uint8",
    model_config_pb2.TYPE_FP32: "float32",
    model_config_pb2.TYPE_FP16: "float16",
}


class Supervisor:
    """Keeps one Triton serving. For one thread, which must live as long as Triton should.

    Args:
        process: the Triton, running; whoever made it stops it.
        repository: the folder that it serves.
        loads: whether what is loaded into it is kept alive, too. Not where a front door does so, which also unloads what nobody asks for:
            what is tried here would look as if somebody did.

    Attributes:
        num_restarts: how often Triton had to be started again.
        num_revivals: how often a segment had to be loaded again.
    """

    def __init__(self, process: TritonProcess, repository: pathlib.Path, loads: bool = True) -> None:
        self._process = process
        self._repository = repository
        self._loads = loads
        self._endpoint = Endpoint(process.addresses.grpc, Access.read(TritonSettings()))
        self._rows: dict[str, int] = {}
        self._loaded: set[str] = set()
        self._owed: set[str] = set()
        self._reasons: dict[str, str] = {}
        self.num_restarts = 0
        self.num_revivals = 0

    def load(self, generation: Generation, stop: threading.Event) -> None:
        """Loads a generation, segments first, and asks every task its golden images.

        Args:
            generation: what `read_generation` gave.
            stop: when set, it returns early.

        Raises:
            GenerationRefusedError: Triton cannot load it or answers otherwise than it should.
            EndpointGoneError: it does not answer at all.
        """
        for names in (list(generation.segments), ensembles_of(generation)):
            findings = [finding for name in names if not stop.is_set() and (finding := self._load(name))]
            if findings:
                raise GenerationRefusedError(generation.number, findings)
        tasks = [task for task in generation.tasks.values() if not stop.is_set()]
        findings = [finding for task in tasks if (finding := self._rehearse(task))]
        if findings:
            raise GenerationRefusedError(generation.number, findings)

    def watch(self, stop: threading.Event, interval_seconds: float) -> None:
        """Keeps Triton alive, and what anybody loaded into it, until it is told to stop.

        Args:
            stop: when set, it returns.
            interval_seconds: between two looks.

        Raises:
            TritonError, SettingsError: Triton ended and does not start again.
        """
        while not stop.wait(interval_seconds):
            if not self._process.is_running:
                self._restart()
            try:
                if self._loads:
                    self._look(stop)
            except EndpointGoneError as error:
                # It ended meanwhile, or is too busy even to count.
                _log.warning("%s", error)

    def close(self) -> None:
        """Gives up the connection to Triton."""
        self._endpoint.close()

    def _restart(self) -> None:
        _log.error("Triton ended with %s; its log is %s", self._process.outcome, self._process.log)
        self._process.start()
        self._endpoint.reconnect()
        self.num_restarts += 1
        self._owed |= self._loaded
        self._rows.clear()
        _log.warning("Triton was started again, with %d models to load", len(self._owed))

    def _look(self, stop: threading.Event) -> None:
        """Loads what is owed, then tries every segment that nobody got an answer from since the last look."""
        for name in sorted(self._owed, key=lambda name: (not name.startswith("seg-"), name)):
            if not stop.is_set():
                self._bring_back(name)
        counts = self._endpoint.counts()
        self._loaded = {*counts, *self._owed}
        for name in sorted(counts):
            if name.startswith("seg-") and not stop.is_set():
                self._check(name, counts[name].rows)

    def _check(self, name: str, rows: int) -> None:
        before = self._rows.get(name)
        self._rows[name] = rows
        if before is not None and rows > before:
            return
        try:
            self._try(name)
            self._rows[name] += 1
        except ModelMissingError:
            # Another controller unloaded it since Triton counted.
            self._rows.pop(name)
        except EndpointSilentError as error:
            _log.warning("%s: %s", name, error)
        except ModelDeadError as error:
            _log.error("%s is dead and will be loaded again: %s", name, error)
            # Loading alone would change nothing, because its files did not. The ensembles that need it go and come back with it.
            self._endpoint.unload(name)
            self._rows.pop(name)
            self.num_revivals += 1
            self._bring_back(name)
        except EndpointGoneError:
            raise
        except EndpointError as error:
            self._say(name, f"{name} fails: {error}")

    def _try(self, segment: str) -> None:
        """Has a segment run one row; no cache knows the answer."""
        config = self._endpoint.config(segment)
        tensor = config.input[0]
        row = noise(tensor.dims, _TYPES[tensor.data_type])
        self._endpoint.ask(to_request(segment, row, [config.output[0].name], tensor.name), ANSWER_SECONDS)

    def _bring_back(self, name: str) -> None:
        if not (self._repository / name).is_dir():
            # Loaded under a throw-away name, or collected meanwhile.
            self._owed.discard(name)
            return
        finding = self._load(name)
        if finding is None:
            self._owed.discard(name)
            self._reasons.pop(name, None)
            _log.warning("%s is loaded again", name)
        else:
            self._owed.add(name)
            self._say(name, str(finding))

    def _say(self, name: str, reason: str) -> None:
        """Logs what is wrong with a model, once as long as it stays the same."""
        if self._reasons.get(name) != reason:
            self._reasons[name] = reason
            _log.error("%s", reason)

    def _load(self, name: str) -> Finding | None:
        try:
            self._endpoint.load(name, LOAD_SECONDS)
        except EndpointGoneError:
            raise
        except EndpointError as error:
            return Finding(f"model {name!r}", error.reason, "one that Triton loads", "publish again")
        return None

    def _rehearse(self, task: Task) -> Finding | None:
        where = f"task {task.name!r}: golden answer"
        try:
            # One by one: how many go together is each segment's own matter.
            requests = [to_request(task.ensemble, image[np.newaxis], ["logits"]) for image in task.golden.read_images()]
            logits = np.concatenate([self._endpoint.ask(request, ANSWER_SECONDS)["logits"] for request in requests])
        except EndpointError as error:
            return Finding(where, error.reason, "logits", "publish again")
        except (OSError, ValueError) as error:
            return Finding(task.golden.images.name, str(error)[:300], "golden images", "publish again")
        disagreement = find_disagreement(logits, task.golden.logits, task.golden.tolerance)
        return None if disagreement is None else Finding(where, *disagreement, "publish again")


def read_generation(repository: Repository) -> Generation:
    """Returns a repository's current generation, if the wheel's Triton can serve it here.

    Raises:
        RepositoryError: it has faults, or is meant for a GPU.
        SharedMemoryError: there is too little for so many segments.
    """
    generation = repository.read()
    findings = list(_check_kinds(repository.root, generation))
    if findings:
        raise GenerationRefusedError(generation.number, findings)
    check_shared_memory(generation)
    return generation


def ensembles_of(generation: Generation) -> list[str]:
    """Returns the names of a generation's ensembles and of their aliases, the tasks' plain names, as Triton is to load them."""
    tasks = generation.tasks.values()
    return [*(task.ensemble for task in tasks), *generation.ensembles.values(), *generation.tasks]


def check_shared_memory(generation: Generation, folder: pathlib.Path = FOLDER) -> None:
    """Checks that there is enough shared memory for Triton to load a generation, and warns if full batches would need more.

    Raises:
        SharedMemoryError: it would not even load.
    """
    free = shutil.disk_usage(folder).free
    least = _REGION_BYTES * (len(generation.segments) + 1)
    if free < least:
        raise SharedMemoryError(folder, free, least, len(generation.segments))
    specs = [spec for segment in generation.segments.values() for spec in (segment.input, segment.output)]
    row = max(spec.known_bytes for spec in specs)
    most = least + sum(2 * segment.max_batch_size * row for segment in generation.segments.values())
    if free < most:
        _log.warning("%s has %d MiB free; full batches of all segments could need %d MiB", folder, free // MIB, most // MIB)


def _check_kinds(root: pathlib.Path, generation: Generation) -> Iterator[Finding]:
    for name in generation.segments:
        config = parse_config(root / config_path(name))
        if any(group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU for group in config.instance_group):
            advice = "publish with `munet-evolve export --target cpu`, or serve it with a container of Triton"
            yield Finding(f"{config_path(name)}: instance_group", "KIND_GPU", "KIND_CPU: the wheel's Triton has no GPU", advice)
