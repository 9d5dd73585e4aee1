"""A Python that has imported what takes long: for processes that tests start by the dozen, and that are no test of how they start.

`WarmPython(...).executable` stands for `python`: with `-m MODULE` or `-c CODE` it runs in a process that was forked from one in which torch
and this project are imported; with anything else it becomes Python itself. Standard streams, folder, environment, signals and exit
status are as always, and a killed one takes the forked process with it, shortly after. What libraries read from the environment while they
load is that of the tests. Not for programs that hand functions of their main module to multiprocessing, which would look for them here.
"""

from __future__ import annotations

import atexit
import json
import os
import pathlib
import runpy
import select
import signal
import socket
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

from tests.support.processes import environment

_PROGRAM = """#!{python} -IS
import json, os, signal, socket, sys
if sys.argv[1:2] not in (["-m"], ["-c"]):
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    request = {{"program": sys.argv[0], "arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
    socket.send_fds(connection, [b"+"], [0, 1, 2])
    connection.sendall(json.dumps(request).encode() + b"\\n")
    answers = connection.makefile()
    process = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(process, number))
    status = int(answers.readline())
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


class WarmPython:
    """The process that is forked; leaving the block ends it.

    Args:
        folder: where the executable is put; a short path, for sockets have a limit of about 100 bytes.

    Attributes:
        executable: to be called in place of Python.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        address = str(folder / "socket")
        self.executable = folder / "python"
        self.executable.write_text(_PROGRAM.format(python=sys.executable, address=address), encoding="utf-8")
        self.executable.chmod(0o755)
        command = [sys.executable, "-m", "tests.support.warm", address]
        self._process = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            raise RuntimeError("found that the process to be forked did not start; expected it to listen")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._process.communicate(timeout=30)


def main() -> None:
    """Imports, listens, and forks until standard input ends."""
    import matplotlib.figure  # noqa: F401
    import torch  # noqa: F401

    import evolve.api
    import evolve.cli
    import evolve.data.load
    import evolve.root
    import evolve.training.one_by_one
    import evolve.training.together  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(sys.argv[1])
        listening.listen()
        print("listening", flush=True)
        while True:
            ready, _, _ = select.select([listening, sys.stdin], [], [])
            if sys.stdin in ready:
                # Nothing to tidy up, and torch takes seconds to.
                os._exit(0)
            connection, _ = listening.accept()
            # Twice, so that nobody here has to wait for it: what is left of the first is the parent of the process that is asked for.
            if os.fork() == 0:
                if os.fork() == 0:
                    listening.close()
                    _serve(connection)
                os._exit(0)
            os.wait()
            connection.close()


def _serve(connection: socket.socket) -> None:
    """Starts what a connection asks for, kills it if the connection ends, and says how it ended; does not return."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    process = os.fork()
    if process == 0:
        connection.close()
        _become(request, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(f"{process}\n".encode())
    ended = os.pidfd_open(process)
    while ended not in select.select([ended, connection], [], [])[0]:
        os.kill(process, signal.SIGKILL)
        select.select([ended], [], [])
    _, status = os.waitpid(process, 0)
    try:
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    finally:
        os._exit(0)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Runs what was asked for in place of this process; does not return."""
    for target, source in enumerate(streams):
        os.dup2(source, target)
    for stream in streams:
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, encoding="utf-8", closefd=False) for number, mode in enumerate("rww")
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    kind, what, *arguments = request["arguments"]
    sys.executable = request["program"]
    sys.path[0] = request["folder"] if kind == "-m" else ""
    sys.argv = [kind, *arguments]
    status = 1
    try:
        if kind == "-m":
            sys.modules.pop(what, None)
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        else:
            status = ended.code or 0
    except KeyboardInterrupt:
        status = -signal.SIGINT
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        if status < 0:
            signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
        os._exit(status)


if __name__ == "__main__":
    main()
