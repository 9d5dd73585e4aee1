"""munet-evolve in real processes that start at once: forked from one that has imported everything, the ONNX exporter warmed up."""

from __future__ import annotations

import os
import pathlib
import resource
import signal
import sys
import tempfile

from tests.support.forking import Forker, fork_on_request
from tests.support.permissions import without_override


class Command:
    """A process that runs munet-evolve.

    Attributes:
        id: of the process.
    """

    def __init__(self, commands: Commands, process_id: int, output: pathlib.Path) -> None:
        self._commands = commands
        self._output = output
        self.id = process_id

    def kill(self) -> None:
        """Ends it by SIGKILL; a process that has ended already is none the worse for it."""
        self.send(signal.SIGKILL)

    def pause(self) -> None:
        """Stops it until `go_on`."""
        self.send(signal.SIGSTOP)

    def go_on(self) -> None:
        """Ends a pause."""
        self.send(signal.SIGCONT)

    def send(self, number: int) -> None:
        """Sends it a signal; to be called before `wait`."""
        os.kill(self.id, number)

    @property
    def ended(self) -> bool:
        """Whether it has ended; `wait` says how."""
        state = pathlib.Path(f"/proc/{self.id}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        return state == "Z"

    def wait(self) -> int:
        """Returns its exit status, -9 after a kill."""
        return self._commands.wait(self.id)

    @property
    def output(self) -> str:
        """What it has said so far, standard error included."""
        return self._output.read_text(encoding="utf-8")


class Commands(Forker):
    """Starts processes of munet-evolve; leaving the block kills those that nobody waited for."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Keeps what the processes say in files of an existing folder."""
        super().__init__("tests.support.commands")
        self._folder = folder
        self._count = 0

    def start(self, *arguments: str | pathlib.Path, max_file_bytes: int = -1) -> Command:
        """Starts a process and returns at once.

        Permissions hold for it also where they do not for root. Where no file may be larger than so many bytes, a write that goes
        beyond is cut short and fails, as on a full disk.
        """
        self._count += 1
        output = self._folder / f"output-{self._count}.txt"
        request = {"arguments": [*map(str, arguments)], "output": str(output), "max_file_bytes": max_file_bytes}
        return Command(self, self.fork(request), output)

    def run(self, *arguments: str | pathlib.Path, max_file_bytes: int = -1) -> tuple[int, str]:
        """Runs a process to its end and returns its exit status and what it said."""
        command = self.start(*arguments, max_file_bytes=max_file_bytes)
        return command.wait(), command.output


def main() -> None:
    # All that a run would import on its way.
    import torch

    import evolve.cli
    import evolve.data.load
    import evolve.root
    import evolve.training.one_by_one  # noqa: F401
    from evolve.export.onnx import export_segment
    from evolve.export.segments import segment_of, units_of
    from evolve.export.settings import ExportSettings
    from tests.support.system import TaskSketch, build_system

    torch.set_num_threads(1)
    # Graphs are exported once for each architecture: those of small systems of three classes.
    with tempfile.TemporaryDirectory() as folder:
        system = build_system(pathlib.Path(folder) / "system", {"warm": TaskSketch(classes=3, adapters=(1,))})
        for unit in units_of(system.path(system.tasks()["warm"].path_id)):
            export_segment(segment_of([unit], ExportSettings()), system.tensors, ExportSettings())

    fork_on_request(lambda request: _become(**request))


def _become(arguments: list[str], output: str, max_file_bytes: int) -> None:
    """Runs the command in place of this process; does not return."""
    import evolve.cli

    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, descriptor), (2, descriptor)):
        os.dup2(source, target)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    # Whoever runs the tests in the background may have told them to ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["munet-evolve", *arguments]
    status = 70
    try:
        with without_override():
            evolve.cli.main()
        status = 0
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
