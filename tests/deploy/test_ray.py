"""The Ray cluster that is to be deployed, as far as it can be checked without one."""

from __future__ import annotations

import re
import shlex
from typing import Any

import pytest
import typer.main
import yaml

from evolve.cli import app
from tests.support.processes import TOP

FOLDER = TOP / "deploy" / "ray"


def pod_of(template: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = template["spec"]
    return pod


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "cluster.yaml").read_text(encoding="utf-8"))["spec"]


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    return pod_of(yaml.safe_load((FOLDER / "job.yaml").read_text(encoding="utf-8"))["spec"]["template"])


def test_all_pods_have_one_image_and_see_one_folder(cluster: dict[str, Any], job: dict[str, Any]) -> None:
    pods = [
        pod_of(cluster["headGroupSpec"]["template"]),
        *(pod_of(group["template"]) for group in cluster["workerGroupSpecs"]),
        job,
    ]
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    assert {pod["containers"][0]["volumeMounts"][0]["mountPath"] for pod in pods} == {"/shared"}
    assert all(pod["volumes"][0]["name"] == pod["containers"][0]["volumeMounts"][0]["name"] for pod in pods)


def test_the_cluster_is_of_the_ray_that_is_tested(cluster: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(.+)$", (TOP / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]


def test_the_jobs_command_is_one_and_asks_for_as_many_workers_as_there_are_nodes(
    cluster: dict[str, Any], job: dict[str, Any]
) -> None:
    words = shlex.split(job["containers"][0]["args"][0].partition("&&")[2])
    assert words[:2] == ["munet-evolve", "run"]
    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    context = command.make_context("run", words[2:])
    assert context.params["executor"] == "ray"
    assert context.params["workers"] == cluster["workerGroupSpecs"][0]["maxReplicas"]
