"""Pictures as PNG: the only door to matplotlib.

Matplotlib is an optional dependency and is imported when a picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, cycle, pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from schedules.excerpt import Excerpt
from schedules.render import COLOURS, LINK, STAGE_KINDS, duration, facts, notes, present
from schedules.timeline import Span, Timeline
from vp_train.commands.labels import Box, Ground, Wish
from vp_train.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Fill = Literal["full", "none", "left", "top"]

_MARKERS = "osD^vPX*"
# The colours of Okabe and Ito that are dark enough for small marks on white.
_INKS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
# Four darker ones, for pictures with more names.
_MORE_INKS = ("#882255", "#332288", "#8B5A2B", "#7A7A00")
_FILLS: tuple[_Fill, ...] = ("full", "none", "left", "top")  # of marks, where inks repeat
_MARK = 6.5  # points: the size of a mark of a frontier
_BEST = "least bubble known under every cap"
_CLEAR = 0.025  # the part of a whole axis beside a cut that has no tick
_EMPTY = 0.5  # the part of a whole axis that must be empty for a cut
_INSIDE = 4.0  # pixels between labels and the edges of the axes
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
    figure = _figure(14, 1.5 + lane * timeline.num_ranks, dpi=150)
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
    """Add the legend of the colours below the axes, in as many rows as it takes to fit."""
    from matplotlib.patches import Patch

    kinds = present(timeline)
    patches = [
        Patch(facecolor=COLOURS[kind], label=f"{kind} {meaning}") for kind, meaning in kinds.items()
    ]
    if timeline.transfers:
        patches += [Patch(facecolor=colour, label=words) for _, colour, words in LINK.values()]
    for rows in range(1, len(patches) + 1):
        columns = math.ceil(len(patches) / rows)
        legend = figure.legend(
            # A legend is filled by columns; this order is read by rows.
            handles=[patch for column in range(columns) for patch in patches[column::columns]],
            title=notes(timeline, "white"),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=8,
            title_fontsize=8,
        )
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()


def comparison_png(marks: Sequence[Marker], title: str, path: Path) -> None:
    """Draw bubble against peak memory, as `comparison_figure`."""
    comparison_figure(marks, title).savefig(path)


def comparison_figure(marks: Sequence[Marker], title: str) -> Figure:
    """Return a picture of bubble against peak memory.

    Every schedule has a colour and every algorithm a shape; keys at the right name them.  Where
    there are more schedules than colours, the marks of some are hollow or filled in half.  A point
    has a label where there is room for one.
    """
    figure = _figure(10, 6, dpi=110)
    axes = figure.add_subplot()
    looks = _looks([mark.schedule for mark in marks])
    shapes = dict(zip(dict.fromkeys(mark.vocab for mark in marks), _MARKERS * 4, strict=False))
    for mark in marks:
        look = looks[mark.schedule]
        axes.plot(
            *mark.at,
            shapes[mark.vocab],
            color=look.ink,
            markersize=7,
            fillstyle=look.fill,
            markeredgecolor=look.edge,
        )
    _spread(axes, "x", [mark.at[0] for mark in marks])
    _spread(axes, "y", [mark.at[1] for mark in marks])
    axes.set_xlabel("peak memory of the worst rank, activations, GiB")
    axes.set_ylabel("mean bubble, %")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="#E5E5E5")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _add_keys(figure, looks, shapes)
    _label_marks(figure, axes, marks, looks)
    return figure


@dataclass(frozen=True, slots=True)
class _Look:
    """The colour of a mark, and which part of it is filled."""

    ink: str
    fill: _Fill = "full"

    @property
    def edge(self) -> str:
        """The colour of the edge, which a mark needs that is not filled."""
        return "white" if self.fill == "full" else self.ink


def _looks(names: Iterable[str]) -> dict[str, _Look]:
    """Return a look for every name: all colours first, then the same with another filling."""
    every = (_Look(ink, fill) for fill, ink in cycle(product(_FILLS, _INKS + _MORE_INKS)))
    return dict(zip(dict.fromkeys(names), every, strict=False))


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
    colour.  Each has its name where there is room.  Memory is counted in GiB, or in microbatches
    of `unit` bytes if that is given.  Where algorithms are far apart, the axis of bubbles has a
    cut, with one scale on both sides.  Caps under which the best bubble is above those of all
    marks are not shown.
    """
    names = dict.fromkeys([line.vocab for line in frontiers] + [mark.vocab for mark in marks])
    inks = dict(zip(names, _INKS * 4, strict=False))
    marks = [replace(mark, peak_bytes=mark.peak_bytes / unit * 2**30) for mark in marks]
    lines = [
        Frontier(line.vocab, [(at / unit, 100 * bubble) for at, bubble in line.points])
        for line in frontiers
    ]
    shown = {name: [mark.at for mark in marks if mark.vocab == name] for name in names}
    for line in lines:
        shown[line.vocab] += _near_the_marks(line, shown[line.vocab])
    places = [at for points in shown.values() for at, _ in points]
    margin = 0.05 * (max(places) - min(places)) or 0.1 * max(places) or 1.0
    figure = _figure(8, 5.2, dpi=150)
    ranges = [sorted(bubble for _, bubble in points) for points in shown.values()]
    panels = _panels(figure, [(values[0], values[-1]) for values in ranges])
    panels[-1].set_xlim(max(0.0, min(places) - margin), max(places) + margin)
    for line in lines:
        axes = _panel_of(panels, line.points[-1][1])
        # What the last cap allows, more memory allows too.
        xs, ys = zip(*line.points, (2 * max(places) + margin, line.points[-1][1]), strict=True)
        axes.plot(xs, ys, drawstyle="steps-post", color=inks[line.vocab], linewidth=1.8, zorder=2)
    words = "GiB" if unit == 2**30 else "microbatches of a rank's layers"
    panels[-1].set_xlabel(f"activations of the fullest rank, {words}")
    figure.supylabel("mean bubble, %", fontsize=10)
    panels[0].set_title(title, loc="left", fontsize=10)
    _explain_frontier(figure)
    _label_frontier(figure, panels, lines, marks, inks)
    return figure


def _near_the_marks(
    line: Frontier, marks: Sequence[tuple[float, float]]
) -> list[tuple[float, float]]:
    """Return the points of a line that are not far above the marks of its algorithm."""
    if not marks:
        return list(line.points)
    least, most = line.points[-1][1], max(bubble for _, bubble in marks)
    return [point for point in line.points if point[1] <= most + 0.1 * (most - least)]


def _panels(figure: Figure, ranges: Sequence[tuple[float, float]]) -> list[Axes]:
    """Return axes with a common horizontal axis for ranges of values in per cent, highest first.

    There are several where most of the vertical axis would be empty between two ranges. All have
    one scale.
    """
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    if isinstance(engine := figure.get_layout_engine(), ConstrainedLayoutEngine):
        engine.set(hspace=0.0, h_pad=0.06)
    ranges = sorted(ranges)
    span = max(high for _, high in ranges) - ranges[0][0] or max(ranges[0][0], 1.0)
    groups = [ranges[0]]
    for low, high in ranges[1:]:
        first, last = groups[-1]
        if low - last > _EMPTY * span:
            groups.append((low, high))
        else:
            groups[-1] = (first, max(last, high))
    used = sum(high - low for low, high in groups) or span
    limits = [(low - 0.1 * used, high + 0.08 * used) for low, high in groups]
    bottom, top = limits[0]
    limits[0] = (0.0 if bottom < 0.3 * top else bottom, top)
    least = 0.12 * sum(top - bottom for bottom, top in limits)
    limits = [
        (bottom - missing / 2, top + missing / 2)
        for bottom, top in limits
        for missing in [max(0.0, least - (top - bottom))]
    ][::-1]
    grid = figure.add_gridspec(
        len(limits), hspace=0, height_ratios=[top - low for low, top in limits]
    )
    panels = [figure.add_subplot(grid[0])]
    panels += [figure.add_subplot(grid[k], sharex=panels[0]) for k in range(1, len(limits))]
    height = sum(top - bottom for bottom, top in limits)
    _, tick, *_ = MaxNLocator(14, steps=[1, 2, 5, 10]).tick_values(0, height)
    for number, (axes, (bottom, top)) in enumerate(zip(panels, limits, strict=True)):
        axes.set_ylim(bottom, top)
        is_first, is_last = number == 0, number == len(panels) - 1
        low, high = bottom + (not is_last) * _CLEAR * height, top - (not is_first) * _CLEAR * height
        axes.set_yticks([k * tick for k in range(math.ceil(low / tick), int(high / tick) + 1)])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(axis="y", color="#ECECEC", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if not is_first:
            _draw_break(axes, 1.0)
        if not is_last:
            _draw_break(axes, 0.0)
            axes.spines["bottom"].set_visible(False)
            axes.tick_params(axis="x", bottom=False, labelbottom=False)
    return panels


def _draw_break(axes: Axes, height: float) -> None:
    """Draw the mark of a cut across the left axis, at its lower end 0 or its upper end 1."""
    axes.plot(
        [0],
        [height],
        transform=axes.transAxes,
        marker=[(-1, -0.5), (1, 0.5)],
        markersize=10,
        linestyle="none",
        color="k",
        markeredgewidth=1,
        clip_on=False,
        label="_break",
    )


def _panel_of(panels: Sequence[Axes], bubble: float) -> Axes:
    """Return the axes whose limits have a value in per cent."""
    for axes in panels:
        low, high = axes.get_ylim()
        if low <= bubble <= high:
            return axes
    raise ValueError(f"a bubble of {bubble} % is outside of all axes")


def _explain_frontier(figure: Figure) -> None:
    """Add a line that says what lines and marks are."""
    from matplotlib.lines import Line2D

    line = Line2D([], [], color="#555555", linewidth=1.8, label=_BEST)
    mark = Line2D([], [], color="#555555", marker="o", linestyle="", label="named schedule")
    figure.legend(
        handles=[line, mark], loc="outside lower center", ncols=2, frameon=False, fontsize=9
    )


def _label_frontier(
    figure: Figure,
    panels: Sequence[Axes],
    lines: Sequence[Frontier],
    marks: Sequence[Marker],
    inks: dict[str, str],
) -> None:
    """Draw the marks, and name marks and lines where that covers nothing.

    Marks of an algorithm that lie on each other have one label.
    """
    figure.draw_without_rendering()  # positions are known only now
    figure.set_layout_engine("none")  # and labels must not change them
    pixel = figure.dpi / 72
    for axes in panels:
        low, high = axes.get_ylim()
        here = [mark for mark in marks if low <= mark.at[1] <= high]
        at = [tuple(axes.transData.transform(mark.at)) for mark in here]
        groups = _on_each_other(here, at, 0.6 * _MARK * pixel)
        gaps = [
            math.dist(at[one], at[other])
            for group, rest in combinations(groups, 2)
            for one, other in product(group, rest)
        ]
        size = max(0.6 * _MARK, min([_MARK, *(0.95 * gap / pixel for gap in gaps)]))
        boxes = [Box.around([point], size * pixel / 2) for point in at]
        for mark in here:
            axes.plot(
                *mark.at,
                "o",
                color=inks[mark.vocab],
                markersize=size,
                markeredgecolor="white",
                markeredgewidth=0.7,
                zorder=3,
            )
        curves = [line for line in lines if low <= line.points[-1][1] <= high]
        paths = {line.vocab: _staircase(axes, line) for line in curves}
        parts = [Box.around(part, 1.2 * pixel) for path in paths.values() for part in path]
        frame = _box_of(axes).padded(-_INSIDE)
        heights = axes.transData.transform([(0, tick) for tick in axes.get_yticks()])[:, 1]
        grid = [Box(frame.left, y - 1, frame.right, y + 1) for y in heights]
        ground = Ground(frame, boxes, parts, grid)
        for line in curves:
            ends = [end for part in paths[line.vocab] for end in part if part[0][1] == part[1][1]]
            words = f"vocab {line.vocab}"
            _write(axes, ground, words, _along(ends), None, inks[line.vocab], size=10)
        # Those with the nearest neighbours have the fewest places.
        groups.sort(key=lambda group: _room(group, at))
        for group in groups:
            name = ", ".join(dict.fromkeys(here[k].schedule for k in group))
            ink = inks[here[group[0]].vocab]
            _write(axes, ground, name, (at[group[0]],), boxes[group[0]], ink)


def _on_each_other(
    marks: Sequence[Marker], at: Sequence[tuple[float, float]], near: float
) -> list[list[int]]:
    """Return the numbers of the marks, in groups of one algorithm that are within `near`."""
    groups: list[list[int]] = []
    for k, mark in enumerate(marks):
        for group in groups:
            first = group[0]
            if marks[first].vocab == mark.vocab and math.dist(at[first], at[k]) < near:
                group.append(k)
                break
        else:
            groups.append([k])
    return groups


def _room(group: Sequence[int], at: Sequence[tuple[float, float]]) -> float:
    """Return how far the nearest other mark is from a group, in pixels."""
    others = [point for k, point in enumerate(at) if k not in group]
    return min((math.dist(at[group[0]], point) for point in others), default=math.inf)


def _staircase(axes: Axes, line: Frontier) -> list[tuple[tuple[float, float], ...]]:
    """Return the straight parts of a line as it is drawn, as pairs of points in pixels."""
    frame = _box_of(axes)
    corners = [line.points[0]]
    for at, bubble in line.points[1:]:
        corners += [(at, corners[-1][1]), (at, bubble)]
    pixels = [(float(x), float(y)) for x, y in axes.transData.transform(corners)]
    pixels.append((frame.right, pixels[-1][1]))
    return [
        (frame.nearest(one), frame.nearest(other))
        for one, other in pairwise(pixels)
        if one != other and Box.around((one, other), 0.5).overlaps(frame)
    ]


def _along(ends: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Return points on the level parts of a line, given their ends, from the right on."""
    points = []
    for (x0, y), (x1, _) in zip(ends[-2::-2], ends[::-2], strict=True):
        count = max(1, round((x1 - x0) / 10))
        points += [(x1 + (x0 - x1) * step / count, y) for step in range(count + 1)]
    return tuple(points)


def _box_of(axes: Axes) -> Box:
    return Box(*axes.bbox.extents)


def _write(
    axes: Axes,
    ground: Ground,
    words: str,
    at: tuple[tuple[float, float], ...],
    own: Box | None,
    ink: str,
    *,
    size: float = 9,
    farthest: float = 0.3,
) -> None:
    """Write `words` beside a mark, or along a line if `own` is None, where there is room.

    size: of the letters in points. farthest: from its mark, as a part of the width.
    """
    label = axes.annotate(
        words,
        (0, 0),
        xycoords="figure pixels",
        va="bottom",
        fontsize=size,
        fontweight="bold" if own is None else "normal",
        color=ink,
        zorder=4,
    )
    extent = label.get_window_extent()
    wish = Wish(at, extent.width, extent.height, own, farthest * axes.bbox.width)
    place = ground.place(wish)
    if place is None:
        label.remove()
        return
    label.xyann = (place.box.left, place.box.bottom)
    if place.leader is not None:
        axes.annotate(
            "",
            place.leader[0],
            place.leader[1],
            xycoords="figure pixels",
            textcoords="figure pixels",
            arrowprops={
                "arrowstyle": "-",
                "color": "#999999",
                "linewidth": 0.7,
                "shrinkA": 0,
                "shrinkB": 0,
            },
            zorder=1.5,
        )


def _label_marks(
    figure: Figure, axes: Axes, marks: Sequence[Marker], looks: dict[str, _Look]
) -> None:
    """Write schedule and algorithm near every mark, where that covers no label and no mark.

    A mark without room for a label within a fifth of the picture gets none.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    at = [tuple(axes.transData.transform(mark.at)) for mark in marks]
    boxes = [Box.around([point], 7.0) for point in at]
    ground = Ground(_box_of(axes), boxes, is_strict=False)
    for mark, point, box in sorted(
        zip(marks, at, boxes, strict=True), key=lambda entry: -entry[0].bubble
    ):
        _write(
            axes,
            ground,
            f"{mark.schedule}, {mark.vocab}",
            (point,),
            box,
            looks[mark.schedule].ink,
            size=7.5,
            farthest=0.2,
        )


def _add_keys(figure: Figure, looks: dict[str, _Look], shapes: dict[str, str]) -> None:
    """Add the key of the colours and the key of the shapes, at the right of the axes."""
    colours = [(name, "s", look) for name, look in looks.items()]
    _add_key(figure, "schedule", "outside right upper", colours)
    marks = [(name, shape, _Look("#555555")) for name, shape in shapes.items()]
    _add_key(figure, "vocabulary", "outside right lower", marks)


def _add_key(
    figure: Figure,
    title: str,
    place: Literal["outside right upper", "outside right lower"],
    entries: Sequence[tuple[str, str, _Look]],
) -> None:
    """Add a key with the name, shape and look of every entry."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            linestyle="",
            marker=shape,
            color=look.ink,
            fillstyle=look.fill,
            markeredgecolor=look.ink,
            label=name,
        )
        for name, shape, look in entries
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
