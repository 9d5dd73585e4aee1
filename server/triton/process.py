"""One tritonserver as a child process: started, awaited, stopped, and nothing of it left."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from server.errors import SettingsError, TritonProcessError
from server.triton.environment import TritonEnvironment
from server.triton.shared_memory import SharedMemory

START_SECONDS = 60.0
THREADS_VARIABLE = "MUNET_TRITON_THREADS"
"""What `backend/model.py` reads: it cannot import from here, nor this from there."""

EXIT_SECONDS = 5
"""What Triton may take to finish requests in flight when it is told to end."""

_KILL_SECONDS = 15.0
_NUM_LINES = 20
_NUM_TRIES = 3

# The kernel ends Triton when this process dies, however it dies. Python offers no such thing between fork and exec but `preexec_fn`, which
# is unsafe where threads run; so an interpreter of its own says so and then becomes Triton.
_LAUNCH = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclasses.dataclass(frozen=True)
class TritonAddresses:
    """Where a Triton listens: HOST:PORT, with port 0 for any free one.

    Attributes:
        grpc: of KServe v2 over gRPC.
        http: of KServe v2 over HTTP.
        metrics: of Prometheus metrics over HTTP; none without them.
    """

    grpc: str = "127.0.0.1:0"
    http: str = "127.0.0.1:0"
    metrics: str | None = None


class TritonProcess:
    """A tritonserver of the wheel with explicit model control: it starts with no model loaded.

    A context manager: entering starts it, leaving stops it. Start it from a thread that lives as long as it should.

    Args:
        environment: what it runs in.
        repository: the model repository.
        addresses: where it shall listen.
        log: the file that its output is appended to; none means a temporary one, kept only if the block fails.
        threads: of a segment that computes one batch; 0 means one for each core.
        arguments: more of tritonserver's own.

    Attributes:
        addresses: where it listens, with real ports once it started.
        log: the file that its output is in.
    """

    def __init__(
        self,
        environment: TritonEnvironment,
        repository: pathlib.Path,
        addresses: TritonAddresses = TritonAddresses(),
        log: pathlib.Path | None = None,
        threads: int = 1,
        arguments: Sequence[str] = (),
    ) -> None:
        self._environment = environment
        self._repository = repository.resolve()
        self._wanted = addresses
        self._threads = threads
        self._arguments = tuple(arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._memory: SharedMemory | None = None
        self._status = 0
        self._is_log_temporary = log is None
        self.addresses = addresses
        self.log = log or _temporary_log()

    @property
    def pid(self) -> int:
        """Of tritonserver; 0 if it was not started."""
        return self._process.pid if self._process is not None else 0

    @property
    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def ends_within(self, seconds: float) -> bool:
        """Waits for its end, at most so long; returns whether it has ended."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        return not self.is_running

    @property
    def outcome(self) -> str:
        """How it ended, in words."""
        status = self._process.poll() if self._process is not None else None
        return "nothing, it runs" if status is None else f"signal {-status}" if status < 0 else f"exit status {status}"

    def start(self) -> None:
        """Starts it, again if it ended, at the same addresses, and waits until it takes requests.

        Raises:
            SettingsError: an address is used by somebody else, or is none of this machine.
            TritonProcessError: it ended instead.
        """
        self._end()
        for num_left in reversed(range(_NUM_TRIES)):
            addresses = _real_addresses(self._wanted, self.addresses)
            try:
                self._start(addresses)
            except TritonProcessError as error:
                # A free port may be taken by somebody else before Triton listens there.
                is_taken = any("already in use" in line for line in error.lines)
                if not (is_taken and num_left and addresses != self.addresses):
                    raise
            else:
                self.addresses = addresses
                return

    def stop(self) -> int:
        """Ends it, kindly at first, and removes what it left; returns its last exit status, negative for a signal."""
        if self._process is not None and self.is_running:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(EXIT_SECONDS + _KILL_SECONDS)
        self._end()
        if self._memory is not None:
            self._memory.close()
            self._memory = None
        return self._status

    def _start(self, addresses: TritonAddresses) -> None:
        self._environment.refresh()
        self._memory = self._memory or SharedMemory()
        offset = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *self._command(addresses, self._memory.prefix)],
                env=self._environment.variables() | {THREADS_VARIABLE: str(self._threads)},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                pass_fds=[self._memory.handle],
                # Ctrl-C in a terminal is for whoever started this, who then ends Triton in order.
                start_new_session=True,
            )
        try:
            self._await_ready(addresses, offset)
        except BaseException:
            self._end()
            raise

    def _failure(self, expected: str, offset: int) -> TritonProcessError:
        with self.log.open("rb") as stream:
            stream.seek(offset)
            lines = stream.read().decode(errors="replace").splitlines()
        # Errors say more than the tables of settings that Triton ends its log with.
        errors = [line for line in lines if line.startswith(("E", "error", "Error"))]
        return TritonProcessError(self.outcome, expected, self.log, (errors or lines)[-_NUM_LINES:])

    def _command(self, addresses: TritonAddresses, prefix: str) -> list[str]:
        command = [
            str(self._environment.program),
            f"--model-repository={self._repository}",
            f"--backend-directory={self._environment.backends}",
            "--model-control-mode=explicit",
            # Our configs are complete. Triton would start every segment's process twice to ask what it might add.
            "--disable-auto-complete-config",
            f"--backend-config=python,shm-region-prefix-name={prefix}",
            f"--exit-timeout-secs={EXIT_SECONDS}",
            "--allow-gpu-metrics=false",
        ]
        for kind, address in dataclasses.asdict(addresses).items():
            if address is None:
                command.append(f"--allow-{kind}=false")
            else:
                host, _, port = address.rpartition(":")
                command += [f"--{kind}-address={host}", f"--{kind}-port={port}"]
        return [*command, *self._arguments]

    def _await_ready(self, addresses: TritonAddresses, offset: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        # gRPC waits longer after each failed try to connect: at first a second, in which Triton could have been ready.
        options = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 100)]
        with grpc.insecure_channel(addresses.grpc, options) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            while self.is_running and time.monotonic() < deadline:
                with contextlib.suppress(grpc.RpcError):
                    # Whoever answers at this address: if it were another, ours would have ended.
                    if stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=0.2, wait_for_ready=True).ready:
                        return
        raise self._failure(f"a server that is ready within {START_SECONDS:.0f} s", offset)

    def _end(self) -> None:
        """Kills what runs of it and removes what that left."""
        if self._process is None:
            return
        # Also its Python processes: one that was stopped or hangs outlives Triton.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._status = self._process.wait()
        self._process = None
        if self._memory is not None:
            self._memory.clear()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException as error:
            self.stop()
            if self._is_log_temporary and not isinstance(error, TritonProcessError):
                self.log.unlink(missing_ok=True)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()
        if self._is_log_temporary and kind is None:
            self.log.unlink(missing_ok=True)


@contextlib.contextmanager
def _bound(setting: str, address: str) -> Iterator[socket.socket]:
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(target)
            yield one
    except OSError as error:
        raise SettingsError(setting, address, f"an address to listen on that nobody else uses ({error})") from error


def _real_addresses(wanted: TritonAddresses, last: TritonAddresses) -> TritonAddresses:
    """Returns addresses without port 0: those of last time, if there was one, and free ones otherwise. All are free when it returns."""
    found = {}
    with contextlib.ExitStack() as stack:
        for kind, address in dataclasses.asdict(wanted).items():
            if address is not None:
                one = stack.enter_context(_bound(kind, getattr(last, kind)))
                found[kind] = f"{address.rpartition(':')[0]}:{one.getsockname()[1]}"
    return TritonAddresses(**found)


def _temporary_log() -> pathlib.Path:
    handle, name = tempfile.mkstemp(prefix="munet-triton-", suffix=".log")
    os.close(handle)
    return pathlib.Path(name)
