"""Prometheus itself on what is to be deployed for it: its checks, what the alerts fire on, and each panel of the dashboard."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from server.client import AdminClient, Client
from server.errors import CallError
from tests.support.images import encode
from tests.support.processes import TOP
from tests.support.repository import RepositoryBuilder, random_images
from tests.support.serving import serving, wait_until

FOLDER = TOP / "deploy" / "prometheus"
PROMETHEUS, PROMTOOL = shutil.which("prometheus"), shutil.which("promtool")

needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None or PROMTOOL is None, reason="no prometheus and promtool here (Debian: apt-get install prometheus)"
)

EMPTY = {"Files read again"}
"""Panels that show nothing where there are no such files."""


def run_promtool(*arguments: str) -> str:
    done = subprocess.run([str(PROMTOOL), *arguments], cwd=FOLDER, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))


def test_each_alert_has_cases_in_which_it_fires_and_in_which_it_does_not() -> None:
    alerts = {rule["alert"] for group in read("alerts.yaml")["groups"] for rule in group["rules"]}
    cases = [case for test in read("alerts_test.yaml")["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == alerts
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == alerts


@needs_prometheus
def test_alerts_fire_in_those_cases() -> None:
    assert "SUCCESS" in run_promtool("test", "rules", "alerts_test.yaml")


@needs_prometheus
def test_what_prometheus_reads_is_sound() -> None:
    assert "8 rules found" in run_promtool("check", "config", "prometheus.yaml")


@contextlib.contextmanager
def prometheus(folder: pathlib.Path, target: str) -> Iterator[str]:
    """Runs Prometheus with what is to be deployed, on one server, and gives its address."""
    told = (FOLDER / "prometheus.yaml").read_text(encoding="utf-8")
    assert "127.0.0.1:9090" in told
    assert "scrape_interval: 15s" in told
    told = told.replace("127.0.0.1:9090", target).replace("scrape_interval: 15s", "scrape_interval: 200ms")
    (folder / "prometheus.yaml").write_text(told, encoding="utf-8")
    shutil.copy(FOLDER / "alerts.yaml", folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [str(PROMETHEUS), f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
        try:
            yield address
        finally:
            process.terminate()
            process.wait(20)


def query(address: str, expression: str) -> list[Any]:
    """Returns what an expression gives now; nothing as long as Prometheus is not ready."""
    try:
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}") as answer:
            found: list[Any] = json.load(answer)["data"]["result"]
            return found
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return []
        pytest.fail(f"{expression}: {error.read().decode()}")
    except urllib.error.URLError:
        return []


def wait_for(address: str, expression: str) -> None:
    """Waits until an expression gives something."""
    wait_until(lambda: bool(query(address, expression)), 60)


def num_scrapes(address: str) -> int:
    (found,) = query(address, "count_over_time(up[1h])")
    return int(found["value"][1])


def expressions(panel: dict[str, Any]) -> list[str]:
    variables = {"$__rate_interval": "30s", "$instance": ".*", "$task": ".*"}
    found = []
    for expression in (target["expr"] for target in panel.get("targets", ())):
        for name, value in variables.items():
            expression = expression.replace(name, value)
        assert "$" not in expression
        found.append(expression)
    return found


@needs_prometheus
def test_each_panel_of_the_dashboard_shows_something(tmp_path: pathlib.Path) -> None:
    dashboard = json.loads((TOP / "deploy" / "grafana" / "munet.json").read_text(encoding="utf-8"))
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish()
    image = encode(random_images(1, 8)[0])
    with (
        serving(builder.root, metrics_listen="127.0.0.1:0") as server,
        prometheus(tmp_path, server.server.metrics_address) as address,
        Client(server.address, retry=None) as client,
        AdminClient(server.admin_address) as admin,
    ):
        wait_for(address, "up == 1")
        for _ in range(2):
            builder.publish()
            admin.reload()
            client.classify_tasks(image)
            with contextlib.suppress(CallError):
                client.classify("digits", b"no image")
            # Two scrapes later, so that there is a rate of what has come to be.
            wait_for(address, f"count_over_time(up[1h]) >= {num_scrapes(address) + 3}")
        for panel in dashboard["panels"]:
            if panel["title"] not in EMPTY:
                for expression in expressions(panel):
                    wait_for(address, expression)
