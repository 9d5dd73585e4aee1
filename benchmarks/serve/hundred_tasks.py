"""S3: a server's memory (RSS) for 100 tasks / what it takes for one of them and 99 times its own parameters, float32.

ViT-S/16 at 224 px. Of the 100 tasks, 80 have a final norm and a head of their own, 20 one cloned block too, each of the 12 blocks in turn,
so that the trunk is cut before and after every block. `munet-server serve` in a process of its own, default settings, after every task has
answered one image through gRPC. `own` is the size of all weights that the server of one task does not have.
"""

from __future__ import annotations

from benchmarks.published import SMALL, SMOKE, Own, Published, System
from benchmarks.reporting import Target, rounded
from benchmarks.serve.processes import server_process
from benchmarks.serve.sides import random_images
from benchmarks.serve.workbench import Workbench
from server.client import Client
from server.repository import Repository

ONE = System("one-task", SMALL, ({"task-0": Own()},), golden_images=1)
HUNDRED = System(
    "hundred-tasks",
    SMALL,
    ({f"task-{number}": Own((number // 5 % 12,) if number % 5 == 4 else ()) for number in range(100)},),
    golden_images=1,
)
SMOKE_ONE = System("one-task", SMOKE, ({"task-0": Own()},))
SMOKE_SEVERAL = System("hundred-tasks", SMOKE, ({"task-0": Own(), "task-1": Own((1,))},))
FLOAT_BYTES = 4


def measure(bench: Workbench) -> None:
    """Measures S3."""
    smoke = bench.effort.smoke
    one, hundred = (bench.publish(system) for system in ((SMOKE_ONE, SMOKE_SEVERAL) if smoke else (ONE, HUNDRED)))
    found, expected = served_mib(hundred), served_mib(one)
    own = (parameter_bytes(hundred) - parameter_bytes(one)) / 2**20
    value = found / (expected + own)
    bench.report.figure("S3", value, Target("<=", 1.10))
    generation = Repository(hundred.repository).read()
    bench.report.line(
        figure="S3",
        tasks=len(generation.tasks),
        segments=len(generation.segments),
        rss_mib=rounded(found),
        one_task_rss_mib=rounded(expected),
        own_mib=rounded(own),
        beyond_kib_per_segment=rounded(1024 * (found - expected - own) / len(generation.segments)),
        ratio=rounded(value),
    )


def served_mib(models: Published) -> float:
    """Returns the resident memory of a server that has answered each task once, in MiB."""
    image = random_images(models)[0]
    with server_process(models.repository) as server, Client(server.address) as client:
        for task in client.list_tasks().tasks:
            client.classify(task.name, image)
        return server.memory()["rss_mib"]


def parameter_bytes(models: Published) -> int:
    """Returns the size of all weights of a repository's current generation."""
    segments = Repository(models.repository).read().segments.values()
    return FLOAT_BYTES * sum(segment.num_parameters for segment in segments)
