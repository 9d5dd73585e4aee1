"""Keeps a Triton of ours serving: loads what CURRENT names, notices what died within Triton or all of it, and brings that back.

Triton itself reports a segment as ready whose process was killed, and fails every request to it from then on. So a segment is alive only
if it answers: requests that others asked meanwhile count, and where there were none an inference is tried.
"""

from __future__ import annotations

import logging
import math
import pathlib
import shutil
import threading
import time
from collections.abc import Collection, Hashable, Iterable, Iterator

from tritonclient.grpc import model_config_pb2

from server.config import TritonSettings
from server.errors import (
    EndpointError,
    EndpointGoneError,
    EndpointSilentError,
    Finding,
    GenerationRefusedError,
    ModelDeadError,
    ModelMissingError,
    SegmentLoadError,
    ServerError,
    SharedMemoryError,
)
from server.generation import Generation, Segment
from server.repository import Repository, config_path
from server.triton.asking import noise
from server.triton.endpoint import Access, Endpoint, to_request
from server.triton.fleet import Fleet
from server.triton.plans import HeldGeneration
from server.triton.preparation import Preparation
from server.triton.process import TritonProcess
from server.triton.shared_memory import FOLDER
from server.triton.tidying import Tidying
from server.verification import check_alias, parse_config

_log = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
"""What an answer may take: much, because an inference that is tried waits behind those of others."""

_NUM_TRIES = 3
"""So often Triton may end while the first generation loads: what kills it may lie in the generation."""

_END_SECONDS = 2.0

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
        repository: what it serves.
        loads: whether it follows the repository's CURRENT, and what is loaded is kept alive. Not where a front door does so, which also
            unloads what nobody asks for: what is tried here would look as if somebody did.
        settings: how long what may take, and when what is not needed is unloaded.

    Attributes:
        num_restarts: how often Triton had to be started again.
        num_revivals: how often a segment had to be loaded again.
    """

    def __init__(
        self, process: TritonProcess, repository: Repository, loads: bool = True, settings: TritonSettings | None = None
    ) -> None:
        self._process = process
        self._repository = repository
        self._loads = loads
        self._settings = settings or TritonSettings()
        self._endpoint = Endpoint(process.addresses.grpc, Access.read(self._settings))
        self._fleet = Fleet([self._endpoint])
        (self._member,) = self._fleet.members
        self._tidying = Tidying(self._member, self._fleet, self._settings, repository.root)
        self._seen: Hashable = None
        self._retry_seconds = math.inf
        self._rows: dict[str, int] = {}
        self._loaded: set[str] = set()
        self._owed: set[str] = set()
        self._reasons: dict[str, str] = {}
        self.num_restarts = 0
        self.num_revivals = 0

    def load(self, generation: Generation, stop: threading.Event) -> None:
        """Loads a generation beside what is there: segments, then ensembles, which answer their golden images, and then the aliases.

        What only the generation before needed is unloaded later, when nobody has asked it for a while.

        Args:
            generation: what `read_generation` gave.
            stop: when set, it returns early.

        Raises:
            GenerationRefusedError: Triton cannot load it or answers otherwise than it should. The one before goes on.
            EndpointError: Triton does not answer at all, or serves another repository.
        """
        held = HeldGeneration(generation)
        try:
            Preparation(self._endpoint, held, self._fleet.needed(), self._member.counters, self._settings, stop).run()
        except SegmentLoadError as error:
            if not stop.is_set():
                raise GenerationRefusedError(generation.number, [error.finding]) from error
        except ServerError:
            if not stop.is_set():
                raise
        if not stop.is_set():
            self._fleet.loaded = {generation: held}
            self._fleet.known.update(held.models, generation.tasks)
            self._fleet.followed = generation
            self._tidying.run()
            # Whoever kills Triton before the next look gets it back as it is now.
            self._remember(self._endpoint.counts())

    def begin(self, generation: Generation, stop: threading.Event) -> None:
        """Loads the first generation. A Triton that ends meanwhile is started again: it may have been killed, or memory was short.

        Args:
            generation: what `read_generation` gave.
            stop: when set, it returns early.

        Raises:
            GenerationRefusedError, EndpointError: as `load`; also after as many starts as are worth a try.
            TritonError, SettingsError: Triton ended and does not start again.
        """
        for num_left in reversed(range(_NUM_TRIES)):
            try:
                self.load(generation, stop)
            except EndpointGoneError:
                # What was asked fails a moment before the kernel says that it ended.
                if not num_left or not self._process.ends_within(_END_SECONDS):
                    raise
                self._restart()
            else:
                return

    def watch(self, stop: threading.Event, interval_seconds: float) -> None:
        """Keeps Triton alive, and what anybody loaded into it, and follows CURRENT, until it is told to stop.

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
                    self._follow(stop)
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

    def _follow(self, stop: threading.Event) -> None:
        """Goes over to the generation that CURRENT names, if it is another one, and tidies up after the one before."""
        seen = self._repository.fingerprint()
        if seen != self._seen or time.monotonic() >= self._retry_seconds:
            self._seen, self._retry_seconds = seen, math.inf
            try:
                self._load_current(stop)
            except EndpointGoneError:
                self._seen = None
                raise
            except ServerError as error:
                # Not only its files may be to blame.
                self._retry_seconds = time.monotonic() + self._settings.retry_seconds
                numbers = " and ".join(str(generation.number) for generation in self._fleet.loaded)
                self._say("CURRENT", f"generation {numbers} goes on: {error}")
        try:
            self._tidying.run()
        except EndpointGoneError:
            raise
        except EndpointError as error:
            self._say("tidying up", f"tidying up: {error}")

    def _load_current(self, stop: threading.Event) -> None:
        generation = read_generation(self._repository, self._fleet.needed())
        if all(generation.digest != loaded.digest for loaded in self._fleet.loaded):
            self.load(generation, stop)
            if not stop.is_set():
                self._reasons.pop("CURRENT", None)
                _log.info("generation %d serves %d tasks", generation.number, len(generation.tasks))

    def _look(self, stop: threading.Event) -> None:
        """Loads what is owed, then tries every segment that nobody got an answer from since the last look."""
        for name in sorted(self._owed, key=lambda name: (not name.startswith("seg-"), name)):
            if not stop.is_set():
                self._bring_back(name)
        counts = self._endpoint.counts()
        self._remember(counts)
        for name in sorted(counts):
            if name.startswith("seg-") and not stop.is_set():
                self._check(name, counts[name].rows)

    def _remember(self, loaded: Iterable[str]) -> None:
        """Notes what Triton has, and is to have again if it ends."""
        self._loaded = {*loaded, *self._owed}

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
        if not (self._repository.root / name).is_dir():
            # Loaded under a throw-away name, or collected meanwhile.
            self._owed.discard(name)
            return
        self._owed.add(name)
        try:
            self._endpoint.load(name, self._settings.load_timeout_seconds)
        except EndpointGoneError:
            raise
        except EndpointError as error:
            self._say(name, f"{name} cannot be loaded again: {error}")
        else:
            self._owed.discard(name)
            self._reasons.pop(name, None)
            _log.warning("%s is loaded again", name)

    def _say(self, name: str, reason: str) -> None:
        """Logs what is wrong with a model, once as long as it stays the same."""
        if self._reasons.get(name) != reason:
            self._reasons[name] = reason
            _log.error("%s", reason)


def read_generation(repository: Repository, loaded: Collection[str] | None = None) -> Generation:
    """Returns a repository's current generation, if the wheel's Triton can serve it here.

    Args:
        repository: where.
        loaded: models that Triton holds; none before it starts. Only then the aliases have to be right: later, the publisher may still
            be writing them.

    Raises:
        RepositoryError: it has faults, or is meant for a GPU.
        SharedMemoryError: there is too little for so many more segments.
    """
    generation = repository.read()
    findings = list(_check_kinds(repository.root, generation))
    if loaded is None:
        findings += [finding for task in generation.tasks.values() for finding in check_alias(repository.root, task)]
    if findings:
        raise GenerationRefusedError(generation.number, findings)
    check_shared_memory([segment for name, segment in generation.segments.items() if name not in (loaded or ())])
    return generation


def check_shared_memory(segments: Collection[Segment], folder: pathlib.Path = FOLDER) -> None:
    """Checks that there is enough shared memory for Triton to load segments, and warns if full batches would need more.

    Raises:
        SharedMemoryError: it would not even load.
    """
    free = shutil.disk_usage(folder).free
    least = _REGION_BYTES * (len(segments) + 1)
    if free < least:
        raise SharedMemoryError(folder, free, least, len(segments))
    row = max((spec.known_bytes for segment in segments for spec in (segment.input, segment.output)), default=0)
    most = least + sum(2 * segment.max_batch_size * row for segment in segments)
    if free < most:
        _log.warning("%s has %d MiB free; full batches of all segments could need %d MiB", folder, free // MIB, most // MIB)


def _check_kinds(root: pathlib.Path, generation: Generation) -> Iterator[Finding]:
    for name in generation.segments:
        config = parse_config(root / config_path(name))
        if any(group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU for group in config.instance_group):
            advice = "publish with `munet-evolve export --target cpu`, or serve it with a container of Triton"
            yield Finding(f"{config_path(name)}: instance_group", "KIND_GPU", "KIND_CPU: the wheel's Triton has no GPU", advice)
