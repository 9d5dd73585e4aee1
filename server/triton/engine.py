"""The engine on Tritons elsewhere: questions wait here, run there, and are asked again where a Triton is lost.

What waits here costs nothing when it is cancelled or late, and each Triton has as much at a time as keeps its batches full. Inference
changes nothing, so what a Triton that died was asked is asked of another one.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any

import numpy as np

from server.config import ServerSettings
from server.engine import Logits, Question, SegmentStatistics, check_question
from server.errors import (
    DeadlineError,
    EndpointError,
    EndpointGoneError,
    EngineClosedError,
    ModelDeadError,
    ModelMissingError,
    ModelSilentError,
    NoEndpointError,
    SegmentRunError,
    ServerError,
    SettingsError,
)
from server.fairness import FairLine, VirtualTimes
from server.generation import Generation
from server.questions import OpenQuestions, Settlement, settle_all
from server.triton.asking import filled_up
from server.triton.endpoint import Access, Endpoint, segments_in, to_request
from server.triton.fleet import EndpointReport, Fleet, Member, State
from server.triton.flights import AskedQuestion, Flight, Part
from server.triton.plans import HeldGeneration
from server.triton.upkeep import Upkeep

_log = logging.getLogger(__name__)

_STATISTICS_SECONDS = 1.0
"""What a Triton may take to say what it counted. One that takes longer is told of as it was."""

_LEAVE_SECONDS = 10.0
"""How long `close` waits for what the Tritons still compute."""

_MOST_AHEAD_ROWS = 4096.0
"""What a flow may have had more than others, in rows times segments, before it counts no more."""

_PAUSE_SECONDS = 0.2
"""Between tries to find a first Triton, and what a probe usually does not take."""


class TritonEngine:
    """Tritons that serve the same model repository. `server.engine.Engine` says what it does, and where it does less.

    Args:
        settings: where the Tritons are, and how to treat them.
        clock: seconds that only go forward, the clock of questions' deadlines.

    Raises:
        SettingsError: no Triton is named, or a file cannot be read.
    """

    def __init__(self, settings: ServerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings.triton
        self._clock = clock
        if not settings.triton.endpoints:
            raise SettingsError("triton.endpoints", "none", "HOST:PORT of a Triton, such as --triton 127.0.0.1:8001")
        access = Access.read(settings.triton)
        self._fleet = Fleet(Endpoint(address, access) for address in settings.triton.endpoints)
        self._lock = self._fleet.lock
        self._work = threading.Condition(self._lock)
        self._loading = threading.Lock()
        self._numbers = itertools.count(1)
        self._questions = OpenQuestions(AskedQuestion, settings.engine, clock, self._ended)
        self._waiting: dict[int, Part] = {}
        self._times = VirtualTimes(_MOST_AHEAD_ROWS)
        self._line = FairLine(self._waiting, self._times)
        self._flights: set[Flight] = set()
        self._requested: dict[str, int] = {}
        self._closed = False
        self._upkeep = {
            member: Upkeep(member, self._fleet, settings.triton, settings.repository, self._wake, self._give_up)
            for member in self._fleet.members
        }
        self._sender = threading.Thread(target=self._run_sender, name="triton-send", daemon=True)
        self._sender.start()

    @property
    def name(self) -> str:
        """What the engine is, for people."""
        with self._lock:
            versions = sorted({member.version for member in self._fleet.members if member.version})
        return f"triton {' and '.join(versions) or 'of unknown version'} at {', '.join(self._settings.endpoints)}"

    def load(self, generation: Generation) -> None:
        """Makes a generation answerable at every Triton that answers. See `Engine.load`.

        Raises:
            SegmentLoadError: a segment cannot be loaded.
            GenerationRefusedError: an ensemble cannot be loaded, or a golden answer is another one.
            EndpointError: a Triton has another repository.
            NoEndpointError: no Triton answers.
            EngineClosedError: the engine is closed.
        """
        with self._loading:
            with self._lock:
                if self._closed:
                    raise EngineClosedError
                if generation in self._fleet.loaded:
                    return
                held = self._fleet.loading = HeldGeneration(generation)
                self._fleet.known.update(held.models, generation.tasks)
            try:
                self._load_everywhere(held)
            finally:
                with self._lock:
                    self._fleet.loading = None
                    # Of a generation that was not loaded nothing is kept.
                    self._free_unused()

    def check(self, generation: Generation, tasks: tuple[str, ...], num_images: int, deadline_seconds: float | None) -> None:
        """Checks whether a question would be refused now. See `Engine.check`."""
        with self._lock:
            self._questions.check(self._fleet.loaded.get(generation), tasks, num_images, deadline_seconds)

    def answer(self, question: Question) -> concurrent.futures.Future[Logits]:
        """Starts to answer a question. See `Engine.answer`."""
        check_question(question)
        with self._lock:
            try:
                opened = self._admit(question)
            except ServerError as error:
                failed: concurrent.futures.Future[Logits] = concurrent.futures.Future()
                # Its traceback would hold this frame, and so the future that holds it, and the images, until Python collects cycles.
                failed.set_exception(error.with_traceback(None))
                return failed
            for part in opened.parts:
                self._enqueue(part)
            self._work.notify()
        # By its number, not itself: the future would hold what holds it.
        number, future = opened.number, opened.future
        future.add_done_callback(lambda future: self._abandon(number) if future.cancelled() else None)
        return future

    def unload(self, generation: Generation) -> None:
        """Ends a generation. See `Engine.unload`."""
        with self._lock:
            held = self._fleet.loaded.pop(generation, None)
            if held is not None:
                held.retired = True
                if held.num_open:
                    self._fleet.retiring.add(held)
                self._free_unused()

    def follow(self, generation: Generation) -> None:
        """Has the aliases, for clients that talk to Triton itself, follow to a generation that answers; returns at once."""
        with self._lock:
            self._fleet.followed = generation
            for member in self._fleet.members:
                member.wake.set()

    def statistics(self) -> list[SegmentStatistics]:
        """Returns what each segment that is held has run. See `Engine.statistics`."""
        with self._lock:
            serving = [member for member in self._fleet.members if member.state is State.SERVING]
        for member in serving:
            self._read_counters(member)
        with self._lock:
            names = sorted(
                {name for held in self._fleet.held() if held is not self._fleet.loading for name in held.generation.segments}
            )
            totals = [member.counters.totals() for member in self._fleet.members]
            return [
                SegmentStatistics(
                    name,
                    self._requested.get(name, 0),
                    sum(counts[name][0] for counts in totals if name in counts),
                    sum(counts[name][1] for counts in totals if name in counts),
                )
                for name in names
            ]

    def endpoints(self) -> tuple[EndpointReport, ...]:
        """Returns what is to be said of each Triton, in the order of the settings."""
        return self._fleet.reports()

    def close(self) -> None:
        """Fails what is open and ends the engine's threads; what the Tritons hold stays there. See `Engine.close`."""
        with self._lock:
            self._closed = True
            settlements = self._questions.fail_all(EngineClosedError)
            self._work.notify_all()
        settle_all(settlements)
        self._sender.join()
        for upkeep in self._upkeep.values():
            upkeep.close(_LEAVE_SECONDS)
        with self._loading, self._lock:
            self._fleet.loaded.clear()
            self._fleet.retiring.clear()
            self._free_unused()

    # Loading

    def _load_everywhere(self, held: HeldGeneration) -> None:
        """Brings a generation to every Triton that answers, or to the first that does if none did."""
        deadline_seconds = time.monotonic() + self._settings.start_seconds
        while True:
            with self._lock:
                if self._closed:
                    raise EngineClosedError
                serving = [member for member in self._fleet.members if member.state is State.SERVING]
                missing = [member for member in serving if held.generation not in member.holds]
                before = list(self._fleet.loaded.values())
                if serving and not missing:
                    # From here on it is answered, by all of them, and whoever joins is brought to it first.
                    self._fleet.loaded[held.generation] = held
                    return
            if serving:
                faults = self._bring(missing, [held])
                if faults:
                    raise faults[0]
                continue
            faults = self._bring(self._fleet.members, [*before, held])
            if any(self._fleet.take_up(member, held) for member in self._fleet.members):
                continue
            if faults:
                raise faults[0]
            if before or time.monotonic() >= deadline_seconds:
                raise NoEndpointError(sorted(held.generation.tasks), self._fleet.troubles())
            time.sleep(_PAUSE_SECONDS)

    def _bring(self, members: Iterable[Member], generations: list[HeldGeneration]) -> list[ServerError]:
        """Brings members to generations, all at a time. Those that are lost are out; returns what is wrong with the others."""
        members = list(members)
        with concurrent.futures.ThreadPoolExecutor(len(members), thread_name_prefix="triton-bring") as threads:
            errors = list(threads.map(lambda member: self._try_to_bring(member, generations), members))
        return [error for error in errors if error is not None]

    def _try_to_bring(self, member: Member, generations: list[HeldGeneration]) -> ServerError | None:
        with self._lock:
            life, was_serving = member.life, member.state is State.SERVING
        try:
            self._upkeep[member].bring(generations)
        except EndpointGoneError as error:
            self._fleet.take_down(member, error.reason, life)
            self._wake()
            # At start-up all may be wrong at once, and each for a reason of its own.
            return None
        except ServerError as error:
            if not was_serving:
                self._fleet.take_down(member, str(error), life)
            return error
        return None

    # Questions

    def _admit(self, question: Question) -> AskedQuestion:
        if self._closed:
            raise EngineClosedError
        return self._questions.admit(question, self._fleet.loaded.get(question.generation))

    def _enqueue(self, part: Part) -> None:
        number = next(self._numbers)
        self._waiting[number] = part
        self._line.add(number, part.opened.tree.flow, part.opened.due_seconds)

    def _wake(self) -> None:
        with self._lock:
            self._work.notify()

    def _run_sender(self) -> None:
        while True:
            with self._lock:
                flights, settlements = self._next_flights()
                while not flights and not settlements and not self._closed:
                    self._work.wait()
                    flights, settlements = self._next_flights()
                if self._closed:
                    return
            settle_all(settlements)
            for flight in flights:
                try:
                    self._send(flight)
                except EndpointError as error:
                    self._land(flight, error)
                except Exception as error:
                    # The edge of the thread: without it nothing would be asked any more.
                    _log.exception("asking Triton failed")
                    self._land(flight, SegmentRunError(flight.part.opened.plan.ensemble, repr(error)))
            # Nothing of a finished question is kept alive while waiting for the next.
            del flights, settlements

    def _next_flights(self) -> tuple[list[Flight], list[Settlement]]:
        """Takes from what waits as much as the Tritons have room for, and what cannot be answered any more."""
        flights: list[Flight] = []
        settlements: list[Settlement] = []
        now = self._clock()
        while (number := self._line.first()) is not None:
            part = self._waiting[number]
            opened = part.opened
            question = opened.question
            if opened in self._questions:
                if question.deadline_seconds is not None and question.deadline_seconds <= now:
                    settlements += self._questions.fail(opened.number, DeadlineError())
                else:
                    able = self._fleet.able(question.generation, opened.plan, part.tried)
                    if able:
                        member = min(able, key=lambda member: member.num_rows)
                        if member.num_rows and member.num_rows + part.count > self._settings.max_rows_in_flight:
                            break
                        self._times.reach(opened.tree.flow)
                        self._times.charge(opened.tree.flow, part.count * opened.tree.num_branches)
                        flight = Flight(part, member, member.life)
                        member.num_rows += part.count
                        self._flights.add(flight)
                        flights.append(flight)
                    else:
                        settlements += self._questions.fail(
                            opened.number, NoEndpointError(question.tasks, self._fleet.troubles())
                        )
            del self._waiting[number]
            self._line.leave()
        return flights, settlements

    def _send(self, flight: Flight) -> None:
        part, plan = flight.part, flight.part.opened.plan
        images = part.opened.question.images[part.first : part.first + part.count]
        if part.is_alone and part.count < plan.max_rows:
            images = filled_up(images, plan.max_rows)
        request = to_request(plan.ensemble, images, plan.outputs.values())
        flight.member.endpoint.infer(request, lambda call: self._read(flight, call))

    def _read(self, flight: Flight, call: Any) -> None:
        """Takes the answer to a part; in a thread of gRPC."""
        try:
            answer: Logits | ServerError = flight.member.endpoint.read_answer(call)
        except EndpointError as error:
            answer = error
        except Exception as error:
            # The edge to gRPC, which would swallow it: the question would never end.
            answer = SegmentRunError(flight.part.opened.plan.ensemble, repr(error))
        self._land(flight, answer)

    def _land(self, flight: Flight, answer: Logits | ServerError) -> None:
        """Ends a flight with logits or an error. One that was given up has ended already."""
        part, member = flight.part, flight.member
        with self._lock:
            if flight not in self._flights:
                return
            self._flights.discard(flight)
            member.num_rows -= part.count
            if not isinstance(answer, EndpointGoneError):
                self._fleet.answered(member)
            try:
                settlements = self._retry(flight, answer) if isinstance(answer, ServerError) else self._put(flight, answer)
            except Exception as error:
                # An answer that is none must not leave its question open.
                settlements = self._questions.fail(part.opened.number, SegmentRunError(part.opened.plan.ensemble, repr(error)))
            self._work.notify_all()
        settle_all(settlements)

    def _give_up(self, member: Member, error: EndpointError, models: Collection[str]) -> None:
        """Ends flights to a member, or through models there, that say nothing, so that others are asked."""
        with self._lock:
            flights = [
                flight
                for flight in self._flights
                if flight.member is member and (not models or not flight.part.opened.plan.models.isdisjoint(models))
            ]
        for flight in flights:
            self._land(flight, error)

    def _put(self, flight: Flight, logits: Logits) -> list[Settlement]:
        part, member = flight.part, flight.member
        opened, plan = part.opened, part.opened.plan
        num_rows = plan.max_rows if part.is_alone else part.count
        is_counted = opened.question.counted
        self._fleet.answered(member, plan)
        member.counters.answered(plan.tree, num_rows, num_rows - part.count if is_counted else num_rows)
        if opened not in self._questions:
            return []
        if is_counted:
            for branch in plan.tree.branches:
                self._requested[branch.segment] = self._requested.get(branch.segment, 0) + part.count * branch.num_tasks
        rows = {task: logits[output][: part.count] for task, output in plan.outputs.items()}
        for task, values in rows.items():
            if not np.isfinite(values).all():
                segment = opened.question.generation.tasks[task].route[-1]
                return self._questions.fail(opened.number, SegmentRunError(segment, "logits that are no numbers"))
        for task, values in rows.items():
            if opened.put(task, part.first, values):
                return [self._questions.complete(opened)]
        return []

    def _retry(self, flight: Flight, error: ServerError) -> list[Settlement]:
        """Asks a part again if that may help; else fails its question."""
        part, member, life = flight.part, flight.member, flight.life
        opened = part.opened
        if isinstance(error, EndpointGoneError):
            self._fleet.take_down(member, error.reason, life)
            part.tried.add((member, life))
        elif isinstance(error, ModelMissingError | ModelDeadError | ModelSilentError):
            self._fleet.blame(member, error, opened.plan, life)
            part.tried.add((member, life))
        elif not isinstance(error, EndpointError):
            return self._questions.fail(opened.number, error)
        elif part.is_alone:
            segment = min(segments_in(error.reason), default=opened.plan.ensemble)
            return self._questions.fail(opened.number, SegmentRunError(segment, error.reason))
        else:
            # Another question's row may have run in the same batch and be to blame: once more, in a batch of its own.
            part.is_alone = True
        if opened in self._questions:
            self._enqueue(part)
        return []

    def _abandon(self, number: int) -> None:
        with self._lock:
            self._questions.abandon(number)

    def _ended(self, opened: AskedQuestion) -> None:
        """Drops what only the generation of a question needed that is open no longer. What a Triton has of it runs to its end there."""
        if opened.loaded.is_over:
            self._fleet.retiring.discard(opened.loaded)
            self._free_unused()

    def _free_unused(self) -> None:
        """Forgets what only generations needed that are gone; the Tritons are tidied later."""
        held = {one.generation for one in self._fleet.held()}
        segments = {name for generation in held for name in generation.segments}
        self._requested = {name: rows for name, rows in self._requested.items() if name in segments}
        models = self._fleet.needed()
        for member in self._fleet.members:
            member.holds &= held
            member.proven = {name: seconds for name, seconds in member.proven.items() if name in models}
            member.counters.keep(segments)

    def _read_counters(self, member: Member) -> None:
        """Reads what a Triton counted, until that has in it all that it answered: it counts a moment later."""
        deadline_seconds = time.monotonic() + _STATISTICS_SECONDS
        # Not between a probe's run and the note that it is not to be counted, unless that takes long.
        is_quiet = member.probing.acquire(timeout=_PAUSE_SECONDS)
        try:
            while not member.counters.see(member.endpoint.counts(_STATISTICS_SECONDS)) and time.monotonic() < deadline_seconds:
                time.sleep(0.002)
        except EndpointError as error:
            _log.debug("%s", error)
        finally:
            if is_quiet:
                member.probing.release()
