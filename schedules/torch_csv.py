"""Schedules in the CSV form of torch.distributed.pipelining.

A file has one row per rank and one cell per time step, such as `2F0`. The multi-stage schedules of
torch read it with `_load_csv(path)` and write it with `_dump_csv(path, format="compute_only")`. F,
B, I and W have the same meaning there. torch has no vocabulary passes: its vocabulary layers are
part of the first and last stage.
"""

from __future__ import annotations

import csv
import io
import re

from schedules.ir import Kind, Pass, Schedule

_COMMUNICATION = re.compile(r"\d+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)\d*")


def to_csv(schedule: Schedule) -> str:
    """Return the stage passes (F, B, I, W) of `schedule` as CSV.

    Cells for bubbles are left out, because the order of the passes determines them. Vocabulary
    passes (S, T, E, G) and the name are dropped, because torch has neither.
    """
    rows = (
        ",".join(str(item) for item in order if not item.kind.is_vocabulary)
        for order in schedule.ranks
    )
    return "".join(f"{row}\n" for row in rows)


def from_csv(text: str, name: str) -> Schedule:
    """Return the base order in the CSV `text`.

    `generators.complete(name, schedule.ranks, problem, cost)` adds the vocabulary passes. The file
    does not contain the layout of the stages, so `check_base(schedule, problem)` finds missing,
    repeated and misplaced passes. Empty cells are bubbles and skipped. If any backward is split,
    every B is replaced by I and W, because a problem splits all backward passes or none.

    Raises ValueError with line, column (both from 1) and cell for anything that is not a stage
    pass. A row without passes is refused with its line, because torch would count it as a rank.
    """
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        ranks = tuple(_order(row, rows.line_num) for row in rows)
    except csv.Error as error:
        raise ValueError(
            f"line {rows.line_num} is not CSV ({error}); write cells like 2F0, separated by commas"
        ) from None
    if not ranks:
        raise ValueError("the CSV has no rows; write one per rank, e.g. 0F0,0B0")
    if any(item.kind in (Kind.I, Kind.W) for order in ranks for item in order):
        ranks = tuple(_split(order) for order in ranks)
    return Schedule(name, ranks)


def _order(row: list[str], line: int) -> tuple[Pass, ...]:
    """Return the passes of one row."""
    cells = ((column, cell.strip()) for column, cell in enumerate(row, start=1))
    order = tuple(
        _stage_pass(cell, f"line {line}, column {column}") for column, cell in cells if cell
    )
    if not order:
        raise ValueError(
            f"line {line} has no passes, but every line is a rank; "
            "delete it or write the passes of the rank"
        )
    return order


def _stage_pass(cell: str, place: str) -> Pass:
    """Return the stage pass in `cell`. Raises ValueError, naming `place`, for anything else."""
    if _COMMUNICATION.fullmatch(cell):
        raise ValueError(
            f'{place}: {cell!r} is communication; dump the schedule with format="compute_only"'
        )
    if cell.endswith("OVERLAP_F_B"):
        raise ValueError(
            f"{place}: {cell!r} overlaps two passes; "
            "write a cell for each, in the order in which they should run"
        )
    try:
        item = Pass.parse(cell)
    except ValueError:
        raise ValueError(
            f"{place}: {cell!r} is not a pass; write <stage><F, B, I or W><microbatch>, e.g. 2F0"
        ) from None
    if item.kind.is_vocabulary:
        raise ValueError(
            f"{place}: {cell!r} is a vocabulary pass, which torch does not have; "
            "leave it out, complete() adds it"
        )
    return item


def _split(order: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """Return `order` with each B replaced by I and W."""
    halves = {Kind.B: (Kind.I, Kind.W)}
    return tuple(
        Pass(item.stage, kind, item.microbatch)
        for item in order
        for kind in halves.get(item.kind, (item.kind,))
    )
