"""What a Triton holds beyond the generations that answer: aliases for its direct clients, and models that nobody needs any more.

Several servers may share a Triton, each with its own idea of what is needed. So a model is unloaded only if

- its name is of content (or it is the alias of a task that is gone), and this server's repository published it, or this server loaded it;
- neither a generation that this server holds nor the repository's current generation has it;
- it has been so for a while, in which nobody, whoever it be, asked it if it is an ensemble: every server keeps asking what it holds;
- no ensemble that is loaded, whosever it be, runs through it if it is a segment: unloading it would take the ensemble down.
"""

from __future__ import annotations

import logging
import pathlib
import re
import time
from collections.abc import Collection, Mapping

from tritonclient.grpc import model_config_pb2

from server.config import TritonSettings
from server.errors import EndpointError, EndpointGoneError, ModelMissingError, RepositoryError
from server.generation import Generation, Task
from server.repository import PublishedModels, published_models
from server.triton.endpoint import ModelCounts
from server.triton.fleet import Fleet, Member
from server.verification import check_alias

_log = logging.getLogger(__name__)

_NOTHING = ModelCounts(0, 0, 0)
_CONTENT_NAMED = re.compile(r"seg-[0-9a-f]{12}|[a-z0-9][a-z0-9_-]*\.[0-9a-f]{12}")


class Tidying:
    """Keeps one Triton tidy. For one thread, which holds the member's `changing`.

    Args:
        member: the Triton.
        fleet: knows what is needed.
        settings: what to do, and when.
        repository: folder of the model repository, as this server sees it.
    """

    def __init__(self, member: Member, fleet: Fleet, settings: TritonSettings, repository: pathlib.Path) -> None:
        self._member = member
        self._endpoint = member.endpoint
        self._fleet = fleet
        self._settings = settings
        self._repository = repository
        self._following: Generation | None = None
        self._aliases: dict[str, str] = {}
        self._waiting: dict[str, str] = {}
        self._idle: dict[str, tuple[ModelCounts, float]] = {}
        self._steps: dict[str, frozenset[str]] = {}

    @property
    def is_due(self) -> bool:
        """Whether aliases have to follow another generation."""
        return self._settings.aliases and self._fleet.followed is not self._following

    def forget(self) -> None:
        """Notes that Triton may have lost everything."""
        self._following = None
        self._aliases.clear()
        self._idle.clear()

    def run(self) -> None:
        """Does what is to be done now.

        Raises:
            EndpointGoneError: Triton does not answer.
        """
        if self._settings.aliases:
            self._follow()
        self._unload()

    def _follow(self) -> None:
        """Has each task's alias be its ensemble in the generation that answers, and ends those of tasks that are gone."""
        generation = self._fleet.followed
        if generation is None or (generation is self._following and not self._waiting):
            return
        self._following = generation
        waited, self._waiting = self._waiting, {}
        loaded = self._endpoint.loaded()
        # Of a task that was gone meanwhile, or whose alias somebody unloaded, nothing is known.
        self._aliases = {name: self._aliases[name] for name in self._aliases.keys() & generation.tasks.keys() & loaded}
        for task in generation.tasks.values():
            if self._aliases.get(task.name) != task.ensemble:
                reason = self._load_alias(task)
                if reason:
                    self._waiting[task.name] = reason
        if self._waiting and self._waiting != waited:
            # The publisher writes aliases last, so that this passes. If it does not, it is to be seen.
            _log.info("aliases at Triton %s that wait: %s", self._endpoint.address, "; ".join(self._waiting.values()))
        published = self._published()
        known = self._fleet.known | (published.kept if published else frozenset())
        for name in (loaded & known).difference(generation.tasks):
            if not _CONTENT_NAMED.fullmatch(name) and self._is_ours(name):
                self._try_to_unload(name)

    def _load_alias(self, task: Task) -> str:
        """Loads an alias; returns why it cannot be, if so."""
        # An ensemble that cannot be loaded takes down the one before it: only what is surely right is tried.
        findings = check_alias(self._repository, task)
        if findings:
            return str(findings[0])
        try:
            self._endpoint.load(task.name, self._settings.load_timeout_seconds)
            if _nameless(self._endpoint.config(task.name)) != _nameless(self._endpoint.config(task.ensemble)):
                return f"{task.name}: found another ensemble there, expected {task.ensemble}"
        except EndpointGoneError:
            raise
        except EndpointError as error:
            return str(error)
        self._aliases[task.name] = task.ensemble
        return ""

    def _unload(self) -> None:
        counts = self._endpoint.counts()
        candidates = {name for name in counts.keys() - self._fleet.needed() if _CONTENT_NAMED.fullmatch(name)}
        if not candidates:
            self._idle.clear()
            return
        published = self._published()
        if published is None:
            return
        candidates &= published.kept | self._fleet.known
        idle = self._idle_among(candidates - published.current, counts)
        ensembles = sorted(name for name in idle if "." in name)
        for name in ensembles:
            self._try_to_unload(name)
        segments = idle.difference(ensembles)
        if segments:
            left = self._endpoint.loaded().difference(ensembles)
            used = frozenset().union(*(self._segments_of(name) for name in left if not name.startswith("seg-")))
            for name in sorted(segments - used):
                self._try_to_unload(name)

    def _published(self) -> PublishedModels | None:
        try:
            return published_models(self._repository)
        except RepositoryError as error:
            _log.warning("what is not needed stays at Triton %s: %s", self._endpoint.address, error)
            return None

    def _idle_among(self, models: Collection[str], counts: Mapping[str, ModelCounts]) -> set[str]:
        """Returns those of these models that nobody has needed for a while."""
        now = time.monotonic()
        idle: dict[str, tuple[ModelCounts, float]] = {}
        for name in models:
            # Segments are asked by whoever looks whether they live, and otherwise through ensembles only.
            count = counts.get(name, _NOTHING) if "." in name else _NOTHING
            known = self._idle.get(name)
            idle[name] = known if known is not None and known[0] == count else (count, now)
        self._idle = idle
        return {name for name, (_, since) in idle.items() if now - since >= self._settings.unload_after_seconds}

    def _try_to_unload(self, name: str) -> None:
        # Asked again just before: it may be needed by now.
        if name in self._fleet.needed():
            return
        try:
            self._endpoint.unload(name)
            _log.info("unloaded %s at Triton %s", name, self._endpoint.address)
        except EndpointGoneError:
            raise
        except EndpointError as error:
            _log.warning("could not unload %s: %s", name, error)
        with self._fleet.lock:
            self._member.models.discard(name)

    def _is_ours(self, name: str) -> bool:
        """Whether a model without a name of content is an ensemble through nothing but segments, as aliases are."""
        steps = self._segments_of(name)
        return bool(steps) and all(step.startswith("seg-") for step in steps)

    def _segments_of(self, ensemble: str) -> frozenset[str]:
        """Returns the models that an ensemble runs through; none if it is no ensemble."""
        known = self._steps.get(ensemble)
        if known is None:
            try:
                steps = self._endpoint.config(ensemble).ensemble_scheduling.step
            except ModelMissingError:
                return frozenset()
            known = frozenset(step.model_name for step in steps)
            if _CONTENT_NAMED.fullmatch(ensemble):
                self._steps[ensemble] = known
        return known


def _nameless(config: model_config_pb2.ModelConfig) -> model_config_pb2.ModelConfig:
    config.name = ""
    return config
