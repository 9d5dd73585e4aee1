"""The commands of `munet-server` that talk to a server: asking it about images, and looking at it and telling it what to do."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from munet.words import counted
from server.classify_command import classify
from server.client import AdminClient, Client
from server.connection_options import Connection, asks_admin, asks_server
from server.errors import CallTimeoutError
from server.results import CanaryStatus, SegmentMemory, ServerStatus, TaskChanges
from server.top import top

TimeoutOption = Annotated[float, typer.Option("--timeout", help="Deadline of each call, in seconds.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to a command line."""
    app.command()(classify)
    app.command()(status)
    app.command("reload")(reload_)
    app.command()(rollback)
    app.command()(drain)
    app.command()(watch)
    app.command()(top)


@asks_admin
def status(
    connection: Connection,
    as_json: JsonOption = False,
    timeout: TimeoutOption = 30.0,
) -> None:
    """Shows what a server serves, how its last reload went and what its engine computed once."""
    with AdminClient(connection.address, credentials=connection.credentials) as client:
        answer = client.status(timeout_seconds=timeout)
    print(json.dumps(dataclasses.asdict(answer), indent=2, default=str) if as_json else _status_text(answer))


@asks_admin
def reload_(
    connection: Connection,
    timeout: TimeoutOption = 600.0,
) -> None:
    """Has a server serve its repository's current generation now, and says whether it did."""
    with AdminClient(connection.address, credentials=connection.credentials) as client:
        answer = client.reload(timeout_seconds=timeout)
    print(f"serving generation {answer.generation}" + ("" if answer.changed else ", as before"))


@asks_admin
def rollback(
    connection: Connection,
    to: Annotated[
        int | None, typer.Option(min=1, metavar="NUMBER", help="A generation that is kept.", show_default="the one before")
    ] = None,
    timeout: TimeoutOption = 600.0,
) -> None:
    """Has one server answer from a generation that is still kept, until CURRENT changes or `reload`.

    `munet-evolve rollback` changes CURRENT itself, and so every server of a repository.
    """
    with AdminClient(connection.address, credentials=connection.credentials) as client:
        answer = client.rollback(to or 0, timeout_seconds=timeout)
    before = f" instead of {answer.previous}" if answer.previous != answer.generation else ", as before"
    print(f"serving generation {answer.generation}{before}, until CURRENT changes or `munet-server reload`")


@asks_admin
def drain(
    connection: Connection,
    cancel: Annotated[bool, typer.Option("--cancel", help="Put it back into service instead.")] = False,
    timeout: TimeoutOption = 600.0,
) -> None:
    """Takes a server out of service and waits until nothing is in flight there; the process goes on."""
    with AdminClient(connection.address, credentials=connection.credentials) as client:
        try:
            drained = client.drain(cancel=cancel, timeout_seconds=timeout)
        except CallTimeoutError as error:
            num = client.status().num_in_flight
            print(
                f"munet-server: {counted(num, 'call')} still in flight after {timeout:g} s; it takes no new ones", file=sys.stderr
            )
            raise typer.Exit(2) from error
    if cancel:
        print("in service")
    elif drained:
        print("drained: nothing is in flight; `munet-server drain --cancel` puts it back into service")
    else:
        print("munet-server: somebody put the server back into service", file=sys.stderr)
        raise typer.Exit(2)


@asks_server
def watch(
    connection: Connection,
    as_json: JsonOption = False,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds to watch.", show_default="for ever")] = None,
) -> None:
    """Shows which tasks are served, and then, as it happens, what another generation changes."""
    with Client(connection.address, credentials=connection.credentials) as client:
        try:
            for changes in client.watch_tasks(timeout_seconds=timeout):
                print(json.dumps(dataclasses.asdict(changes)) if as_json else _changes_text(changes), flush=True)
        except CallTimeoutError:
            return


def _changes_text(changes: TaskChanges) -> str:
    names = [f"+{task.name}" for task in changes.added] + [f"~{task.name}" for task in changes.changed]
    names += [f"-{name}" for name in changes.removed]
    return " ".join([f"generation {changes.generation}:", *names, f"({changes.num_unchanged} unchanged)"])


def _canary_lines(canary: CanaryStatus | None) -> list[str]:
    if canary is None:
        return []
    if canary.refusal:
        return [f"canary: generation {canary.generation} refused: {canary.refusal}"]
    parts = "".join(f", {percent:g} % of {task}" for task, percent in sorted(canary.percent_of_task.items()))
    return [f"canary: generation {canary.generation}, {canary.percent:g} %{parts}; {counted(canary.num_requests, 'request')}"]


def _memory_line(memory: SegmentMemory) -> str:
    taken = f"memory: {memory.num_resident} of {counted(memory.num_segments, 'segment')}, {_mebibytes(memory.resident_bytes)}"
    if memory.limit_bytes is None:
        return taken
    failed = f" ({memory.failed_loads} more failed)" if memory.failed_loads else ""
    return (
        f"{taken} of {_mebibytes(memory.limit_bytes)}; {memory.loads} loaded for questions{failed}, "
        f"{memory.evictions} evicted for room"
    )


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _status_text(status_: ServerStatus) -> str:
    lines = [
        f"generation {status_.generation}, {counted(status_.num_tasks, 'task')}, up {status_.uptime_seconds:.0f} s, "
        f"{status_.engine}, version {status_.version}, {counted(status_.num_in_flight, 'call')} in flight"
    ]
    if status_.draining:
        lines.append("draining: health says NOT_SERVING, and new questions are refused")
    if status_.rolled_back_from is not None:
        lines.append(f"rolled back from generation {status_.rolled_back_from}, until CURRENT changes or `munet-server reload`")
    if status_.kept_generations:
        lines.append(f"kept generations: {' '.join(map(str, status_.kept_generations))}")
    lines += _canary_lines(status_.canary)
    last = status_.last_reload
    if last is not None:
        outcome = f"refused: {last.error}" if last.error else "served"
        lines.append(f"last reload: generation {last.generation} {outcome} ({last.finished:%Y-%m-%d %H:%M:%S} UTC)")
    for endpoint in status_.endpoints:
        held = f", generation {' and '.join(map(str, endpoint.generations))}" if endpoint.generations else ""
        wrong = f": {endpoint.reason}" if endpoint.reason else ""
        lines.append(f"Triton {endpoint.address} is {endpoint.state} since {endpoint.since:%Y-%m-%d %H:%M:%S} UTC{held}{wrong}")
    if status_.memory is not None:
        lines.append(_memory_line(status_.memory))
    lines.append(f"{'segment':<18}{'requested':>12}{'computed':>12}{'saved':>12}{'batches':>12}  tasks")
    lines += [
        f"{segment.name:<18}{segment.rows_requested:>12}{segment.rows_computed:>12}{segment.rows_saved:>12}"
        f"{segment.executions:>12}  {' '.join(segment.tasks[:6])}{' ...' if len(segment.tasks) > 6 else ''}"
        for segment in status_.segments
    ]
    return "\n".join(lines)
