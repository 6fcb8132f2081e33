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
        if not item.kind.is_vocabulary and owners.setdefault(item.stage, rank) != rank:
            raise ValueError(
                f"rank {rank} runs {item}, but rank {owners[item.stage]} has other passes of stage "
                f"{item.stage}; every stage has one rank"
            )
    if not owners:
        raise ValueError("it has no passes; after the name comes a line of passes for every rank")
    num_ranks, num_stages = schedule.num_ranks, len(owners)
    split_backward = any(item.kind is Kind.I for _, item in schedule.passes())
    for name in LAYOUTS:
        try:
            layout = Layout(name, num_ranks, num_stages // num_ranks if num_ranks else 0)
        except ValueError:
            continue
        if owners == {stage: layout.rank_of(stage) for stage in range(layout.num_stages)}:
            return layout, split_backward
    # The first stage that no layout has there, as linear and the first half of the others begin.
    first = next((s for s in sorted(owners) if s >= num_ranks or owners[s] != s), max(owners))
    raise ValueError(
        f"schedule {schedule.name!r} has {num_stages} stages on {num_ranks} ranks, "
        f"laid out as none of {', '.join(LAYOUTS)}: stage {first} is on rank {owners[first]}"
    )
