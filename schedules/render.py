"""Drawings of timelines: a text grid, an SVG picture, and a trace for Perfetto.

The functions return text and data. They write no files.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from schedules.excerpt import Excerpt
from schedules.timeline import OFFLOAD, RELOAD, Span, Timeline

# The colours of Okabe and Ito, which colour-blind readers can distinguish.
COLOURS = {
    "F": "#56B4E9",
    "B": "#009E73",
    "I": "#66C2A4",
    "W": "#B2DFCB",
    "S": "#E69F00",
    "T": "#F0E442",
    "E": "#CC79A7",
    "G": "#D55E00",
}
MEANINGS = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
    "S": "output layer: softmax",
    "T": "output layer: gradients",
    "E": "embedding",
    "G": "embedding gradient",
}
# Transfers to the host and back: the row of text, the colour, the meaning.
LINK = {
    OFFLOAD: ("v", "#8C564B", "activations to the host"),
    RELOAD: ("^", "#C49C94", "back"),
}
STAGE_KINDS = "FBIW"  # the passes of a stage; the others belong to a vocabulary shard
_BARRIER = "#666666"
_LATER_STAGE = "#333333"
_BARRIER_HEIGHT, _BAND = 5, 3
_LINK_HEIGHT = 12  # of both directions of the link to the host
_WIDTH, _LEFT, _RIGHT, _TOP = 1200, 64, 68, 72
_GAP = 26  # pixels in place of what is left out


def text_grid(timeline: Timeline, columns: int = 120, seconds: float = math.inf) -> str:
    """Return one row of text per rank, with time to scale, and a legend.

    A pass is its letter and microbatch, followed by `-` until its end. If the microbatch does not
    fit, only the letter is drawn. The letters of a stage that is not the first of its rank are
    lower case. A pass that takes no time is not drawn. Blanks are bubbles. No line is longer than
    `columns`. Only the first `seconds` of the step are drawn, but the legend describes the whole
    step. Below a rank that offloads activations, the rows `v` and `^` are the two directions of its
    link to the host, with the microbatches that it moves.
    """
    width = columns - 4
    shown = min(timeline.makespan, seconds)
    scale = width / shown if shown > 0 else 0.0
    rows = []
    for rank, spans in enumerate(timeline.compute):
        cells, later = [" "] * width, _stages(spans)[1:]
        for span in spans:
            if span.start > 0 and span.start >= shown:
                break
            if span.seconds == 0 and shown > 0:
                continue
            first = min(width - 1, round(span.start * scale))
            length = max(1, min(width, round(span.end * scale)) - first)
            is_later = span.kind in STAGE_KINDS and span.stage in later
            letter = span.kind.lower() if is_later else span.kind
            label = f"{letter}{span.microbatch}"
            label = label if len(label) <= length else letter
            cells[first : first + length] = label.ljust(length, "-")
        rows.append((f"{rank:>3} " + "".join(cells)).rstrip())
        rows += _link_rows(timeline, rank, width, shown)
    legend = ", ".join(f"{kind} {meaning}" for kind, meaning in present(timeline).items())
    if _has_later_stages(timeline):
        legend += "; lower case: a later stage of the rank"
    if timeline.transfers:
        legend += "".join(f"; {row} {meaning}" for row, _, meaning in LINK.values())
    for words in (facts(timeline), legend):
        rows += textwrap.wrap(words, columns, initial_indent=" " * 4, subsequent_indent=" " * 4)
    return "\n".join(rows) + "\n"


def _link_rows(timeline: Timeline, rank: int, width: int, shown: float) -> list[str]:
    """Return a row of text for each direction of a rank's link; none without transfers."""
    spans, rows = timeline.transfers_of(rank), []
    if not spans or shown <= 0:
        return []
    for kind, (head, *_) in LINK.items():
        cells = [" "] * width
        for span in spans:
            if span.kind == kind and span.seconds > 0 and span.start < shown:
                first = min(width - 1, round(span.start * width / shown))
                length = max(1, min(width, round(span.end * width / shown)) - first)
                label = str(span.microbatch)
                label = label if len(label) <= length else "-"
                cells[first : first + length] = label.ljust(length, "-")
        rows.append(f"{head:>3} {''.join(cells)}".rstrip())
    return rows


@dataclass(frozen=True, slots=True)
class _Frame:
    """The geometry of the picture, in pixels."""

    shown: Excerpt
    scale: float  # pixels per second
    lane: int  # height of the passes of a rank
    font: int  # size of the numbers in the passes
    tops: tuple[int, ...]  # upper edge of the lane of every rank
    bottom: int  # lower edge of the last lane

    @classmethod
    def of(cls, timeline: Timeline) -> _Frame:
        """Return the geometry for `timeline`: the more ranks, the lower their lanes."""
        lane, font = (
            (26, 11)
            if timeline.num_ranks <= 8
            else (18, 10)
            if timeline.num_ranks <= 16
            else (13, 8)
        )
        with_barriers = {span.rank for span in timeline.comm}
        tops, y = [], _TOP
        for rank in range(timeline.num_ranks):
            tops.append(y)
            y += lane + (_BARRIER_HEIGHT + 2 if rank in with_barriers else 0) + lane // 4
            y += _LINK_HEIGHT if timeline.transfers_of(rank) else 0
        shown = Excerpt.of(timeline)
        width = _WIDTH - _LEFT - _RIGHT - (_GAP if shown.cut is not None else 0)
        scale = width / shown.seconds if shown.seconds > 0 else 0.0
        return cls(shown, scale=scale, lane=lane, font=font, tops=tuple(tops), bottom=y)

    def x(self, seconds: float) -> float:
        """Return where a moment lies, which is not in the cut."""
        gap = _GAP / self.scale if self.scale else 0.0
        return self.shown.place(seconds, gap) * self.scale


def svg(timeline: Timeline, title: str) -> str:
    """Return an SVG picture with one lane per rank.

    A lane shows the passes of a rank, below them the communications that the timeline shows on it,
    and its bubble at the right. A dark band under a pass marks a stage other than the first of its
    rank. Every box shows its name and duration on hover. A step of many microbatches is shown
    without its middle.
    """
    frame = _Frame.of(timeline)
    height = frame.bottom + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11" fill="#222">',
        '<defs><pattern id="bubble" width="6" height="6" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect width="6" height="6" fill="#F6F6F6"/>'
        '<rect width="1" height="6" fill="#DDD"/></pattern></defs>',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{_LEFT}" y="24" font-size="15" font-weight="bold">{escape(title)}</text>',
        f'<text x="{_WIDTH - _RIGHT}" y="24" text-anchor="end" fill="#555">'
        f"{facts(timeline)}</text>",
        f'<text x="{_WIDTH - 12}" y="{_TOP - 7}" text-anchor="end" fill="#555">bubble</text>',
        *_legend(timeline),
        *_axis(timeline.makespan, frame),
    ]
    for rank in range(timeline.num_ranks):
        parts += _lane(timeline, rank, frame)
    return "\n".join([*parts, *_cut_words(frame), "</svg>"]) + "\n"


def _lane(timeline: Timeline, rank: int, frame: _Frame) -> list[str]:
    """Return the SVG of one rank. The origin is the start of the step at the top of the lane."""
    spans = timeline.compute[rank]
    stages = _stages(spans)
    # A lane shows all its numbers or none. Numbers that end at 9, because 10 does not fit, would
    # look as if something happened there.
    label_width = (
        frame.font * 0.6 * len(str(max((span.microbatch for span in spans), default=0))) + 2
    )
    middle = f"{frame.lane / 2 + frame.font * 0.36:.1f}"
    parts = [
        f'<g transform="translate({_LEFT},{frame.tops[rank]})" text-anchor="middle" '
        f'font-size="{frame.font}">',
        f'<text x="-8" y="{middle}" text-anchor="end">rank {rank}</text>',
        f'<rect width="{frame.x(timeline.makespan):.1f}" height="{frame.lane}" '
        'fill="url(#bubble)"/>',
    ]
    for span in spans:
        if (shown := frame.shown.visible(span)) is None:
            continue
        parts.append(_box(span, frame, 0, frame.lane, COLOURS[span.kind]))
        if span.kind in STAGE_KINDS and span.stage != stages[0]:
            parts.append(_box(span, frame, frame.lane - _BAND, _BAND, _LATER_STAGE))
        if (shown[1] - shown[0]) * frame.scale > label_width:
            x = (frame.x(shown[0]) + frame.x(shown[1])) / 2
            parts.append(f'<text x="{x:.1f}" y="{middle}">{span.microbatch}</text>')
    barriers = [span for span in timeline.comm if span.rank == rank]
    if barriers:
        y = frame.lane + 2 + _BARRIER_HEIGHT
        parts.append(f'<text x="-8" y="{y}" text-anchor="end" font-size="8">barriers</text>')
    boxes = (_box(span, frame, frame.lane + 2, _BARRIER_HEIGHT, _BARRIER) for span in barriers)
    parts += filter(None, boxes)
    y = frame.lane + 2 + (_BARRIER_HEIGHT + 2 if barriers else 0)
    for kind, (_, colour, _) in LINK.items():
        moved = [span for span in timeline.transfers_of(rank) if span.kind == kind]
        parts += filter(
            None, (_box(span, frame, y, _LINK_HEIGHT // 2 - 1, colour) for span in moved)
        )
        y += _LINK_HEIGHT // 2
    x = _WIDTH - _LEFT - 12
    return [
        *parts,
        f'<text x="{x}" y="{middle}" text-anchor="end">{timeline.bubble(rank):.1%}</text>',
        "</g>",
    ]


def _stages(spans: tuple[Span, ...]) -> list[int]:
    """Return the stages among the spans of a rank, in model order."""
    return sorted({span.stage for span in spans if span.kind in STAGE_KINDS})


def _box(span: Span, frame: _Frame, y: int, height: int, colour: str) -> str:
    """Return the SVG of one span, empty if it is not in the picture."""
    shown = frame.shown.visible(span)
    if shown is None:
        return ""
    start, width = frame.x(shown[0]), (shown[1] - shown[0]) * frame.scale
    # A gap separates neighbours of the same colour. It shrinks with the box, so that short passes
    # stay visible.
    drawn = max(0.6, width - min(0.8, 0.2 * width))
    below = f' y="{y}"' if y else ""
    return (
        f'<rect x="{start:.1f}"{below} width="{drawn:.1f}" height="{height}" '
        f'fill="{colour}"><title>{span.name} {duration(span.seconds)}</title></rect>'
    )


def present(timeline: Timeline) -> dict[str, str]:
    """Return the kinds of passes that occur in `timeline`, with their meanings."""
    kinds = {span.kind for spans in timeline.compute for span in spans}
    return {kind: meaning for kind, meaning in MEANINGS.items() if kind in kinds}


def _legend(timeline: Timeline) -> list[str]:
    """Return the SVG of the colours that occur, and of what else a reader must know."""
    entries = [(COLOURS[kind], f"{kind} {meaning}") for kind, meaning in present(timeline).items()]
    if timeline.comm:
        entries.append((_BARRIER, "barriers"))
    if timeline.transfers:
        entries += [(colour, meaning) for _, colour, meaning in LINK.values()]
    parts, x = [], float(_LEFT)
    for colour, words in entries:
        parts.append(f'<rect x="{x:.0f}" y="36" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14:.0f}" y="45">{words}</text>')
        x += 28 + 5.9 * len(words)
    return [*parts, f'<text x="{_LEFT}" y="62" fill="#555">{notes(timeline, "hatched")}</text>']


def notes(timeline: Timeline, bubble: str) -> str:
    """Return what numbers, bubbles and bands of a picture mean; bubbles are drawn as `bubble`."""
    band = "; dark band: a later stage of the rank" if _has_later_stages(timeline) else ""
    return f"number: microbatch; {bubble}: bubble{band}"


def _has_later_stages(timeline: Timeline) -> bool:
    return any(len(_stages(spans)) > 1 for spans in timeline.compute)


def _axis(makespan: float, frame: _Frame) -> list[str]:
    """Return the SVG of grid lines and times at round values, in one unit."""
    factor, unit = (
        (1.0, "s") if makespan >= 10 else (1e3, "ms") if makespan >= 1e-3 else (1e6, "µs")
    )
    parts = []
    for tick in frame.shown.ticks(factor):
        x = _LEFT + frame.x(tick / factor)
        parts.append(f'<path d="M{x:.1f} {_TOP - 4}V{frame.bottom + 4}" stroke="#DDD"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{frame.bottom + 18}" text-anchor="middle" fill="#555">'
            f"{tick:g} {unit}</text>"
        )
    return parts


def _cut_words(frame: _Frame) -> list[str]:
    """Return the SVG of the gap that stands for what is left out, empty if that is nothing."""
    if frame.shown.cut is None:
        return []
    x, middle = _LEFT + frame.x(frame.shown.cut[0]), (_TOP + frame.bottom) / 2
    words = f"{duration(frame.shown.left_out)} not shown"
    return [
        f'<rect x="{x:.1f}" y="{_TOP - 4}" width="{_GAP}" height="{frame.bottom - _TOP + 8}" '
        'fill="white"/>',
        f'<text transform="translate({x + _GAP / 2 + 4:.1f},{middle:.0f}) rotate(-90)" '
        f'text-anchor="middle" fill="#555">{words}</text>',
    ]


def facts(timeline: Timeline) -> str:
    """Return the duration and bubble of a step, and its gap if a bound is known.

    For example `1.44 s, mean bubble 4.0%, 2.1% above the lower bound`.
    """
    gap = "" if timeline.gap is None else f", {timeline.gap:.1%} above the lower bound"
    return f"{duration(timeline.makespan)}, mean bubble {timeline.mean_bubble:.1%}{gap}"


def duration(seconds: float) -> str:
    """Return `seconds` as text with a unit: `12.3 ms` for 0.0123, `1,234.50 s` for 1234.5."""
    if seconds >= 0.9995:  # else rounding would make it 1e+03 of the smaller unit
        return f"{seconds:,.2f} s"
    if seconds >= 0.9995e-3 or seconds == 0:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds * 1e6:.3g} µs"


def chrome_trace(timelines: Mapping[str, Timeline]) -> dict[str, Any]:
    """Return a trace in Chrome's JSON format, with one process per timeline and rank.

    The keys of `timelines` name the processes, e.g. `predicted` and `measured`. Times are in
    microseconds.
    """
    events: list[dict[str, Any]] = []
    process = 0
    for name, timeline in timelines.items():
        for rank, spans in enumerate(timeline.compute):
            comm = [span for span in timeline.comm if span.rank == rank]
            events.append(
                {
                    "ph": "M",
                    "name": "process_name",
                    "pid": process,
                    "args": {"name": f"{name} rank {rank}"},
                }
            )
            lanes = [("compute", spans), ("barriers", comm)]
            if moved := timeline.transfers_of(rank):
                lanes.append(("host link", moved))
            for thread, (label, lane) in enumerate(lanes):
                events.append(
                    {
                        "ph": "M",
                        "name": "thread_name",
                        "pid": process,
                        "tid": thread,
                        "args": {"name": label},
                    }
                )
                events += [_event(span, process, thread) for span in lane]
            process += 1
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(span: Span, process: int, thread: int) -> dict[str, Any]:
    """Return the trace event of one span."""
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.kind,
        "pid": process,
        "tid": thread,
        "ts": span.start * 1e6,
        "dur": span.seconds * 1e6,
        "args": {"stage": span.stage, "microbatch": span.microbatch}
        if span.stage >= 0
        else {"microbatch": span.microbatch},
    }
