"""Writing a report: the page, its figures, and every number as CSV and JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib

from evolve.errors import SystemFolderError
from evolve.report.charts import draw_all
from evolve.report.content import Content, read_content
from evolve.report.drawing import style, to_png, to_svg
from evolve.report.page import Drawn, to_html
from evolve.report.tables import tables, to_csv
from evolve.store import System
from munet.files import write_atomically

PAGE = "report.html"
"""Name of the page in the folder of a report."""


def write_report(system: System, out: str | os.PathLike[str]) -> Content:
    """Writes report.html, report.json, tables/*.csv and figures/*.svg and *.png into a folder; files of an earlier report are replaced.

    Args:
        system: what to report of; it may be evolving meanwhile.
        out: made if missing.

    Returns:
        What the report says.

    Raises:
        DamagedError: a current path or one of its layers is missing or altered.
        SystemFolderError: the folder cannot be written.
    """
    folder, content = pathlib.Path(out), read_content(system)
    files: dict[str, bytes] = {"report.json": to_json(content, system).encode()}
    for name, table in tables(content).items():
        files[f"tables/{name}.csv"] = to_csv(table).encode()
    drawn = []
    with style():
        for name, section, figure in draw_all(content):
            svg = to_svg(figure, name)
            drawn.append(Drawn(name, section, name.replace("-", " "), svg))
            files[f"figures/{name}.svg"] = svg.encode()
            files[f"figures/{name}.png"] = to_png(figure)
    files[PAGE] = to_html(content, system.folder.resolve().name, system.root_source, drawn).encode()
    try:
        for file, data in files.items():
            write_atomically(folder / file, data)
    except OSError as error:
        raise SystemFolderError(f"could not write in {folder} ({error.strerror})", "a writable folder with free space") from error
    return content


def to_json(content: Content, system: System) -> str:
    """Returns every number of a report as a JSON document: the summary of the system, and the tables by name."""
    document = {
        "system": dataclasses.asdict(content.summary),
        "root_source": dict(system.root_source),
        "findings": list(content.findings),
        "tables": tables(content),
    }
    return json.dumps(document, indent=1) + "\n"
