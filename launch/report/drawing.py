"""How every picture looks, as PNG and as SVG: one style, a title, labels with units, and a legend below where lines are several.

Pictures are drawn without a word on the terminal: what matplotlib warns of (fonts, glyphs, empty legends) mends nobody's run.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from launch.report.history import Series

BLUE, GREEN, ORANGE, RED, GREY = "#2a6f97", "#3d7d53", "#c9761a", "#b5483a", "#5f6b75"
COLOURS = (BLUE, ORANGE, GREEN, RED, "#6d5a99", "#3a9291", "#8c6546", GREY)
LINES = ("-", "--", "-.", ":")  # so that lines differ in print without colours, too
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans", "sans-serif"]  # names of runs are written in any script
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "font.family": FONTS,
    "svg.fonttype": "none",
    "svg.hashsalt": "negpool",
    "text.parse_math": False,  # the name of a run may have dollar signs
    "axes.grid": True,
    "grid.color": "#e3e8ec",
    "axes.axisbelow": True,
}
SIZE = (6.0, 3.5)  # inches
SMOOTH = 0.05  # share of a line whose median is shown at each of its places
MOST_POINTS = 600  # of a line: more make a page slow, and nobody sees them
APART = "dev and test are different queries"
MOST_NAMES = 12  # along an axis

Pictures = dict[str, tuple[str, Figure]]  # title and figure, by name
Wanted = tuple[str, str, Any, Callable[[Axes], None]]  # title, label of the values, what must be there, what draws


@contextlib.contextmanager
def quiet_style() -> Iterator[None]:
    """Draw in the style of all pictures, without warnings."""
    log = logging.getLogger("matplotlib")  # of each font that is not there, at each text
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with rc_context(STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def picture(title: str, x_label: str, y_label: str) -> Iterator[tuple[Figure, Axes]]:
    """Give a figure to draw on; its legend is made from the labels of what was drawn."""
    with quiet_style():
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        yield figure, axes
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            longest = max(map(len, labels))
            columns = 1 if longest > 42 else 2 if longest > 18 else 3
            figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def draw_wanted(x_label: str, wanted: dict[str, Wanted]) -> Pictures:
    """Return title and picture, by name, of all that there is something to draw for."""
    found: Pictures = {}
    for name, (title, y_label, is_there, draw) in wanted.items():
        if is_there:
            with picture(title, x_label, y_label) as (figure, axes):
                draw(axes)
            found[name] = title, figure
    return found


def as_png(figure: Figure) -> bytes:
    """Return a picture's PNG."""
    buffer = io.BytesIO()
    with quiet_style():
        figure.savefig(buffer, format="png", dpi=160)
    return buffer.getvalue()


def as_svg(figure: Figure, name: str) -> str:
    """Return a picture as an element of a page; its ids begin with the name, for a page has one space of ids."""
    buffer = io.StringIO()
    with quiet_style():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)


def draw_noisy(axes: Axes, series: Series, colour: str) -> None:
    """Draw each value of a noisy line faintly, and the running median."""
    dot = "o" if len(series[0]) == 1 else ""
    axes.plot(*thinned(series), color=colour, alpha=0.35, linewidth=1, label="each step")
    axes.plot(*running_median(series), color=colour, linewidth=2, marker=dot, label="running median")
    whole_steps(axes)


def draw_stack(axes: Axes, names: Sequence[str], parts: dict[str, list[float]]) -> None:
    """Draw a bar of parts for each name."""
    bottom = np.zeros(len(names))
    for (part, values), colour in zip(parts.items(), (COLOURS * 9)[: len(parts)], strict=True):
        width = min(0.6, 0.15 * len(names))
        axes.bar(range(len(names)), values, bottom=bottom, label=part, color=colour, width=width)
        bottom += values
    name_places(axes, names)


def name_places(axes: Axes, names: Sequence[str]) -> None:
    """Name the places 0, 1, 2, … of the lower axis, not more than fit side by side."""
    step = -(-len(names) // MOST_NAMES) or 1
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.grid(axis="x", visible=False)
    if len(names) == 1:
        axes.set_xlim(-1, 1)


def whole_steps(axes: Axes) -> None:
    """Number the steps of the lower axis by whole numbers."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def log_scale(axes: Axes) -> None:
    """Make the upright axis logarithmic, with plain numbers: powers are typeset, which names of runs must not be."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def thinned(series: Series) -> Series:
    """Return at most MOST_POINTS of a line: the lowest and the highest of each stretch, so that no peak is lost."""
    places, values = series
    if len(values) <= MOST_POINTS:
        return series
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(values)), MOST_POINTS // 2):
        of_stretch = np.nan_to_num(np.array([values[i] for i in stretch], float))
        kept += sorted({int(stretch[of_stretch.argmin()]), int(stretch[of_stretch.argmax()])})
    return [places[i] for i in kept], [values[i] for i in kept]


def running_median(series: Series) -> Series:
    """Return the median of SMOOTH of a line around some of its places, at most MOST_POINTS."""
    places, values = series
    reach = max(2, round(len(values) * SMOOTH / 2))
    kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), MOST_POINTS)).astype(int)).tolist()
    return [places[i] for i in kept], [float(np.nanmedian(values[max(0, i - reach) : i + reach + 1])) for i in kept]
