"""munet-evolve: the command line of the offline half. Reads arguments, shows what happens; evolve.api does it.

Exit status: 0 done; 1 `verify` found damage; 2 something a person can mend, said on standard error; 130 ended by SIGINT (Ctrl-C), 143 by
SIGTERM; a watch that Ctrl-C ends is done. A second such signal ends it at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_args

import rich.console
import rich.table
import typer

from evolve import api
from evolve.baseline import BaselinePlan, Method, is_finished
from evolve.collecting import collect
from evolve.config import Experiment, load_settings
from evolve.errors import DamagedError, DeviceFailedError, EvolveError, SettingsError, SystemFolderError
from evolve.export.coarsening import ENGINE_COSTS, Coarseness
from evolve.export.settings import Precision, Target
from evolve.interruption import Interrupted, interruptible
from evolve.lineage import lineage_hash
from evolve.observers import Observers
from evolve.printing import LoadingProgress, print_collection, print_summary
from evolve.progress import BaselineProgressObserver, ProgressObserver, publishing
from evolve.release_commands import add_to as add_release_commands
from evolve.search import SearchPlan
from evolve.store import System
from evolve.summary import summarise
from evolve.verification import verify as verify_system
from evolve.watch import Watcher, follow, view
from munet.command_line import add_version
from munet.words import counted

if TYPE_CHECKING:
    from evolve.tensorboard import TensorBoardObserver
    from munet.signatures import PrivateKey

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

add_version(
    app,
    "Evolves classification tasks from one pretrained Vision Transformer: each task gets a path of layers that are reused "
    "frozen, cloned and trained, adapted or left out. What other tasks use never changes.",
)
add_release_commands(app)

key_app = typer.Typer(help="Makes keys that sign generations.", no_args_is_help=True)
app.add_typer(key_app, name="key")

SystemLocation = Annotated[
    str,
    typer.Option("--system", metavar="DIR", help="Folder of the system, or URL of a store it is in, such as s3://bucket/folder."),
]
Repository = Annotated[pathlib.Path, typer.Option("--repository", metavar="DIR", help="Model repository to publish to.")]
PrecisionOption = Annotated[str, typer.Option(help="float32 or float16: of the weights and hidden states that are published.")]
SegmentsOption = Annotated[
    str,
    typer.Option(
        help="shared, embedded or triton: segments as long as sharing allows, or coarser ones, where handing an image on costs this "
        "engine more than sharing saves."
    ),
]
TasksPerImageOption = Annotated[
    int, typer.Option(min=1, help="With coarse segments: how many tasks a request asks about one image, usually.")
]
MemoryFactorOption = Annotated[
    float, typer.Option(min=1, help="With coarse segments: most memory of all pieces, times that of the shared segments.")
]
SignOption = Annotated[
    pathlib.Path | None,
    typer.Option("--sign", metavar="KEYFILE", help="Sign what is published with this ed25519 key (PEM).", show_default="none"),
]
ExperimentFile = Annotated[
    pathlib.Path, typer.Argument(metavar="EXPERIMENT.toml", help="Settings: root, tasks, search, training.")
]
DeviceOption = Annotated[str | None, typer.Option(help="auto, cpu or cuda; overrides the experiment.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=1, max=256, help="Processes that train side by side; overrides the experiment.", show_default=False),
]
ExecutorOption = Annotated[
    str | None, typer.Option(help="processes or ray: where they run, here or on a Ray cluster; overrides the experiment.")
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        help="host:port of the Ray cluster's head, auto for the one this machine is part of (default), or local: one made here."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(
    experiment: ExperimentFile,
    system: SystemLocation,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME", help="Evolve only this task; may be repeated.")
    ] = None,
    repository: Annotated[
        pathlib.Path | None, typer.Option("--repository", metavar="DIR", help="Publish here after each closed task.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds to bring every task to; overrides the experiment.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the search; overrides the experiment.")] = None,
    device: DeviceOption = None,
    workers: WorkersOption = None,
    executor: ExecutorOption = None,
    address: AddressOption = None,
    precision: PrecisionOption = "float32",
    segments: SegmentsOption = "shared",
    tasks_per_image: TasksPerImageOption = 1,
    memory_factor: MemoryFactorOption = 2.0,
    sign: SignOption = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start unfinished rounds over; their journals are kept in journal/removed.")
    ] = False,
    recover: Annotated[
        bool, typer.Option("--recover", help="Go on from what is whole of a journal that was altered; a copy is kept.")
    ] = False,
    tensorboard: Annotated[
        pathlib.Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write scalars for TensorBoard here.")
    ] = None,
) -> None:
    """Evolve the tasks of an experiment.

    Brings every task (or those named) to the experiment's number of rounds, and makes the system if there is none.

    The same command goes on where an earlier one was stopped, and after a task was added; what is finished is not done again.
    """
    form = _Form.of("cpu", precision, segments, tasks_per_image, memory_factor)
    if restart and recover:
        raise SettingsError("found --restart and --recover", "one of them")
    if sign is not None and repository is None:
        raise SettingsError("found --sign without --repository", "a repository to publish to")
    signing_key = _signing_key(sign)
    training = {"device": device, "workers": workers, "executor": executor, "address": address}
    settings = _override(api.load_experiment(experiment), rounds=rounds, seed=seed, training=training)
    plan = SearchPlan.of(settings)
    console = rich.console.Console()
    scalars = [] if tensorboard is None else [_write_scalars(tensorboard)]
    observer = ProgressObserver(console)

    def publish(_task: str = "") -> None:
        if repository is not None:
            console.print(_export(prepared.system, repository, form, console, signing_key), highlight=False, soft_wrap=True)

    def tell_aside(name: str, file: pathlib.Path) -> None:
        does = "starts over" if restart else "goes on from what is whole"
        _teller(console)(f"{name}: {does}; the journal it had is {file}")

    with _saying_how_to_go_on(observer, *scalars) as done_once:
        prepared = api.prepare_search(
            settings,
            system,
            tasks=task,
            unfinished="restart" if restart else "recover" if recover else "continue",
            loading=LoadingProgress(console),
            set_aside=tell_aside,
        )
        # With it, what is done from here on would be done over.
        done_once.append("--restart")
        closed = api.run_tasks(
            prepared.system,
            prepared.data,
            plan,
            private=prepared.private,
            make_trainer=api.default_trainer(plan.training, _teller(console)),
            observer=Observers([observer, *scalars]),
            on_closed=publish,
        )
    if not closed:
        rounds_had = counted(settings.search.rounds, "round")
        console.print(f"nothing to do: every task has {rounds_had}; --rounds asks for more", highlight=False, soft_wrap=True)
        # A process that was killed may have closed a task without publishing it.
        publish()


@app.command()
def baseline(
    experiment: ExperimentFile,
    system: SystemLocation,
    method: Annotated[str, typer.Option(metavar="METHOD", help="finetune, freeze:K or adapters:D.")],
    task: Annotated[list[str] | None, typer.Option("--task", metavar="NAME", help="Only this task; may be repeated.")] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Draw learning rate, warm-up and augmentation of each replica at random.")
    ] = False,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Replicas that share the steps of the search; a generation's children by default.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of the search; overrides the experiment.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed; overrides the experiment.")] = None,
    device: DeviceOption = None,
    workers: WorkersOption = None,
    executor: ExecutorOption = None,
    address: AddressOption = None,
) -> None:
    """Train the root on each task without a search, in as many steps: what a search is compared with.

    finetune trains every layer; freeze:K freezes the patch embedding and the first K blocks; adapters:D trains adapters of width D, the
    final norm and the head.

    Tasks of the system are neither used nor changed. The same command goes on where an earlier one was stopped.
    """
    wanted = Method.parse(method, tuned=tune)
    training = {"device": device, "workers": workers, "executor": executor, "address": address}
    settings = _override(api.load_experiment(experiment), rounds=rounds, seed=seed, training=training)
    plan = BaselinePlan(SearchPlan.of(settings), len(settings.tasks), replicas)
    console = rich.console.Console()

    def is_pending(found: System, name: str) -> bool:
        return not is_finished(found, wanted, name, plan)

    with _saying_how_to_go_on():
        prepared = api.prepare(
            settings, system, tasks=task, loading=LoadingProgress(console), is_pending=is_pending, check_root=wanted.check
        )
        make = api.default_trainer(settings.training, _teller(console))
        api.run_baselines(
            prepared.system, prepared.data, wanted, plan, make_trainer=make, observer=BaselineProgressObserver(console)
        )
    if not prepared.data:
        console.print(f"nothing to do: {wanted} is finished for every task", highlight=False, soft_wrap=True)


@app.command()
def show(system: SystemLocation, as_json: AsJson = False) -> None:
    """Show tasks, quality, test accuracy, parameters and what is shared.

    quality: accuracy on the validation images, 0 to 1, which the search chose by. test: accuracy on images it never saw.

    parameters: of the task's whole path. own: of layers that neither the root nor another task uses.

    accounted: each layer's parameters divided by the number of tasks that use it.

    lineage: one hash of all that was decided, trained and kept; equal for two runs of one experiment, however often they were stopped.
    """
    opened = _open_to_read(system)
    summary = summarise(opened)
    try:
        lineage = lineage_hash(opened)
    except SystemFolderError as error:
        typer.echo(f"warning: no lineage: {error}", err=True)
        lineage = None
    if as_json:
        typer.echo(json.dumps({**dataclasses.asdict(summary), "lineage_hash": lineage}, indent=2))
    else:
        print_summary(summary, rich.console.Console())
        typer.echo(f"lineage {lineage or 'unknown'}")


@app.command()
def report(
    system: SystemLocation,
    out: Annotated[pathlib.Path, typer.Option("--out", metavar="DIR", help="Folder to write to; made if missing.")],
) -> None:
    """Write a page with figures: leaderboard, baselines, the multitask model, families, hyperparameters, cost.

    report.html needs nothing else; figures/ holds its figures as SVG and PNG, tables/ and report.json every number.
    """
    # It draws, and what draws takes time to load.
    from evolve.report.write import PAGE, write_report

    content = write_report(_open_to_read(system), out)
    for finding in content.findings:
        typer.echo(f"warning: {finding}", err=True)
    tasks, searches = counted(len(content.summary.tasks), "task"), len(content.searches)
    typer.echo(f"{out / PAGE}: {tasks}, {searches} search{'' if searches == 1 else 'es'}")


@app.command()
def watch(
    system: SystemLocation,
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
    except Interrupted as signal:
        # Ctrl-C is how a watch ends.
        if signal.status != 130:
            raise


@app.command()
def verify(system: SystemLocation) -> None:
    """Hash every layer, path and task again and follow every reference."""
    try:
        opened = _open_to_read(system)
        findings = verify_system(opened)
    except DamagedError as error:
        # Not even its root can be read: that is a finding like any other.
        findings = [str(error)]
    for finding in findings:
        typer.echo(finding, err=True)
    if findings:
        typer.echo(f"{len(findings)} things are wrong in {system}", err=True)
        raise typer.Exit(1)
    typer.echo(f"{system}: {counted(len(opened.tasks()), 'task')}, every layer and path is as it was written")


@app.command()
def remove(
    system: SystemLocation,
    task: Annotated[str, typer.Option("--task", metavar="NAME", help="Task to remove.")],
) -> None:
    """Remove a task. Layers that others use stay; `munet-evolve export` takes it out of the model repository."""
    api.remove_task(System.open(system), task)
    typer.echo(f"removed {task}; run `munet-evolve export` to take it out of the model repository")


@app.command()
def gc(
    system: SystemLocation,
    delete: Annotated[bool, typer.Option("--delete", help="Do it; without, nothing is changed.")] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="Of a system in a store: no other machine is at work on it; no lock would tell.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what nothing refers to any more and compress the journals of closed searches; says what and how many bytes.

    Safe at any moment, also beside running searches. Whatever an unfinished search needs to go on stays. A system in a store is collected
    only with --alone, and only safe while no other machine is at work on it.

    To be free of a search that nobody will finish, `munet-evolve remove` its task or start it over with `run --restart`.
    """

    def say_that_it_waits() -> None:
        typer.echo("waiting until others have stored or published what they are at", err=True)

    opened = System.open(system)
    collection = collect(opened, delete=delete, alone=alone, waits=say_that_it_waits)
    for sentence in collection.left:
        typer.echo(f"warning: left as it is: {sentence}", err=True)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(collection) | {"num_bytes": collection.num_bytes}, indent=2, default=str))
    else:
        print_collection(collection)


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
    system: SystemLocation,
    repository: Repository = pathlib.Path("model_repository"),
    target: Annotated[str, typer.Option(help="cpu or gpu: where Triton is to run the segments.")] = "cpu",
    precision: PrecisionOption = "float32",
    segments: SegmentsOption = "shared",
    tasks_per_image: TasksPerImageOption = 1,
    memory_factor: MemoryFactorOption = 2.0,
    response_cache: Annotated[
        bool,
        typer.Option("--response-cache", help="Let a Triton that has a cache keep what the segments answer that take the image."),
    ] = False,
    sign: SignOption = None,
    canary: Annotated[
        float | None,
        typer.Option(
            "--canary",
            metavar="PERCENT",
            help="Publish it beside the current generation: so many of a hundred requests go to it.",
            show_default="none",
        ),
    ] = None,
) -> None:
    """Publish every task's current path to a model repository, as a new generation."""
    form = _Form.of(target, precision, segments, tasks_per_image, memory_factor, response_cache=response_cache)
    signing_key = _signing_key(sign)
    typer.echo(_export(System.open(system), repository, form, rich.console.Console(), signing_key, canary))


@key_app.command()
def new(
    file: Annotated[pathlib.Path, typer.Argument(metavar="KEYFILE", help="Where to write the private key; it must not exist.")],
) -> None:
    """Make a key that signs generations, and beside it KEYFILE.pub, which servers require signatures of.

    Whoever has KEYFILE can publish to those servers: keep it where you publish, and there alone.
    """
    from evolve.signing import write_new_key

    public = write_new_key(file)
    typer.echo(f"{file}: private key, for --sign; {public}: public key, for `munet-server serve --require-signature`")


def main() -> None:
    """Runs the command line; what a person can mend is printed, without a traceback, with exit status 2."""
    # Read when torch loads: threads that wait in a busy loop slow a search several times over beside another busy process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with interruptible():
        try:
            app()
        except EvolveError as error:
            typer.echo(f"error: {error}", err=True)
            sys.exit(2)
        except Interrupted as signal:
            typer.echo("interrupted", err=True)
            sys.exit(signal.status)
        except RuntimeError as error:
            # Torch has no class of its own for it on every version.
            if not str(error).startswith("CUDA error"):
                raise
            typer.echo(f"error: {DeviceFailedError(str(error).partition(chr(10))[0])}", err=True)
            sys.exit(2)


def _open_to_read(location: str) -> System:
    """Opens a system, with all that other machines have published of it."""
    system = System.open(location)
    system.pull()
    system.pull_journals()
    return system


@contextlib.contextmanager
def _saying_how_to_go_on(*observers: ProgressObserver | TensorBoardObserver) -> Iterator[list[str]]:
    """Stops the observers, and ends the command if it is interrupted. Gives a list of options to go on without."""
    done_once: list[str] = []

    def stop() -> None:
        for observer in observers:
            observer.stop()

    try:
        yield done_once
    except Interrupted as signal:
        stop()
        command = shlex.join(["munet-evolve", *(word for word in sys.argv[1:] if word not in done_once)])
        typer.echo(f"interrupted; nothing that was finished is lost: the same command goes on from here: {command}", err=True)
        raise typer.Exit(signal.status) from None
    finally:
        stop()


def _override(
    settings: Experiment, *, rounds: int | None, seed: int | None, training: Mapping[str, str | int | None]
) -> Experiment:
    values = settings.model_dump()
    if rounds is not None:
        values["search"]["rounds"] = rounds
    if seed is not None:
        values["seed"] = seed
    allowed = {"device": ("auto", "cpu", "cuda"), "executor": ("processes", "ray")}
    for name, value in training.items():
        if value is not None:
            values["training"][name] = _one_of(name, str(value), allowed[name]) if name in allowed else value
    if values["training"]["executor"] != "ray":
        if training["address"] is not None:
            raise SettingsError(f"found --address {training['address']} without a Ray cluster", "--executor ray with it")
        # The experiment's own are of the executor that was overridden.
        values["training"] |= dict.fromkeys(("address", "cpus_per_worker", "gpus_per_worker"))
    return Experiment.model_validate(values)


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


def _teller(console: rich.console.Console) -> Callable[[str], None]:
    return lambda sentence: console.print(sentence, highlight=False, markup=False, soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class _Form:
    """How something is published."""

    target: Target
    precision: Precision
    coarseness: Coarseness | None
    response_cache: bool

    @staticmethod
    def of(
        target: str, precision: str, segments: str, tasks_per_image: int, memory_factor: float, *, response_cache: bool = False
    ) -> _Form:
        """Checks what was asked for.

        Raises:
            SettingsError: it is not to be had.
        """
        coarseness = None
        if segments != "shared":
            costs = next((costs for engine, costs in ENGINE_COSTS.items() if engine == segments), None)
            if costs is None:
                raise SettingsError(f"found segments {segments!r}", f"shared, {' or '.join(ENGINE_COSTS)}")
            if target == "gpu":
                advice = "leave --segments out; or measure, and call evolve.publish with costs of your own"
                raise SettingsError(f"found segments {segments!r} for a GPU", "costs, which were measured on CPUs alone", advice)
            coarseness = Coarseness(costs, tasks_per_image, memory_factor)
        return _Form(
            _one_of("target", target, get_args(Target)),
            _one_of("precision", precision, get_args(Precision)),
            coarseness,
            response_cache,
        )


def _one_of(name: str, value: str, allowed: Sequence[Any]) -> Any:
    if value not in allowed:
        raise SettingsError(f"found {name} {value!r}", " or ".join((", ".join(allowed[:-1]), allowed[-1])))
    return value


def _signing_key(file: pathlib.Path | None) -> PrivateKey | None:
    """Returns the key that signs, read before anything takes time."""
    if file is None:
        return None
    from evolve.signing import read_signing_key

    return read_signing_key(file)


def _export(
    system: System,
    repository: pathlib.Path,
    form: _Form,
    console: rich.console.Console,
    signing_key: PrivateKey | None,
    canary_percent: float | None = None,
) -> str:
    """Publishes, telling what is under way, and returns what was done in words."""
    with publishing(console, repository) as tell:
        result = api.publish(
            system,
            repository,
            target=form.target,
            precision=form.precision,
            coarseness=form.coarseness,
            response_cache=form.response_cache,
            signing_key=signing_key,
            canary_percent=canary_percent,
            progress=tell,
        )
    choice = "" if result.choice is None else f"\n{repository}: {result.choice}"
    if not result.changed:
        return f"{repository}: generation {result.generation} is up to date{choice}"
    return (
        f"{repository}: published generation {result.generation}{', signed' if signing_key else ''}"
        f"{'' if canary_percent is None else f' as canary, {canary_percent:g} %'}, "
        f"{counted(len(result.new_segments), 'new segment')}, "
        f"{len(result.reused_segments)} as before, {result.seconds:.1f} s{choice}"
    )


if __name__ == "__main__":
    main()
