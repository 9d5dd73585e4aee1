"""The embedded engine: worker threads that take batches from the scheduler and run them in ONNX Runtime sessions.

A worker takes a batch as soon as it is free, so batches form while workers are busy and nothing ever waits for a batch to fill. After a
segment, rows go straight to the queues of their next segments.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from munet.runtime import onnxruntime
from server.admission import Forecast
from server.background import give_way
from server.config import EngineSettings
from server.embedded.allocator import give_back_memory
from server.embedded.batch_sizes import with_measured_batches
from server.embedded.batches import BatchRun, Cargo, SegmentCounters, Trip, values_of
from server.embedded.carriers import Carrier, Transfers, Values, carrier_of
from server.embedded.costs import Costs, Kind
from server.embedded.limited_memory import LimitedMemory
from server.embedded.memory import MemoryStatistics, SegmentMemory
from server.embedded.scheduler import Claim, Decision, Lane, Rows
from server.embedded.sessions import SegmentSession, prepare_device, prepare_process
from server.embedded.work import Role, Work, roles
from server.engine import Logits, Question, SegmentStatistics, check_question
from server.errors import DeadlineError, EngineClosedError, SegmentRunError, SegmentUnavailableError, ServerError
from server.generation import Generation
from server.questions import Branch, LoadedGeneration, OpenQuestion, OpenQuestions, RouteTree, Settlement, settle_all

_log = logging.getLogger(__name__)


class EmbeddedEngine:
    """ONNX Runtime in this process. `server.engine.Engine` says what it does.

    Args:
        settings: how it works.
        clock: seconds that only go forward, the clock of questions' deadlines.
        carrier: how rows get from segment to segment, on the device of the settings; none means the one that suits it.

    Raises:
        DeviceError: the device cannot be used.
        SettingsError: this process has a thread pool of another size.
    """

    def __init__(
        self, settings: EngineSettings, clock: Callable[[], float] = time.monotonic, carrier: Carrier | None = None
    ) -> None:
        prepare_process(settings.num_threads)
        prepare_device(settings.device)
        self._carrier = carrier or carrier_of(settings.device)
        self._settings = settings
        self._clock = clock
        self._lock = threading.Lock()
        self._work = Work(self._lock, settings.num_workers, clock)
        self._loading = threading.Lock()
        self._costs = Costs(settings.num_workers)
        self._questions = OpenQuestions(OpenQuestion, settings, clock, self._ended, self._forecast)
        self._loaded: dict[Generation, LoadedGeneration] = {}
        self._retiring: set[LoadedGeneration] = set()
        self._memory = self._make_memory()
        self._counters: dict[str, SegmentCounters] = {}
        self._closed = False
        self._workers = [
            threading.Thread(target=self._run_worker, args=(role,), name=f"engine-{role.value}-{index}", daemon=True)
            for index, role in enumerate(roles(settings.num_workers))
        ]
        for worker in self._workers:
            worker.start()

    @property
    def name(self) -> str:
        """What the engine is, for people."""
        return f"embedded (onnxruntime {onnxruntime.__version__}, {self._settings.device})"

    def load(self, generation: Generation) -> None:
        """Makes a generation answerable. See `Engine.load`."""
        with self._loading:
            with self._lock:
                if self._closed:
                    raise EngineClosedError
                if generation in self._loaded:
                    return
                # Held from now on, so that nothing it shares with an older generation is freed while the rest loads.
                loaded = LoadedGeneration(generation)
                self._retiring.add(loaded)
            try:
                self._memory.load(generation)
                self._measure(generation)
            except BaseException:
                with self._lock:
                    self._retiring.discard(loaded)
                    self._free_unused()
                raise
            with self._lock:
                if self._closed:
                    raise EngineClosedError
                self._counters.update({name: SegmentCounters() for name in generation.segments if name not in self._counters})
                self._retiring.discard(loaded)
                self._loaded[generation] = loaded

    def check(self, generation: Generation, tasks: tuple[str, ...], num_images: int, deadline_seconds: float | None) -> None:
        """Checks whether a question would be refused now. See `Engine.check`."""
        with self._lock:
            self._questions.check(self._loaded.get(generation), tasks, num_images, deadline_seconds)

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
            for branch in opened.tree.roots:
                self._enqueue(opened, branch, question.images, 0, Trip(self._clock()))
            self._work.wake()
        # By its number, not itself: the future would hold what holds it.
        number, future = opened.number, opened.future
        future.add_done_callback(lambda future: self._abandon(number) if future.cancelled() else None)
        return future

    def unload(self, generation: Generation) -> None:
        """Ends a generation. See `Engine.unload`."""
        with self._lock:
            loaded = self._loaded.pop(generation, None)
            if loaded is not None:
                loaded.retired = True
                if loaded.num_open:
                    self._retiring.add(loaded)
                self._free_unused()
        give_back_memory()

    def statistics(self) -> list[SegmentStatistics]:
        """Returns what each segment that is held has run. See `Engine.statistics`."""
        with self._lock:
            counted = [
                (counters, SegmentStatistics(name, counters.rows_requested, counters.rows_computed, counters.executions))
                for name, counters in sorted(self._counters.items())
            ]
        return [dataclasses.replace(counts, distributions=counters.distributions()) for counters, counts in counted]

    def transfers(self) -> Transfers:
        """Returns what has crossed between host and device; nothing on a CPU."""
        return self._carrier.transfers()

    def memory(self) -> MemoryStatistics:
        """Returns what the segments take of memory, and what came and went there."""
        with self._lock:
            return self._memory.statistics()

    def providers(self) -> dict[str, str]:
        """Returns what each segment that is in memory runs on, ONNX Runtime's first provider by the segment's name."""
        with self._lock:
            return {name: session.session.get_providers()[0] for name, session in sorted(self._memory.sessions.items())}

    def close(self) -> None:
        """Fails what is open, frees everything and ends the workers. See `Engine.close`."""
        with self._lock:
            self._closed = True
            settlements = self._questions.fail_all(EngineClosedError)
            self._work.wake_all()
            self._memory.close()
        settle_all(settlements)
        for worker in self._workers:
            worker.join()
        self._memory.join()
        with self._loading, self._lock:
            self._loaded.clear()
            self._retiring.clear()
            self._free_unused()
        self._carrier.close()

    def _admit(self, question: Question) -> OpenQuestion:
        if self._closed:
            raise EngineClosedError
        opened = self._questions.admit(question, self._loaded.get(question.generation))
        try:
            self._memory.need(opened)
        except ServerError:
            self._questions.abandon(opened.number)
            raise
        return opened

    def _enqueue(self, opened: OpenQuestion, branch: Branch, values: Values, first_image: int, trip: Trip) -> None:
        segment = opened.loaded.generation.segments[branch.segment]
        row_bytes = max(values.nbytes // len(values), segment.output.known_bytes)
        max_rows = min(segment.max_batch_size, self._settings.max_rows(row_bytes))
        deadline_seconds = opened.question.deadline_seconds
        image_size = opened.question.images.shape[1]
        kind = Kind(branch.segment, image_size)
        rows = Rows(
            claim=Claim(
                request=opened.number,
                flow=opened.tree.flow,
                due_seconds=opened.due_seconds,
                deadline_seconds=math.inf if deadline_seconds is None else deadline_seconds,
            ),
            lane=Lane(branch.segment, values.shape[1:], max_rows),
            first=0,
            count=len(values),
            payload=Cargo(opened, branch, values, first_image, trip),
            row_seconds=self._costs.share_seconds(kind),
            enough_rows=self._costs.enough_rows(kind, max_rows),
            free_rows=self._costs.free_rows(kind, max_rows),
            has_begun=trip.computed_seconds > 0,
            needs_seconds=(
                0.0 if deadline_seconds is None else self._costs.needs_seconds(branch, len(values), image_size, self._clock())
            ),
        )
        if self._memory.put_aside(rows):
            self._work.watch()
        else:
            self._work.add(rows)

    def _forecast(self, tree: RouteTree, num_images: int, image_size: int) -> Forecast:
        return self._costs.forecast(tree, num_images, image_size, self._clock())

    def _run_worker(self, role: Role) -> None:
        # On a GPU its thread only starts what computes, and should not be late with that.
        gives_way = role.gives_way and self._settings.device == "cpu"
        if gives_way:
            give_way()
        decision: Decision[Cargo] | None = None
        while True:
            with self._lock:
                if decision is not None:
                    self._work.finished(decision)
                # In place of the batch that is finished: nothing of it is kept alive while waiting for the next.
                decision = self._decide(role)
                while not decision.batch and not decision.expired and not self._closed:
                    self._work.wait(role, self._memory.seconds_to_deadline(self._clock()))
                    decision = self._decide(role)
                if self._closed:
                    return
                # Whoever takes a batch wakes one more worker while there is more to take. What a batch leads to is taken by who ran it,
                # with the rows still in the cache of its core.
                self._work.wake()
                settlements = [settle for number in decision.expired for settle in self._questions.fail(number, DeadlineError())]
                session = self._memory.enter(decision.batch) if decision.batch else None
            settle_all(settlements)
            if session is not None:
                try:
                    self._run_batch(session, decision, gives_way)
                except Exception as error:
                    # The edge of the thread: without its worker the engine would answer nobody any more.
                    _log.exception("a worker failed")
                    self._fail_batch(decision, SegmentRunError(session.segment.name, repr(error)))
                self._memory.leave(decision.batch)
            del session, settlements

    def _decide(self, role: Role) -> Decision[Cargo]:
        decision = self._work.take(role)
        late = self._memory.expired(self._clock())
        return dataclasses.replace(decision, expired=(*decision.expired, *late)) if late else decision

    def _run_batch(self, session: SegmentSession, decision: Decision[Cargo], gives_way: bool) -> None:
        # Logits come down; hidden states stay where they are.
        to_host = any(rows.payload.branch.leaves for rows in decision.batch)
        started_seconds, started_cpu_seconds = self._clock(), time.thread_time()
        try:
            answer = self._carrier.run(session, [values_of(rows) for rows in decision.batch], to_host)
        except Exception as error:
            # The edge to ONNX Runtime, whose errors share no class but Exception.
            _log.warning("segment %s failed on a batch of %d requests: %s", session.segment.name, len(decision.batch), error)
            if len(decision.batch) > 1:
                # One of them may be to blame: each runs alone, so that it fails alone.
                for rows in decision.batch:
                    self._run_batch(session, Decision((rows,), ()), gives_way)
                return
            self._fail_batch(decision, SegmentRunError(session.segment.name, str(error)[:500]))
            return
        ended_seconds = self._clock()
        cost_seconds = ended_seconds - started_seconds
        if gives_way and self._settings.num_threads == 1:
            # What gives way takes as long as others let it, and costs what it computes, all of which it does in this thread.
            cost_seconds = min(cost_seconds, time.thread_time() - started_cpu_seconds)
        run = BatchRun(session.segment.name, decision.batch, started_seconds, ended_seconds, cost_seconds)
        run.tell()
        sound = isinstance(answer, np.ndarray) and to_host and bool(np.isfinite(answer).all())
        with self._lock:
            # A segment whose last question was cancelled while it ran is gone by now.
            counters = self._counters.get(session.segment.name)
            if counters is not None:
                counters.count(decision.batch)
                self._learn(run)
            settlements = list(self._distribute(run, answer, sound))
        settle_all(settlements)
        # The rows are on their way already: what is noted here holds nobody up.
        if counters is not None:
            counters.observe(run)

    def _learn(self, run: BatchRun) -> None:
        """Notes what a batch cost, and that its rows are done."""
        now = run.ended_seconds
        kind = Kind(run.segment, run.batch[0].payload.open_question.question.images.shape[1])
        self._costs.observe(kind, sum(rows.count for rows in run.batch), run.cost_seconds, now)
        row_seconds = self._costs.row_seconds(kind, now)
        for rows in run.batch:
            self._questions.progress(rows.payload.open_question, rows.count * row_seconds)

    def _fail_batch(self, decision: Decision[Cargo], error: SegmentRunError) -> None:
        with self._lock:
            settlements = [settle for rows in decision.batch for settle in self._questions.fail(rows.claim.request, error)]
        settle_all(settlements)

    def _distribute(self, run: BatchRun, answer: Values, sound: bool) -> Iterable[Settlement]:
        """Sends each row of a batch's answer where it goes next; `sound` says that all of it is known to be numbers."""
        start = 0
        for rows in run.batch:
            values = answer[start : start + rows.count]
            start += rows.count
            opened = rows.payload.open_question
            if opened not in self._questions:
                continue
            first_image = rows.payload.first_image + rows.first
            trip = rows.payload.trip.after(run.started_seconds, run.ended_seconds)
            for branch in rows.payload.branch.children.values():
                self._enqueue(opened, branch, values, first_image, trip)
            if not rows.payload.branch.leaves:
                continue
            if not isinstance(values, np.ndarray) or not (sound or np.isfinite(values).all()):
                # As float16 gives where it overflows: no answer, and no business of the other rows'.
                yield from self._questions.fail(opened.number, SegmentRunError(run.segment, "logits that are no numbers"))
                continue
            for task in rows.payload.branch.leaves:
                if opened.question.times is not None:
                    opened.question.times.note(task, trip.waited_seconds, trip.computed_seconds)
                if opened.put(task, first_image, values):
                    yield self._questions.complete(opened)

    def _abandon(self, number: int) -> None:
        with self._lock:
            self._questions.abandon(number)
            # What waited behind it may be somebody else's.
            self._work.wake()

    def _ended(self, opened: OpenQuestion) -> None:
        """Drops what a question that is open no longer has waiting, and what only its generation needed."""
        self._work.drop(opened.number)
        self._memory.end(opened)
        if opened.loaded.is_over:
            self._retiring.discard(opened.loaded)
            self._free_unused()

    def _free_unused(self) -> None:
        """Frees the segments that no generation uses that is loaded, being loaded, or unloaded with questions open."""
        held = {loaded.generation for loaded in (*self._loaded.values(), *self._retiring)}
        used = {name for generation in held for name in generation.segments}
        for name in self._memory.names - used:
            self._memory.drop(name)
            self._counters.pop(name, None)
        self._memory.keep(held)
        self._costs.keep(self._memory.names)

    def _measure(self, generation: Generation) -> None:
        """Chooses how large batches are, once, if that was asked for."""
        if self._settings.measure_batches:
            with self._lock:
                sessions = dict(self._memory.sessions)
            settings = with_measured_batches(self._settings, generation, sessions)
            self._settings = settings.model_copy(update={"measure_batches": False})

    def _make_memory(self) -> SegmentMemory:
        limit_bytes = self._settings.memory_limit_bytes
        if limit_bytes is None:
            return SegmentMemory(self._settings.device, self._lock)
        return LimitedMemory(
            self._settings.device, self._lock, limit_bytes, self._clock, on_ready=self._resume, on_failure=self._fail_needing
        )

    def _resume(self, ready: Sequence[Rows[Cargo]]) -> None:
        """Lets rows wait whose segment has come into memory."""
        for rows in ready:
            self._work.add(rows)
        self._work.wake()

    def _fail_needing(self, numbers: Sequence[int], segment: str) -> list[Settlement]:
        """Takes the questions out that need a segment which cannot be had, and returns what fails them."""
        return [settle for number in numbers for settle in self._questions.fail(number, SegmentUnavailableError(segment))]
