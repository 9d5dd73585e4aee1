from __future__ import annotations

import contextvars
import datetime as dt
import json
import logging
import sys

import pytest

from server.call_context import CallContext, set_call
from server.logs import JsonFormatter, TextFormatter, told


def line_of(formatter: logging.Formatter, call: CallContext | None = None, message: str = "said", **values: object) -> str:
    record = logging.makeLogRecord({"name": "server.x", "levelname": "WARNING", "msg": message, "created": 1e9, **values})

    def write() -> str:
        if call is not None:
            set_call(call)
        return formatter.format(record)

    return contextvars.copy_context().run(write)


def test_outside_of_calls_a_line_is_about_none() -> None:
    assert json.loads(line_of(JsonFormatter())) == {
        "time": dt.datetime.fromtimestamp(1e9, dt.UTC).isoformat(timespec="milliseconds"),
        "level": "warning",
        "logger": "server.x",
        "message": "said",
    }
    assert line_of(TextFormatter()).endswith("WARNING server.x: said")


def test_within_a_call_a_line_says_which() -> None:
    call = CallContext("mine", "InferenceService/Classify", tuple(f"task-{index}" for index in range(20)), "4bf9")
    line = json.loads(line_of(JsonFormatter(), call, **told(status="OK")))
    assert (line["request_id"], line["method"], line["trace_id"], line["status"]) == ("mine", call.method, "4bf9", "OK")
    assert (line["tasks"], line["num_tasks"]) == ([f"task-{index}" for index in range(16)], 20)
    assert line_of(TextFormatter(), call).endswith("WARNING server.x: said [mine]")


@pytest.mark.parametrize("message", ["two\nlines", "\ud800 alone", 'a "quote"', "é"])
def test_whatever_is_said_is_one_line_of_json(message: str) -> None:
    line = line_of(JsonFormatter(), message=message)
    assert "\n" not in line
    assert line.isascii()
    assert json.loads(line)["message"] == message


def test_a_traceback_is_told() -> None:
    try:
        raise ZeroDivisionError("of a bug")
    except ZeroDivisionError:
        line = json.loads(line_of(JsonFormatter(), exc_info=sys.exc_info()))
    assert line["exception"].startswith("Traceback (most recent call last):")
    assert line["exception"].endswith("ZeroDivisionError: of a bug")
