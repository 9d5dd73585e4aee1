"""What commands print of data, of a system and of its garbage, as tables and sentences."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import rich.console
import rich.table
import typer

from evolve.collecting import Collection, Kind
from evolve.data.task import TaskData
from evolve.progress import loading
from evolve.summary import SystemSummary
from munet.words import counted


class LoadingProgress:
    """Shows how the loading of data goes, and what was loaded; see evolve.api.LoadingObserver."""

    def __init__(self, console: rich.console.Console) -> None:
        """Shows it on a console, warnings on standard error."""
        self._console = console

    def loading(self, task: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """See `loading`."""
        return loading(self._console, task)

    def loaded(self, data: TaskData, seconds: float) -> None:
        """Prints how many images there are, and what is odd about them."""
        from evolve.data.load import doubts_about_quality

        counts = f"{len(data.train)} / {len(data.validation)} / {len(data.test) if data.test is not None else 0}"
        self._console.print(
            f"{data.name}: {len(data.labels)} classes, {counts} images to train, validate, test ({seconds:.1f} s)",
            highlight=False,
            soft_wrap=True,
        )
        for warning in (*data.warnings, *doubts_about_quality(data)):
            typer.echo(f"warning: {data.name}: {warning}", err=True)


def print_summary(summary: SystemSummary, console: rich.console.Console) -> None:
    """Prints the tasks of a system, what each is made of, and what they share."""
    table = rich.table.Table(box=None, pad_edge=False, header_style="bold")
    for title in ("task", "classes", "quality", "test", "parameters", "own", "accounted"):
        table.add_column(title, justify="left" if title == "task" else "right")
    for task in summary.tasks:
        table.add_row(
            task.name + (" (private)" if task.private else ""),
            str(task.num_classes),
            f"{task.quality:.4f}",
            "-" if task.test_accuracy is None else f"{task.test_accuracy:.4f}",
            f"{task.num_parameters:,}",
            f"{task.own_parameters:,}",
            f"{task.accounted_parameters:,.0f}",
        )
    console.print(table)
    for task in summary.tasks:
        parts = [task.make_up(summary.root_blocks)]
        if task.outcomes is not None:
            parts += [f"{counted(task.outcomes.trained, 'child', 'children')} trained", *task.outcomes.remarks]
        console.print(f"{task.name}: {'; '.join(parts)}", highlight=False, markup=False, soft_wrap=True)
    line = f"{counted(summary.num_layers, 'distinct layer')} with {summary.num_parameters:,} parameters"
    if len(summary.tasks) > 1:
        line += f"; {len(summary.tasks)} separate models would have {summary.separate_parameters:,}"
    console.print(line, highlight=False, soft_wrap=True)


def print_collection(collection: Collection) -> None:
    """Prints what was, or would be, removed and compressed."""
    for kind in Kind:
        found = [one.num_bytes for one in collection.garbage if one.kind is kind]
        if found:
            typer.echo(f"{counted(len(found), kind)}: {sum(found):,} bytes")
    if collection.journals:
        before, after = (sum(getattr(one, which) for one in collection.journals) for which in ("before", "after"))
        what = "compressed" if collection.deleted else "to compress"
        typer.echo(f"{counted(len(collection.journals), 'journal')} {what}: {before:,} bytes to {after:,}")
    if collection.unfinished:
        typer.echo(f"kept for searches that are not finished: what {', '.join(collection.unfinished)} names")
    if collection.deleted:
        typer.echo(f"freed {collection.num_bytes:,} bytes")
    else:
        typer.echo(f"would free {collection.num_bytes:,} bytes; --delete does it")
