"""Writes the tables of docs/operations.md that follow from the code, or checks that they are as they would be written.

Usage: python docs/generate.py [--check]
"""

from __future__ import annotations

import datetime as dt
import inspect
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

import pydantic
import typer.core
import typer.main

from server.cli import app
from server.config import MetricsSettings, ServerSettings
from server.engine import SegmentDistributions, SegmentStatistics
from server.histogram import Histogram
from server.metrics import Metrics
from server.reload import ReloadAttempt
from server.task_counts import TaskCounts

PAGE = pathlib.Path(__file__).with_name("operations.md")
_TABLE = "<!-- generated: {name} -->\n{content}<!-- end -->\n"


def settings() -> str:
    """Returns the table of all settings, with what the docstrings of their classes say of them."""
    return _table(("setting", "default", "meaning"), _settings(ServerSettings, ""))


def _settings(kind: type[pydantic.BaseModel], prefix: str) -> Iterator[Sequence[str]]:
    meanings = _attributes(kind)
    tables = []
    for name, field in kind.model_fields.items():
        if isinstance(field.default, pydantic.BaseModel):
            tables.append((type(field.default), f"{prefix}{name}."))
        elif get_origin(field.annotation) is dict:
            # One table for each of what has a name.
            tables.append((get_args(field.annotation)[1], f"{prefix}{name}.NAME."))
        else:
            yield f"`{prefix}{name}`", _shown(field.default), meanings[name]
    for table, inner in tables:
        yield from _settings(table, inner)


def _attributes(kind: type[object]) -> dict[str, str]:
    """Returns what a class's docstring says of its attributes, by name."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    meanings: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if found := re.fullmatch(r" {4}(\w+): (.*)", line):
            name = found[1]
            meanings[name] = found[2]
        elif name and line.strip():
            meanings[name] += f" {line.strip()}"
    return meanings


def flags() -> str:
    """Returns a table of flags for each command that has some."""
    return "\n".join(
        f"`munet-server {name}`\n\n" + _table(("flag", "default", "meaning"), map(_flag, parameters))
        for name, parameters in commands(typer.main.get_command(app))
    )


def commands(command: Any, name: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Yields each command's name, with those above it, and its options."""
    if isinstance(command, typer.core.TyperGroup):
        for inner, below in sorted(command.commands.items()):
            yield from commands(below, f"{name} {inner}".strip())
    else:
        yield name, [parameter for parameter in command.params if parameter.param_type_name == "option"]


def _flag(parameter: Any) -> Sequence[str]:
    shown = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    names = ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))
    required = "required" if parameter.required else _shown(shown)
    return names, required, parameter.help or ""


def metrics() -> str:
    """Returns the table of all metrics of our own."""
    return _table(("metric", "type", "labels", "meaning"), _metrics())


def _metrics() -> Iterator[Sequence[str]]:
    for family in exercised_metrics().registry.collect():
        if family.name.startswith("munet_") or family.name == "process_threads":
            suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
            labels = {label: None for sample in family.samples for label in sample.labels if label != "le"}
            yield f"`{family.name}{suffix}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation


def exercised_metrics() -> Metrics:
    """Returns metrics in which everything has been counted once."""
    histogram = Histogram((1.0,)).distribution()
    distributions = SegmentDistributions(histogram, histogram, histogram, histogram, histogram)
    counts = TaskCounts()
    with counts.counted(["task"], 1):
        pass
    counted = Metrics(lambda: [SegmentStatistics("seg-a", 1, 1, 1, distributions)], counts, MetricsSettings())
    counted.count_call("Service/Method", "OK", 0.1)
    counted.count_rejection("overloaded")
    counted.count_reload(ReloadAttempt(1, dt.datetime.now(dt.UTC), 0.1, ""))
    counted.count_reread("tokens", True)
    return counted


def _table(head: Sequence[str], rows: Iterator[Sequence[str]] | map[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _shown(default: object) -> str:
    match default:
        case None | () | False:
            return ""
        case True:
            return "true"
        case float():
            return f"{default:g}"
        case _:
            return f"`{default}`" if isinstance(default, str | pathlib.Path) else str(default)


def written(page: str) -> str:
    """Returns a page with its tables written anew.

    Raises:
        SystemExit: it has no place for a table.
    """
    for name, content in (("settings", settings()), ("flags", flags()), ("metrics", metrics())):
        pattern = re.escape(_TABLE).replace(r"\{name\}", name).replace(r"\{content\}", "(?:.*\n)*?")
        pattern = pattern.replace("\\\n", "\n")
        table = _TABLE.format(name=name, content=f"\n{content}\n")
        page, count = re.subn(pattern, table.replace("\\", r"\\"), page)
        if count != 1:
            raise SystemExit(f"found {count} places for the table {name!r} in {PAGE.name}, expected one")
    return page


def main() -> None:
    """Writes or checks."""
    before = PAGE.read_text(encoding="utf-8")
    after = written(before)
    if sys.argv[1:] == []:
        PAGE.write_text(after, encoding="utf-8")
    elif sys.argv[1:] != ["--check"]:
        raise SystemExit(__doc__)
    elif after != before:
        raise SystemExit(f"found tables in docs/{PAGE.name} other than what the code gives; run: make docs")


if __name__ == "__main__":
    main()
