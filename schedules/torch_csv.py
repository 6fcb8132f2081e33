"""Schedules in the CSV of torch.distributed.pipelining: one row per rank, one cell per time step, cells such as `2F0`.

torch reads it with `_load_csv(path)` and writes it with `_dump_csv(path, format="compute_only")` of a multi-stage schedule.
F, B, I and W mean the same on both sides.  torch has no vocabulary passes, for it keeps the vocabulary inside the end stages.
"""

from __future__ import annotations

import csv
import io
import re

from schedules.ir import Kind, Pass, Schedule

_COMMUNICATION = re.compile(r"\d+(SEND_F|RECV_F|SEND_B|RECV_B|UNSHARD|RESHARD|REDUCE_GRAD)\d*")


def to_csv(schedule: Schedule) -> str:
    """The stage passes (F, B, I, W) of `schedule` in their order, without bubbles, for they follow from the order.

    Vocabulary passes (S, T, E, G) are dropped, and so is the name: torch has neither.
    """
    rows = (
        ",".join(str(item) for item in order if not item.kind.is_vocabulary)
        for order in schedule.ranks
    )
    return "".join(f"{row}\n" for row in rows)


def from_csv(text: str, name: str) -> Schedule:
    """The base order that `text` holds; `generators.complete(name, schedule.ranks, problem, cost)` adds the vocabulary passes.

    The file does not say where stages live: `check_base(schedule, problem)` finds missing, repeated and misplaced passes.
    Empty cells are bubbles and skipped.  Where any backward is split, every B becomes I and W, one after the other: a problem
    splits all backward passes or none.  Raises ValueError with line, column (both from 1) and cell for anything that is not a
    stage pass, and with the line for a row without passes, which torch would count as a rank.
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
    cells = ((column, cell.strip()) for column, cell in enumerate(row, start=1))
    order = tuple(
        _stage_pass(cell, f"line {line}, column {column}") for column, cell in cells if cell
    )
    if not order:
        raise ValueError(
            f"line {line} has no passes, but every line is a rank; delete it or write the passes of the rank"
        )
    return order


def _stage_pass(cell: str, place: str) -> Pass:
    if _COMMUNICATION.fullmatch(cell):
        raise ValueError(
            f'{place}: {cell!r} is communication; dump the schedule with format="compute_only"'
        )
    if cell.endswith("OVERLAP_F_B"):
        raise ValueError(
            f"{place}: {cell!r} overlaps two passes; write a cell for each, in the order in which they shall run"
        )
    try:
        item = Pass.parse(cell)
    except ValueError:
        raise ValueError(
            f"{place}: {cell!r} is not a pass; write <stage><F, B, I or W><microbatch>, e.g. 2F0"
        ) from None
    if item.kind.is_vocabulary:
        raise ValueError(
            f"{place}: {cell!r} is a vocabulary pass, which torch does not have; leave it out, complete() adds it"
        )
    return item


def _split(order: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """`order` with I and W in the place of each B."""
    halves = {Kind.B: (Kind.I, Kind.W)}
    return tuple(
        Pass(item.stage, kind, item.microbatch)
        for item in order
        for kind in halves.get(item.kind, (item.kind,))
    )
