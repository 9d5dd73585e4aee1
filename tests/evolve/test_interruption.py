"""Signals: the first unwinds, the second ends at once, and one that is ignored stays so."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from evolve.interruption import Interrupted, interruptible
from tests.support.processes import environment

SLOW_TO_END = """
import signal, sys, time
from evolve.interruption import Interrupted, interruptible
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test that runs in the background may have been told to ignore it
with interruptible():
    try:
        print("ready", flush=True)
        time.sleep(60)
    except Exception:
        print("taken for an error", flush=True)
    except Interrupted as interrupted:
        print("unwinding", interrupted.status, flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize(("first", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_unwinds_and_the_second_ends_at_once(first, second, status):
    command = [sys.executable, "-c", SLOW_TO_END]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        assert process.stdout.readline() == f"unwinding {status}\n"
        started = time.monotonic()
        process.send_signal(second)
        assert process.wait(timeout=30) == -second
        assert time.monotonic() - started < 20


def test_afterwards_signals_do_what_they_did_before():
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: told.append(number))
    try:
        with pytest.raises(Interrupted, match="SIGTERM"), interruptible():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert told == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_was_to_be_ignored_is_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
