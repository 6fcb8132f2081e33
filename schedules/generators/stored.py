"""Schedules read from a file: their layout follows from their passes."""

from __future__ import annotations

from schedules.ir import Kind, Schedule
from schedules.layout import LAYOUTS, Layout


def recognise(schedule: Schedule) -> tuple[Layout, bool]:
    """Return the layout of a schedule, and whether its backward is split.

    Raises ValueError if no layout puts the stages where the schedule has them.
    """
    owners: dict[int, int] = {}
    for rank, item in schedule.passes():
        if not item.kind.is_vocabulary:
            owners[item.stage] = rank
    num_ranks, num_stages = schedule.num_ranks, len(owners)
    split_backward = any(item.kind is Kind.I for _, item in schedule.passes())
    for name in LAYOUTS:
        try:
            layout = Layout(name, num_ranks, num_stages // num_ranks if num_ranks else 0)
        except ValueError:
            continue
        if owners == {stage: layout.rank_of(stage) for stage in range(layout.num_stages)}:
            return layout, split_backward
    raise ValueError(
        f"schedule {schedule.name!r} has {num_stages} stages on {num_ranks} ranks, "
        f"laid out as none of {', '.join(LAYOUTS)}"
    )
