"""Calls of a real Triton that takes its time."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
import signal
import time

from server.config import TritonSettings
from server.triton.endpoint import Access, Endpoint
from server.triton.process import TritonProcess
from tests.support.triton import environment


def test_a_triton_that_is_slow_to_take_a_connection_in_is_waited_for(tmp_path: pathlib.Path) -> None:
    """As where its machine is busy, or far away and asks for TLS: nothing is wrong with it."""
    with (
        TritonProcess(environment(), tmp_path) as triton,
        contextlib.closing(Endpoint(triton.addresses.grpc, Access.read(TritonSettings()))) as endpoint,
        concurrent.futures.ThreadPoolExecutor(1) as threads,
    ):
        # The system completes connections to what stands still, which says nothing on them.
        os.kill(triton.pid, signal.SIGSTOP)
        try:
            asked = threads.submit(endpoint.models)
            time.sleep(1.5)
            assert not asked.done(), asked.exception()
        finally:
            os.kill(triton.pid, signal.SIGCONT)
        assert asked.result() == frozenset()
