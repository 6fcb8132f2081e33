"""Program + CostModel + Runtime -> Timeline: how long a lowered program takes where it is executed.

The simulation knows passes and barriers.  A runtime knows operations that are issued in order, and
streams or threads that wait for each other.  Everything such a program does starts as soon as
certain other things have ended: what stands before it in its stream, and what it waits for.  So a
replay is one walk over these activities, and an operation in the wrong place shows as time.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from schedules.cost import CostModel
from schedules.graph import DeadlockError
from schedules.ir import Kind, Pass
from schedules.lower import Action, Op, Program
from schedules.problem import Collective
from schedules.simulate import peak
from schedules.timeline import Span, Timeline
from schedules.vocab import End


@dataclass(frozen=True, slots=True)
class Runtime:
    """How operations that are issued in the order of a program are executed.

    On every rank the passes run one after the other.  WAIT and ARRIVE stop them until their
    communication has ended.  A communication starts when all its ranks have issued it, and no
    rank's message is ready before the passes that stand before its issue.  The collectives of one
    end of the vocabulary run in the order of their issue.

    `issues_ahead`: the host issues the whole program at once, and streams wait in its place.
    Without it an operation is issued when the passes before it have ended.
    `continues_beside_passes`: a collective that continues another starts when that one has ended,
    whatever the passes do.  Without it START waits for that one in the stream of the passes.
    `hops_in_order`: what one rank sends to another travels in the order of issue, one hop at a time.
    """

    name: str
    issues_ahead: bool
    continues_beside_passes: bool
    hops_in_order: bool


# CUDA: a compute stream, a stream per communicator, a side stream per end for its messages.
CUDA = Runtime("cuda", issues_ahead=True, continues_beside_passes=True, hops_in_order=True)
# gloo: the host runs the passes; a thread per end issues that end's collectives.
GLOO = Runtime("gloo", issues_ahead=False, continues_beside_passes=True, hops_in_order=False)
RUNTIMES = {runtime.name: runtime for runtime in (CUDA, GLOO)}


@dataclass(frozen=True, slots=True)
class Replay:
    """A replayed program.

    `causes[r][k]` is the operation that pass k of rank r waited for last; None if it followed the
    pass before it at once.
    """

    timeline: Timeline
    causes: tuple[tuple[Op | None, ...], ...]


@dataclass(frozen=True, slots=True)
class LateStart:
    """A pass before which a rank waits `seconds` longer than simulated, for the operation `cause`."""

    rank: int
    name: str
    seconds: float
    cause: Op

    def __str__(self) -> str:
        return f"rank {self.rank} before {self.name}, at {self.cause}"


def replay(program: Program, cost: CostModel, runtime: Runtime) -> Replay:
    """Return what `runtime` makes of `program`; the bound of the timeline is not known.

    Raises DeadlockError, naming the operation at which each rank stands, if none can go on.
    """
    walk = _Walk.over(program, cost, runtime)
    walk.run()
    return Replay(_timeline_of(walk, program, cost), tuple(map(walk.causes, range(len(program.ranks)))))


def late_starts(replayed: Replay, simulated: Timeline) -> list[LateStart]:
    """Return where ranks wait longer in the replay than in the simulation of it, worst first.

    A wait is the time between two passes of a rank.  So a delay counts where a rank stands still,
    not in everything that comes after it.  Raises ValueError for timelines of different passes.
    """
    noise = 1e-9 * simulated.makespan
    found = []
    for rank, (spans, expected) in enumerate(
        zip(replayed.timeline.compute, simulated.compute, strict=True)
    ):
        if [span.name for span in spans] != [span.name for span in expected]:
            raise ValueError(f"the passes of rank {rank} differ in replay and simulation")
        before = planned = 0.0
        for span, plan, cause in zip(spans, expected, replayed.causes[rank], strict=True):
            seconds = (span.start - before) - (plan.start - planned)
            if seconds > noise and cause is not None:
                found.append(LateStart(rank, span.name, seconds, cause))
            before, planned = span.end, plan.end
    return sorted(found, key=lambda late: -late.seconds)


_Hop = tuple[Pass, int, int]  # what, from, to
_Communicator = End | tuple[int, int]


@dataclass(slots=True)
class _Walk:
    """Activities: passes, communications, and the moments at which passes wait for these.

    `seconds`, `missing`, `followers` and `start` are indexed by the activity.  `missing` counts the
    activities that have not ended yet, and the ranks that have not issued it.  `placed[r]` are
    rank r's operations with the activity of each, `communications` what they exchange.
    """

    placed: list[list[tuple[Op, int]]]
    seconds: list[float] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    followers: list[list[int]] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    communications: dict[Collective | _Hop, int] = field(default_factory=dict)

    @classmethod
    def over(cls, program: Program, cost: CostModel, runtime: Runtime) -> _Walk:
        """Lay out the activities of `program`."""
        walk = cls([[] for _ in program.ranks])
        walk._announce(program, cost)
        for rank, ops in enumerate(program.ranks):
            walk._place(rank, ops, cost, runtime)
        return walk

    def _add(self, seconds: float, missing: int = 0) -> int:
        self.seconds.append(seconds)
        self.missing.append(missing)
        self.followers.append([])
        return len(self.seconds) - 1

    def _follow(self, earlier: int, later: int) -> None:
        if earlier >= 0:
            self.followers[earlier].append(later)
            self.missing[later] += 1

    def _announce(self, program: Program, cost: CostModel) -> None:
        """Add all communications: a collective needs every rank that ever starts one of its end."""
        members: dict[End, set[int]] = {end: set() for end in End}
        ends: dict[Collective, End] = {}
        for rank, ops in enumerate(program.ranks):
            for op in ops:
                item = op.item
                if isinstance(item, Pass):
                    if op.action in (Action.SEND, Action.RECV, Action.ARRIVE):
                        hop = _hop_of(op, item, rank)
                        if hop not in self.communications:
                            self.communications[hop] = self._add(cost.hop_seconds, 2)
                elif op.exchange is not None:
                    ends[item] = op.exchange.end
                    members[op.exchange.end].add(rank)
        for item, end in ends.items():
            self.communications[item] = self._add(cost.barrier(item.barrier), len(members[end]))

    def _place(self, rank: int, ops: tuple[Op, ...], cost: CostModel, runtime: Runtime) -> None:
        """Put the operations of one rank in order; `passes` and `last` are the ends of its streams."""
        passes = -1
        last: dict[_Communicator, int] = {}

        def wait_for(op: Op, communication: int) -> None:
            nonlocal passes
            activity = self._add(0.0)
            self._follow(passes, activity)
            self._follow(communication, activity)
            self.placed[rank].append((op, activity))
            passes = activity

        def issue(op: Op, activity: int, communicator: _Communicator | None, after: int) -> None:
            self.missing[activity] -= 1
            self._follow(after, activity)
            if communicator is not None:
                self._follow(last.get(communicator, -1), activity)
                last[communicator] = activity
            self.placed[rank].append((op, activity))

        for op in ops:
            item, exchange = op.item, op.exchange
            match op.action:
                case Action.RUN:
                    assert isinstance(item, Pass)
                    activity = self._add(cost.seconds(item))
                    self._follow(passes, activity)
                    self.placed[rank].append((op, activity))
                    passes = activity
                case Action.SEND | Action.RECV:
                    assert isinstance(item, Pass)
                    hop = _hop_of(op, item, rank)
                    channel = hop[1:] if runtime.hops_in_order else None
                    issue(op, self.communications[hop], channel, passes)
                case Action.ARRIVE:
                    assert isinstance(item, Pass)
                    wait_for(op, self.communications[_hop_of(op, item, rank)])
                case Action.WAIT:
                    assert isinstance(item, Collective)
                    wait_for(op, self._collective(item))
                case Action.START:
                    assert isinstance(item, Collective)
                    assert exchange is not None
                    activity, after = self.communications[item], passes
                    if exchange.continues is not None:
                        earlier = self._collective(exchange.continues)
                        if not runtime.continues_beside_passes:
                            wait_for(op, earlier)
                            after = passes
                        else:
                            self._follow(earlier, activity)
                            after = -1 if runtime.issues_ahead else passes
                    issue(op, activity, exchange.end, after)

    def _collective(self, item: Collective) -> int:
        """Return the activity of a collective; of one that no rank starts, an endless one."""
        if item not in self.communications:
            self.communications[item] = self._add(0.0, 1)
        return self.communications[item]

    def run(self) -> None:
        """Find the start of every activity."""
        seconds, missing, followers = self.seconds, self.missing, self.followers
        start = self.start = [0.0] * len(seconds)
        ready = [activity for activity, count in enumerate(missing) if count == 0]
        done = 0
        while ready:
            activity = ready.pop()
            done += 1
            end = start[activity] + seconds[activity]
            for later in followers[activity]:
                if end > start[later]:
                    start[later] = end
                missing[later] -= 1
                if missing[later] == 0:
                    ready.append(later)
        if done < len(seconds):
            raise DeadlockError(self._stuck())

    def _stuck(self) -> str:
        """Say where each rank stands: where its passes stop, or else what it issued in vain."""
        words = []
        for rank, placed in enumerate(self.placed):
            waiting = [op for op, activity in placed if self.missing[activity] != 0]
            stops = (op for op in waiting if op.action not in (Action.SEND, Action.RECV, Action.START))
            if (op := next(stops, waiting[0] if waiting else None)) is not None:
                words.append(f"rank {rank} stands at {op}")
        return "deadlock: " + ", ".join(words)

    def causes(self, rank: int) -> tuple[Op | None, ...]:
        """Return the operation that each pass of `rank` waited for last."""
        found: list[Op | None] = []
        now, cause = 0.0, None
        for op, activity in self.placed[rank]:
            start = self.start[activity]
            if op.action is Action.RUN:
                found.append(cause)
                now, cause = start + self.seconds[activity], None
            elif start > now and op.action in (Action.ARRIVE, Action.WAIT):
                now, cause = start, op
        return tuple(found)


def _hop_of(op: Op, item: Pass, rank: int) -> _Hop:
    assert op.peer is not None
    return (item, rank, op.peer) if op.action is Action.SEND else (item, op.peer, rank)


def _timeline_of(walk: _Walk, program: Program, cost: CostModel) -> Timeline:
    """Return the spans of a walk, and the peaks of every rank."""
    kinds = Counter(op.item.kind for ops in program.ranks for op in ops if isinstance(op.item, Pass))
    frees = next((kind for kind in (Kind.W, Kind.B) if kind in kinds), Kind.F)
    compute, peak_bytes, peak_in_flight = [], [], []
    comm: dict[Collective, Span] = {}
    for rank, placed in enumerate(walk.placed):
        spans, changes, flying = [], [], []
        for op, activity in placed:
            start, item = walk.start[activity], op.item
            end = start + walk.seconds[activity]
            if isinstance(item, Collective):
                if op.exchange is not None and item not in comm:
                    root, name = op.exchange.root, item.barrier
                    comm[item] = Span(root, str(item), name, -1, item.microbatch, start, end)
            elif op.action is Action.RUN:
                kind, stage, microbatch = item.kind, item.stage, item.microbatch
                spans.append(Span(rank, str(item), kind.value, stage, microbatch, start, end))
                changes.append(0.0 if program.forward_only else cost.byte_change(item))
                flying.append((kind is Kind.F) - (kind is frees))
        compute.append(tuple(spans))
        peak_bytes.append(peak(changes))
        peak_in_flight.append(int(peak(flying)))
    ordered = sorted(comm.values(), key=lambda span: span.start)
    return Timeline(tuple(compute), tuple(ordered), tuple(peak_bytes), tuple(peak_in_flight))
