"""munet-evolve: the command line of the offline half. Builds and wires; everything else lives elsewhere.

Exit status: 0 done; 1 `verify` found damage; 2 something a person can mend, said on standard error; 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import rich.console
import rich.table
import typer

from evolve.closing import ActiveTask
from evolve.config import Experiment, RootSettings, TaskSettings, load_settings
from evolve.errors import DamagedError, EvolveError, SettingsError, SystemFolderError
from evolve.generation import Trainer
from evolve.layer import PATCH_EMBED
from evolve.observers import Observers
from evolve.progress import ProgressObserver, loading, publishing
from evolve.search import SearchPlan, check_image_size, run_rounds
from evolve.store import System
from evolve.summary import SystemSummary, summarise
from evolve.watch import Watcher, follow, view
from munet.names import similar_names

if TYPE_CHECKING:
    from evolve.tensorboard import TensorBoardObserver

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
    tensorboard: Annotated[
        pathlib.Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write scalars for TensorBoard here.")
    ] = None,
) -> None:
    """Evolve the tasks of an experiment.

    Brings every task (or those named) to the experiment's number of rounds, and makes the system if there is none.

    The same command goes on where an earlier one was stopped, and after a task was added; what is finished is not done again.
    """
    checked = _check_precision(precision)
    settings = _override(load_settings(experiment, Experiment), rounds=rounds, seed=seed, device=device)
    chosen = _choose_tasks(settings, task)
    console = rich.console.Console()
    scalars = [] if tensorboard is None else [_write_scalars(tensorboard)]
    opened, active = _prepare(settings, chosen, system, console)
    plan = SearchPlan(settings.seed, settings.defaults, settings.search, settings.training)
    observer = ProgressObserver(console)

    closed = []

    def publish() -> None:
        if repository is not None:
            console.print(_export(opened, repository, "cpu", checked, console), highlight=False, soft_wrap=True)

    def finish(name: str) -> None:
        closed.append(name)
        publish()

    try:
        run_rounds(opened, active, plan, Observers([observer, *scalars]), finish)
    except KeyboardInterrupt:
        observer.stop()
        typer.echo("interrupted; nothing that was finished is lost: the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    finally:
        observer.stop()
        for writer in scalars:
            writer.stop()
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
def report(
    system: SystemFolder,
    out: Annotated[pathlib.Path, typer.Option("--out", metavar="DIR", help="Folder to write to; made if missing.")],
) -> None:
    """Write a page with figures: leaderboard, baselines, the multitask model, families, hyperparameters, cost.

    report.html needs nothing else; figures/ holds its figures as SVG and PNG, tables/ and report.json every number.
    """
    # It draws, and what draws takes time to load.
    from evolve.report.write import PAGE, write_report

    content = write_report(System.open(system), out)
    for finding in content.findings:
        typer.echo(f"warning: {finding}", err=True)
    tasks, searches = _counted(len(content.summary.tasks), "task"), len(content.searches)
    typer.echo(f"{out / PAGE}: {tasks}, {searches} search{'' if searches == 1 else 'es'}")


@app.command()
def watch(
    system: SystemFolder,
    once: Annotated[bool, typer.Option("--once", help="Print what there is to see now, and end.")] = False,
) -> None:
    """Watch a running search from another terminal; Ctrl-C ends the watch, not the search.

    Where there is no terminal, it prints what there is now, then a line for each child that finishes.
    """
    watcher = Watcher(system)
    console = rich.console.Console()
    if once:
        watcher.poll()
        console.print(view(watcher, time.time()))
        return
    try:
        follow(watcher, console)
    except KeyboardInterrupt:
        # That is how a watch ends.
        return


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
    opened = System.open(system)
    opened.check_known(task)
    with opened.evolving(task), opened.publishing():
        opened.remove_task(task)
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


def _choose_tasks(settings: Experiment, names: list[str] | None) -> tuple[TaskSettings, ...]:
    known = [task.name for task in settings.tasks]
    for name in names or ():
        if name not in known:
            similar = similar_names(name, known)
            raise SettingsError(
                f"found no task {name!r} in the experiment",
                f"one of {known}",
                f"did you mean {' or '.join(map(repr, similar))}?" if similar else "",
            )
    return tuple(task for task in settings.tasks if not names or task.name in names)


def _prepare(
    settings: Experiment, chosen: tuple[TaskSettings, ...], folder: pathlib.Path, console: rich.console.Console
) -> tuple[System, list[tuple[ActiveTask, Callable[[], Trainer]]]]:
    """Loads data and root before anything is written, and returns the system with the tasks that have rounds to do."""
    from evolve.data.load import doubts_about_quality, load_task
    from evolve.training.device import resolve_device

    resolve_device(settings.training)
    system = _open_system(settings.root, folder)
    # First, as it is quick and data may take hours.
    root = _load_root(settings) if system is None else None
    if system is not None:
        check_image_size(system.root.layer(PATCH_EMBED).spec.integer("patch_size"), settings.defaults.image_size)
    records = system.tasks() if system is not None else {}
    pending = [task for task in chosen if task.name not in records or records[task.name].rounds < settings.search.rounds]
    datasets = []
    for task in pending:
        started = time.monotonic()
        with loading(console, task.name) as progress:
            data = load_task(task, progress)
        datasets.append((ActiveTask(task.name, data.labels, len(data.train), data.fingerprint, task.private), data))
        counts = f"{len(data.train)} / {len(data.validation)} / {len(data.test) if data.test is not None else 0}"
        console.print(
            f"{task.name}: {len(data.labels)} classes, {counts} images to train, validate, test ({time.monotonic() - started:.1f} s)",
            highlight=False,
            soft_wrap=True,
        )
        for warning in (*data.warnings, *doubts_about_quality(data)):
            typer.echo(f"warning: {task.name}: {warning}", err=True)
    opened = system or _create_system(settings.root, root, folder)

    def trainer_of(data: Any) -> Callable[[], Trainer]:
        from evolve.training.one_by_one import OneByOneTrainer

        return lambda: OneByOneTrainer(data, opened.tensors, settings.training)

    return opened, [(task, trainer_of(data)) for task, data in datasets]


def _open_system(root: RootSettings, folder: pathlib.Path) -> System | None:
    """Opens the system if there is one, and checks that it has the root that the experiment asks for."""
    if not System.exists(folder):
        return None
    system = System.open(folder)
    source = _describe_root(root)
    if system.root_source and dict(system.root_source) != source:
        raise SettingsError(
            f"found a system in {folder} with root {dict(system.root_source)}",
            f"the experiment's root {source}",
            "use the same root, or another folder: a system keeps its root for life",
        )
    return system


def _load_root(settings: Experiment) -> Any:
    from evolve.root import load_root

    root = load_root(settings.root)
    patch_embed, _ = root.layers[PATCH_EMBED]
    check_image_size(patch_embed.integer("patch_size"), settings.defaults.image_size)
    return root


def _create_system(settings: RootSettings, root: Any, folder: pathlib.Path) -> System:
    try:
        return System.create(folder, root.layers, root.image_size, _describe_root(settings))
    except SystemFolderError:
        # Another process may have made one while this one loaded its data.
        made = _open_system(settings, folder)
        if made is None:
            raise
        return made


def _describe_root(root: RootSettings) -> dict[str, Any]:
    description = root.model_dump(mode="json", exclude={"file"})
    if root.file is not None:
        try:
            description["sha256"] = hashlib.sha256(root.file.read_bytes()).hexdigest()
        except OSError as error:
            raise SettingsError(f"could not read root.file {root.file} ({error.strerror})", "a checkpoint") from error
    return description


def _write_scalars(folder: pathlib.Path) -> TensorBoardObserver:
    try:
        from evolve.tensorboard import TensorBoardObserver
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "tensorboardX":
            raise
        raise SettingsError(
            "found no module 'tensorboardX' for --tensorboard", "the packages of 'tensorboard'", "pip install '.[tensorboard]'"
        ) from None
    return TensorBoardObserver(folder)


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
    from evolve.export.publish import export_system

    with publishing(console, repository) as tell:
        result = export_system(system, repository, target=target, precision=precision, progress=tell)
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
        console.print(f"{task.name}: {task.make_up(summary.root_blocks)}", highlight=False, markup=False, soft_wrap=True)
    line = f"{_counted(summary.num_layers, 'distinct layer')} with {summary.num_parameters:,} parameters"
    if len(summary.tasks) > 1:
        line += f"; {len(summary.tasks)} separate models would have {summary.separate_parameters:,}"
    console.print(line, highlight=False, soft_wrap=True)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


if __name__ == "__main__":
    main()
