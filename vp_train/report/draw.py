"""Curves as small SVG pictures that take their colours and font from the page around them.

matplotlib draws them.  No text of a run comes into a picture: its words are in the page.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from vp_train.config import ConfigError
from vp_train.report.curves import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_COLOURS = 9  # of the page: --c0 to --c8
_DASHES = ("-", "--", ":", "-.")
NUM_STYLES = NUM_COLOURS * len(_DASHES)  # of curves that can be told apart
_WIDTH, _HEIGHT = 400.0, 210.0  # in points of the picture, which the page scales
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 10.0, 24.0
_FONT = 11
_MOST_MARKED = 40  # points of a curve that are marked
_CUT = 3.0  # times the median at which a stack of parts is cut off
# Colours that stand for those of the page.
_INK, _GRID = "#010203", "#010204"
_COLOURS = tuple(f"#0102{10 + index}" for index in range(NUM_COLOURS))


@dataclass(frozen=True, slots=True)
class Style:
    """The look of one curve: one of the page's colours, and one of the dashes."""

    colour: int
    dashes: int = 0

    @classmethod
    def of(cls, index: int) -> Style:
        """Return the look of curve `index`; NUM_STYLES differ."""
        return cls(index % NUM_COLOURS, index // NUM_COLOURS % len(_DASHES))

    @property
    def dash_array(self) -> str:
        """The dashes of the legend, as SVG writes them."""
        return ("none", "5 3", "1.5 2", "6 2 1.5 2")[self.dashes]


def require_packages() -> None:
    """Raise ConfigError, with the command that installs them, if a package is missing."""
    if (name := missing_package()) is not None:
        raise ConfigError(
            f"a report needs {name}, which is not installed; pip install 'vp_train[plot]'"
        )


def missing_package() -> str | None:
    """Return the name of a package that a report needs and that is not installed."""
    return next((name for name in ("jinja2", "matplotlib") if not find_spec(name)), None)


def lines(
    curves: Sequence[tuple[Style, Sequence[Point]]], *, name: str, from_zero: bool = False
) -> str:
    """Return a picture of curves over the steps, as an SVG element.

    `name` is a word for the picture: no other one of the page may have it.
    """
    figure, axes = _figure()
    for style, points in curves:
        marks = "o" if len(points) <= _MOST_MARKED else ""
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=_COLOURS[style.colour],
            linestyle=_DASHES[style.dashes],
            linewidth=1.5,
            marker=marks,
            markersize=3,
        )
    if from_zero:
        axes.set_ylim(bottom=0, top=max(axes.get_ylim()[1], 1e-12))
    return _svg(figure, name)


def stack(parts: Sequence[tuple[Style, Sequence[Point]]], *, name: str) -> tuple[str, bool]:
    """Return a picture of parts on top of each other, and whether its highest steps are cut off.

    All parts have their points at the same steps.
    """
    figure, axes = _figure()
    steps = [step for step, _ in parts[0][1]]
    values = [[value for _, value in points] for _, points in parts]
    colours = [_COLOURS[style.colour] for style, _ in parts]
    if len(steps) == 1:  # one bar is an area without width
        steps, values = [steps[0] - 0.5, steps[0] + 0.5], [[*row, *row] for row in values]
    axes.stackplot(steps, values, colors=colours, linewidth=0)
    heights = sorted(map(sum, zip(*values, strict=True)))
    most = _CUT * heights[len(heights) // 2]
    is_cut = 0 < most < heights[-1]
    axes.set_ylim(0, most if is_cut else max(1.05 * heights[-1], 1e-12))
    return _svg(figure, name), is_cut


def _figure() -> tuple[Figure, Axes]:
    """Return an empty picture."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it talks about its caches
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72)
    axes = figure.add_axes(
        (
            _LEFT / _WIDTH,
            _BOTTOM / _HEIGHT,
            1 - (_LEFT + _RIGHT) / _WIDTH,
            1 - (_TOP + _BOTTOM) / _HEIGHT,
        )
    )
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(length=0, labelsize=_FONT, labelcolor=_INK, pad=4)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(_short)
    axes.yaxis.set_major_formatter(_short)
    return figure, axes


def _short(value: float, _: object = None) -> str:
    """Return a number for an axis in few characters."""
    for factor, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= 10 * factor or (factor > 1e3 and abs(value) >= factor):
            return f"{value / factor:.4g}{unit}"
    return f"{value:.4g}"


_HEAD = re.compile(r"^.*?<svg [^>]*>", re.S)
_METADATA = re.compile(r"<metadata>.*?</metadata>|<style .*?</style>|<defs>\s*</defs>", re.S)
_UNUSED = re.compile(r' id="(?![mp][0-9a-f]{10}")[^"]*"')
_FAMILY = re.compile(r" font-family: [^;\"]*;?")


def _svg(figure: Figure, name: str) -> str:
    """Return the figure as an element for a page; its colours are those of the page."""
    import matplotlib

    written = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True, metadata=nothing)
    text = _METADATA.sub("", _HEAD.sub("", written.getvalue(), count=1))
    text = _FAMILY.sub("", _UNUSED.sub("", text))
    text = re.sub(r"\s*\n\s*", " ", text)
    for index, colour in enumerate(_COLOURS):
        text = text.replace(colour, f"var(--c{index})")
    text = text.replace(_INK, "var(--muted)").replace(_GRID, "var(--line)")
    return f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}">{text}'
