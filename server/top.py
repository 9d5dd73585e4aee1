"""`munet-server top`: what a server does now, task by task and segment by segment."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator
from typing import Annotated

import rich.console
import rich.live
import rich.table
import rich.text
import typer

from munet.words import counted
from server.client import AdminClient
from server.connection_options import Connection, asks_admin
from server.rates import Rates, rates_between
from server.results import ServerStatus


@asks_admin
def top(
    connection: Connection,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks; rates are over so long.")] = 2.0,
    rows: Annotated[int, typer.Option(min=1, help="How many tasks and how many segments to show.")] = 20,
    once: Annotated[bool, typer.Option("--once", help="Look for one interval, print that and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each interval, with everything.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", help="Deadline of each call, in seconds.")] = 30.0,
) -> None:
    """Shows live what a server is asked and computes: rates and latencies of tasks, batches and sharing of segments. Ctrl-C ends it."""
    console = rich.console.Console()
    with AdminClient(connection.address, credentials=connection.credentials) as client:
        looks = itertools.islice(_looks(client, interval, timeout), 1 if once else None)
        with contextlib.suppress(KeyboardInterrupt):
            if as_json:
                for rates in looks:
                    print(json.dumps(dataclasses.asdict(rates)), flush=True)
            elif once or not console.is_terminal:
                for rates in looks:
                    console.print(view(rates, rows))
            else:
                _show(console, looks, client.server, rows)


def _looks(client: AdminClient, interval_seconds: float, timeout_seconds: float) -> Iterator[Rates]:
    """Yields what the server did in each interval, for ever.

    Raises:
        CallError: it does not answer.
    """
    earlier: ServerStatus = client.status(details=True, timeout_seconds=timeout_seconds)
    while True:
        time.sleep(interval_seconds)
        later = client.status(details=True, timeout_seconds=timeout_seconds)
        yield rates_between(earlier, later)
        earlier = later


def _show(console: rich.console.Console, looks: Iterator[Rates], server: str, rows: int) -> None:
    waiting = rich.text.Text(f"looking at {server} ...")
    with rich.live.Live(waiting, console=console, screen=True, auto_refresh=False) as live:
        live.refresh()
        for rates in looks:
            live.update(view(rates, rows), refresh=True)


def view(rates: Rates, rows: int) -> rich.console.Group:
    """Returns what is shown of a server.

    Args:
        rates: what it did.
        rows: tasks and segments to show at most.
    """
    head = rich.text.Text(
        f"generation {rates.generation}, {counted(rates.num_tasks, 'task')}, {rates.engine}, up {rates.uptime_seconds:.0f} s; "
        f"{rates.requests_per_second:.1f} requests/s over {rates.seconds:.1f} s"
    )
    parts: list[rich.console.RenderableType] = [head]
    if rates.refused:
        parts.append(rich.text.Text(f"last reload refused: {rates.refused}", style="red"))
    tasks = _table("task", "requests/s", "images/s", "failed/s", "p50 ms", "p99 ms", "queue p50", "compute p50")
    for task in rates.tasks[:rows]:
        tasks.add_row(
            task.name,
            _number(task.requests_per_second),
            _number(task.images_per_second),
            _number(task.failures_per_second),
            _milliseconds(task.latency_p50_seconds),
            _milliseconds(task.latency_p99_seconds),
            _milliseconds(task.queue_p50_seconds),
            _milliseconds(task.compute_p50_seconds),
        )
    segments = _table(
        "segment",
        "tasks",
        "rows/s",
        "saved",
        "batches/s",
        "rows/batch",
        "requests/batch",
        "tasks/batch",
        "queue p99",
        "compute p50",
        "busy",
    )
    for segment in rates.segments[:rows]:
        segments.add_row(
            segment.name,
            str(segment.num_tasks),
            _number(segment.rows_per_second),
            "" if segment.saved_share is None else f"{segment.saved_share:.0%}",
            _number(segment.batches_per_second),
            _number(segment.batch_rows),
            _number(segment.batch_requests),
            _number(segment.batch_tasks),
            _milliseconds(segment.queue_p99_seconds),
            _milliseconds(segment.compute_p50_seconds),
            "" if segment.busy is None else f"{segment.busy:.2f}",
        )
    parts += [tasks, _rest(len(rates.tasks) - rows, "task"), segments, _rest(len(rates.segments) - rows, "segment")]
    return rich.console.Group(*parts)


def _table(first: str, *others: str) -> rich.table.Table:
    table = rich.table.Table(box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _rest(number: int, noun: str) -> rich.text.Text:
    return rich.text.Text(f"and {counted(number, noun)} more\n" if number > 0 else "", style="dim")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.1f}"
