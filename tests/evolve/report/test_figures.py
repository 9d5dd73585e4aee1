"""Figures: what is written in them stays inside, and nothing covers anything else, with one task, eight and sixty."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET

import matplotlib.text
import pytest
from matplotlib.figure import Figure

from evolve.report.accuracy import draw_methods, draw_task, draw_tasks
from evolve.report.charts import draw_all
from evolve.report.drawing import (
    in_time,
    in_units,
    new_figure,
    place_labels,
    settle,
    shorten,
    style,
    task_colours,
    to_svg,
)
from evolve.report.families import draw_family
from evolve.report.graph import draw_graph, draw_in_common
from evolve.report.spending import draw_flops, draw_seconds
from evolve.report.tuning import draw_hyperparameter, draw_mutations, varied
from tests.support.reported import make_child, make_content, make_search, make_task

METHODS = (
    "finetune",
    "finetune (tuned)",
    "freeze:0",
    "freeze:1",
    "freeze:2",
    "freeze:3",
    "adapters:8",
    "adapters:32",
    "adapters:128",
)


@pytest.fixture(autouse=True)
def styled():
    with style():
        yield


def _written(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    """Draws a figure and returns every text that was drawn, with the box it takes."""
    found = []
    draw = matplotlib.text.Text.draw

    def record(text, renderer, *rest, **more):
        if text.get_visible() and text.get_text().strip():
            found.append((text.get_text(), text.get_window_extent(renderer)))
        draw(text, renderer, *rest, **more)

    settle(figure)
    with monkeypatch.context() as patch:
        patch.setattr(matplotlib.text.Text, "draw", record)
        figure.canvas.draw()
    return found


def _faults(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Returns a sentence for each text that leaves the figure or covers another."""
    written = _written(figure, monkeypatch)
    assert written
    frame = figure.bbox
    faults = [
        f"{text!r} leaves the figure"
        for text, box in written
        if box.x0 < frame.x0 or box.y0 < frame.y0 or box.x1 > frame.x1 or box.y1 > frame.y1
    ]
    for (one, here), (other, there) in itertools.combinations(written, 2):
        # Boxes have air above and below the letters.
        if min(here.x1, there.x1) - max(here.x0, there.x0) > 1 and min(here.y1, there.y1) - max(here.y0, there.y0) > 2:
            faults.append(f"{one!r} covers {other!r}")
    return faults


def test_faults_are_found(monkeypatch):
    figure = new_figure(100, 100, layout=None)
    figure.text(0.5, 0.5, "one")
    figure.text(0.5, 0.52, "other")
    figure.text(0.9, 0.1, "outside")
    assert _faults(figure, monkeypatch) == ["'outside' leaves the figure", "'one' covers 'other'"]


@pytest.mark.parametrize("num_tasks", [1, 8, 60])
def test_words_stay_inside_and_cover_nothing(num_tasks, monkeypatch):
    content = make_content(num_tasks, num_blocks=3 if num_tasks < 60 else 6)
    figures = {
        "accuracy": draw_tasks(content.standings),
        "model": draw_graph(content.structure),
        "in common": draw_in_common(content.structure),
        "family": draw_family(content.searches[:1]),
        "mutations": draw_mutations(content.payoffs),
        "time": draw_seconds(content.costs),
        "flops": draw_flops(content.costs),
        **{name: draw_hyperparameter(name, values, content.searches) for name, values in varied(content.searches).items()},
    }
    assert len(figures) == 10
    assert {name: faults for name, figure in figures.items() if (faults := _faults(figure, monkeypatch))} == {}


def test_words_of_baselines_cover_nothing(monkeypatch):
    content = make_content(3, methods=METHODS, num_blocks=2)
    for figure in (draw_methods(content.methods), draw_task(content.standings[0], content.baselines[::3])):
        assert _faults(figure, monkeypatch) == []
        assert sum(text in ("search", *METHODS) for text, _ in _written(figure, monkeypatch)) >= 7


def test_every_section_has_its_figures():
    names = [(chart.section, chart.name) for chart in draw_all(make_content(2, methods=("finetune",), num_blocks=2))]
    assert len({name for _, name in names}) == len(names)
    assert [section for section, _ in itertools.groupby(names, key=lambda pair: pair[0])] == [
        *("accuracy", "model", "families", "hyperparameters", "mutations", "cost"),
    ]


def test_layers_are_drawn_in_the_colour_of_their_trainers():
    content = make_content(4, num_blocks=2)
    figure = draw_graph(content.structure)
    boxes = [patch for patch in figure.axes[0].patches if type(patch).__name__ == "FancyBboxPatch"]
    layers = [layer for row in content.structure.rows for layer in row.layers]
    assert len(boxes) == len(layers)
    colours = task_colours(content.structure.tasks)
    for box, layer in zip(boxes, layers, strict=True):
        found = "#" + "".join(f"{round(255 * part):02x}" for part in box.get_facecolor()[:3])
        assert found == colours.get(layer.trained_by, "#9aa1ab")


def test_labels_without_room_are_left_out(monkeypatch):
    figure = new_figure(200, 200)
    axes = figure.add_subplot()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    left_out = place_labels(axes, [(0.5, 0.5, "label") for _ in range(20)])
    assert len(axes.texts) == 20 - left_out
    assert 3 <= len(axes.texts) <= 8, "around one point there is room for a few"
    assert _faults(figure, monkeypatch) == []


def test_a_family_that_diverged_as_a_whole_can_be_drawn(monkeypatch):
    children = [make_child(n, diverged=True, quality=0.0, score=0.0) for n in range(3)]
    assert _faults(draw_family([make_search(*children)]), monkeypatch) == []


def test_many_rounds_and_children_can_be_drawn(monkeypatch):
    rounds = [make_search(*(make_child(n, score=n / 200) for n in range(128)), round=r) for r in range(8)]
    assert _faults(draw_family(rounds), monkeypatch) == []


def test_equal_accuracies_and_parameters_have_room(monkeypatch):
    from evolve.report.content import rank

    standings = rank([make_task(name, accounted_parameters=0.0) for name in "abc"], [])
    assert _faults(draw_tasks(standings), monkeypatch) == []


def test_the_same_figure_gives_the_same_svg_and_its_ids_bear_its_name():
    texts = [to_svg(draw_in_common(make_content(3, num_blocks=2).structure), "in-common") for _ in range(2)]
    assert texts[0] == texts[1]
    root = ET.fromstring(texts[0])
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert ids
    assert all(name.startswith("in-common-") for name in ids)
    links = [value for element in root.iter() for key, value in element.attrib.items() if key.endswith("href")]
    assert {link.removeprefix("#") for link in links} <= set(ids)


def test_colours_tell_tasks_apart():
    for number in (1, 8, 10, 60):
        assert len(set(task_colours([str(task) for task in range(number)]).values())) == number


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (55, "55"), (999, "999"), (999.6, "1k"), (1484162, "1.48M"), (999_600, "1M"), (3.2e14, "320T"), (2e20, "200E")],
)
def test_numbers_in_units(value, words):
    assert in_units(value) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0.0 s"),
        (99.9, "99.9 s"),
        (100, "1.7 min"),
        (596.9, "9.9 min"),
        (597, "10 min"),
        (3600, "60 min"),
        (2 * 3600, "2.0 h"),
        (72 * 3600, "3.0 d"),
    ],
)
def test_durations(seconds, words):
    assert in_time(seconds) == words


def test_long_names_keep_their_ends():
    assert shorten("greek", 10) == "greek"
    assert shorten("letters-of-the-greek-alphabet-2", 10) == "letter…t-2"
    assert len(shorten("x" * 64, 22)) == 22
