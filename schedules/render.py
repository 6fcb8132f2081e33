"""Timelines for people: a text grid, an SVG picture, and a trace for Perfetto.  Returns text and data, writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.sax.saxutils import escape

from schedules.timeline import Span, Timeline

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_COLOURS = {
    "F": "#56B4E9",
    "B": "#009E73",
    "I": "#66C2A4",
    "W": "#B2DFCB",
    "S": "#E69F00",
    "T": "#F0E442",
    "E": "#CC79A7",
    "G": "#D55E00",
}
_MEANINGS = {
    "F": "forward",
    "B": "backward",
    "I": "input gradient",
    "W": "weight gradient",
    "S": "output layer: logits, softmax",
    "T": "output layer: gradients",
    "E": "embedding",
    "G": "embedding gradient",
}
_BARRIER = "#7F7F7F"


def text_grid(timeline: Timeline, columns: int = 120) -> str:
    """One row per rank, time to scale: each pass starts with its letter and microbatch, runs on as `-`; blanks are bubbles."""
    width = columns - 4
    scale = width / timeline.makespan if timeline.makespan > 0 else 0.0
    rows = []
    for rank, spans in enumerate(timeline.compute):
        cells = [" "] * width
        for span in spans:
            first = min(width - 1, round(span.start * scale))
            last = max(first + 1, min(width, round(span.end * scale)))
            label = f"{span.kind}{span.microbatch}"[: last - first].ljust(last - first, "-")
            cells[first:last] = label
        rows.append(f"{rank:>3} " + "".join(cells).rstrip())
    kinds = [kind for kind in _MEANINGS if any(span.kind == kind for spans in timeline.compute for span in spans)]
    legend = ", ".join(f"{kind} {_MEANINGS[kind]}" for kind in kinds)
    return "\n".join([*rows, f"    {_duration(timeline.makespan)}; {legend}"]) + "\n"


def svg(timeline: Timeline, title: str, width: int = 1200) -> str:
    """One lane per rank with its passes and, below them, the barriers it roots; the bubble of each rank at the right."""
    left, right, top, lane, thin, gap = 60, 70, 62, 26, 6, 8
    scale = (width - left - right) / timeline.makespan if timeline.makespan > 0 else 0.0
    step = lane + thin + gap
    bottom = top + step * timeline.num_ranks
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{bottom + 34}" viewBox="0 0 {width} {bottom + 34}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{bottom + 34}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="15" font-weight="bold">{escape(title)}</text>',
        f'<text x="{width - right + 8}" y="{top - 8}" fill="#555">bubble</text>',
    ]
    parts += _legend(timeline, left, 38)
    for rank, spans in enumerate(timeline.compute):
        y = top + rank * step
        parts.append(f'<text x="{left - 8}" y="{y + lane * 0.65:.1f}" text-anchor="end">rank {rank}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{timeline.makespan * scale:.2f}" height="{lane}" fill="#EEEEEE"/>')
        parts += [_box(span, left + span.start * scale, y, span.seconds * scale, lane) for span in spans]
        parts.append(f'<text x="{width - right + 8}" y="{y + lane * 0.65:.1f}">{timeline.bubble(rank):.1%}</text>')
    for span in timeline.comm:
        x, y = left + span.start * scale, top + span.rank * step + lane + 1
        parts.append(
            f'<rect x="{x:.2f}" y="{y}" width="{max(0.5, span.seconds * scale):.2f}" height="{thin}" fill="{_BARRIER}">'
            f"<title>{escape(span.name)}</title></rect>"
        )
    parts += _axis(timeline, left, bottom, scale)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(span: Span, x: float, y: float, width: float, height: float) -> str:
    """A pass with its microbatch, where the number fits; the full name shows on hover."""
    stroke = ' stroke="white" stroke-width="0.6"' if width > 2 else ""
    box = (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{_COLOURS[span.kind]}"{stroke}>'
        f"<title>{escape(span.name)}: {_duration(span.seconds)}</title></rect>"
    )
    label = str(span.microbatch)
    if width < 7 * len(label) + 2:
        return box
    return f'{box}<text x="{x + width / 2:.2f}" y="{y + height * 0.65:.1f}" text-anchor="middle">{label}</text>'


def _legend(timeline: Timeline, x: float, y: float) -> list[str]:
    present = {span.kind for spans in timeline.compute for span in spans}
    parts = []
    for kind, meaning in _MEANINGS.items():
        if kind in present:
            parts.append(f'<rect x="{x:.0f}" y="{y - 8}" width="10" height="10" fill="{_COLOURS[kind]}"/>')
            parts.append(f'<text x="{x + 14:.0f}" y="{y + 1}">{kind} {meaning}</text>')
            x += 30 + 6.2 * (len(meaning) + 2)
    if timeline.comm:
        parts.append(f'<rect x="{x:.0f}" y="{y - 5}" width="10" height="5" fill="{_BARRIER}"/>')
        parts.append(f'<text x="{x + 14:.0f}" y="{y + 1}">barriers</text>')
    return parts


def _axis(timeline: Timeline, left: float, y: float, scale: float) -> list[str]:
    parts = []
    for tick in range(11):
        seconds = timeline.makespan * tick / 10
        x = left + seconds * scale
        parts.append(f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 5}" stroke="#555"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 18}" text-anchor="middle" fill="#555">{_duration(seconds)}</text>')
    return parts


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def chrome_trace(timelines: Mapping[str, Timeline]) -> dict[str, Any]:
    """A trace with one process per timeline and rank, e.g. of {"predicted": ..., "measured": ...}, times in microseconds."""
    events: list[dict[str, Any]] = []
    process = 0
    for name, timeline in timelines.items():
        for rank, spans in enumerate(timeline.compute):
            comm = [span for span in timeline.comm if span.rank == rank]
            events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": f"{name} rank {rank}"}})
            for thread, (label, lane) in enumerate((("compute", spans), ("barriers", comm))):
                events.append({"ph": "M", "name": "thread_name", "pid": process, "tid": thread, "args": {"name": label}})
                events += [_event(span, process, thread) for span in lane]
            process += 1
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(span: Span, process: int, thread: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.name,
        "cat": span.kind,
        "pid": process,
        "tid": thread,
        "ts": span.start * 1e6,
        "dur": span.seconds * 1e6,
        "args": {"stage": span.stage, "microbatch": span.microbatch},
    }
