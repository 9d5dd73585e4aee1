"""The connection of this process to a Ray cluster: made once, told apart from what else a Ray would print."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from typing import Any

from evolve.errors import ClusterError, SettingsError

REACH_SECONDS = 5.0
"""Who listens at an address is there within this time."""

CONNECT_SECONDS = 40.0
"""A cluster takes a process in within this time."""

_ADVICE = (
    "start one with `ray start --head`, let this machine join one with `ray start --address=...`, or give --address local; "
    "an address is that of the head's GCS, port 6379 by default, not the dashboard's"
)

# Whoever calls ray.init with an address where nobody answers waits two minutes, and is then ended by Ray.
_PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR', configure_logging=False)"


def load_ray() -> Any:
    """Returns the module ray.

    Raises:
        SettingsError: it is not installed.
    """
    before = signal.getsignal(signal.SIGTERM)
    # Ray takes note that GPUs are hidden from workers that ask for none, as here they should be.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "ray":
            raise
        raise SettingsError(
            "found no module 'ray' for the executor ray",
            "the packages of 'ray'",
            "pip install '.[ray]', on every node of the cluster",
        ) from None
    finally:
        _restore(before)


def connect(address: str | None) -> Any:
    """Connects this process to a cluster, unless it is connected to one already, and returns the module ray.

    Args:
        address: see evolve.config.TrainingSettings.

    Raises:
        SettingsError: Ray is not installed, or the address is none.
        ClusterError: there is no cluster that takes this process in.
    """
    ray = load_ray()
    if ray.is_initialized():
        return ray
    address = address or "auto"
    if address != "local":
        _reach(address)
    before = signal.getsignal(signal.SIGTERM)
    own = {}
    if address == "local":
        own["include_dashboard"] = False
        # Nobody is told of it.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Lines of Ray's own would go between ours; what matters of them, an error of a worker, comes with its result.
    ray._private.worker._worker_logs_enabled = False
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        raise _unusable(address, _first_line(str(error))) from error
    finally:
        # Ray ends the process at SIGTERM without a word.
        _restore(before)
    return ray


def _restore(handler: Any) -> None:
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _reach(address: str) -> None:
    """Finds out within seconds whether there is a cluster at an address.

    Raises:
        SettingsError: it is no address.
        ClusterError: there is none.
    """
    if address != "auto":
        host, _, port = address.rpartition(":")
        if not host or "/" in address or not port.isdigit() or not 0 < int(port) < 65536:
            raise SettingsError(f"found address {address!r} of a Ray cluster", "host:port, auto or local", _ADVICE)
        try:
            socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()
        except OSError as error:
            raise _unusable(address, error.strerror or str(error)) from error
    with tempfile.TemporaryFile() as told:
        probe = subprocess.Popen([sys.executable, "-c", _PROBE, address], stdout=told, stderr=told, start_new_session=True)
        try:
            status = probe.wait(CONNECT_SECONDS)
        except subprocess.TimeoutExpired:
            raise _unusable(address, f"no answer within {CONNECT_SECONDS:.0f} s") from None
        finally:
            probe.kill()
            probe.wait()
        if status != 0:
            told.seek(0)
            raise _unusable(address, _reason(told.read().decode(errors="replace")))


def _reason(told: str) -> str:
    """Returns the error that a traceback ends with."""
    lines = [line for line in told.splitlines() if line and not line.startswith((" ", "\t", "["))]
    start = next((number for number, line in enumerate(lines) if "Error" in line.partition(":")[0]), len(lines) - 1)
    return " ".join(line.strip() for line in lines[start:])[:500] or "it ended without a word"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _unusable(address: str, reason: str) -> ClusterError:
    what = "on this machine" if address == "auto" else f"at {address}"
    return ClusterError(f"found no Ray cluster {what} that can be used ({reason})", "a cluster that answers", _ADVICE)
