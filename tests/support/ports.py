"""Ports that nobody else is given."""

from __future__ import annotations

import itertools
import os
import socket

_NUM_PORTS = 1200
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_ports = itertools.count(20_000 + _NUM_PORTS * _worker + os.getpid() % 800)
"""Of this process of a run alone. On Linux the system hands out none of them to those who ask for any: they begin at 32,768."""


def lasting_port() -> int:
    """Returns a port of 127.0.0.1 that is free, and stays so while nobody listens: for servers that take it later, or again."""
    for port in itertools.islice(_ports, _NUM_PORTS):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"found {_NUM_PORTS} ports in use, expected one that is free")
