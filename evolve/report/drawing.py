"""What all figures of a report have in common: sizes in pixels, colours that a page can change, labels that do not overlap."""

from __future__ import annotations

import colorsys
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

INK = "#1b1f24"
MUTED = "#6a737d"
GRID = "#e1e4e9"
SURFACE = "#ffffff"
ROOT_COLOUR = "#9aa1ab"
UNKNOWN_COLOUR = "#59606b"
ACCENT = "#2f6fd0"
SECOND = "#e08a1e"
THIRD = "#3f9e6b"
BAD = "#c93c3c"
PALE = "#fdfdfe"
DARK = "#14171b"
"""This and the one before: words on a coloured ground, which is the same in light and dark."""

VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface"}
"""Colours that a page sets by its own variables, so that a figure in it follows its theme."""

DPI = 96
_FONT_PIXELS = 11
SMALL = 10 * 72 / DPI
"""Size of small text, in points."""

WIDTH = 420
"""Of a chart in pixels: on a narrow screen nearly all of it, on a wide one two or three side by side."""

LONGEST_NAME = 22
"""Characters that are shown of a name."""

MAX_ANNOTATED = 16
"""With more tasks or searches than these, figures leave out what would be said of each."""

_PNG_SCALE = 2

_SETTINGS: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": _FONT_PIXELS * 72 / DPI,
    "svg.fonttype": "path",
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 12 * 72 / DPI,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "figure.facecolor": SURFACE,
    "axes.facecolor": SURFACE,
}

# The first ten are told apart by more than their hue; grey is left to the root.
_FEW = (*("#3b78d8", "#e0861a", "#3a9d5d", "#cf4a4a", "#8a63c9", "#9c6b50", "#d268ae", "#8f9a1f", "#1ba3b3", "#c2a11c"),)


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Holds the looks of all figures, whatever a user's own settings of matplotlib are; figures are made and saved within it."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        yield


def new_figure(width: float, height: float, *, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """Returns an empty figure of so many pixels of a page."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout=layout)
    # Of its own accord a figure has a canvas that cannot measure text.
    FigureCanvasAgg(figure)
    return figure


def settle(figure: Figure) -> None:
    """Lays a figure out for good: layouts are slow, and each file that is written of it would begin anew."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def to_svg(figure: Figure, name: str) -> str:
    """Returns a figure as an SVG document; the same figure gives the same text.

    Args:
        figure: the figure.
        name: starts every id in it, so that several can stand in one page.
    """
    settle(figure)
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    for pattern in (r'(\bid=")', r'(href="#)', r"(url\(#)"):
        text = re.sub(pattern, rf"\g<1>{name}-", text)
    return text


def to_png(figure: Figure) -> bytes:
    """Returns a figure as PNG, with two pixels for one of the page."""
    settle(figure)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI * _PNG_SCALE, metadata={"Software": None})
    return stream.getvalue()


def task_colours(tasks: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each task; neighbours differ in hue or, where there are many, in lightness."""
    if len(tasks) <= len(_FEW):
        return dict(zip(tasks, _FEW, strict=False))
    colours = {}
    for index, task in enumerate(tasks):
        rgb = colorsys.hls_to_rgb(index / len(tasks), (0.42, 0.58)[index % 2], 0.6)
        colours[task] = "#" + "".join(f"{round(255 * value):02x}" for value in rgb)
    return colours


def shorten(text: str, most: int) -> str:
    """Returns a text of at most so many characters: of a longer one, its beginning and its end, where names differ."""
    if len(text) <= most:
        return text
    tail = (most - 1) // 3
    return f"{text[: most - 1 - tail]}…{text[len(text) - tail :]}"


def in_units(value: float) -> str:
    """Returns a number in three digits or fewer with the sign of its thousands: `1.48M`."""
    for factor, sign in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # What would be rounded to 1000 of the next smaller is 1 of this.
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{sign}"
    return f"{value:.3g}"


def in_time(seconds: float) -> str:
    """Returns a duration in words: `41.5 s`, `2.7 min`, `12 min`, `3.1 h`, `2.5 d`."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.{1 if seconds < 597 else 0}f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} d"


def place_labels(axes: Axes, labels: Sequence[tuple[float, float, str]]) -> int:
    """Writes a label beside each point so that none covers another, a point or an edge; one without a place is left out.

    The layout of the figure is settled by this: what is added later must not move the axes.

    Args:
        axes: with their final limits.
        labels: x and y of each point, and its label; the first are placed first.

    Returns:
        How many are left out.
    """
    figure = axes.get_figure(root=True)
    if figure is None or not isinstance(figure.canvas, FigureCanvasAgg):
        raise ValueError("found axes of no figure of `new_figure`, expected some that stand in one")
    settle(figure)
    renderer = figure.canvas.get_renderer()  # type: ignore[no-untyped-call]  # matplotlib leaves it untyped
    frame = axes.get_window_extent(renderer)
    points = [axes.transData.transform((x, y)) for x, y, _ in labels]
    taken = [Bbox.from_extents(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    left_out = 0
    for (x, y, text), own in zip(labels, list(taken), strict=True):
        if not _place(axes, (x, y), text, [box for box in taken if box is not own], taken, frame, renderer):
            left_out += 1
    return left_out


_AROUND: Sequence[tuple[float, float, str, str]] = (
    (7, 0, "left", "center"),
    (-7, 0, "right", "center"),
    (0, 7, "center", "bottom"),
    (0, -7, "center", "top"),
    (5, 5, "left", "bottom"),
    (5, -5, "left", "top"),
    (-5, 5, "right", "bottom"),
    (-5, -5, "right", "top"),
)


def _place(
    axes: Axes,
    point: tuple[float, float],
    text: str,
    others: Sequence[Bbox],
    taken: list[Bbox],
    frame: Bbox,
    renderer: Any,
) -> bool:
    for right, up, horizontal, vertical in _AROUND:
        label = axes.annotate(
            text,
            point,
            xytext=(right * 72 / DPI, up * 72 / DPI),
            textcoords="offset points",
            ha=horizontal,
            va=vertical,
            fontsize=SMALL,
        )
        box = label.get_window_extent(renderer)
        inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        if inside and not any(box.overlaps(other) for other in others):
            taken.append(box)
            return True
        label.remove()
    return False
