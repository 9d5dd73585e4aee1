"""The page for whoever operates a server says everything there is, and nothing that is not."""

from __future__ import annotations

import importlib.util
import inspect
import re
from types import ModuleType

import pytest
import yaml

from server import errors
from server.errors import CallError, ServerError
from server.front_door.status import status_of
from tests.support.processes import TOP

FILE = TOP / "docs" / "operations.md"
PAGE = FILE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", TOP / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_code(generate: ModuleType) -> None:
    assert generate.written(PAGE) == PAGE, "run: make docs"


def test_a_table_that_lacks_something_is_not_the_codes(generate: ModuleType) -> None:
    for name in ("`munet_calls_total`", "`limits.max_images`", "`--grace`"):
        (row,) = re.findall(rf"^\| {name} \|.*\n", PAGE, re.MULTILINE)
        assert generate.written(PAGE.replace(row, "")) == PAGE


def test_every_metric_and_setting_has_a_meaning() -> None:
    rows = re.findall(r"^\| (`(?:munet_|process_|[a-z_.]+`).*)\|$", PAGE, re.MULTILINE)
    assert len(rows) > 80
    assert all(row.rpartition("|")[2].strip() for row in rows)


def error_rows() -> dict[str, str]:
    section = PAGE.partition("## Errors")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| ([A-Z_]+) \|", section, re.MULTILINE)
    return {reason: status for reasons, status in rows for reason in re.findall(r"`(\w+)`", reasons)}


def test_every_error_is_there_with_its_status() -> None:
    classes = [
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, ServerError) and not issubclass(kind, CallError)
    ]
    # Its class alone says what an error's reason and status are.
    expected = {errors.reason_of(error): status_of(error).name for error in (kind.__new__(kind) for kind in classes)}
    expected |= {"bug": status_of(KeyError()).name, "cancelled": "CANCELLED"}
    assert error_rows() == expected
    clients = {name for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, CallError)}
    assert clients <= set(re.findall(r"`(\w+)`", PAGE.partition("## Errors")[2]))


def test_every_alert_is_there() -> None:
    rules = yaml.safe_load((TOP / "deploy" / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))
    named = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert set(re.findall(r"^\| `(Munet\w+)` \|", PAGE, re.MULTILINE)) == named
