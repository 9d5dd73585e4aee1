"""The commands of `munet-evolve` that say what a model repository's servers answer from."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from evolve.errors import SettingsError

if TYPE_CHECKING:
    from evolve.export.releases import Release

RepositoryOption = Annotated[pathlib.Path, typer.Option("--repository", metavar="DIR", help="The model repository.")]


def add_to(app: typer.Typer) -> None:
    """Adds the commands to a command line."""
    app.command()(rollback)
    app.command()(canary)


def rollback(
    repository: RepositoryOption = pathlib.Path("model_repository"),
    to: Annotated[
        int | None, typer.Option(min=1, metavar="NUMBER", help="A generation that is kept.", show_default="the one before")
    ] = None,
) -> None:
    """Have all servers of a model repository answer from a generation that is still kept, also those that start later.

    What the system holds stays as it is: the next export publishes it again.
    """
    from evolve.export.releases import roll_back

    typer.echo(_release_words(roll_back(repository, to, typer.echo)))


def canary(
    repository: RepositoryOption = pathlib.Path("model_repository"),
    generation: Annotated[
        int | None, typer.Option(min=1, metavar="NUMBER", help="Which, newer than CURRENT.", show_default="the canary that is")
    ] = None,
    percent: Annotated[
        float | None, typer.Option(help="So many of a hundred requests about a task go to it.", show_default="as it is")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PERCENT", help="Another part, for one task; repeat for several.")
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Make it the current generation.")] = False,
    end: Annotated[bool, typer.Option("--end", help="Have servers try nothing any more.")] = False,
) -> None:
    """Show, change, promote or end what servers of a model repository try beside the current generation."""
    from evolve.export import releases

    changes = generation is not None or percent is not None or bool(task)
    if changes + promote + end > 1:
        raise SettingsError("found several of --promote, --end and a change", "one of them at a time")
    if promote:
        release = releases.promote(repository, typer.echo)
    elif end:
        release = releases.end_canary(repository, typer.echo)
    elif changes:
        parts = _percent_of_task(task or ())
        release = releases.set_canary(repository, number=generation, percent=percent, percent_of_task=parts, progress=typer.echo)
    else:
        release = releases.read_release(repository, typer.echo)
    typer.echo(_release_words(release))


def _percent_of_task(parts: Sequence[str]) -> dict[str, float]:
    percents = {}
    for part in parts:
        name, _, percent = part.partition("=")
        try:
            percents[name] = float(percent)
        except ValueError as error:
            raise SettingsError(f"found --task {part!r}", "NAME=PERCENT such as pets=50") from error
    return percents


def _release_words(release: Release) -> str:
    kept = f"kept: {', '.join(map(str, release.kept))}"
    if release.canary is None:
        return f"servers answer from generation {release.current}; {kept}"
    parts = "".join(f", {percent:g} % of {task}" for task, percent in sorted(release.percent_of_task.items()))
    return f"servers answer from generation {release.current}, canary {release.canary} with {release.percent:g} %{parts}; {kept}"
