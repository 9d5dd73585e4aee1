"""What is to be deployed, as far as it can be checked without a cluster."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Any

import pytest
import yaml

from server.triton.container import CONTAINER, MAX_IR_VERSION, MAX_OPSET, ONNX_RUNTIME
from tests.support.processes import TOP
from tests.support.triton import environment

FOLDER = TOP / "deploy" / "triton"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8").replace("\\\n", "")


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    return {
        document["kind"]: document for document in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
    }


def test_the_cluster_runs_what_the_page_says(manifests: dict[str, Any]) -> None:
    (container,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    command = shlex.split(next(line for line in PAGE.splitlines() if line.startswith("docker run")))
    assert [container["image"], *container["command"], *container["args"]] == command[command.index(CONTAINER) :]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_ports_volumes_and_labels_fit_together(manifests: dict[str, Any]) -> None:
    pod = manifests["Deployment"]["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    # Those that tritonserver listens on unless told otherwise.
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    assert {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")} == {"http"}
    assert all(port["port"] == ports[port["targetPort"]] for port in manifests["Service"]["spec"]["ports"])
    assert {port["port"] for rule in manifests["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]} <= ports.keys()
    labels = pod["metadata"]["labels"]
    assert manifests["Service"]["spec"]["selector"] == labels
    assert manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert manifests["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["spec"]["volumes"]]
    timeout = next(
        int(found[1]) for argument in container["args"] if (found := re.fullmatch(r"--exit-timeout-secs=(\d+)", argument))
    )
    assert pod["spec"]["terminationGracePeriodSeconds"] > timeout


def test_a_real_tritonserver_knows_every_option() -> None:
    triton = environment()
    done = subprocess.run([triton.program, "--help"], env=triton.variables(), capture_output=True, text=True, check=False)
    known = set(re.findall(r"--[a-z-]+", done.stdout + done.stderr))
    options = set(re.findall(r"(--[a-z-]+)", "".join(line.partition(CONTAINER)[2] for line in PAGE.splitlines())))
    assert len(options) >= 4
    assert options <= known


def test_the_table_says_what_check_checks() -> None:
    release = CONTAINER.partition(":")[2].removesuffix("-py3")
    row = rf"\| {ONNX_RUNTIME.rpartition('.')[0]} \| {MAX_OPSET} \| {MAX_IR_VERSION} \| {release}:"
    assert re.search(row, PAGE)
    assert f"{release} holds {ONNX_RUNTIME}" in PAGE
