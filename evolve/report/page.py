"""The page of a report: one HTML document that needs nothing else, in light and dark, on narrow and wide screens."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

import jinja2
import markupsafe

from evolve.report.content import SEARCH, Content
from evolve.report.drawing import VARIABLES, in_time, in_units
from evolve.report.tables import tables
from munet.words import counted


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A figure for the page.

    Attributes:
        name: of its files.
        section: whose section it belongs to.
        title: what it shows, for who does not see it.
        svg: an SVG document.
    """

    name: str
    section: str
    title: str
    svg: str


@dataclasses.dataclass(frozen=True)
class _Figure:
    svg: markupsafe.Markup
    is_wide: bool


@dataclasses.dataclass(frozen=True)
class _Table:
    """Cells as they are shown; `texts` are the columns of words, `below` is said under it."""

    names: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: frozenset[int] = frozenset()
    below: str = ""


@dataclasses.dataclass(frozen=True)
class _Section:
    id: str
    title: str
    words: str
    tables: Sequence[_Table] = ()
    figures: Sequence[_Figure] = ()


@dataclasses.dataclass(frozen=True)
class _Tile:
    value: str
    words: str


_WIDE = 500
"""Figures wider than so many pixels have a line of the page for themselves."""


def to_html(content: Content, name: str, root: Mapping[str, object], drawn: Sequence[Drawn]) -> str:
    """Returns the page.

    Args:
        content: what it says.
        name: of the system.
        root: where its root comes from.
        drawn: its figures, in their order.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("evolve", "report"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        title=f"muNet: {name}",
        root=", ".join(f"{key} {value}" for key, value in root.items() if value is not None) or "unknown",
        tiles=_tiles(content),
        findings=content.findings,
        sections=[section for section in _sections(content, drawn) if section.tables or section.figures],
        tables=list(tables(content)),
    )


def embed(svg: str, title: str) -> markupsafe.Markup:
    """Returns an SVG document as an element of a page: as wide as it was drawn or a little narrower, in the page's colours.

    Args:
        svg: as evolve.report.drawing.to_svg gives it.
        title: what it shows.
    """
    svg = svg[svg.index("<svg") :]
    head, _, rest = svg.partition(">")
    found = re.search(r'viewBox="0 0 ([\d.]+) ', head)
    if found is None:
        raise ValueError("found an SVG without a viewBox, expected one as matplotlib writes it")
    width = float(found[1]) * 96 / 72
    head = re.sub(r'\s(width|height|version|xmlns:xlink)="[^"]*"', "", head)
    # Narrower screens shrink it as far as its words stay readable; then it scrolls.
    head += (
        f' role="img" aria-label="{markupsafe.escape(title)}" style="max-width: {width:.0f}px; min-width: {width * 0.82:.0f}px"'
    )
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL).replace("xlink:href", "href")
    for colour, variable in VARIABLES.items():
        rest = rest.replace(colour, f"var({variable})")
    return markupsafe.Markup(f"{head}>{rest}")  # matplotlib's own, with names as outlines of letters


def _tiles(content: Content) -> list[_Tile]:
    summary = content.summary
    children = [child for search in content.searches for child in search.children]
    unfinished = sum(search.end is None for search in content.searches)
    tiles = [
        _Tile(str(len(summary.tasks)), "tasks" if len(summary.tasks) != 1 else "task"),
        _Tile(in_units(summary.num_parameters), f"parameters in {summary.num_layers} layers"),
        _Tile(in_units(summary.separate_parameters), "parameters of separate models"),
        _Tile(str(len(content.searches)), "searches" + (f", {unfinished} unfinished" if unfinished else "")),
        _Tile(str(len(children)), f"children, {sum(child.survived for child in children)} survived"),
        _Tile(str(sum(child.diverged for child in children)), "children diverged"),
        _Tile(in_units(sum(child.num_trained_images for child in children)), "images trained"),
        _Tile(in_units(sum(child.flops for child in children)), "floating point operations"),
        _Tile(in_time(sum(cost.seconds for cost in content.costs)), "spent"),
    ]
    tested = [standing.accuracy for standing in content.standings if standing.is_tested]
    if tested:
        tiles.insert(1, _Tile(_share(sum(tested) / len(tested)), f"mean test accuracy of {counted(len(tested), 'task')}"))
    return tiles


def _sections(content: Content, drawn: Sequence[Drawn]) -> Iterable[_Section]:
    def figures(section: str) -> list[_Figure]:
        return [_figure(one) for one in drawn if one.section == section]

    yield _Section(
        "leaderboard",
        "Leaderboard",
        "Test accuracy was measured once, on images that no decision looked at; quality is validation accuracy, which the search "
        "chose by. Accounted parameters: each layer's, divided by the number of tasks that use it.",
        [table for table in (_leaderboard(content), _methods(content)) if table.rows],
    )
    yield _Section(
        "accuracy",
        "Accuracy and parameters",
        "Up is better, left is cheaper. Baselines, where there are any, had as many training steps as the whole search of the task, if "
        "they were run with its settings; hollow ones were tuned. A point whose name has no room has none: the tables name them all.",
        figures=figures("accuracy"),
    )
    yield _Section(
        "model",
        "The multitask model",
        "From the image below to the answers above. Each box is one layer, in the colour of the task that trained it, grey if the "
        "root did; a box under several lines serves several tasks. Each line is a task, in its own colour. The map says how many "
        "layers each two tasks have in common, the root's counted in; on its diagonal, how many a task uses.",
        figures=figures("model"),
    )
    yield _Section(
        "families",
        "Families",
        "Each child's score, with a line from its parent. Children of seeds (current paths of other tasks, and the root) always "
        "survive; others only if they beat their parent. Dotted lines part rounds. What diverged and scores nothing is drawn at the "
        "lower edge.",
        figures=figures("families"),
    )
    yield _Section(
        "hyperparameters",
        "Hyperparameters",
        "Only those that were not the same for all children. Filled: the child survived. Dotted lines part searches, where they are few.",
        figures=figures("hyperparameters"),
    )
    yield _Section(
        "mutations",
        "Which mutations paid",
        "A child that carried several counts for each, so that this shows company, not cause; few children mean little. Beside each "
        "bar: how many of how many, and what they gained or lost in score on average. Children of seeds are left out: they have no "
        "score to beat.",
        figures=figures("mutations"),
    )
    yield _Section(
        "cost",
        "Cost",
        "All rounds together. Other time is what was neither training nor validation nor examination; of a search that was resumed it is "
        "not known. A multiply-add counts as two operations. Diverged: losses or weights were not finite; such a child scores nothing. "
        "Stopped early: it could not beat its parent any more.",
        [table for table in (_costs(content),) if table.rows],
        figures("cost"),
    )


def _figure(drawn: Drawn) -> _Figure:
    found = re.search(r'viewBox="0 0 ([\d.]+) ', drawn.svg)
    return _Figure(embed(drawn.svg, drawn.title), found is not None and float(found[1]) * 96 / 72 > _WIDE)


def _leaderboard(content: Content) -> _Table:
    has_rivals = any(standing.rival for standing in content.standings)
    names = [
        "task",
        "test accuracy",
        "quality",
        "accounted",
        "own",
        "parameters",
        "blocks",
        "adapters",
        "pixels",
        "rounds",
        "from",
    ]
    rows = []
    for standing in content.standings:
        task = standing.task
        row = [
            task.name + (" (private)" if task.private else ""),
            "-" if task.test_accuracy is None else _share(task.test_accuracy),
            _share(task.quality),
            in_units(task.accounted_parameters),
            in_units(task.own_parameters),
            in_units(task.num_parameters),
            str(task.num_blocks),
            str(len(task.adapters)),
            str(task.image_size),
            str(task.rounds),
            task.parent,
        ]
        if has_rivals:
            rival, margin = standing.rival, standing.margin
            row[3:3] = ["-", "-"] if rival is None or margin is None else [_margin(margin), rival.method]
        rows.append(row)
    if has_rivals:
        names[3:3] = ["margin", "best baseline"]
    texts = {names.index("from")} | ({names.index("best baseline")} if has_rivals else set())
    return _Table(
        names,
        rows,
        frozenset(texts),
        "Margin: points above the best baseline of the task, in test accuracy, or in quality without a test split."
        if has_rivals
        else "",
    )


def _methods(content: Content) -> _Table:
    names = ("method", "tasks", "mean test accuracy", "margin", "accounted", "images trained", "operations", "train and validate")
    rows = [
        (
            row.method,
            str(row.num_tasks),
            _share(row.accuracy),
            "-" if row.method == SEARCH else _margin(row.margin),
            in_units(row.accounted_parameters),
            in_units(row.num_trained_images),
            in_units(row.flops),
            in_time(row.seconds),
        )
        for row in content.methods
    ]
    below = (
        "Margin: points above the search, mean over the tasks that both were tested on. Accounted parameters: mean over tasks. Images, "
        "operations and time: sums. Equal steps are not equal arithmetic."
    )
    return _Table(names, rows, below=below)


def _costs(content: Content) -> _Table:
    names = (
        "task",
        "rounds",
        "children",
        "survived",
        "diverged",
        "stopped early",
        "images",
        "operations",
        "train",
        "validate",
        "examine",
        "other",
    )
    rows = [
        (
            cost.task,
            str(cost.num_searches),
            str(cost.num_children),
            str(cost.num_survived),
            str(cost.num_diverged),
            str(cost.num_stopped_early),
            in_units(cost.num_trained_images),
            in_units(cost.flops),
            in_time(cost.train_seconds),
            in_time(cost.evaluate_seconds),
            in_time(cost.examine_seconds),
            in_time(cost.other_seconds),
        )
        for cost in content.costs
    ]
    return _Table(names, rows)


def _share(value: float) -> str:
    return f"{value:.2%}"


def _margin(value: float) -> str:
    return f"{100 * value:+.2f}"
