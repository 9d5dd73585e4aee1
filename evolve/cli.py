"""munet-evolve: the command line of the offline half. Reads arguments, shows what happens; evolve.api does it.

Exit status: 0 done; 1 `verify` found damage; 2 something a person can mend, said on standard error; 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Literal

import rich.console
import rich.table
import typer

from evolve import api
from evolve.config import Experiment, load_settings
from evolve.data.task import TaskData
from evolve.errors import DamagedError, EvolveError, SettingsError
from evolve.progress import ProgressObserver, loading, publishing
from evolve.search import SearchPlan
from evolve.store import System
from evolve.summary import SystemSummary, summarise

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Evolves classification tasks from one pretrained Vision Transformer: each task gets a path of layers that are reused "
    "frozen, cloned and trained, adapted or left out. What other tasks use never changes.",
)

SystemFolder = Annotated[pathlib.Path, typer.Option("--system", metavar="DIR", help="Folder of the system.")]
Repository = Annotated[pathlib.Path, typer.Option("--repository", metavar="DIR", help="Model repository to publish to.")]
PrecisionOption = Annotated[str, typer.Option(help="float32 or float16: of the weights and hidden states that are published.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(
    experiment: Annotated[
        pathlib.Path, typer.Argument(metavar="EXPERIMENT.toml", help="Settings: root, tasks, search, training.")
    ],
    system: SystemFolder,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME", help="Evolve only this task; may be repeated.")
    ] = None,
    repository: Annotated[
        pathlib.Path | None, typer.Option("--repository", metavar="DIR", help="Publish here after each closed task.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds to bring every task to; overrides the experiment.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the search; overrides the experiment.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda; overrides the experiment.")] = None,
    precision: PrecisionOption = "float32",
) -> None:
    """Evolve the tasks of an experiment.

    Brings every task (or those named) to the experiment's number of rounds, and makes the system if there is none.

    The same command goes on where an earlier one was stopped, and after a task was added; what is finished is not done again.
    """
    checked = _check_precision(precision)
    settings = _override(api.load_experiment(experiment), rounds=rounds, seed=seed, device=device)
    console = rich.console.Console()
    prepared = api.prepare(settings, system, tasks=task, loading=_Loading(console))
    observer = ProgressObserver(console)

    def publish(_task: str = "") -> None:
        if repository is not None:
            console.print(_export(prepared.system, repository, "cpu", checked, console), highlight=False, soft_wrap=True)

    plan = SearchPlan.of(settings)
    try:
        closed = api.run_tasks(
            prepared.system, prepared.data, plan, private=prepared.private, observer=observer, on_closed=publish
        )
    except KeyboardInterrupt:
        observer.stop()
        typer.echo("interrupted; nothing that was finished is lost: the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    finally:
        observer.stop()
    if not closed:
        rounds_had = _counted(settings.search.rounds, "round")
        console.print(f"nothing to do: every task has {rounds_had}; --rounds asks for more", highlight=False, soft_wrap=True)
        # A process that was killed may have closed a task without publishing it.
        publish()


@app.command()
def show(system: SystemFolder, as_json: AsJson = False) -> None:
    """Show tasks, quality, test accuracy, parameters and what is shared.

    quality: accuracy on the validation images, 0 to 1, which the search chose by. test: accuracy on images it never saw.

    parameters: of the task's whole path. own: of layers that neither the root nor another task uses.

    accounted: each layer's parameters divided by the number of tasks that use it.
    """
    summary = summarise(System.open(system))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(summary), indent=2))
    else:
        _print_summary(summary, rich.console.Console())


@app.command()
def verify(system: SystemFolder) -> None:
    """Hash every layer, path and task again and follow every reference."""
    try:
        opened = System.open(system)
        findings = opened.verify()
    except DamagedError as error:
        # Not even its root can be read: that is a finding like any other.
        findings = [str(error)]
    for finding in findings:
        typer.echo(finding, err=True)
    if findings:
        typer.echo(f"{len(findings)} things are wrong in {system}", err=True)
        raise typer.Exit(1)
    typer.echo(f"{system}: {_counted(len(opened.tasks()), 'task')}, every layer and path is as it was written")


@app.command()
def remove(
    system: SystemFolder,
    task: Annotated[str, typer.Option("--task", metavar="NAME", help="Task to remove.")],
) -> None:
    """Remove a task. Layers that others use stay; `munet-evolve export` takes it out of the model repository."""
    api.remove_task(System.open(system), task)
    typer.echo(f"removed {task}; run `munet-evolve export` to take it out of the model repository")


@app.command()
def pretrain(
    recipe: Annotated[pathlib.Path, typer.Argument(metavar="RECIPE.toml", help="Settings of the pretraining.")],
    out: Annotated[pathlib.Path, typer.Option("--out", metavar="FILE", help="Where to write the root (.safetensors).")],
) -> None:
    """Pretrain a small root on rendered characters."""
    # Torch is imported only where it is needed: the other commands start in a fraction of the time.
    from evolve.training.pretraining import PretrainingSettings, run_recipe

    run_recipe(load_settings(recipe, PretrainingSettings), out, lambda line: typer.echo(line))


@app.command()
def export(
    system: SystemFolder,
    repository: Repository = pathlib.Path("model_repository"),
    target: Annotated[str, typer.Option(help="cpu or gpu: where Triton is to run the segments.")] = "cpu",
    precision: PrecisionOption = "float32",
) -> None:
    """Publish every task's current path to a model repository, as a new generation."""
    if target not in ("cpu", "gpu"):
        raise SettingsError(f"found target {target!r}", "cpu or gpu")
    checked = _check_precision(precision)
    console = rich.console.Console()
    typer.echo(_export(System.open(system), repository, "gpu" if target == "gpu" else "cpu", checked, console))


def main() -> None:
    """Runs the command line; what a person can mend is printed, without a traceback, with exit status 2."""
    # Read when torch loads: threads that wait in a busy loop slow a search several times over beside another busy process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except EvolveError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def _override(settings: Experiment, *, rounds: int | None, seed: int | None, device: str | None) -> Experiment:
    values = settings.model_dump()
    if rounds is not None:
        values["search"]["rounds"] = rounds
    if seed is not None:
        values["seed"] = seed
    if device is not None:
        if device not in ("auto", "cpu", "cuda"):
            raise SettingsError(f"found device {device!r}", "auto, cpu or cuda")
        values["training"]["device"] = device
    return Experiment.model_validate(values)


class _Loading:
    """Shows how the loading of data goes, and what was loaded; see evolve.api.LoadingObserver."""

    def __init__(self, console: rich.console.Console) -> None:
        self._console = console

    def loading(self, task: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return loading(self._console, task)

    def loaded(self, data: TaskData, seconds: float) -> None:
        from evolve.data.load import doubts_about_quality

        counts = f"{len(data.train)} / {len(data.validation)} / {len(data.test) if data.test is not None else 0}"
        self._console.print(
            f"{data.name}: {len(data.labels)} classes, {counts} images to train, validate, test ({seconds:.1f} s)",
            highlight=False,
            soft_wrap=True,
        )
        for warning in (*data.warnings, *doubts_about_quality(data)):
            typer.echo(f"warning: {data.name}: {warning}", err=True)


def _check_precision(precision: str) -> Literal["float32", "float16"]:
    if precision == "float32":
        return "float32"
    if precision == "float16":
        return "float16"
    raise SettingsError(f"found precision {precision!r}", "float32 or float16")


def _export(
    system: System,
    repository: pathlib.Path,
    target: Literal["cpu", "gpu"],
    precision: Literal["float32", "float16"],
    console: rich.console.Console,
) -> str:
    """Publishes, telling what is under way, and returns what was done in words."""
    with publishing(console, repository) as tell:
        result = api.publish(system, repository, target=target, precision=precision, progress=tell)
    if not result.changed:
        return f"{repository}: generation {result.generation} is up to date"
    return (
        f"{repository}: published generation {result.generation}, {_counted(len(result.new_segments), 'new segment')}, "
        f"{len(result.reused_segments)} as before, {result.seconds:.1f} s"
    )


def _print_summary(summary: SystemSummary, console: rich.console.Console) -> None:
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
        parts = [task.make_up(summary.root_blocks), f"{_counted(task.outcomes.trained, 'child', 'children')} trained"]
        parts.extend(task.outcomes.remarks)
        console.print(f"{task.name}: {'; '.join(parts)}", highlight=False, markup=False, soft_wrap=True)
    line = f"{_counted(summary.num_layers, 'distinct layer')} with {summary.num_parameters:,} parameters"
    if len(summary.tasks) > 1:
        line += f"; {len(summary.tasks)} separate models would have {summary.separate_parameters:,}"
    console.print(line, highlight=False, soft_wrap=True)


def _counted(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


if __name__ == "__main__":
    main()
