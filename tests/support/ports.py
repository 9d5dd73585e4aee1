"""Ports that nobody else is given."""

from __future__ import annotations

import pathlib
import random
import socket


def lasting_port() -> int:
    """Returns a port of 127.0.0.1 that is free, and stays so while nobody listens: the system hands it out to none who asks for any."""
    first = int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    ports = range(min(20_000, first // 2), first)
    # Not from a seed: those who test at the same time would all take the same.
    for port in random.SystemRandom().sample(ports, min(100, len(ports))):
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError(f"found 100 ports in use of those below {first}, expected one that is free")
