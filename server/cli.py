"""The command line, `munet-server`, and the only place where the server's parts are built and wired.

Exit status: 0 all went well; 1 some of many images failed; 2 something a person can mend (the message on stderr says
what was found, what was expected and what to do).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import pathlib
import signal
import sys
import threading
from collections.abc import AsyncIterator
from typing import Annotated, Any

import typer
import uvloop

from munet.command_line import add_version
from munet.words import counted
from server.check import check as check_repository
from server.classification import Classifier
from server.client_commands import add_to as add_client_commands
from server.config import MAX_THREADS, MIB, LogSettings, ServerSettings, check_address_option, read_settings
from server.embedded.engine import EmbeddedEngine
from server.embedded.memory import MemoryStatistics
from server.engine import Engine
from server.errors import ServerError, SettingsError, TritonEnvironmentError
from server.exposure import check_exposure
from server.front_door.call_book import CallBook
from server.front_door.doorkeeper import Doorkeeper
from server.front_door.draining import Draining
from server.front_door.edge import Edge
from server.front_door.health import Health
from server.front_door.open_inference import STREAM_FAILURES, OpenInferenceServicer
from server.front_door.server import ADMIN_SERVICE, QUESTION_SERVICES, FrontDoor
from server.front_door.servicers import STREAM_FAILURES as QUESTION_STREAM_FAILURES
from server.front_door.servicers import AdminServicer, InferenceServicer
from server.front_door.tls import certificates_of
from server.garbage import prepare_collector
from server.generation import Generation
from server.logs import configure_logs
from server.metrics import Metrics, MetricsEndpoint
from server.preprocessing import Preprocessor
from server.reload import Reloader
from server.repository import Repository, read_keys
from server.task_counts import TaskCounts
from server.task_limits import TaskLimiter
from server.tokens import TokenFile, add_line, line_of, new_token
from server.tracing import Tracing, is_wanted
from server.triton.engine import TritonEngine
from server.triton.environment import DEFAULT_FOLDER, find_environment
from server.triton.environment import install as install_triton
from server.triton.fleet import State
from server.triton.process import TritonAddresses, TritonProcess
from server.triton.supervisor import Supervisor, read_generation

_log = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

add_version(app, "Serves the tasks of a model repository by name, over gRPC.")

triton_app = typer.Typer(help="Runs a real Triton on a model repository.", no_args_is_help=True)
app.add_typer(triton_app, name="triton")

token_app = typer.Typer(help="Makes bearer tokens.", no_args_is_help=True)
app.add_typer(token_app, name="token")

RepositoryOption = Annotated[pathlib.Path, typer.Option("--repository", help="The model repository.")]
SignatureOption = Annotated[
    list[pathlib.Path] | None,
    typer.Option(
        "--require-signature",
        metavar="FILE",
        help="Public key (PEM); only generations that it signed are taken. Repeat for several, any of which will do.",
        show_default="none",
    ),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, or cuda, which needs an NVIDIA GPU and the extra 'cuda'.", show_default="cpu")
]


@dataclasses.dataclass(frozen=True)
class RunningServer:
    """A server that serves.

    Attributes:
        front_door: what listens, with the real addresses.
        reloader: what serves.
        engine: what computes.
        metrics_address: where metrics are; empty if nowhere.
    """

    front_door: FrontDoor
    reloader: Reloader
    engine: Engine
    metrics_address: str

    @property
    def ready_line(self) -> str:
        """What is said once the server answers, for people and scripts."""
        generation = self.reloader.generation
        number, num_tasks = (generation.number, len(generation.tasks)) if generation else (0, 0)
        line = f"serving generation {number} ({counted(num_tasks, 'task')}) at {self.front_door.address}"
        metrics = f", metrics {self.metrics_address}" if self.metrics_address else ""
        return f"{line}, admin {self.front_door.admin_address}{metrics}"


@contextlib.asynccontextmanager
async def running_server(settings: ServerSettings) -> AsyncIterator[RunningServer]:
    """Builds a server, serves within the block, and stops gracefully after it.

    Args:
        settings: everything it is told.

    Raises:
        ServerError: the repository cannot be served or an address cannot be listened on.
    """
    settings = check_exposure(settings)
    async with contextlib.AsyncExitStack() as stack:
        engine: Engine
        tritons = TritonEngine(settings) if settings.engine.kind == "triton" else None
        engine = tritons or EmbeddedEngine(settings.engine)
        stack.push_async_callback(asyncio.to_thread, engine.close)
        counts = TaskCounts()

        def memory() -> MemoryStatistics | None:
            return engine.memory() if isinstance(engine, EmbeddedEngine) else None

        metrics = Metrics(engine.statistics, counts, settings.metrics, settings.engine.kind, memory)
        tracing = Tracing(settings.tracing) if is_wanted(settings.tracing) else None
        if tracing is not None:
            stack.push_async_callback(asyncio.to_thread, tracing.close)
        book = CallBook(metrics, settings.log.access, tracing)
        doorkeeper = None
        if settings.tokens.file is not None:
            tokens = TokenFile(settings.tokens.file, functools.partial(metrics.count_reread, "tokens"))
            doorkeeper = Doorkeeper(tokens, book)
            look_at_tokens = asyncio.create_task(tokens.watch(settings.watch_interval_seconds))
            stack.callback(look_at_tokens.cancel)
        certificates = certificates_of(settings.tls, functools.partial(metrics.count_reread, "certificates"))
        health = Health((*QUESTION_SERVICES, ADMIN_SERVICE))
        limiter = TaskLimiter(settings.task_limits)
        metrics.watch("serving", lambda: health.is_serving)

        def on_swap(generation: Generation) -> None:
            health.set_serving(generation.tasks)
            metrics.set_generation(generation.number, len(generation.tasks))
            counts.keep(generation.tasks.keys())
            if strangers := limiter.strangers(generation.tasks):
                _log.warning(
                    "task_limits name tasks that generation %d does not serve: %s", generation.number, ", ".join(strangers)
                )
            if tritons is not None:
                tritons.follow(generation)

        retry_seconds = settings.triton.retry_seconds if tritons is not None else None
        repository = Repository(settings.repository, read_keys(settings.require_signature))
        reloader = Reloader(repository, engine, on_swap, metrics.count_reload, retry_seconds)
        stack.push_async_callback(reloader.close)
        await reloader.reload()
        preprocessor = Preprocessor(settings.num_decode_threads, settings.limits.image)
        stack.push_async_callback(asyncio.to_thread, preprocessor.close)
        metrics_address = ""
        if settings.metrics_listen is not None:
            endpoint = MetricsEndpoint(metrics, settings.metrics_listen)
            stack.push_async_callback(asyncio.to_thread, endpoint.close)
            metrics_address = endpoint.address
        edge = Edge(settings.limits, book, STREAM_FAILURES | QUESTION_STREAM_FAILURES)
        draining = Draining(health, edge, settings.drain_seconds)
        classifier = Classifier(reloader, engine, preprocessor, settings.limits, counts, limiter)
        front_door = FrontDoor(
            settings,
            InferenceServicer(classifier),
            OpenInferenceServicer(classifier, engine, preprocessor, health, settings.limits),
            AdminServicer(reloader, engine, counts, draining, tritons.endpoints if tritons is not None else tuple, memory),
            health,
            edge,
            draining,
            doorkeeper,
            certificates,
        )
        await front_door.start()
        stack.push_async_callback(front_door.stop, settings.grace_seconds)
        watch = asyncio.create_task(reloader.watch(settings.watch_interval_seconds))
        stack.callback(watch.cancel)
        if tritons is not None:
            look = asyncio.create_task(_tell_health(health, tritons, settings.triton.probe_interval_seconds))
            stack.callback(look.cancel)
        yield RunningServer(front_door, reloader, engine, metrics_address)


async def _tell_health(health: Health, tritons: TritonEngine, interval_seconds: float) -> None:
    """Has health say whether any Triton answers, so that load balancers look elsewhere while none does."""
    while True:
        health.pause(not any(report.state is State.SERVING for report in tritons.endpoints()))
        await asyncio.sleep(interval_seconds)


async def _serve(settings: ServerSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with running_server(settings) as server:
        prepare_collector()
        # Scripts wait for this line and read the real addresses from it.
        print(server.ready_line, flush=True)
        await stop.wait()
        _log.info("stopping: up to %g + %g seconds", settings.drain_seconds, settings.grace_seconds)


@app.command()
def serve(
    repository: Annotated[
        pathlib.Path | None, typer.Option(help="The model repository.", show_default="model_repository")
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="HOST:PORT for questions; port 0 for any free one.", show_default="127.0.0.1:8500")
    ] = None,
    admin_listen: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT for administration; beyond loopback only with authentication.", show_default="127.0.0.1:8501"
        ),
    ] = None,
    metrics_listen: Annotated[
        str | None, typer.Option(help="HOST:PORT for Prometheus metrics over HTTP.", show_default="none")
    ] = None,
    engine: Annotated[
        str | None, typer.Option(help="embedded, in this process; or triton, in the Tritons named.", show_default="embedded")
    ] = None,
    triton: Annotated[
        list[str] | None, typer.Option(help="HOST:PORT of a Triton's gRPC; repeat for several.", show_default="none")
    ] = None,
    device: DeviceOption = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Threads that compute one batch; 0 for all CPUs. Batches run side by side anyway.", show_default="1"),
    ] = None,
    measure_batches: Annotated[
        bool | None,
        typer.Option(
            "--measure-batches", help="Choose the size of batches by a measurement of under a second.", show_default="no"
        ),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            help="What segments may take of memory, such as 2GiB; others are loaded when they are needed.", show_default="none"
        ),
    ] = None,
    watch_interval: Annotated[float | None, typer.Option(help="Seconds between looks at CURRENT.", show_default="0.2")] = None,
    drain: Annotated[
        float | None, typer.Option(help="Seconds from NOT_SERVING to refusing requests at shutdown.", show_default="0.5")
    ] = None,
    grace: Annotated[
        float | None, typer.Option(help="Seconds for requests in flight to finish at shutdown.", show_default="10")
    ] = None,
    require_signature: SignatureOption = None,
    tokens: Annotated[
        pathlib.Path | None,
        typer.Option(help="File of bearer tokens' hashes; nobody is answered without one.", show_default="none"),
    ] = None,
    certificate_file: Annotated[
        pathlib.Path | None, typer.Option(help="The server's certificate (PEM); it then speaks TLS.", show_default="none")
    ] = None,
    key_file: Annotated[pathlib.Path | None, typer.Option(help="Its key (PEM).", show_default="none")] = None,
    client_ca_file: Annotated[
        pathlib.Path | None,
        typer.Option(help="Authorities (PEM); who asks questions needs a certificate of theirs.", show_default="none"),
    ] = None,
    admin_client_ca_file: Annotated[
        pathlib.Path | None,
        typer.Option(help="Authorities (PEM); who administers needs a certificate of theirs.", show_default="none"),
    ] = None,
    settings: Annotated[
        pathlib.Path | None, typer.Option(help="TOML file with any of server.config.ServerSettings; flags override it.")
    ] = None,
    log_level: Annotated[str | None, typer.Option(help="debug, info, warning or error.", show_default="info")] = None,
    log_format: Annotated[
        str | None, typer.Option(help="text, lines for people; or json, one object a line.", show_default="text")
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log a line for each call.")] = False,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Collector of OpenTelemetry traces, by OTLP over HTTP.",
            show_default="OTEL_EXPORTER_OTLP_ENDPOINT",
        ),
    ] = None,
) -> None:
    """Serves a model repository until SIGTERM or SIGINT, and every generation published there meanwhile."""
    overrides: dict[str, Any] = {
        "repository": repository,
        "listen": listen,
        "admin_listen": admin_listen,
        "metrics_listen": metrics_listen,
        "engine.kind": engine,
        "engine.device": device,
        "engine.threads": threads,
        "engine.measure_batches": measure_batches,
        "engine.memory_limit_bytes": memory_limit,
        "triton.endpoints": triton or None,
        "watch_interval_seconds": watch_interval,
        "drain_seconds": drain,
        "grace_seconds": grace,
        "require_signature": require_signature or None,
        "tokens.file": tokens,
        "tls.certificate_file": certificate_file,
        "tls.key_file": key_file,
        "tls.client_ca_file": client_ca_file,
        "tls.admin_client_ca_file": admin_client_ca_file,
        "log.level": log_level and log_level.lower(),
        "log.format": log_format,
        "log.access": access_log or None,
        "tracing.otlp_endpoint": otlp_endpoint,
    }
    told = read_settings(settings, overrides)
    configure_logs(told.log)
    if told.triton.endpoints and told.engine.kind != "triton":
        raise SettingsError("engine.kind", told.engine.kind, "triton where Tritons are named; add --engine triton")
    if told.engine.memory_limit_bytes is not None and told.engine.kind == "triton":
        raise SettingsError("engine.memory_limit_bytes", told.engine.memory_limit_bytes, "none where Tritons hold the segments")
    # Faster than asyncio's own loop where gRPC wakes it, for each message.
    uvloop.run(_serve(told))


@app.command()
def check(
    repository: RepositoryOption = pathlib.Path("model_repository"),
    device: DeviceOption = None,
    require_signature: SignatureOption = None,
) -> None:
    """Verifies a model repository: checksums, configs, ensembles, segments, golden answers. Names every fault."""
    settings = read_settings(None, {"engine.device": device}).engine
    reader = Repository(repository, read_keys(require_signature or ()))
    number = reader.current_number()
    engine = EmbeddedEngine(settings)
    try:
        generation, findings = check_repository(reader, engine, settings.device)
    finally:
        engine.close()
    for finding in findings:
        print(finding, file=sys.stderr)
    if generation is None or findings:
        print(f"generation {number} in {repository}: {counted(len(findings), 'fault')}", file=sys.stderr)
        raise typer.Exit(2)
    counts = f"{counted(len(generation.tasks), 'task')}, {counted(len(generation.segments), 'segment')}"
    print(f"generation {number} in {repository} is whole: {counts}")


@token_app.command()
def new(
    role: Annotated[str, typer.Option(help="read, infer or admin: what it may do; each includes those before it.")],
    name: Annotated[str, typer.Option(help="What people call it; one name, one token.")] = "token",
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task that it is for, or a pattern such as 'flowers-*'; repeat for several.", show_default="all"),
    ] = None,
    add_to: Annotated[
        pathlib.Path | None, typer.Option(metavar="FILE", help="Add its line to this file of tokens, made if missing.")
    ] = None,
) -> None:
    """Makes a token and prints it, once: nothing keeps it. Then the line for the server's file of tokens, which holds its hash.

    With --add-to, the line goes into the file, and the token alone is printed.
    """
    token = new_token()
    line = line_of(name, role, token, task or ())
    if add_to is None:
        print(f"{token}\n{line}", end="")
    else:
        add_line(add_to, line)
        print(token)


@triton_app.command()
def run(
    repository: RepositoryOption = pathlib.Path("model_repository"),
    grpc: Annotated[str, typer.Option(help="HOST:PORT for KServe v2 over gRPC; port 0 for any free one.")] = "127.0.0.1:8001",
    http: Annotated[str, typer.Option(help="HOST:PORT for KServe v2 over HTTP.")] = "127.0.0.1:8000",
    metrics: Annotated[
        str | None, typer.Option(help="HOST:PORT for Triton's Prometheus metrics over HTTP.", show_default="none")
    ] = None,
    environment: Annotated[
        pathlib.Path, typer.Option(help="The folder that `munet-server triton install` made.")
    ] = DEFAULT_FOLDER,
    load: Annotated[
        bool, typer.Option(help="Load what CURRENT names and keep it alive; or leave all that to a front door.")
    ] = True,
    threads: Annotated[int, typer.Option(min=0, max=MAX_THREADS, help="Threads of each segment; 0 for all cores.")] = 1,
    interval: Annotated[
        float, typer.Option(min=0.01, help="Seconds between two looks at what may have died, and at CURRENT.")
    ] = 1.0,
    cache: Annotated[
        int, typer.Option(min=0, metavar="MIB", help="Memory for answers of segments published with --response-cache.")
    ] = 0,
    require_signature: SignatureOption = None,
    log: Annotated[
        pathlib.Path | None, typer.Option(help="File that Triton's own log is added to.", show_default="a temporary one")
    ] = None,
) -> None:
    """Runs a real Triton on a model repository until SIGTERM or SIGINT, with every generation published there meanwhile.

    What dies is brought back.
    """
    configure_logs(LogSettings())
    for option, address in (("--grpc", grpc), ("--http", http), ("--metrics", metrics)):
        if address is not None:
            check_address_option(option, address)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    reader = Repository(repository, read_keys(require_signature or ()))
    generation = read_generation(reader) if load else None
    if generation is None:
        reader.current_number()
    addresses = TritonAddresses(grpc, http, metrics)
    found = find_environment(environment)
    arguments = found.cache_arguments(cache * MIB) if cache else []
    with (
        TritonProcess(found, repository, addresses, log, threads, arguments) as triton,
        contextlib.closing(Supervisor(triton, reader, loads=load)) as supervisor,
    ):
        if generation is not None:
            supervisor.begin(generation, stop)
        if not stop.is_set():
            # Scripts wait for this line and read the real addresses from it.
            print(_triton_line(triton, generation), flush=True)
        supervisor.watch(stop, interval)
    counts = f"{counted(supervisor.num_restarts, 'restart')}, {counted(supervisor.num_revivals, 'segment')} loaded again"
    print(f"stopped; {counts}")


def _triton_line(triton: TritonProcess, generation: Generation | None) -> str:
    what = f"generation {generation.number} ({counted(len(generation.tasks), 'task')})" if generation else "nothing yet"
    metrics = f", metrics {triton.addresses.metrics}" if triton.addresses.metrics else ""
    return f"Triton serving {what} at {triton.addresses.grpc}, HTTP {triton.addresses.http}{metrics}, log {triton.log}"


@triton_app.command()
def install(
    into: Annotated[pathlib.Path, typer.Option(help="A new or empty folder, or one that this command made.")] = DEFAULT_FOLDER,
) -> None:
    """Makes the environment that a real Triton runs in, from the package index; once, in some seconds."""
    try:
        environment = find_environment(into)
    except TritonEnvironmentError:
        print(f"making Triton's environment in {into} (once; 330 MB, some seconds)", flush=True)
        environment = install_triton(into)
    print(f"Triton's environment in {environment.folder} is ready")


add_client_commands(app)


def main() -> None:
    """Runs the command line; the console script `munet-server`."""
    try:
        app()
    except ServerError as error:
        print(f"munet-server: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
