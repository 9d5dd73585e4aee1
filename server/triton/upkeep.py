"""Keeps one Triton in order: notices what is wrong with it, mends it, and brings it to the generations that answer.

Two threads, because what mends may wait for minutes for a model to load, and a Triton that hangs is to be noticed meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import threading
import time
from collections.abc import Callable, Collection, Iterable

import numpy as np

from server.config import TritonSettings
from server.errors import EndpointError, EndpointGoneError, EndpointSilentError, ModelSilentError, ServerError
from server.generation import Segment
from server.triton.asking import ask, ask_segment
from server.triton.endpoint import Images
from server.triton.fleet import Fleet, Member, State
from server.triton.plans import HeldGeneration, Plan
from server.triton.preparation import Preparation
from server.triton.tidying import Tidying

_log = logging.getLogger(__name__)

_COUNT_SECONDS = 10.0
"""How often Triton's counters are read when nobody asks: what it counted since is lost if it is killed."""

_TIDY_SECONDS = 5.0
_MOST_PATIENCE = 16
"""Times the interval between tries to mend what failed to be mended."""


class Upkeep:
    """Looks after one Triton, in threads of its own until it is closed.

    Args:
        member: the Triton.
        fleet: what it belongs to.
        settings: what may take how long.
        repository: folder of the model repository, as this server sees it.
        on_change: called when the member may answer more, or less, than before.
        on_silence: called with the member, what it said last, and the models there that say nothing (none: all), when these are given up.
    """

    def __init__(
        self,
        member: Member,
        fleet: Fleet,
        settings: TritonSettings,
        repository: pathlib.Path,
        on_change: Callable[[], None],
        on_silence: Callable[[Member, EndpointError, Collection[str]], None],
    ) -> None:
        self._member = member
        self._endpoint = member.endpoint
        self._fleet = fleet
        self._settings = settings
        self._on_change = on_change
        self._on_silence = on_silence
        self._tidying = Tidying(member, fleet, settings, repository)
        self._closed = threading.Event()
        self._images: dict[int, Images] = {}
        self._counted_seconds = 0.0
        self._tidied_seconds = 0.0
        self._num_failures = 0
        self._tidied_life = member.life
        self._threads = [
            threading.Thread(target=self._watch, name=f"triton-watch {member.address}", daemon=True),
            threading.Thread(target=self._mend, name=f"triton-mend {member.address}", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def close(self, patience_seconds: float) -> None:
        """Closes the endpoint and ends the threads.

        Args:
            patience_seconds: how long inferences under way may take to end.
        """
        self._closed.set()
        self._member.wake.set()
        self._endpoint.close(patience_seconds)
        for thread in self._threads:
            thread.join()

    def bring(self, generations: Iterable[HeldGeneration]) -> None:
        """Has the Triton hold generations.

        Raises:
            EndpointError, SegmentLoadError, GenerationRefusedError: it does not; see `Preparation.run`.
        """
        member = self._member
        with member.changing:
            for held in generations:
                with self._fleet.lock:
                    life, known = member.life, frozenset(member.models)
                version = self._endpoint.version()
                Preparation(self._endpoint, held, known, member.counters, self._settings).run()
                with self._fleet.lock:
                    if life != member.life:
                        raise EndpointGoneError(member.address, member.reason or "it was lost meanwhile")
                    member.version = version
                    member.models |= held.models
                    member.holds.add(held.generation)
                self._fleet.answered(member)

    def _watch(self) -> None:
        while not self._closed.wait(self._settings.probe_interval_seconds):
            try:
                if self._member.state is State.SERVING:
                    self._probe_the_stalest()
                    self._count()
                else:
                    self._check_liveliness()
            except EndpointError as error:
                _log.debug("%s", error)
            except Exception:
                # The edge of the thread: without it nothing would be noticed any more.
                _log.exception("looking at Triton %s failed", self._member.address)

    def _check_liveliness(self) -> None:
        """Has whatever waits for a Triton that says nothing be told so."""
        try:
            self._endpoint.is_live(self._settings.probe_timeout_seconds)
        except EndpointSilentError as error:
            self._endpoint.reconnect()
            self._on_silence(self._member, error, ())

    def _probe_the_stalest(self) -> None:
        """Asks the model that has not run for the longest time, if that is long enough; also so that no other server unloads it."""
        member, now = self._member, time.monotonic()
        with self._fleet.lock:
            life = member.life
            stalest = self._stalest(now - self._settings.probe_interval_seconds)
        if stalest is None:
            return
        held, plan = stalest
        try:
            self._probe(held, plan)
        except EndpointSilentError as error:
            if member.answered_seconds < now:
                self._lose(error.reason, life)
                self._endpoint.reconnect()
                self._on_silence(member, error, ())
            else:
                self._find_the_silent(held, plan, now, life)
        except EndpointGoneError as error:
            self._lose(error.reason, life)
        except EndpointError as error:
            self._blame(error, plan, life)

    def _stalest(self, before_seconds: float) -> tuple[HeldGeneration, Plan] | None:
        """Returns how to ask the model that has not run for the longest time, if not since then; but nothing that is at fault."""
        member = self._member
        stale = [
            (member.proven.get(model, 0.0), model, held)
            for held in self._fleet.loaded.values()
            if held.generation in member.holds
            for model in held.asked
            if member.proven.get(model, 0.0) < before_seconds
        ]
        for _, model, held in sorted(stale, key=lambda one: one[:2]):
            plan = held.plan_through(model)
            if plan.models.isdisjoint(member.faults):
                return held, plan
        return None

    def _find_the_silent(self, held: HeldGeneration, plan: Plan, since_seconds: float, life: int) -> None:
        """Asks each segment of a plan itself that nothing came through lately: the others are merely busy."""
        for name in sorted(plan.models & held.generation.segments.keys()):
            if self._member.proven.get(name, 0.0) >= since_seconds:
                continue
            try:
                self._probe_segment(held.generation.segments[name])
            except EndpointSilentError as error:
                silent = ModelSilentError(self._member.address, f"{name}: {error.reason}")
                self._blame(silent, plan, life)
                self._on_silence(self._member, silent, (name,))
                return
            except EndpointGoneError as error:
                self._lose(error.reason, life)
                return
            except EndpointError as error:
                self._blame(type(error)(self._member.address, f"{name}: {error.reason}"), plan, life)
                return

    def _blame(self, error: EndpointError, plan: Plan, life: int) -> None:
        self._fleet.blame(self._member, error, plan, life)
        self._on_change()

    def _lose(self, reason: str, life: int | None = None) -> None:
        # Once it is closed, all that it says is that.
        if not self._closed.is_set():
            self._fleet.take_down(self._member, reason, life)
            self._on_change()

    def _probe(self, held: HeldGeneration, plan: Plan) -> None:
        image = self._image(held, next(iter(plan.outputs)))
        with self._member.probing:
            ask(self._endpoint, self._member.counters, plan, image, self._settings.probe_timeout_seconds)
        self._fleet.answered(self._member, plan)

    def _probe_segment(self, segment: Segment) -> None:
        with self._member.probing:
            ask_segment(self._endpoint, self._member.counters, segment, self._settings.probe_timeout_seconds)

    def _image(self, held: HeldGeneration, name: str) -> Images:
        """Returns an image that a task takes: a golden one while it can be read."""
        task = held.generation.tasks[name]
        image = self._images.get(task.image_size)
        if image is None:
            try:
                image = task.golden.read_images()[:1]
            except (OSError, ValueError):
                image = np.zeros((1, task.image_size, task.image_size, 3), dtype=np.uint8)
            self._images[task.image_size] = image
        return image

    def _count(self) -> None:
        now = time.monotonic()
        if now - self._counted_seconds >= _COUNT_SECONDS:
            self._counted_seconds = now
            self._member.counters.see(self._endpoint.counts())

    def _mend(self) -> None:
        while not self._closed.is_set():
            # What failed again and again is tried less often.
            patience = min(2**self._num_failures, _MOST_PATIENCE)
            self._member.wake.wait(self._settings.probe_interval_seconds * patience)
            self._member.wake.clear()
            if self._closed.is_set():
                return
            try:
                self._mend_once()
            except Exception:
                # The edge of the thread: without it nothing would be mended any more.
                _log.exception("mending Triton %s failed", self._member.address)

    def _mend_once(self) -> None:
        member = self._member
        if member.state is not State.SERVING:
            self._join()
        elif member.faults:
            self._repair()
        if member.state is State.SERVING:
            self._tidy()

    def _join(self) -> None:
        member = self._member
        try:
            while not self._fleet.take_up(member):
                with self._fleet.lock:
                    missing = [held for held in self._fleet.loaded.values() if held.generation not in member.holds]
                if not missing:
                    return
                self.bring(missing)
        except EndpointGoneError as error:
            self._num_failures = 0
            self._lose(error.reason)
        except ServerError as error:
            self._num_failures += 1
            self._lose(str(error))
        else:
            self._num_failures = 0
            self._on_change()

    def _repair(self) -> None:
        member = self._member
        with self._fleet.lock:
            life, faults = member.life, sorted(member.faults)
            held = {model: one for one in self._fleet.held() if one.generation in member.holds for model in one.models}
        try:
            with member.changing:
                # Segments first: what runs through them cannot answer before they do.
                order = sorted(faults, key=lambda model: not model.startswith("seg-"))
                mended = [model for model in order if model not in held or self._repair_model(held[model], model, life)]
                for model in sorted(held.keys() - self._endpoint.loaded()):
                    self._endpoint.load(model, self._settings.load_timeout_seconds)
                self._fleet.mend(member, mended)
        except EndpointGoneError as error:
            self._num_failures = 0
            self._lose(error.reason, life)
            return
        except EndpointError as error:
            _log.warning("still wrong: %s", error)
        self._num_failures = self._num_failures + 1 if member.faults else 0
        self._on_change()

    def _repair_model(self, held: HeldGeneration, model: str, life: int) -> bool:
        """Loads a model anew unless it answers by now, and has it answer. Returns whether it does."""
        plan = held.plan_through(model)
        segment = held.generation.segments.get(model)

        def try_it() -> None:
            if segment is not None:
                self._probe_segment(segment)
            else:
                self._probe(held, plan)

        with contextlib.suppress(EndpointError):
            try_it()
            return True
        try:
            if segment is not None:
                # Its process may be dead while Triton says that it is ready: only a new one helps.
                self._endpoint.unload(model)
            self._endpoint.load(model, self._settings.load_timeout_seconds)
            try_it()
        except EndpointSilentError as error:
            # If all of it says nothing, who watches will notice.
            _log.warning("still wrong: %s", error)
            return False
        except EndpointGoneError:
            raise
        except EndpointError as error:
            # It may have found another one that is to be mended first.
            self._fleet.blame(self._member, error, plan, life)
            _log.warning("still wrong: %s", error)
            return False
        return True

    def _tidy(self) -> None:
        now = time.monotonic()
        if self._tidied_life != self._member.life:
            self._tidied_life = self._member.life
            self._tidying.forget()
        if now - self._tidied_seconds < min(_TIDY_SECONDS, self._settings.unload_after_seconds) and not self._tidying.is_due:
            return
        self._tidied_seconds = now
        try:
            with self._member.changing:
                self._tidying.run()
        except EndpointGoneError as error:
            _log.debug("%s", error)
        except EndpointError as error:
            _log.warning("tidying up: %s", error)
