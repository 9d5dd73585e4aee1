"""A cache in Triton never asks whether a model changed since: from the export to answers after an update, on the same images."""

from __future__ import annotations

import pathlib

import numpy as np
from tritonclient.grpc import service_pb2

from evolve.export.publish import export_system
from evolve.layer import PATCH_EMBED
from evolve.vit import reference_logits
from server.repository import Repository
from tests.support.system import IMAGE_SIZE, TaskSketch, add_task, build_system
from tests.support.triton import Caller, TritonRun, wait_until

IMAGES = np.random.default_rng(7).integers(0, 256, (3, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)


def num_hits(caller: Caller, segment: str) -> int:
    (found,) = caller.stub.ModelStatistics(service_pb2.ModelStatisticsRequest(name=segment)).model_stats
    return int(found.inference_stats.cache_hit.count)


def test_answers_that_were_kept_are_not_given_for_another_generation(tmp_path: pathlib.Path) -> None:
    system = build_system(tmp_path / "system", {"moving": TaskSketch(), "staying": TaskSketch()})
    repository = tmp_path / "repository"
    export_system(system, repository, response_cache=True)

    def expected(task: str) -> np.ndarray:
        return reference_logits(system.path(system.tasks()[task].path_id), system.tensors, IMAGES)

    def is_right(task: str) -> bool:
        return np.allclose(caller.infer(task, IMAGES)["logits"], expected(task), rtol=0, atol=1e-4)

    def check_kept(task: str) -> None:
        stem = Repository(repository).read().tasks[task].route[0]
        assert is_right(task)
        before = num_hits(caller, stem)
        assert is_right(task)
        assert num_hits(caller, stem) == before + 1

    arguments = ("--cache", "16", "--interval", "0.1")
    with TritonRun(repository, tmp_path / "output", *arguments) as run, Caller(run.address) as caller:
        for task in ("moving", "staying"):
            check_kept(task)
        before = expected("moving")
        # From the first layer on, another path, and the same question.
        add_task(system, "moving", TaskSketch(cloned=(PATCH_EMBED,)))
        export_system(system, repository, response_cache=True)
        assert np.abs(expected("moving") - before).max() > 0.01
        wait_until(lambda: is_right("moving"))
        for task in ("moving", "staying"):
            check_kept(task)
