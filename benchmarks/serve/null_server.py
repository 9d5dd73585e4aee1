"""`munet-server` with an engine that computes nothing: what is left is the front door. Same command line."""

from __future__ import annotations

import concurrent.futures

import server.cli
from server.config import EngineSettings
from server.engine import Engine, Logits, Question, SegmentStatistics, check_question


class NullEngine(Engine):
    """Answers every image with what a task answers to its first golden image, by way of a thread, as an engine does.

    What else an engine does, it does not: the protocol's own methods do nothing.
    """

    name = "null"

    def __init__(self, settings: EngineSettings) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1)

    def answer(self, question: Question) -> concurrent.futures.Future[Logits]:
        """Answers at once."""
        check_question(question)
        return self._thread.submit(self._logits, question)

    def statistics(self) -> list[SegmentStatistics]:
        """Returns nothing."""
        return []

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()

    def _logits(self, question: Question) -> Logits:
        count = len(question.images)
        return {name: question.generation.tasks[name].golden.logits[:count] for name in question.tasks}


if __name__ == "__main__":
    # Another class under its name, which mypy rightly refuses: the command line has no option for an engine that computes nothing.
    server.cli.EmbeddedEngine = NullEngine  # type: ignore[assignment, misc]
    server.cli.main()
