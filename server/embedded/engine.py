"""The embedded engine: worker threads that take batches from the scheduler and run them in ONNX Runtime sessions.

A worker takes a batch as soon as it is free, so batches form while workers are busy and nothing ever waits for a batch to fill. After a
segment, rows go straight to the queues of their next segments.
"""

from __future__ import annotations

import concurrent.futures
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
import onnxruntime

from server.config import EngineSettings
from server.embedded.batches import Cargo, SegmentCounters, values_of
from server.embedded.carriers import Carrier, Transfers, Values, carrier_of
from server.embedded.scheduler import Decision, Lane, Rows, Scheduler
from server.embedded.sessions import SegmentSession, prepare_device, prepare_process
from server.engine import Logits, Question, SegmentStatistics, check_question
from server.errors import DeadlineError, EngineClosedError, SegmentRunError, ServerError
from server.generation import Generation
from server.questions import Branch, LoadedGeneration, OpenQuestion, OpenQuestions, Settlement, completion, settle_all

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
        self._work = threading.Condition(self._lock)
        self._loading = threading.Lock()
        self._scheduler: Scheduler[Cargo] = Scheduler()
        self._questions = OpenQuestions(OpenQuestion, settings, clock, self._ended)
        self._loaded: dict[Generation, LoadedGeneration] = {}
        self._retiring: set[LoadedGeneration] = set()
        self._sessions: dict[str, SegmentSession] = {}
        self._counters: dict[str, SegmentCounters] = {}
        self._closed = False
        self._workers = [
            threading.Thread(target=self._run_worker, name=f"engine-{index}", daemon=True)
            for index in range(settings.num_workers)
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
                missing = [segment for name, segment in generation.segments.items() if name not in self._sessions]
            try:
                sessions = {segment.name: SegmentSession(segment, self._settings.device) for segment in missing}
            except BaseException:
                with self._lock:
                    self._retiring.discard(loaded)
                    self._free_unused()
                raise
            with self._lock:
                if self._closed:
                    raise EngineClosedError
                self._sessions.update(sessions)
                self._counters.update({name: SegmentCounters() for name in sessions})
                self._retiring.discard(loaded)
                self._loaded[generation] = loaded

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
                self._enqueue(opened, branch, question.images, 0)
            self._work.notify()
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

    def statistics(self) -> list[SegmentStatistics]:
        """Returns what each segment that is held has run. See `Engine.statistics`."""
        with self._lock:
            return [
                SegmentStatistics(name, counters.rows_requested, counters.rows_computed, counters.executions)
                for name, counters in sorted(self._counters.items())
            ]

    def transfers(self) -> Transfers:
        """Returns what has crossed between host and device; nothing on a CPU."""
        return self._carrier.transfers()

    def providers(self) -> dict[str, str]:
        """Returns what each segment that is held runs on, ONNX Runtime's first provider by the segment's name."""
        with self._lock:
            return {name: session.session.get_providers()[0] for name, session in sorted(self._sessions.items())}

    def close(self) -> None:
        """Fails what is open, frees everything and ends the workers. See `Engine.close`."""
        with self._lock:
            self._closed = True
            settlements = self._questions.fail_all(EngineClosedError)
            self._work.notify_all()
        settle_all(settlements)
        for worker in self._workers:
            worker.join()
        with self._loading, self._lock:
            self._loaded.clear()
            self._retiring.clear()
            self._free_unused()
        self._carrier.close()

    def _admit(self, question: Question) -> OpenQuestion:
        if self._closed:
            raise EngineClosedError
        return self._questions.admit(question, self._loaded.get(question.generation))

    def _enqueue(self, opened: OpenQuestion, branch: Branch, values: Values, first_image: int) -> None:
        segment = opened.loaded.generation.segments[branch.segment]
        row_bytes = max(values.nbytes // len(values), segment.output.known_bytes)
        max_rows = min(segment.max_batch_size, self._settings.max_rows(row_bytes))
        deadline_seconds = opened.question.deadline_seconds
        self._scheduler.add(
            Rows(
                request=opened.number,
                lane=Lane(branch.segment, values.shape[1:], max_rows),
                first=0,
                count=len(values),
                due_seconds=opened.due_seconds,
                deadline_seconds=math.inf if deadline_seconds is None else deadline_seconds,
                payload=Cargo(opened, branch, values, first_image),
            )
        )

    def _run_worker(self) -> None:
        while True:
            with self._lock:
                decision = self._scheduler.next_batch(self._clock())
                while not decision.batch and not decision.expired and not self._closed:
                    self._work.wait()
                    decision = self._scheduler.next_batch(self._clock())
                if self._closed:
                    return
                # Whoever takes a batch wakes one more worker while there is more to take. What a batch leads to is taken by who ran it,
                # with the rows still in the cache of its core.
                if self._scheduler.num_rows:
                    self._work.notify()
                settlements = [settle for number in decision.expired for settle in self._questions.fail(number, DeadlineError())]
                session = self._sessions[decision.batch[0].lane.segment] if decision.batch else None
            settle_all(settlements)
            if session is not None:
                try:
                    self._run_batch(session, decision)
                except Exception as error:
                    # The edge of the thread: without its worker the engine would answer nobody any more.
                    _log.exception("a worker failed")
                    self._fail_batch(decision, SegmentRunError(session.segment.name, repr(error)))
            # Nothing of a finished batch is kept alive while waiting for the next.
            del decision, session, settlements

    def _run_batch(self, session: SegmentSession, decision: Decision[Cargo]) -> None:
        # Logits come down; hidden states stay where they are.
        to_host = any(rows.payload.branch.leaves for rows in decision.batch)
        try:
            answer = self._carrier.run(session, [values_of(rows) for rows in decision.batch], to_host)
        except Exception as error:
            # The edge to ONNX Runtime, whose errors share no class but Exception.
            _log.warning("segment %s failed on a batch of %d requests: %s", session.segment.name, len(decision.batch), error)
            if len(decision.batch) > 1:
                # One of them may be to blame: each runs alone, so that it fails alone.
                for rows in decision.batch:
                    self._run_batch(session, Decision((rows,), ()))
                return
            self._fail_batch(decision, SegmentRunError(session.segment.name, str(error)[:500]))
            return
        sound = isinstance(answer, np.ndarray) and to_host and bool(np.isfinite(answer).all())
        with self._lock:
            # A segment whose last question was cancelled while it ran is gone by now.
            counters = self._counters.get(session.segment.name)
            if counters is not None:
                counters.count(decision.batch)
            settlements = list(self._distribute(session.segment.name, decision.batch, answer, sound))
        settle_all(settlements)

    def _fail_batch(self, decision: Decision[Cargo], error: SegmentRunError) -> None:
        with self._lock:
            settlements = [settle for rows in decision.batch for settle in self._questions.fail(rows.request, error)]
        settle_all(settlements)

    def _distribute(self, segment: str, batch: Iterable[Rows[Cargo]], answer: Values, sound: bool) -> Iterable[Settlement]:
        """Sends each row of a batch's answer where it goes next; `sound` says that all of it is known to be numbers."""
        start = 0
        for rows in batch:
            values = answer[start : start + rows.count]
            start += rows.count
            opened = rows.payload.open_question
            if opened not in self._questions:
                continue
            first_image = rows.payload.first_image + rows.first
            for branch in rows.payload.branch.children.values():
                self._enqueue(opened, branch, values, first_image)
            if not rows.payload.branch.leaves:
                continue
            if not isinstance(values, np.ndarray) or not (sound or np.isfinite(values).all()):
                # As float16 gives where it overflows: no answer, and no business of the other rows'.
                yield from self._questions.fail(opened.number, SegmentRunError(segment, "logits that are no numbers"))
                continue
            for task in rows.payload.branch.leaves:
                if opened.put(task, first_image, values):
                    self._questions.end(opened)
                    yield completion(opened)

    def _abandon(self, number: int) -> None:
        with self._lock:
            self._questions.abandon(number)

    def _ended(self, opened: OpenQuestion) -> None:
        """Drops what a question that is open no longer has waiting, and what only its generation needed."""
        self._scheduler.drop(opened.number)
        if opened.loaded.is_over:
            self._retiring.discard(opened.loaded)
            self._free_unused()

    def _free_unused(self) -> None:
        """Frees the segments that no generation uses that is loaded, being loaded, or unloaded with questions open."""
        used = {name for loaded in (*self._loaded.values(), *self._retiring) for name in loaded.generation.segments}
        for name in self._sessions.keys() - used:
            del self._sessions[name]
            del self._counters[name]
