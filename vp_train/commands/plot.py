"""Pictures as PNG: the only door to matplotlib.

Matplotlib is an optional dependency and is imported when a picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from schedules.excerpt import Excerpt
from schedules.render import COLOURS, LINK, STAGE_KINDS, duration, facts, notes, present
from schedules.timeline import Span, Timeline
from vp_train.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox, BboxBase

_MARKERS = "osD^vPX*"
# The colours of Okabe and Ito that are dark enough for small marks on white.
_INKS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_GAP = 0.022  # the width of a cut, as a part of the time shown


@dataclass(frozen=True, slots=True)
class Marker:
    """One schedule with one vocabulary algorithm in a comparison.

    `bubble` is the mean bubble as a fraction, `peak_bytes` the memory of the worst rank.
    """

    schedule: str
    vocab: str
    bubble: float
    peak_bytes: float

    @property
    def at(self) -> tuple[float, float]:
        """The position in the picture: GiB and per cent."""
        return self.peak_bytes / 2**30, 100 * self.bubble


def _figure(width: float, height: float, dpi: int) -> Figure:
    """Return an empty figure of this size in inches.  Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "PNG pictures need matplotlib, which is not installed; pip install 'vp_train[plot]' "
            "(all other files are written)"
        ) from None
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def schedule_png(timeline: Timeline, title: str, path: Path) -> None:
    """Draw a step, as `schedule_figure`."""
    schedule_figure(timeline, title).savefig(path)


def schedule_figure(timeline: Timeline, title: str) -> Figure:
    """Return a picture with one lane per rank, which shows its passes in their colours.

    A dark band marks a stage that is not the first of its rank.  A step of many microbatches is
    shown without its middle.
    """
    lane = 0.4 if timeline.num_ranks <= 16 else 6.4 / timeline.num_ranks
    figure = _figure(14, 1.3 + lane * timeline.num_ranks, dpi=150)
    axes = figure.add_subplot()
    scale = _Scale.of(timeline)
    for rank, spans in enumerate(timeline.compute):
        _draw_lane(axes, rank, spans, scale)
        _draw_link(axes, rank, timeline.transfers_of(rank), scale)
    axes.set_xlim(0, max(scale.x(timeline.makespan), 1e-9))
    axes.set_ylim(timeline.num_ranks - 0.5, -0.5)
    ranks = (
        range(timeline.num_ranks)
        if timeline.num_ranks <= 16
        else range(0, timeline.num_ranks, timeline.num_ranks // 8)
    )
    axes.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    ticks = scale.shown.ticks(scale.factor)
    axes.set_xticks([scale.x(tick / scale.factor) for tick in ticks], [f"{x:g}" for x in ticks])
    axes.set_xlabel(scale.unit)
    axes.set_title(f"{title}: {facts(timeline)}", loc="left", fontsize=11)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _write_microbatches(axes, timeline, scale)
    _draw_cut(axes, timeline.num_ranks, scale)
    _explain(figure, timeline)
    return figure


@dataclass(frozen=True, slots=True)
class _Scale:
    """The horizontal axis: what of the step is shown, in units of 1 / factor seconds."""

    shown: Excerpt
    factor: float
    unit: str

    @classmethod
    def of(cls, timeline: Timeline) -> _Scale:
        factor, unit = (1.0, "s") if timeline.makespan >= 10 else (1e3, "ms")
        return cls(Excerpt.of(timeline), factor, unit)

    @property
    def gap(self) -> float:
        """The width of the cut in seconds; 0 if all is shown."""
        return 0.0 if self.shown.cut is None else _GAP * self.shown.seconds

    def x(self, moment: float) -> float:
        """Return where a moment lies that is shown."""
        return self.shown.place(moment, self.gap) * self.factor

    def boxes(self, spans: Iterable[Span]) -> list[tuple[float, float]]:
        """Return start and width of what is shown of `spans`."""
        parts = filter(None, map(self.shown.visible, spans))
        return [(self.x(start), (end - start) * self.factor) for start, end in parts]


def _draw_lane(axes: Axes, rank: int, spans: Sequence[Span], scale: _Scale) -> None:
    first = min((span.stage for span in spans if span.kind in STAGE_KINDS), default=0)
    # An edge has a fixed width: between short passes it would look like a bubble.
    edge = 0.3 if len(scale.boxes(spans)) < 150 else 0.0
    for kind in {span.kind: None for span in spans}:
        axes.broken_barh(
            scale.boxes(span for span in spans if span.kind == kind),
            (rank - 0.42, 0.84),
            facecolors=COLOURS[kind],
            edgecolor="white",
            linewidth=edge,
        )
    later = scale.boxes(span for span in spans if span.kind in STAGE_KINDS and span.stage != first)
    axes.broken_barh(later, (rank + 0.32, 0.1), facecolors="#333333", linewidth=0)


def _draw_link(axes: Axes, rank: int, spans: Sequence[Span], scale: _Scale) -> None:
    """Draw the transfers to the host and back below the passes of a rank."""
    for place, (kind, (_, colour, _)) in enumerate(LINK.items()):
        boxes = scale.boxes(span for span in spans if span.kind == kind)
        axes.broken_barh(boxes, (rank + 0.42 + 0.04 * place, 0.04), facecolors=colour, linewidth=0)


def _draw_cut(axes: Axes, num_ranks: int, scale: _Scale) -> None:
    """Draw the gap that stands for what is not shown, and write into it how long that is."""
    if scale.shown.cut is None:
        return
    left, width = scale.x(scale.shown.cut[0]), scale.gap * scale.factor
    axes.axvspan(left, left + width, facecolor="white", zorder=3)
    axes.text(
        left + width / 2,
        (num_ranks - 1) / 2,
        f"{duration(scale.shown.left_out)} not shown",
        rotation=90,
        ha="center",
        va="center",
        fontsize=9,
        color="#555555",
        zorder=4,
    )


def _write_microbatches(axes: Axes, timeline: Timeline, scale: _Scale) -> None:
    """Write the microbatch into every box that is wide enough for the longest number."""
    last = max((span.microbatch for spans in timeline.compute for span in spans), default=0)
    readable = scale.shown.seconds * (0.006 + 0.0045 * len(str(last)))
    for rank, spans in enumerate(timeline.compute):
        for span in spans:
            part = scale.shown.visible(span)
            if part and part[1] - part[0] > readable and timeline.num_ranks <= 16:
                middle = (scale.x(part[0]) + scale.x(part[1])) / 2
                axes.text(middle, rank, str(span.microbatch), ha="center", va="center", fontsize=7)


def _explain(figure: Figure, timeline: Timeline) -> None:
    """Add the legend of the colours."""
    from matplotlib.patches import Patch

    kinds = present(timeline)
    patches = [
        Patch(facecolor=COLOURS[kind], label=f"{kind} {meaning}") for kind, meaning in kinds.items()
    ]
    if timeline.transfers:
        patches += [Patch(facecolor=colour, label=words) for _, colour, words in LINK.values()]
    patches.append(Patch(facecolor="none", label=notes(timeline, "white")))
    figure.legend(
        handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8
    )


def comparison_png(marks: Sequence[Marker], title: str, path: Path) -> None:
    """Draw bubble against peak memory, as `comparison_figure`."""
    comparison_figure(marks, title).savefig(path)


def comparison_figure(marks: Sequence[Marker], title: str) -> Figure:
    """Return a picture of bubble against peak memory.

    Every schedule has a colour and every algorithm a shape; keys at the right name them.  A point
    has a label where there is room for one.
    """
    figure = _figure(10, 6, dpi=110)
    axes = figure.add_subplot()
    inks = dict(zip(dict.fromkeys(mark.schedule for mark in marks), _INKS * 4, strict=False))
    shapes = dict(zip(dict.fromkeys(mark.vocab for mark in marks), _MARKERS * 4, strict=False))
    for mark in marks:
        axes.plot(
            *mark.at,
            shapes[mark.vocab],
            color=inks[mark.schedule],
            markersize=7,
            markeredgecolor="white",
        )
    _spread(axes, "x", [mark.at[0] for mark in marks])
    _spread(axes, "y", [mark.at[1] for mark in marks])
    axes.set_xlabel("peak memory of the worst rank, activations, GiB")
    axes.set_ylabel("mean bubble, %")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _add_keys(figure, inks, shapes)
    _label(figure, axes, marks, inks)
    return figure


@dataclass(frozen=True, slots=True)
class Frontier:
    """The best bubble under every cap on memory, with one vocabulary algorithm.

    `points` are pairs of bytes of the fullest rank and mean bubble as a fraction, by bytes.
    """

    vocab: str
    points: Sequence[tuple[float, float]]


def frontier_pictures(figure: Figure, directory: Path) -> list[str]:
    """Write a frontier as PNG and as SVG to `directory`, and return the names of the files."""
    from matplotlib import rc_context

    names = ["frontier.png", "frontier.svg"]
    # The same picture is the same file: no date, and ids from a fixed seed.
    with rc_context({"svg.hashsalt": "frontier", "svg.fonttype": "none"}):
        figure.savefig(directory / names[0])
        figure.savefig(directory / names[1], metadata={"Date": None})
    return names


def frontier_figure(
    frontiers: Sequence[Frontier], marks: Sequence[Marker], title: str, unit: float = 2**30
) -> Figure:
    """Return a picture of the frontiers, with the named schedules `marks` as points.

    Every algorithm has a colour, its frontier a line of steps and its schedules marks of that
    colour, which are labelled where there is room.  Memory is counted in GiB, or in microbatches
    of `unit` bytes if that is given.
    """
    figure = _figure(8, 5.2, dpi=150)
    axes = figure.add_subplot()
    names = dict.fromkeys([line.vocab for line in frontiers] + [mark.vocab for mark in marks])
    inks = dict(zip(names, _INKS * 4, strict=False))
    right = max(at for line in frontiers for at, _ in line.points) / unit
    right = max([right, *(mark.peak_bytes / unit for mark in marks)])
    for line in frontiers:
        places = [at / unit for at, _ in line.points]
        bubbles = [100 * bubble for _, bubble in line.points]
        # What the last cap allows, more memory allows too.
        axes.plot(
            [*places, 1.05 * right],
            [*bubbles, bubbles[-1]],
            drawstyle="steps-post",
            color=inks[line.vocab],
            linewidth=1.8,
            label=f"auto, {line.vocab}",
            zorder=2,
        )
        axes.plot(places, bubbles, ".", color=inks[line.vocab], markersize=5, zorder=2)
    scaled = [replace(mark, peak_bytes=mark.peak_bytes / unit * 2**30) for mark in marks]
    for mark in scaled:
        axes.plot(
            *mark.at, "D", color=inks[mark.vocab], markersize=6, markeredgecolor="white", zorder=3
        )
    places = [at / unit for line in frontiers for at, _ in line.points]
    values = [100 * bubble for line in frontiers for _, bubble in line.points]
    _spread(axes, "y", values + [mark.at[1] for mark in scaled])
    axes.set_xlim(0.9 * min([*places, *(mark.at[0] for mark in scaled)]), 1.05 * right)
    words = "GiB" if unit == 2**30 else "microbatches of a rank's layers"
    axes.set_xlabel(f"activations of the fullest rank, {words}")
    axes.set_ylabel("mean bubble, %")
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    _label(figure, axes, scaled, {mark.schedule: "#333333" for mark in scaled}, with_vocab=False)
    return figure


def _add_keys(figure: Figure, inks: dict[str, str], shapes: dict[str, str]) -> None:
    """Add the key of the colours and the key of the shapes, at the right of the axes."""
    colours = [(name, "s", ink) for name, ink in inks.items()]
    _add_key(figure, "schedule", "outside right upper", colours)
    marks = [(name, shape, "#555555") for name, shape in shapes.items()]
    _add_key(figure, "vocabulary", "outside right lower", marks)


def _add_key(
    figure: Figure,
    title: str,
    place: Literal["outside right upper", "outside right lower"],
    entries: Sequence[tuple[str, str, str]],
) -> None:
    """Add a key with the name, shape and colour of every entry."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker=shape, color=ink, label=name)
        for name, shape, ink in entries
    ]
    figure.legend(
        handles=handles, title=title, loc=place, frameon=False, fontsize=8, title_fontsize=9
    )


def _spread(axes: Axes, name: str, values: Sequence[float]) -> None:
    """Let an axis start at 0, or make it logarithmic if most points would crowd at one end."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min(values), max(values)
    if not 0 < 5 * low < high:
        axes.set(**{f"{name}lim": (0, 1.2 * high or 1)})
        return
    axes.set(**{f"{name}scale": "log", f"{name}lim": (low / 1.5, high * 1.5)})
    axis = axes.xaxis if name == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def _label(
    figure: Figure,
    axes: Axes,
    marks: Sequence[Marker],
    inks: dict[str, str],
    *,
    with_vocab: bool = True,
) -> None:
    """Write a label near every mark, where it covers no other label and no mark.

    A label that is far from its mark is connected with it by a line.  A mark without room for a
    label within a fifth of the picture gets none.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # positions are known only now
    figure.set_layout_engine("none")  # and labels must not change them
    points = axes.transData.transform([mark.at for mark in marks])
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in points]
    farthest = 0.2 * axes.bbox.width
    for mark, (x, y) in sorted(zip(marks, points, strict=True), key=lambda pair: -pair[0].bubble):
        label = axes.annotate(
            f"{mark.schedule}, {mark.vocab}" if with_vocab else mark.schedule,
            mark.at,
            textcoords="offset pixels",
            xytext=(0, 0),
            fontsize=7.5,
            color=inks[mark.schedule],
        )
        size = label.get_window_extent()
        for right, up in _places(size.width, size.height, farthest):
            box = Bbox.from_bounds(x + right, y + up, size.width, size.height).padded(1.0)
            if _is_within(box, axes.bbox) and not box.count_overlaps(taken):
                label.xyann = (right, up)
                taken.append(box)
                _connect(axes, mark, (x, y), box)
                break
        else:
            label.remove()


def _is_within(box: Bbox, frame: BboxBase) -> bool:
    corners = box.corners()
    return frame.count_contains(corners) == len(corners)


def _places(width: float, height: float, farthest: float) -> Iterator[tuple[float, float]]:
    """Yield where a label of this size may be, the best first.

    A place is that of its lower left corner relative to its mark, in pixels.  Places at the sides
    come first, then circles around the mark.
    """
    near = 12.0
    for right in (near, -near - width):
        for up in (-height / 2, 0.3 * height, -1.3 * height):
            yield right, up
    yield from ((-width / 2, near), (-width / 2, -near - height))
    for distance in range(30, int(farthest), 12):
        for step in range(16):
            angle = math.tau * step / 16
            yield (
                (distance + width / 2) * math.cos(angle) - width / 2,
                distance * math.sin(angle) - height / 2,
            )


def _connect(axes: Axes, mark: Marker, at: tuple[float, float], box: Bbox) -> None:
    """Draw a line from a mark to its label, unless they are neighbours."""
    x, y = min(max(at[0], box.x0), box.x1), min(max(at[1], box.y0), box.y1)
    if math.dist(at, (x, y)) > 16:
        axes.annotate(
            "",
            mark.at,
            textcoords="offset pixels",
            xytext=(x - at[0], y - at[1]),
            arrowprops={"arrowstyle": "-", "color": "#BBBBBB", "linewidth": 0.6},
            zorder=1,
        )
