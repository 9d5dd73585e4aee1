"""What is to be deployed of the server, as far as it can be checked without containers, a cluster or Grafana."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import tomllib
from importlib import metadata
from typing import Any

import pytest
import typer.core
import typer.main
import yaml
from packaging.requirements import Requirement

from server.cli import app
from server.config import MetricsSettings, ServerSettings, read_settings
from server.metrics import Metrics
from server.probe import _parser
from server.task_counts import TaskCounts
from tests.support.processes import TOP

DEPLOY = TOP / "deploy"
DOCKERFILE = (DEPLOY / "server" / "Dockerfile").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "server" / "kubernetes.yaml").read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def pod(manifests: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifests["Deployment"]["spec"]["template"]
    return found


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["spec"]["containers"]
    return dict(found)


@pytest.fixture
def settings(manifests: dict[str, Any], tmp_path: pathlib.Path) -> ServerSettings:
    (tmp_path / "server.toml").write_text(manifests["ConfigMap"]["data"]["server.toml"])
    return read_settings(tmp_path / "server.toml", {})


def check_command(arguments: list[str]) -> None:
    """Checks that munet-server has such a command with such options."""
    command, rest = typer.main.get_command(app), list(arguments)
    while isinstance(command, typer.core.TyperGroup):
        command = command.commands[rest.pop(0)]
    command.make_context("munet-server", rest)


def test_the_cluster_starts_a_command_that_exists(container: dict[str, Any]) -> None:
    check_command(container["args"])


def test_stopping_fits_into_the_grace_of_the_pod(pod: dict[str, Any], settings: ServerSettings) -> None:
    needed = settings.drain_seconds + settings.grace_seconds + 5
    assert pod["spec"]["terminationGracePeriodSeconds"] > needed
    (container,) = pod["spec"]["containers"]
    assert settings.drain_seconds >= 2 * container["readinessProbe"]["periodSeconds"]


def test_ports_volumes_and_labels_fit_together(
    manifests: dict[str, Any], pod: dict[str, Any], container: dict[str, Any], settings: ServerSettings
) -> None:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert settings.metrics_listen is not None
    assert ports == {"grpc": port_of(settings.listen), "metrics": port_of(settings.metrics_listen)}
    assert settings.admin_listen.startswith("127.0.0.1:")
    assert all(port["port"] == ports[port["targetPort"]] for port in manifests["Service"]["spec"]["ports"])
    assert {port["port"] for rule in manifests["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]} == ports.keys()
    labels = pod["metadata"]["labels"]
    assert manifests["Service"]["spec"]["selector"] == labels
    for kind, key in (("Deployment", "selector"), ("PodDisruptionBudget", "selector"), ("NetworkPolicy", "podSelector")):
        assert manifests[kind]["spec"][key]["matchLabels"] == labels
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert list(mounts) == [volume["name"] for volume in pod["spec"]["volumes"]]
    # What the server reads lies where something is mounted, and nothing but scratch can be written.
    read = [settings.repository, settings.tls.certificate_file, settings.tls.key_file, settings.tokens.file]
    read.append(pathlib.Path(container["args"][container["args"].index("--settings") + 1]))
    folders = {pathlib.Path(mount["mountPath"]) for mount in mounts.values()}
    assert all(file is not None and folders & {file, *file.parents} for file in read)
    assert [name for name, mount in mounts.items() if not mount.get("readOnly")] == ["scratch"]


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def test_nobody_is_root(pod: dict[str, Any], container: dict[str, Any]) -> None:
    (user,) = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)
    assert pod["spec"]["securityContext"]["runAsUser"] == int(user) > 0
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_probes_ask_what_listens(container: dict[str, Any], settings: ServerSettings) -> None:
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        program, *arguments = container[name]["exec"]["command"]
        assert [program, *arguments[:2]] == ["python", "-m", "server.probe"]
        told = _parser().parse_args(arguments[2:])
        assert port_of(told.server) == port_of(settings.listen)
        assert told.timeout < container[name]["timeoutSeconds"]
        # Whoever stops, or has lost its Tritons, is not to be killed for it.
        assert told.live is (name == "livenessProbe")


def instruction(name: str) -> list[str]:
    (found,) = re.findall(rf"^{name} (\[.*\])$", DOCKERFILE, re.MULTILINE)
    return list(json.loads(found))


def test_the_image_starts_a_command_that_exists() -> None:
    assert instruction("ENTRYPOINT") == ["munet-server"]
    arguments = instruction("CMD")
    check_command(arguments)
    assert {port_of(word) for word in arguments if re.fullmatch(r"[\d.]+:\d+", word)} == {
        int(port) for port in re.findall(r"\d+", re.findall(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)[0])
    }
    (check,) = re.findall(r"^HEALTHCHECK .*\\\n  CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    assert port_of(_parser().parse_args(json.loads(check)[3:]).server) == port_of(arguments[arguments.index("--listen") + 1])


def test_the_image_is_built_of_what_is_there() -> None:
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        *sources, _ = shlex.split(line)
        assert all((TOP / source).exists() for source in sources)
    ignored = (DEPLOY / "server" / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    copied = {source for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE) for source in line.split()[:-1]}
    assert copied == set(re.findall(r"^!(.*)$", ignored, re.MULTILINE))


def test_what_the_image_installs_brings_no_torch() -> None:
    extras = set(re.findall(r"'\.\[([a-z,]+)\]'", DOCKERFILE)[0].split(","))
    project = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [Requirement(line) for line in wanted]
    while waiting:
        requirement = waiting.pop()
        key = (requirement.name.lower(), frozenset(requirement.extras))
        if key in seen or not is_needed(requirement, {""}):
            continue
        seen.add(key)
        try:
            further = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [one for line in further if is_needed(one := Requirement(line), requirement.extras | {""})]
    names = {name for name, _ in seen}
    assert {"grpcio", "prometheus-client", "opentelemetry-sdk", "numpy"} <= names
    assert not names & {"torch", "torchvision", "timm", "ray", "scikit-learn"}


def is_needed(requirement: Requirement, extras: set[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)


# Prometheus and Grafana


def known_series() -> set[str]:
    metrics = Metrics(list, TaskCounts(), MetricsSettings())
    known = {"up"}
    for family in metrics.registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "info": ["_info"]}.get(family.type, [""])
        known |= {f"{family.name}{suffix}" for suffix in suffixes}
    return known


def series_in(expression: str) -> set[str]:
    bare = re.sub(r'"[^"]*"|\{[^}]*\}|\[[^]]*\]', " ", expression)
    return set(re.findall(r"\b(?:munet_\w+|process_\w+|up)\b", bare))


def test_a_series_that_is_not_there_would_be_noticed() -> None:
    assert series_in('sum by (task) (rate(munet_tusk_images_total{task=~"up"}[5m])) > 0') == {"munet_tusk_images_total"}
    assert "munet_tusk_images_total" not in known_series()


def test_the_dashboard_shows_what_there_is() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "munet.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    expressions += [variable["definition"] for variable in dashboard["templating"]["list"] if "definition" in variable]
    expressions += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    named = {name for expression in expressions for name in series_in(expression)}
    assert named <= known_series()
    # All that is ours, but for what only says what the server is.
    ours = {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in known_series() if name.startswith("munet_")}
    assert {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in named} >= ours - {"munet_build_info"}
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for expression in expressions:
        assert all(expression.count(left) == expression.count(right) for left, right in ("()", "{}", "[]")), expression


def test_alerts_ask_for_what_there_is() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        assert series_in(rule["expr"])
        assert series_in(rule["expr"]) <= known_series()
        assert all(rule["expr"].count(left) == rule["expr"].count(right) for left, right in ("()", "{}", "[]"))


def test_prometheus_finds_the_pods(manifests: dict[str, Any], container: dict[str, Any]) -> None:
    files = [DEPLOY / "prometheus" / name for name in ("prometheus.yaml", "prometheus-kubernetes.yaml")]
    (on_machine,), (in_kubernetes,) = (jobs_of(file) for file in files)
    label, port = in_kubernetes["relabel_configs"][0]["regex"].split(";")
    assert manifests["Deployment"]["spec"]["template"]["metadata"]["labels"] == {"app": label}
    assert port in {entry["name"] for entry in container["ports"]}
    # Alerts tell ours by these names.
    assert all(re.fullmatch("munet.*", job["job_name"]) for job in (on_machine, in_kubernetes))


def jobs_of(file: pathlib.Path) -> list[dict[str, Any]]:
    told = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert all((file.parent / name).is_file() for name in told["rule_files"])
    jobs: list[dict[str, Any]] = told["scrape_configs"]
    return jobs
