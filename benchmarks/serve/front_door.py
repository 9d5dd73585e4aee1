"""null: requests per second and core of the front door alone, beside a plain grpc.aio method that answers bytes to bytes.

`munet-server` with an engine that computes nothing (`null_server`), and `echo_server`, each in a process that is held on one core, asked by
this one from the others with 32 requests open, the same bytes for both. What a core could answer is the inverse of the CPU time that a
request takes the server's process; beside it, the rate that was really reached.

Lines say it for pixels of 32 and 224 pixels, a JPEG file of 224, and pixels of 224 through the Open Inference Protocol; `with engine` is
the same with the embedded engine and a model of one block of width 16, the least there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator

import grpc
import grpc.aio

from benchmarks.published import Architecture, Own, Published, System
from benchmarks.reporting import rounded
from benchmarks.serve.loads import Rate, rate_of_requests
from benchmarks.serve.open_inference import pixels_request
from benchmarks.serve.processes import Server, first_line, server_process, started
from benchmarks.serve.sides import smooth_image, to_jpeg
from benchmarks.serve.workbench import Effort, Workbench
from server import calls

TASK = "task"
NULL_SERVER = "benchmarks.serve.null_server"
ECHO, FRONT_DOOR, WITH_ENGINE = "echo", "front door", "with engine"
CLASSIFY, INFER = "/munet.v1.InferenceService/Classify", "/inference.GRPCInferenceService/ModelInfer"
OPEN_REQUESTS = 32
REPETITIONS = 3


def system(size: int) -> System:
    """Returns a system of one task that computes next to nothing."""
    return System(f"null-{size}", Architecture("null", 16, 2, 1, 16, size), ({TASK: Own()},))


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What is asked.

    Attributes:
        name: for people.
        method: of gRPC.
        request: its bytes.
    """

    name: str
    method: str
    request: bytes


def traffics(size: int) -> list[Traffic]:
    """Returns what is asked at an image size."""
    pixels = smooth_image(size)
    raw = calls.classify(TASK, pixels).request.SerializeToString()
    if size == 32:
        return [Traffic("pixels, 32 px", CLASSIFY, raw)]
    encoded = calls.classify(TASK, to_jpeg(pixels)).request.SerializeToString()
    tensor = pixels_request(TASK, pixels[None]).SerializeToString()
    return [
        Traffic("pixels, 224 px", CLASSIFY, raw),
        Traffic("JPEG, 224 px", CLASSIFY, encoded),
        Traffic("pixels, 224 px, Open Inference Protocol", INFER, tensor),
    ]


def measure(bench: Workbench) -> None:
    """Measures what the front door costs."""
    for size in (32,) if bench.effort.smoke else (32, 224):
        models = bench.publish(system(size))
        for traffic in traffics(size):
            rates = bench.apart(time_servers, models, traffic, bench.effort)
            cpu_us = {side: 1e6 * statistics.median(rate.server_cpu for rate in each) for side, each in rates.items()}
            bench.report.line(
                figure="null",
                traffic=traffic.name,
                request_bytes=len(traffic.request),
                cpu_us_per_request={side: rounded(value) for side, value in cpu_us.items()},
                per_second_and_core={side: rounded(1e6 / value) for side, value in cpu_us.items() if value},
                reached_per_second={
                    side: rounded(statistics.median(rate.per_second for rate in each)) for side, each in rates.items()
                },
                share_of_echo=rounded(cpu_us[ECHO] / cpu_us[FRONT_DOOR]) if cpu_us[FRONT_DOOR] else None,
            )


def time_servers(models: Published, traffic: Traffic, effort: Effort) -> dict[str, list[Rate]]:
    """Returns the rates of each server, repetition by repetition."""
    first, *others = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        with held_on({first}):
            servers = {
                FRONT_DOOR: stack.enter_context(server_process(models.repository, module=NULL_SERVER)),
                WITH_ENGINE: stack.enter_context(server_process(models.repository)),
            }
            answer = asyncio.run(ask_once(servers[FRONT_DOOR].address, traffic))
            servers[ECHO] = stack.enter_context(echo_process(traffic.method, len(answer)))
        rates: dict[str, list[Rate]] = {side: [] for side in servers}
        with held_on(set(others) or {first}):
            for _ in range(min(effort.repetitions, REPETITIONS)):
                for side, server in servers.items():
                    rates[side].append(asyncio.run(rate_of(server, traffic, effort.seconds / 2)))
    return rates


@contextlib.contextmanager
def held_on(cores: set[int]) -> Iterator[None]:
    """Holds this thread on some cores, and the processes that it starts meanwhile for good."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def echo_process(method: str, answer_bytes: int) -> Iterator[Server]:
    """Runs the plain server."""
    command = [sys.executable, "-m", "benchmarks.serve.echo_server", method, str(answer_bytes)]
    with started(command, stdout=subprocess.PIPE) as process:
        yield Server(first_line(process).strip(), "", process.pid)


async def ask_once(address: str, traffic: Traffic) -> bytes:
    """Returns what a server answers, as bytes."""
    async with grpc.aio.insecure_channel(address) as channel:
        answer: bytes = await channel.unary_unary(traffic.method)(traffic.request)
        return answer


async def rate_of(server: Server, traffic: Traffic, seconds: float) -> Rate:
    """Returns how fast a server answers; requests and answers stay bytes here."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        method = channel.unary_unary(traffic.method)
        rate, _ = await rate_of_requests(lambda: method(traffic.request), OPEN_REQUESTS, seconds, server)
        return rate
