"""Pictures as PNG: the only door to matplotlib.

Matplotlib is an optional dependency and is imported when a picture is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from schedules.render import COLOURS, STAGE_KINDS, facts, present
from schedules.timeline import Span, Timeline
from vp_train.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

_MARKERS = "osD^vPX*"
# The colours of Okabe and Ito that are dark enough for small marks on white.
_INKS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
# The places of a label in points from its mark, the best first.
_PLACES = (
    (7, 4),
    (7, -11),
    (-7, 4),
    (-7, -11),
    (0, 9),
    (0, -16),
    (7, 14),
    (7, -21),
    (-7, 14),
    (-7, -21),
    (7, 24),
    (7, -31),
)


@dataclass(frozen=True, slots=True)
class Mark:
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
    """Draw one lane per rank with its passes in their colours.

    A dark band marks a stage that is not the first of its rank.
    """
    lane = 0.4 if timeline.num_ranks <= 16 else 6.4 / timeline.num_ranks
    figure = _figure(14, 1.3 + lane * timeline.num_ranks, dpi=150)
    axes = figure.add_subplot()
    factor, unit = (1.0, "s") if timeline.makespan >= 10 else (1e3, "ms")
    for rank, spans in enumerate(timeline.compute):
        _draw_lane(axes, rank, spans, factor)
    axes.set_xlim(0, max(timeline.makespan * factor, 1e-9))
    axes.set_ylim(timeline.num_ranks - 0.5, -0.5)
    ranks = (
        range(timeline.num_ranks)
        if timeline.num_ranks <= 16
        else range(0, timeline.num_ranks, timeline.num_ranks // 8)
    )
    axes.set_yticks(ranks, [f"rank {rank}" for rank in ranks])
    axes.set_xlabel(unit)
    axes.set_title(f"{title}: {facts(timeline)}", loc="left", fontsize=11)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    _write_microbatches(axes, timeline, factor)
    _explain(figure, timeline)
    figure.savefig(path)


def _draw_lane(axes: Axes, rank: int, spans: Sequence[Span], factor: float) -> None:
    first = min((span.stage for span in spans if span.kind in STAGE_KINDS), default=0)
    for kind in {span.kind: None for span in spans}:
        boxes = [
            (span.start * factor, span.seconds * factor) for span in spans if span.kind == kind
        ]
        # An edge has a fixed width: between short passes it would look like a bubble.
        edge = 0.3 if len(spans) < 150 else 0.0
        axes.broken_barh(
            boxes, (rank - 0.42, 0.84), facecolors=COLOURS[kind], edgecolor="white", linewidth=edge
        )
    later = [
        (span.start * factor, span.seconds * factor)
        for span in spans
        if span.kind in STAGE_KINDS and span.stage != first
    ]
    axes.broken_barh(later, (rank + 0.32, 0.1), facecolors="#333333", linewidth=0)


def _write_microbatches(axes: Axes, timeline: Timeline, factor: float) -> None:
    """Write the microbatch into every box that is wide enough for the longest number."""
    last = max((span.microbatch for spans in timeline.compute for span in spans), default=0)
    readable = timeline.makespan * (0.006 + 0.0045 * len(str(last)))
    for rank, spans in enumerate(timeline.compute):
        for span in spans:
            if span.seconds > readable and timeline.num_ranks <= 16:
                middle = (span.start + span.end) / 2 * factor
                axes.text(middle, rank, str(span.microbatch), ha="center", va="center", fontsize=7)


def _explain(figure: Figure, timeline: Timeline) -> None:
    """Add the legend of the colours."""
    from matplotlib.patches import Patch

    kinds = present(timeline)
    patches = [
        Patch(facecolor=COLOURS[kind], label=f"{kind} {meaning}") for kind, meaning in kinds.items()
    ]
    if any(
        len({span.stage for span in spans if span.kind in STAGE_KINDS}) > 1
        for spans in timeline.compute
    ):
        patches.append(Patch(facecolor="#333333", label="band: later stage"))
    figure.legend(
        handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8
    )


def comparison_png(marks: Sequence[Mark], title: str, path: Path) -> None:
    """Draw bubble against peak memory.

    Every schedule has a colour, every algorithm a shape, and every point a label.
    """
    figure = _figure(9, 6, dpi=110)
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
    _label(figure, axes, marks, inks)
    figure.savefig(path)


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


def _label(figure: Figure, axes: Axes, marks: Sequence[Mark], inks: dict[str, str]) -> None:
    """Place a label next to every mark, where it covers no other label and no mark."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # positions are known only now
    points = axes.transData.transform([mark.at for mark in marks])
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in points]
    for mark in sorted(marks, key=lambda mark: -mark.bubble):
        for place in _PLACES:
            written = _write(axes, mark, place, inks[mark.schedule])
            box = written.get_window_extent()
            inside = (
                axes.bbox.containsx(box.x0)
                and axes.bbox.containsx(box.x1)
                and axes.bbox.containsy(box.y0)
            )
            if inside and not box.count_overlaps(taken):
                break
            written.remove()
        else:  # no place is free: an overlapping label is better than none
            box = _write(axes, mark, _PLACES[0], inks[mark.schedule]).get_window_extent()
        taken.append(box)


def _write(axes: Axes, mark: Mark, place: tuple[int, int], ink: str) -> Annotation:
    side = "left" if place[0] > 0 else "right" if place[0] < 0 else "center"
    words = f"{mark.schedule}, {mark.vocab}"
    return axes.annotate(
        words, mark.at, place, textcoords="offset points", ha=side, fontsize=7.5, color=ink
    )
