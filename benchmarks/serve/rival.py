"""rival: the same mixed traffic as S2's, through gRPC, to `munet-server` and to MLServer with one whole ONNX model per task.

Both speak the Open Inference Protocol and are asked by the same client in this process, in turns, with 16 requests open: one image, a task
at random, as pixels or as a JPEG file. Each has the same CPUs. MLServer runs as many inference workers as there are CPUs, as its
documentation has it, each a process that holds every model, in ONNX Runtime sessions of one thread; access logs and metrics are off. Pixels
it turns into a Python list before the model sees them; a file's bytes it hands on as they are. `munet-server` has its default settings.

MLServer is installed from the package index into `.rivals/mlserver`, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import shutil
import socket
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.published import Published
from benchmarks.reporting import TOP, Ratio, milliseconds, rounded
from benchmarks.serve.loads import Rate, rate_of_requests
from benchmarks.serve.mixed_traffic import SMOKE_SYSTEM, SYSTEM, at_random
from benchmarks.serve.open_inference import file_request, logits_of, only_logits, pixels_request
from benchmarks.serve.processes import Server, server_process, started
from benchmarks.serve.sides import check_equal, smooth_image, to_jpeg
from benchmarks.serve.workbench import Effort, Workbench
from server.config import num_usable_cpus

FOLDER = TOP / ".rivals" / "mlserver"
REQUIREMENTS = (
    "mlserver==1.7.1",
    "onnxruntime==1.31.1",
    "pillow==13.0.0",
    "numpy==2.4.6",
    "grpcio==1.85.1",
    "protobuf==6.33.6",
    "uvloop==0.21.0",
)
MODEL_CLASS = pathlib.Path(__file__).with_name("mlserver_model.py")
START_SECONDS = 300
NUM_IMAGES = 8
OURS, RIVAL = "munet-server", "mlserver"

Request = Callable[[str, int], service_pb2.ModelInferRequest]
"""Makes a request of a task and the index of an image."""


@dataclasses.dataclass
class Side:
    """What one server did with one traffic.

    Attributes:
        rates: repetition by repetition.
        latencies: seconds of each request, all repetitions together.
    """

    rates: list[Rate] = dataclasses.field(default_factory=list)
    latencies: list[float] = dataclasses.field(default_factory=list)


def prepare() -> None:
    """Makes MLServer's environment, unless it is there already."""
    record = FOLDER / "requirements.txt"
    content = "\n".join(REQUIREMENTS)
    if record.exists() and record.read_text() == content:
        return
    venv.create(FOLDER, clear=True, symlinks=True, with_pip=True)
    command = [str(FOLDER / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    if subprocess.run([*command, *REQUIREMENTS], check=False).returncode:
        raise SystemExit("found that MLServer cannot be installed, see above; leave it out with --only S1 S2 ...")
    record.write_text(content)


def measure(bench: Workbench) -> None:
    """Measures both servers."""
    models = bench.publish(SMOKE_SYSTEM if bench.effort.smoke else SYSTEM)
    sides, taken, load_seconds = bench.apart(time_both, models, bench.effort)
    for traffic, of_traffic in sides.items():
        ours, rival = of_traffic[OURS], of_traffic[RIVAL]
        ratio = Ratio([rate.per_second for rate in ours.rates], [rate.per_second for rate in rival.rates])
        bench.report.line(
            figure="rival",
            rival=REQUIREMENTS[0],
            traffic=traffic,
            tasks=len(models.whole),
            requests_at_a_time=bench.effort.requests,
            per_second={
                name: rounded(statistics.median(rate.per_second for rate in side.rates)) for name, side in of_traffic.items()
            },
            p50_ms={name: milliseconds(side.latencies) for name, side in of_traffic.items()},
            p99_ms={name: rounded(1e3 * float(np.percentile(side.latencies, 99))) for name, side in of_traffic.items()},
            cpu_ms_per_request={
                name: milliseconds([rate.server_cpu for rate in side.rates]) for name, side in of_traffic.items()
            },
            memory=taken,
            seconds_to_start=load_seconds,
            ratio=ratio.spread(),
        )


def time_both(models: Published, effort: Effort) -> tuple[dict[str, dict[str, Side]], dict[str, Any], dict[str, float]]:
    """Returns what both did with each traffic, the memory that they took for it, and the seconds in which they were up."""
    images = [smooth_image(models.image_size, seed) for seed in range(NUM_IMAGES)]
    files = [to_jpeg(image) for image in images]
    traffics: dict[str, Request] = {
        "jpeg": lambda task, image: only_logits(file_request(task, files[image])),
        "pixels": lambda task, image: only_logits(pixels_request(task, images[image][np.newaxis])),
    }
    tasks = list(models.whole)
    sides = {traffic: {OURS: Side(), RIVAL: Side()} for traffic in traffics}
    with contextlib.ExitStack() as stack:
        servers, load_seconds = {}, {}
        for name, start in ((OURS, server_process(models.repository)), (RIVAL, mlserver_process(models))):
            begun = time.perf_counter()
            servers[name] = stack.enter_context(start)
            load_seconds[name] = rounded(time.perf_counter() - begun)
        for request in traffics.values():
            asyncio.run(compare([server.address for server in servers.values()], request, tasks))
        for repetition in range(min(effort.repetitions, 3)):
            for traffic, request in traffics.items():
                order = list(servers.items())
                for name, server in order[::-1] if repetition % 2 else order:
                    asyncio.run(ask_at_random(server, request, tasks, effort, sides[traffic][name]))
        return sides, {name: server.memory() for name, server in servers.items()}, load_seconds


async def compare(addresses: list[str], request: Request, tasks: list[str]) -> None:
    """Checks that servers answer each task alike, which also warms them up."""
    async with contextlib.AsyncExitStack() as stack:
        channels = [await stack.enter_async_context(grpc.aio.insecure_channel(address)) for address in addresses]
        for task in tasks:
            answers = [
                logits_of(await service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request(task, 0)))
                for channel in channels
            ]
            for answer in answers[1:]:
                check_equal(answer, answers[0])


async def ask_at_random(server: Server, request: Request, tasks: list[str], effort: Effort, side: Side) -> None:
    """Asks tasks at random for some seconds."""
    chosen = at_random(tasks, NUM_IMAGES)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        rate, latencies = await rate_of_requests(
            lambda: stub.ModelInfer(request(*next(chosen))), effort.requests, effort.seconds, server
        )
    side.rates.append(rate)
    side.latencies += latencies


@contextlib.contextmanager
def mlserver_process(models: Published) -> Iterator[Server]:
    """Runs MLServer with each task's whole model."""
    folder = models.repository.with_name("mlserver")
    folder.mkdir(exist_ok=True)
    shutil.copy(MODEL_CLASS, folder)
    ports = dict(zip(("grpc_port", "http_port", "metrics_port"), free_ports(3), strict=True))
    workers = num_usable_cpus()
    settings = {"debug": False, "host": "127.0.0.1", "parallel_workers": workers, "metrics_endpoint": None, **ports}
    (folder / "settings.json").write_text(json.dumps(settings))
    for name, file in models.whole.items():
        (folder / name).mkdir(exist_ok=True)
        described = {"name": name, "implementation": f"{MODEL_CLASS.stem}.WholeModel", "parameters": {"uri": str(file)}}
        (folder / name / "model-settings.json").write_text(json.dumps(described))
    command = [str(FOLDER / "bin" / "mlserver"), "start", str(folder)]
    address = f"127.0.0.1:{ports['grpc_port']}"
    with started(command, cwd=folder, stdout=sys.stderr) as process:
        wait_until_ready(address, list(models.whole))
        yield Server(address, "", process.pid)


def wait_until_ready(address: str, tasks: list[str]) -> None:
    """Waits until a server says that it has every model."""
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for task in tasks:
            request = service_pb2.ModelReadyRequest(name=task)
            end = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(grpc.RpcError):
                    if stub.ModelReady(request, wait_for_ready=True, timeout=5).ready:
                        break
                if time.monotonic() > end:
                    raise RuntimeError(f"found {task} not ready after {START_SECONDS} seconds")
                time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    """Returns ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
