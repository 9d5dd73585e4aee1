"""`munet-server classify`: asks a server about images, however many."""

from __future__ import annotations

import contextlib
import io
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, TextIO

import typer

from munet.words import counted
from server.answer_lines import Format, header, lines_of, words_of
from server.client import Client
from server.connection_options import Connection, asks_server
from server.errors import CallError, SettingsError
from server.image_files import STANDARD_INPUT, check_images, find_images
from server.results import FileAnswer


@asks_server
def classify(
    connection: Connection,
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            help="Files; folders, with all below them; patterns in quotes, such as 'photos/**/*.jpg'; - for a list.",
        ),
    ],
    task: Annotated[list[str] | None, typer.Option(help="Task to ask; repeat for several.", show_default="all")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many labels to print.")] = 3,
    format_: Annotated[
        Format, typer.Option("--format", help="Lines for people, JSON objects one a line, or CSV with a row for each label.")
    ] = Format.TEXT,
    output: Annotated[
        pathlib.Path | None,
        typer.Option(
            metavar="FILE", help="File to write to instead; line by line, over what it holds.", show_default="standard output"
        ),
    ] = None,
    in_flight: Annotated[int, typer.Option(min=1, max=1024, help="Requests that are under way at once.")] = 8,
    timeout: Annotated[float, typer.Option(help="Deadline of each request, in seconds, all attempts included.")] = 30.0,
) -> None:
    """Asks a server about images: one line for each image and task, with the most probable classes.

    An image that fails ends nothing: it is told of, and the exit status is 1. What concerns all images, such as a server that does
    not answer, ends the command at once with status 2. What was written stays, in whole lines.
    """
    check_images(images)
    counts = _Counts()
    with (
        _writing(output) as out,
        _telling(images, output) as tell,
        Client(connection.address, credentials=connection.credentials) as client,
    ):
        answers = client.classify_files(find_images(images), task or (), top_k=top, timeout_seconds=timeout, in_flight=in_flight)
        _write(out, header(format_))
        try:
            for answer in answers:
                _write(out, lines_of(format_, answer))
                counts.count(answer)
                tell(counts)
                if answer.error is not None and format_ is Format.TEXT:
                    print(f"munet-server: {answer.file}: {words_of(answer.error)}", file=sys.stderr)
        except CallError:
            if counts.num_images:
                print(f"munet-server: stopped after {counted(counts.num_images, 'image')}", file=sys.stderr)
            raise
    if counts.num_failed:
        print(f"munet-server: {counts.num_failed} of {counted(counts.num_images, 'image')} failed", file=sys.stderr)
        raise typer.Exit(1)


class _Counts:
    """How many images there were so far, and how many of them failed."""

    def __init__(self) -> None:
        self.num_images = 0
        self.num_failed = 0

    def count(self, answer: FileAnswer) -> None:
        self.num_images += 1
        self.num_failed += answer.error is not None


@contextlib.contextmanager
def _writing(output: pathlib.Path | None) -> Iterator[TextIO]:
    """Gives what answers are written to.

    Raises:
        SettingsError: it cannot be written to.
    """
    try:
        if output is not None:
            with output.open("w", encoding="utf-8", errors="surrogateescape") as file:
                yield file
            return
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Names of files may be any bytes.
            sys.stdout.reconfigure(errors="surrogateescape")
        yield sys.stdout
    except BrokenPipeError:
        # Whoever reads along has had enough; that is no fault.
        raise
    except OSError as error:
        where = "standard output" if output is None else str(output)
        raise SettingsError("--output", where, f"a file that can be written ({error.strerror or error})") from error


def _write(out: TextIO, lines: str) -> None:
    out.write(lines)
    out.flush()


@contextlib.contextmanager
def _telling(images: Sequence[str], output: pathlib.Path | None) -> Iterator[Callable[[_Counts], None]]:
    """Gives what is told how far it is, and shows it if standard error is a terminal that answers are not written to."""
    if not sys.stderr.isatty() or (output is None and sys.stdout.isatty()):
        yield lambda _: None
        return
    # Every other command would wait for it to be imported too.
    import rich.console
    import rich.progress

    total = None if STANDARD_INPUT in images else sum(1 for _ in find_images(images))
    columns = (
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("images{task.fields[failed]}"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
        row = bar.add_task("", total=total, failed="")

        def tell(counts: _Counts) -> None:
            failed = f", {counts.num_failed} failed" if counts.num_failed else ""
            bar.update(row, completed=counts.num_images, failed=failed)

        yield tell
