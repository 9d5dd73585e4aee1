"""What the log looks like: lines for people, or one JSON object a line for machines. Both carry the id of the request under way."""

from __future__ import annotations

import datetime as dt
import json
import logging
import sys
from typing import IO, Any

from server.call_context import current_call
from server.config import LogSettings

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_FIELDS = "fields"
"""Attribute of records that holds what is told beside the message, for machines."""


def configure_logs(settings: LogSettings, stream: IO[str] | None = None) -> None:
    """Sends all that is logged in this process to a stream.

    Args:
        settings: how much, and in which form.
        stream: where to; none means standard error.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if settings.format == "json" else TextFormatter())
    logging.basicConfig(level=settings.level.upper(), handlers=[handler])


def told(**fields: Any) -> dict[str, Any]:
    """Returns what `extra` of a logger's methods takes, so that these fields stand beside the message where logs are JSON."""
    return {_FIELDS: fields}


class TextFormatter(logging.Formatter):
    """A line for people; within a call it ends with the request's id."""

    def __init__(self) -> None:
        super().__init__(_TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        """Returns the line without a traceback."""
        line = super().formatMessage(record)
        call = current_call()
        return f"{line} [{call.request_id}]" if call is not None else line


class JsonFormatter(logging.Formatter):
    """A JSON object: `time` (UTC), `level`, `logger`, `message`; within a call `request_id`, `method`, `tasks` and, if a trace is recorded,
    `trace_id`; `exception` with the traceback where there is one; and what else the line tells.
    """

    NUM_TASKS = 16
    """A call may ask a thousand tasks; so many are named."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the object, in one line."""
        line: dict[str, Any] = {
            "time": dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        call = current_call()
        if call is not None:
            line |= {"request_id": call.request_id, "method": call.method}
            if call.tasks:
                line |= {"tasks": call.tasks[: self.NUM_TASKS], "num_tasks": len(call.tasks)}
            if call.trace_id:
                line["trace_id"] = call.trace_id
        line |= getattr(record, _FIELDS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
