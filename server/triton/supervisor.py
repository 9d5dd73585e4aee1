"""Keeps a Triton of ours serving: loads a generation in order, notices what died within it or all of it, and brings that back.

Triton itself reports a segment as ready whose process was killed, and fails every request to it from then on. So a segment is alive only
if it answers: requests that others asked meanwhile count, and where there were none an inference is tried.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import shutil
import threading
from collections.abc import Iterator

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub as Stub
from tritonclient.utils import np_to_triton_dtype

from munet.parity import find_disagreement
from server.errors import Finding, GenerationRefusedError, SharedMemoryError
from server.generation import Generation, Task
from server.repository import Repository, config_path
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

_TYPES = {"TYPE_UINT8": np.uint8, "TYPE_FP32": np.float32, "TYPE_FP16": np.float16}
_NUM_TOKENS = 2
"""What a tried inference has where any number goes: few, yet not 1, which exporters like to treat as a case of its own."""


@dataclasses.dataclass
class _Requests:
    """What Triton counted of a segment: requests answered and requests failed."""

    answered: int
    failed: int


class Supervisor:
    """Keeps one Triton serving. For one thread, which must live as long as Triton should.

    Args:
        process: the Triton, running; whoever made it stops it.
        repository: the folder that it serves.

    Attributes:
        num_restarts: how often Triton had to be started again.
        num_revivals: how often a segment had to be loaded again.
    """

    def __init__(self, process: TritonProcess, repository: pathlib.Path) -> None:
        self._process = process
        self._repository = repository
        self._requests: dict[str, _Requests] = {}
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
        """
        with self._process.connect() as channel:
            stub = Stub(channel)
            for names in (list(generation.segments), ensembles_of(generation)):
                findings = [finding for name in names if not stop.is_set() and (finding := _load(stub, name))]
                if findings:
                    raise GenerationRefusedError(generation.number, findings)
            tasks = generation.tasks.values()
            findings = [finding for task in tasks if not stop.is_set() and (finding := _rehearse(stub, task))]
        if findings:
            raise GenerationRefusedError(generation.number, findings)

    def watch(self, stop: threading.Event, interval_seconds: float) -> None:
        """Keeps Triton and whatever anybody loaded into it alive, until it is told to stop.

        Args:
            stop: when set, it returns.
            interval_seconds: between two looks at all segments.

        Raises:
            TritonError, SettingsError: Triton ended and does not start again.
        """
        with self._process.connect() as channel:
            stub = Stub(channel)
            while not stop.wait(interval_seconds):
                if not self._process.is_running:
                    self._restart()
                try:
                    self._look(stub, stop)
                except grpc.RpcError as error:
                    # It ended meanwhile, or is too busy even to count.
                    _log.warning("Triton says nothing of itself: %s", _reason(error))

    def _restart(self) -> None:
        _log.error("Triton ended with %s; its log is %s", self._process.outcome, self._process.log)
        self._process.start()
        self.num_restarts += 1
        self._owed |= self._loaded
        self._requests.clear()
        _log.warning("Triton was started again, with %d models to load", len(self._owed))

    def _look(self, stub: Stub, stop: threading.Event) -> None:
        """Loads what is owed, then tries every segment that nobody got an answer from since the last look."""
        for name in sorted(self._owed, key=lambda name: (not name.startswith("seg-"), name)):
            if not stop.is_set():
                self._bring_back(stub, name)
        statistics = stub.ModelStatistics(service_pb2.ModelStatisticsRequest(), timeout=ANSWER_SECONDS).model_stats
        self._loaded = {model.name for model in statistics} | self._owed
        for model in statistics:
            if model.name.startswith("seg-") and not stop.is_set():
                found = _Requests(model.inference_stats.success.count, model.inference_stats.fail.count)
                self._check(stub, model.name, found)

    def _check(self, stub: Stub, name: str, found: _Requests) -> None:
        before = self._requests.get(name)
        self._requests[name] = found
        if before is not None and found.answered > before.answered and found.failed == before.failed:
            return
        try:
            _infer(stub, name, *_probe(self._repository, name))
            found.answered += 1
        except (OSError, ValueError, KeyError, text_format.ParseError) as error:
            self._say(name, f"{name} cannot be tried: {error}")
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                _log.warning("%s did not answer within %g s", name, ANSWER_SECONDS)
            # Not found: another controller unloaded it since Triton counted.
            elif error.code() is not grpc.StatusCode.NOT_FOUND:
                self._revive(stub, name, _reason(error))

    def _revive(self, stub: Stub, name: str, reason: str) -> None:
        _log.error("%s is dead and will be loaded again: %s", name, reason)
        # Loading alone would change nothing, because its files did not. The ensembles that need it go and come back with it.
        stub.RepositoryModelUnload(service_pb2.RepositoryModelUnloadRequest(model_name=name), timeout=LOAD_SECONDS)
        self._requests.pop(name)
        self.num_revivals += 1
        self._bring_back(stub, name)

    def _bring_back(self, stub: Stub, name: str) -> None:
        if not (self._repository / name).is_dir():
            # Loaded under a throw-away name, or collected meanwhile.
            self._owed.discard(name)
            return
        finding = _load(stub, name)
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


def _load(stub: Stub, name: str) -> Finding | None:
    try:
        stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name=name), timeout=LOAD_SECONDS)
    except grpc.RpcError as error:
        return Finding(f"model {name!r}", _reason(error), "one that Triton loads", "publish again")
    return None


def _reason(error: grpc.RpcError) -> str:
    """Returns what Triton says, without the traceback of its Python process."""
    return str(error.details()).partition("\n\nAt:")[0].strip("; \n")


def _rehearse(stub: Stub, task: Task) -> Finding | None:
    where = f"task {task.name!r}: golden answer"
    try:
        # One by one: how many go together is each segment's own matter.
        answers = [_infer(stub, task.ensemble, "image", image[np.newaxis]) for image in task.golden.read_images()]
    except grpc.RpcError as error:
        return Finding(where, _reason(error), "logits", "publish again")
    except (OSError, ValueError) as error:
        return Finding(task.golden.images.name, str(error)[:300], "golden images", "publish again")
    logits = np.concatenate([np.frombuffer(answer.raw_output_contents[0], np.float32)[np.newaxis] for answer in answers])
    disagreement = find_disagreement(logits, task.golden.logits, task.golden.tolerance)
    return None if disagreement is None else Finding(where, *disagreement, "publish again")


def _probe(repository: pathlib.Path, segment: str) -> tuple[str, npt.NDArray[np.generic]]:
    """Returns the name of a segment's input and one row of zeros for it."""
    tensor = parse_config(repository / config_path(segment)).input[0]
    shape = [1, *(_NUM_TOKENS if size < 0 else size for size in tensor.dims)]
    return tensor.name, np.zeros(shape, _TYPES[model_config_pb2.DataType.Name(tensor.data_type)])


def _infer(stub: Stub, model: str, name: str, tensor: npt.NDArray[np.generic]) -> service_pb2.ModelInferResponse:
    """Runs a model of one input."""
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[tensor.tobytes()])
    request.inputs.add(name=name, datatype=np_to_triton_dtype(tensor.dtype), shape=tensor.shape)
    return stub.ModelInfer(request, timeout=ANSWER_SECONDS)
