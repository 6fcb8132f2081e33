"""Transfers of activations to host memory and back: when they run, and the memory that they free.

Every rank has a link to its host with two directions. Each direction serves its transfers in the
order of their issue, beside the passes. A transfer to the host is issued at the end of its forward
pass. A later pass waits for its end, and from then on the device memory is free. A reload is issued
at the end of a still later pass and takes device memory at once. The first backward pass waits for
its end. So the bytes that a rank keeps depend on the order of its operations only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from schedules.cost import CostModel
from schedules.ir import Offload, Pass, Schedule
from schedules.network import Network
from schedules.problem import Problem
from schedules.timeline import OFFLOAD, RELOAD, HostTransfer, Span


@dataclass(frozen=True, slots=True)
class Issue:
    """A transfer of what `item` keeps; `awaited` is the pass that waits for its end."""

    item: Pass
    awaited: Pass
    kind: str  # OFFLOAD or RELOAD


@dataclass(frozen=True, slots=True)
class Moves:
    """The use that passes make of host memory.

    `issues`: what a pass issues at its end, in this order. `frees`: the forward passes whose copies
    to the host a pass waits for. `restores`: the one whose copy back it waits for.
    """

    issues: dict[Pass, list[Issue]]
    frees: dict[Pass, list[Pass]]
    restores: dict[Pass, Pass]

    @classmethod
    def of(cls, schedule: Schedule, problem: Problem) -> Moves:
        """Return the moves of a schedule. Passes without any are left out."""
        issues: dict[Pass, list[Issue]] = {}
        frees: dict[Pass, list[Pass]] = {}
        restores: dict[Pass, Pass] = {}
        for issuer, item, awaited, kind in _issued(schedule, problem):
            issues.setdefault(issuer, []).append(Issue(item, awaited, kind))
            if kind == OFFLOAD:
                frees.setdefault(awaited, []).append(item)
            else:
                restores[awaited] = item
        return cls(issues, frees, restores)


def _issued(schedule: Schedule, problem: Problem) -> Iterator[tuple[Pass, Pass, Pass, str]]:
    """Yield every transfer: the pass that issues it, what it moves, who waits for it, its kind.

    Of those that a pass issues, the one to the host comes first.
    """
    for offload in schedule.offloads:
        yield offload.item, offload.item, offload.free_before, OFFLOAD
    for offload in schedule.offloads:
        item = offload.item
        reader = Pass(item.stage, problem.backward, item.microbatch)
        yield offload.reload_after, item, reader, RELOAD


@dataclass(slots=True)
class _HostLink:
    """The link of one rank: when each direction is free, and what has been copied when."""

    rank: int
    cost: CostModel
    free: dict[str, float] = field(default_factory=lambda: {OFFLOAD: 0.0, RELOAD: 0.0})
    _run: list[tuple[Pass, str, float, float, float]] = field(default_factory=list)

    def issue(self, item: Pass, kind: str, seconds: float, now: float) -> float:
        """Run a transfer of what `item` keeps that is issued `now`, and return its end."""
        start = self.free[kind]
        if now > start:
            start = now
        end = self.free[kind] = start + seconds
        self._run.append((item, kind, now, start, end))
        return end

    @property
    def transfers(self) -> Iterator[HostTransfer]:
        """The copies so far, in the order of their issue."""
        for item, kind, now, start, end in self._run:
            span = Span(self.rank, f"{kind}:{item}", kind, item.stage, item.microbatch, start, end)
            yield HostTransfer(span, now, self.cost.offload(item.stage)[0])


@dataclass(frozen=True, slots=True)
class HostLinks:
    """The links of all ranks in a sweep over a network.

    `issues` maps the id of a pass to the transfers that it issues at its end: what moves, the kind,
    the seconds, and the id of the pass that waits.
    """

    links: tuple[_HostLink, ...]
    issues: dict[int, list[tuple[Pass, str, float, int]]]

    @classmethod
    def of(
        cls, schedule: Schedule, problem: Problem, cost: CostModel, network: Network
    ) -> HostLinks | None:
        """Return the links, before any transfer; None if `schedule` has none."""
        if not schedule.offloads:
            return None
        number = network.numbers()
        seconds = [cost.offload(stage)[1] for stage in range(problem.layout.num_stages)]
        issues: dict[int, list[tuple[Pass, str, float, int]]] = {}
        for issuer, item, awaited, kind in _issued(schedule, problem):
            one = item, kind, seconds[item.stage], number(awaited)
            issues.setdefault(number(issuer), []).append(one)
        return cls(tuple(_HostLink(rank, cost) for rank in range(problem.layout.num_ranks)), issues)

    def issue(self, number: int, rank: int, end: float, ready: list[float]) -> None:
        """Run the transfers that a pass issues at its end. Who waits is not ready before theirs."""
        link = self.links[rank]
        for item, kind, seconds, awaited in self.issues[number]:
            done = link.issue(item, kind, seconds, end)
            if done > ready[awaited]:
                ready[awaited] = done

    @property
    def transfers(self) -> tuple[HostTransfer, ...]:
        """The transfers so far, rank after rank."""
        return tuple(transfer for link in self.links for transfer in link.transfers)


@dataclass(frozen=True, slots=True)
class HostBytes:
    """The bytes that go to host memory before passes, and that come back after passes."""

    before: dict[Pass, float]
    after: dict[Pass, float]

    @classmethod
    def of(cls, offloads: Iterable[Offload], cost: CostModel) -> HostBytes:
        """Return the bytes of `offloads`, of one rank or of several."""
        before: dict[Pass, float] = {}
        after: dict[Pass, float] = {}
        for offload in offloads:
            num_bytes = cost.offload(offload.item.stage)[0]
            before[offload.free_before] = before.get(offload.free_before, 0.0) + num_bytes
            after[offload.reload_after] = after.get(offload.reload_after, 0.0) + num_bytes
        return cls(before, after)

    def away(self, order: Iterable[Pass]) -> Iterator[tuple[float, float]]:
        """Yield the bytes in host memory during each pass of a rank, and after it until the next.

        The passes are all of the rank, in their order.
        """
        away, before, after = 0.0, self.before, self.after
        for item in order:
            if item in before:
                away += before[item]
            during = away
            if item in after:
                away -= after[item]
            yield during, away

    def peak(self, order: Sequence[Pass], byte_changes: Iterable[float]) -> float:
        """Return the most bytes that a rank keeps on its device at any time.

        `byte_changes` are what its passes add at their start, or free at their end if below 0.
        """
        before = [self.before.get(item, 0.0) for item in order]
        after = [self.after.get(item, 0.0) for item in order]
        return device_peak(byte_changes, before, after)


def device_peak(
    byte_changes: Iterable[float], before: Iterable[float], after: Iterable[float]
) -> float:
    """Return the most bytes that a rank keeps on its device at any time.

    `byte_changes` are what its passes add at their start, or free at their end if below 0. `before`
    and `after` are the bytes that go to host memory before each pass, and that come back after it.
    """
    held = highest = away = 0.0
    for change, leaving, returning in zip(byte_changes, before, after, strict=True):
        away += leaving
        during = held - away if change < 0.0 else held + change - away
        if during > highest:
            highest = during
        away -= returning
        held += change
        if held - away > highest:
            highest = held - away
    return highest
