"""The page and its files: whole, self-contained, and safe from what users name things."""

from __future__ import annotations

import csv
import dataclasses
import html.parser
import json
import re

import pytest
from PIL import Image

from evolve.errors import SystemFolderError
from evolve.report.charts import draw_all
from evolve.report.drawing import style, to_svg
from evolve.report.page import Drawn, embed, to_html
from evolve.report.write import PAGE, write_report
from evolve.store import System
from tests.support.fake_trainer import tiny_root
from tests.support.reported import make_content
from tests.support.searched import add_baseline, searched_system


class _Reader(html.parser.HTMLParser):
    """Collects what a page asks for, what it names and what it says; notices elements that are not closed."""

    VOID = frozenset({"meta", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self._note(dict(attrs))

    def _note(self, attributes):
        if "id" in attributes:
            self.ids.append(attributes["id"])
        self.links += [attributes[name] for name in ("href", "src", "data", "action") if name in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of two tasks with baselines."""
    folder = tmp_path_factory.mktemp("reported")
    system = searched_system(folder / "system", 2, children=8)
    for task in system.tasks():
        add_baseline(system, "finetune", task)
        add_baseline(system, "freeze:2", task)
    add_baseline(system, "adapters:8", "greek", is_finished=False)
    content = write_report(system, folder / "out")
    return system, folder / "out", content


def test_the_page_is_whole_and_asks_for_nothing_else(written):
    _, out, _ = written
    page = (out / PAGE).read_text(encoding="utf-8")
    reader = _Reader(page)
    assert len(reader.ids) == len(set(reader.ids))
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    own = [link for link in reader.links if link.startswith("#")]
    assert {link.removeprefix("#") for link in own} <= set(reader.ids)
    others = set(reader.links) - set(own)
    assert others
    assert all((out / link).is_file() for link in others), "links to its own files only"
    assert "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []
    # Namespaces are names, nothing is fetched from there.
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page


def test_the_page_says_what_was_computed(written):
    _, out, content = written
    words = " ".join(_Reader((out / PAGE).read_text(encoding="utf-8")).words)
    for standing in content.standings:
        assert standing.task.name in words
        assert f"{standing.accuracy:.2%}" in words
        assert f"{100 * standing.margin:+.2f}" in words
    assert "the baseline adapters-8 of greek is unfinished; it is left out" in words
    assert f"{sum(cost.num_children for cost in content.costs)} children".split()[0] in words


def test_every_figure_is_a_file_of_both_sorts_and_in_the_page(written):
    _, out, _ = written
    names = {file.stem for file in (out / "figures").iterdir()}
    page = (out / PAGE).read_text(encoding="utf-8")
    assert {"accuracy", "methods", "accuracy-greek", "model", "in-common", "family-digits", "time", "flops"} <= names
    assert page.count("<svg") == len(names)
    for name in names:
        assert (out / "figures" / f"{name}.svg").read_text(encoding="utf-8").startswith("<?xml")
        with Image.open(out / "figures" / f"{name}.png") as image:
            image.verify()


def test_every_number_is_in_csv_and_json(written):
    system, out, content = written
    document = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert document["system"]["system_id"] == system.id
    assert document["findings"] == list(content.findings)
    for name, table in document["tables"].items():
        with (out / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(table)
        for row, expected in zip(rows, table, strict=True):
            assert row == {key: "" if value is None else str(value) for key, value in expected.items()}


def test_names_are_words_not_markup():
    content = make_content(1, num_blocks=2)
    (standing,) = content.standings
    evil = '<script>alert("1")</script>&amp;'
    named = dataclasses.replace(standing, task=dataclasses.replace(standing.task, name=evil))
    content = dataclasses.replace(content, standings=(named,), findings=(evil,))
    with style():
        drawn = [
            Drawn(name, section, evil, to_svg(figure, name)) for name, section, figure in draw_all(content) if name == "model"
        ]
    page = to_html(content, evil, {"model": evil}, drawn)
    reader = _Reader(page)
    assert "script" not in reader.tags
    assert "".join(reader.words).count(evil) >= 4


def test_figures_in_the_page_follow_its_colours():
    with style():
        svg = next(to_svg(figure, name) for name, _, figure in draw_all(make_content(1, num_blocks=2)) if name == "model")
    embedded = embed(svg, "the model")
    assert "#1b1f24" in svg
    assert "#1b1f24" not in embedded
    assert "var(--ink)" in embedded
    assert "var(--surface)" in embedded
    assert embedded.startswith("<svg")


def test_an_empty_system_has_a_page_which_takes_the_place_of_an_earlier_one(tmp_path):
    system = System.create(tmp_path / "system", tiny_root(), 32)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PAGE).write_text("an earlier one")
    write_report(system, tmp_path / "out")
    reader = _Reader((tmp_path / "out" / PAGE).read_text(encoding="utf-8"))
    assert "svg" not in reader.tags
    assert not (tmp_path / "out" / "figures").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    system = System.create(tmp_path / "system", tiny_root(), 32)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemFolderError, match="could not write in .*out"):
        write_report(system, tmp_path / "out")
