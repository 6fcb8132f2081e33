"""Program + CostModel + Runtime -> Timeline: how long a lowered program takes on a runtime.

`simulate` knows passes and barriers only. A runtime executes operations: it issues them in order,
on streams or threads that wait for each other. An activity starts when the previous one of its
stream has ended, and everything that it waits for. So a replay is one walk over the graph of
activities. An operation in the wrong place shows as lost time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import chain

from schedules.cost import CostModel
from schedules.graph import DeadlockError
from schedules.ir import Kind, Pass
from schedules.lower import Action, Op, Program
from schedules.problem import Collective, Node
from schedules.simulate import peak
from schedules.timeline import OFFLOAD, RELOAD, HostTransfer, Span, Timeline
from schedules.vocab import End


class Hops(StrEnum):
    """The transfers between two ranks that share a stream and run in the order of their issue."""

    FREE = "free"  # none
    DIRECTED = "directed"  # all transfers of one direction
    PAIRED = "paired"  # the activations of both directions; likewise the gradients


@dataclass(frozen=True, slots=True)
class Runtime:
    """The rules by which a runtime executes the operations of a program.

    On every rank the passes run one after the other. WAIT and ARRIVE stop them until their
    communication has ended. A communication starts when all its ranks have issued it. The message
    of a rank is ready when the passes before its issue have ended. The collectives of one end of
    the model run in the order of their issue. Each direction of the link to the host is a stream. A
    transfer follows the passes before its issue. OFFLOADED and RESTORED stop the passes until
    theirs has ended.

    - `issues_ahead`: the host issues the whole program at once, and the streams do the waiting. If
      false, an operation is issued when the passes before it have ended.
    - `continues_beside_passes`: a collective that continues another starts when that one has ended,
      whatever the passes do. If false, START waits for that one in the stream of the passes.
    - `hops`: which transfers between ranks share a stream.
    - `copies_beside_passes`: if false, the passes themselves copy to the host and back.
    """

    name: str
    issues_ahead: bool
    continues_beside_passes: bool
    hops: Hops
    copies_beside_passes: bool = True

    def on(self, device: str) -> Runtime:
        """Return the runtime of passes on `device`: those that a CPU runs copy to the host."""
        return replace(self, copies_beside_passes=self.issues_ahead or device != "cpu")


# CUDA: a compute stream, a stream per communicator, and per end of the model a side stream that
# prepares its messages.
CUDA = Runtime("cuda", issues_ahead=True, continues_beside_passes=True, hops=Hops.DIRECTED)
# gloo: the host runs the passes; a thread per end issues that end's collectives.
GLOO = Runtime("gloo", issues_ahead=False, continues_beside_passes=True, hops=Hops.FREE)
RUNTIMES = {runtime.name: runtime for runtime in (CUDA, GLOO)}


@dataclass(frozen=True, slots=True)
class Replay:
    """The result of a replay.

    `causes[r][k]` is the operation that pass k of rank r waited for last. It is None if the pass
    followed the previous pass at once.

    `beside_waits[r]` is the fraction of the time of rank r's passes in which a communication that
    the rank has issued waits for another rank. Under NCCL a waiting communication occupies thread
    blocks, so matrix products beside it take longer (docs/results.md).
    """

    timeline: Timeline
    causes: tuple[tuple[Op | None, ...], ...]
    beside_waits: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LateStart:
    """A pass `name` before which `rank` waits, at `cause`, `seconds` longer than simulated."""

    rank: int
    name: str
    seconds: float
    cause: Op

    def __str__(self) -> str:
        return f"rank {self.rank} before {self.name}, at {self.cause}"


CopyKey = tuple[Action, Pass]  # OFFLOAD or RELOAD, and the forward pass
_COPIES = {Action.OFFLOADED: Action.OFFLOAD, Action.RESTORED: Action.RELOAD}  # what they wait for


@dataclass(frozen=True, slots=True)
class Times:
    """The seconds of single passes and communications, in place of those of a cost model.

    A hop has the key of the pass that it sends, a copy to the host or back that of its forward pass
    with OFFLOAD or RELOAD. The leads are the seconds from the moment at which all that it waits for
    has ended to its start or its issue: what the host does in between. What has no entry takes the
    seconds of the cost model, without a lead.
    """

    passes: Mapping[Pass, float] = field(default_factory=dict)
    communications: Mapping[Node, float] = field(default_factory=dict)
    copies: Mapping[CopyKey, float] = field(default_factory=dict)
    pass_leads: Mapping[Pass, float] = field(default_factory=dict)
    communication_leads: Mapping[Node, float] = field(default_factory=dict)
    copy_leads: Mapping[CopyKey, float] = field(default_factory=dict)


def replay(
    program: Program, cost: CostModel, runtime: Runtime, times: Times | None = None
) -> Replay:
    """Return how `runtime` executes `program`. The bound of the timeline is left unknown (0).

    Single passes and communications take what `times` say. Raises DeadlockError, naming the
    operation that each rank waits at, if none can go on.
    """
    walk = _Walk.over(program, cost, runtime)
    if times is not None:
        walk.take(times)
    walk.run()
    ranks = range(len(program.ranks))
    causes, beside_waits = tuple(map(walk.causes, ranks)), tuple(map(walk.beside_waits, ranks))
    return Replay(_timeline_of(walk, program, cost), causes, beside_waits)


def times_of(program: Program, cost: CostModel, runtime: Runtime, measured: Timeline) -> Times:
    """Return the times with which `runtime` executes `program` as it was measured.

    A communication lasts from its issue on the last rank to its measured end, at most to the first
    pass that waited for it; one that was not measured takes at most the seconds of `cost`. The time
    of a rank that nothing else explains is the lead of the pass or message after it. A replay with
    these times ends when the measured step did, unless the measurement contradicts the program:
    a pass that started before its inputs were there. Raises ValueError for a pass of the program
    that was not measured.
    """
    walk = _Walk.over(program, cost, runtime)
    return walk.fit(measured)


def late_starts(replayed: Replay, simulated: Timeline) -> list[LateStart]:
    """Return where ranks wait longer in the replay than in the simulation, longest wait first.

    A wait is the time between two passes of a rank. So a delay is counted once, where the rank
    waits, and not again for every later pass. Raises ValueError if the two timelines have different
    passes.
    """
    noise = 1e-9 * simulated.makespan
    found = []
    timelines = zip(replayed.timeline.compute, simulated.compute, strict=True)
    for rank, (spans, expected) in enumerate(timelines):
        if [span.name for span in spans] != [span.name for span in expected]:
            raise ValueError(f"the passes of rank {rank} differ in replay and simulation")
        before = planned = 0.0
        for span, plan, cause in zip(spans, expected, replayed.causes[rank], strict=True):
            seconds = (span.start - before) - (plan.start - planned)
            if seconds > noise and cause is not None:
                found.append(LateStart(rank, span.name, seconds, cause))
            before, planned = span.end, plan.end
    return sorted(found, key=lambda late: -late.seconds)


_Hop = tuple[Pass, int, int]  # the pass whose output is sent, the sender, the receiver
_Communicator = End | tuple[int, int, bool]


@dataclass(slots=True)
class _Streams:
    """The streams of one rank, to which its operations are appended in their order.

    - `passes` is the stream of its passes and waits: operations with their activities.
    - `issued` holds the operations that issue a communication, with its activity.
    - `waits` holds the same activities, with the earlier activities of the rank that each follows.
      When these have ended, the communication waits for the other ranks.
    - `copies` maps OFFLOAD and RELOAD of its forward passes to their activities, and to the last
      activity of the passes at their issue.
    - `started` has the collectives that the rank starts, and the end of the model of each.
    - `now` is the last activity of the passes, -1 before the first. `last` has that of every
      communicator, `copying` that of each direction of the host's link.
    """

    walk: _Walk
    rank: int
    passes: list[tuple[Op, int]] = field(default_factory=list)
    issued: list[tuple[Op, int]] = field(default_factory=list)
    waits: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    copies: dict[tuple[Action, Pass], tuple[int, int]] = field(default_factory=dict)
    started: dict[Collective, End] = field(default_factory=dict)
    now: int = -1
    last: dict[_Communicator, int] = field(default_factory=dict)
    copying: dict[Action, int] = field(default_factory=dict)

    def append(self, op: Op) -> None:
        """Append the activities of the next operation."""
        walk, item, action = self.walk, op.item, op.action
        if isinstance(item, Collective):
            if action is Action.WAIT:
                self._run(op, 0.0, walk.collective(item))
            else:
                self._start(op, item)
        elif action is Action.RUN:
            self._run(op, walk.cost.seconds(item))
        elif action in (Action.OFFLOAD, Action.RELOAD):
            self._copy(op, item)
        elif action in _COPIES:
            self._run(op, 0.0, self.copies[_COPIES[action], item][0])
        elif action is Action.ARRIVE:
            self._run(op, 0.0, walk.transfer(op, self.rank))
        elif action is not Action.NEED:
            after = (self.now,) if self.now >= 0 else ()
            self._issue(op, walk.transfer(op, self.rank), self._channel(op), *after)

    def _run(self, op: Op, seconds: float, after: int = -1) -> None:
        """Append an activity to the stream of the passes; it also follows the activity `after`."""
        activity = self.walk.add(seconds)
        if self.now >= 0:
            self.walk.followers[self.now].append(activity)
        if after >= 0:
            self.walk.followers[after].append(activity)
        self.passes.append((op, activity))
        self.now = activity

    def _issue(
        self, op: Op, activity: int, communicator: _Communicator | None, *after: int
    ) -> None:
        """Append a communication to its stream; it also follows the activities `after`."""
        self.walk.missing[activity] -= 1
        if communicator is not None:
            if communicator in self.last:
                after = (*after, self.last[communicator])
            self.last[communicator] = activity
        for earlier in after:
            self.walk.followers[earlier].append(activity)
        self.issued.append((op, activity))
        self.waits.append((activity, after))

    def _start(self, op: Op, item: Collective) -> None:
        """Issue a collective, behind the one that it continues."""
        runtime, exchange = self.walk.runtime, op.exchange
        assert exchange is not None
        self.started[item] = exchange.end
        activity = self.walk.collective(item)
        after = (self.now,) if self.now >= 0 else ()
        if exchange.continues is not None:
            earlier = self.walk.collective(exchange.continues)
            if runtime.continues_beside_passes:
                after = (earlier,) if runtime.issues_ahead else (*after, earlier)
            else:
                self._run(op, 0.0, earlier)
                after = (self.now,)
        self._issue(op, activity, exchange.end, *after)

    def _copy(self, op: Op, item: Pass) -> None:
        """Append a copy to the host's link, or to the passes if it stops them."""
        seconds, before = self.walk.cost.offload(item.stage)[1], self.now
        if not self.walk.runtime.copies_beside_passes:
            self._run(op, seconds)
            self.copies[op.action, item] = self.now, before
            return
        activity = self.walk.add(seconds)
        for earlier in (before, self.copying.get(op.action, -1)):
            if earlier >= 0:
                self.walk.followers[earlier].append(activity)
        self.copies[op.action, item] = activity, before
        self.copying[op.action] = activity
        self.issued.append((op, activity))

    def _channel(self, op: Op) -> _Communicator | None:
        """Return the stream in which a transfer waits for earlier ones; None if it has none."""
        item, rank, peer = op.item, self.rank, op.peer
        assert isinstance(item, Pass)
        assert peer is not None
        match self.walk.runtime.hops:
            case Hops.FREE:
                return None
            case Hops.DIRECTED:
                return (rank, peer, True) if op.action is Action.SEND else (peer, rank, True)
            case Hops.PAIRED:
                return (min(rank, peer), max(rank, peer), item.kind is Kind.F)


@dataclass(slots=True)
class _Walk:
    """The graph of activities: passes, communications, and waits of the passes for communications.

    `seconds`, `leads`, `missing`, `followers` and `start` are indexed by the activity.
    - `leads` is the time between the moment at which an activity could start and its start.
    - `missing` counts the ranks that have not issued the activity. `run` adds to it the activities
      before it that have not ended.
    - `communications` maps every collective and hop to its activity.
    - `ranks[r]` has the streams of rank r.
    """

    cost: CostModel
    runtime: Runtime
    seconds: list[float] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    followers: list[list[int]] = field(default_factory=list)
    start: list[float] = field(default_factory=list)
    communications: dict[Collective | _Hop, int] = field(default_factory=dict)
    ranks: list[_Streams] = field(default_factory=list)

    @classmethod
    def over(cls, program: Program, cost: CostModel, runtime: Runtime) -> _Walk:
        """Return the graph of the activities of `program`.

        A collective waits for all ranks that start any collective of the same end of the model.
        """
        walk = cls(cost, runtime)
        members: dict[End, set[int]] = {end: set() for end in End}
        ends: dict[Collective, End] = {}
        for rank, ops in enumerate(program.ranks):
            streams = _Streams(walk, rank)
            walk.ranks.append(streams)
            for op in ops:
                streams.append(op)
            for collective, end in streams.started.items():
                members[end].add(rank)
                ends[collective] = end
        for item, activity in walk.communications.items():
            if isinstance(item, Collective):
                walk.missing[activity] += len(members[ends[item]]) if item in ends else 1
        return walk

    def add(self, seconds: float) -> int:
        """Add an activity that takes `seconds`, and return its index."""
        self.seconds.append(seconds)
        self.leads.append(0.0)
        self.missing.append(0)
        self.followers.append([])
        return len(self.seconds) - 1

    def transfer(self, op: Op, rank: int) -> int:
        """Return the activity of the transfer that `op` of `rank` issues or waits for."""
        item, peer = op.item, op.peer
        assert isinstance(item, Pass)
        assert peer is not None
        hop = (item, rank, peer) if op.action is Action.SEND else (item, peer, rank)
        activity = self.communications.get(hop)
        if activity is None:
            activity = self.communications[hop] = self.add(self.cost.hop_seconds)
            self.missing[activity] = 2
        return activity

    def collective(self, item: Collective) -> int:
        """Return the activity of a collective."""
        activity = self.communications.get(item)
        if activity is None:
            activity = self.communications[item] = self.add(self.cost.barrier(item.barrier))
        return activity

    def _runs(self) -> dict[Pass, int]:
        """Return the activity of every pass."""
        return {
            op.item: activity
            for streams in self.ranks
            for op, activity in streams.passes
            if op.action is Action.RUN and isinstance(op.item, Pass)
        }

    def _copies(self) -> dict[CopyKey, int]:
        """Return the activity of every copy to the host and back."""
        return {
            copy: activity
            for streams in self.ranks
            for copy, (activity, _) in streams.copies.items()
        }

    def take(self, times: Times) -> None:
        """Let the passes, communications and copies take what `times` say."""
        runs = self._runs()
        messages = {_key(item): activity for item, activity in self.communications.items()}
        copies = self._copies()
        for found, values, target in (
            (runs, times.passes, self.seconds),
            (runs, times.pass_leads, self.leads),
            (messages, times.communications, self.seconds),
            (messages, times.communication_leads, self.leads),
            (copies, times.copies, self.seconds),
            (copies, times.copy_leads, self.leads),
        ):
            for item, seconds in values.items():
                if item in found:
                    target[found[item]] = seconds  # type: ignore[index]

    def fit(self, measured: Timeline) -> Times:
        """Set seconds and leads so that `run` gives the measured timeline, and return them.

        An activity is fitted when all activities before it are, so what was lost earlier is not
        counted again.
        """
        runs, ends = self._runs(), {span.name: span for span in measured.comm}
        spans = {span.name: span for spans in measured.compute for span in spans}
        if lacking := next((item for item in runs if str(item) not in spans), None):
            raise ValueError(f"{lacking} was not measured")
        observed = {activity: spans[str(item)] for item, activity in runs.items()}
        latest = self._latest(observed)
        messages = {activity: _key(item) for item, activity in self.communications.items()}
        copies = self._copies()
        names = {activity: str(item) for activity, item in messages.items()}
        names |= {activity: f"{action}:{item}" for (action, item), activity in copies.items()}

        def fitted(activity: int) -> None:
            ready = self.start[activity]
            if activity in observed:
                span = observed[activity]
                self.leads[activity] = max(0.0, span.start - ready)
                self.seconds[activity] = span.seconds
            elif activity in names:
                message = ends.get(names[activity])
                begin = ready if message is None else max(ready, message.start)
                end = begin + self.seconds[activity] if message is None else message.end
                end = min(end, latest.get(activity, math.inf))
                begin = min(begin, max(end, ready))
                self.leads[activity] = begin - ready
                self.seconds[activity] = max(0.0, end - begin)

        self.run(fitted)
        return Times(
            passes={item: self.seconds[activity] for item, activity in runs.items()},
            communications={item: self.seconds[activity] for activity, item in messages.items()},
            copies={copy: self.seconds[activity] for copy, activity in copies.items()},
            pass_leads={item: self.leads[activity] for item, activity in runs.items()},
            communication_leads={item: self.leads[activity] for activity, item in messages.items()},
            copy_leads={copy: self.leads[activity] for copy, activity in copies.items()},
        )

    def _latest(self, observed: Mapping[int, Span]) -> dict[int, float]:
        """Return the moment at which the first pass that waited for each communication started."""
        latest: dict[int, float] = {}
        for rank, streams in enumerate(self.ranks):
            awaited: list[int] = []
            for op, activity in streams.passes:
                if op.action is Action.WAIT:
                    assert isinstance(op.item, Collective)
                    awaited.append(self.communications[op.item])
                elif op.action is Action.ARRIVE:
                    awaited.append(self.transfer(op, rank))
                elif op.action in _COPIES:
                    assert isinstance(op.item, Pass)
                    awaited.append(streams.copies[_COPIES[op.action], op.item][0])
                elif op.action is Action.RUN:
                    for message in awaited:
                        start = observed[activity].start
                        latest[message] = min(start, latest.get(message, start))
                    awaited.clear()
        return latest

    def run(self, fit: Callable[[int], None] | None = None) -> None:
        """Compute the start of every activity. Raises DeadlockError if some can never start.

        `fit` is called with an activity as soon as everything before it has its times.
        """
        seconds, leads = self.seconds, self.leads
        missing, followers = self.missing, self.followers
        start = self.start = [0.0] * len(seconds)
        for later in chain.from_iterable(followers):
            missing[later] += 1
        ready = [activity for activity, count in enumerate(missing) if count == 0]
        done = 0
        while ready:
            activity = ready.pop()
            done += 1
            if fit is not None:
                fit(activity)
            start[activity] += leads[activity]
            end = start[activity] + seconds[activity]
            for later in followers[activity]:
                if end > start[later]:
                    start[later] = end
                missing[later] -= 1
                if missing[later] == 0:
                    ready.append(later)
        if done < len(seconds):
            raise DeadlockError(self._stuck())

    def span(self, rank: int, item: Pass | Collective, activity: int) -> Span:
        """Return the interval of a pass or a collective, shown on `rank`."""
        start = self.start[activity]
        return Span(
            rank,
            name=str(item),
            kind=item.kind.value if isinstance(item, Pass) else item.barrier,
            stage=item.stage if isinstance(item, Pass) else -1,
            microbatch=item.microbatch,
            start=start,
            end=start + self.seconds[activity],
        )

    def transfers(self, rank: int) -> tuple[HostTransfer, ...]:
        """Return the copies of a rank to its host and back, in the order of their issue."""
        found = []
        for (action, item), (activity, before) in self.ranks[rank].copies.items():
            start, kind = self.start[activity], OFFLOAD if action is Action.OFFLOAD else RELOAD
            end, num_bytes = start + self.seconds[activity], self.cost.offload(item.stage)[0]
            span = Span(rank, f"{kind}:{item}", kind, item.stage, item.microbatch, start, end)
            issued = self.start[before] + self.seconds[before]
            found.append(HostTransfer(span, issued, num_bytes))
        return tuple(found)

    def _stuck(self) -> str:
        """Return the operation that each rank waits at: in its passes, else an issued one."""
        words = []
        for rank, streams in enumerate(self.ranks):
            ops = chain(streams.passes, streams.issued)
            waiting = (op for op, activity in ops if self.missing[activity] != 0)
            if (op := next(waiting, None)) is not None:
                words.append(f"rank {rank} stands at {op}")
        return "deadlock: " + ", ".join(words)

    def causes(self, rank: int) -> tuple[Op | None, ...]:
        """Return the operation that each pass of `rank` waited for last."""
        found: list[Op | None] = []
        now, cause = 0.0, None
        for op, activity in self.ranks[rank].passes:
            end = self.start[activity] + self.seconds[activity]
            if op.action is Action.RUN:
                found.append(cause)
                now, cause = end, None
            elif end > now:
                now, cause = end, op
        return tuple(found)

    def beside_waits(self, rank: int) -> float:
        """Return the fraction of the passes of `rank`, in time, beside a waiting communication."""
        waits = []
        for activity, after in self.ranks[rank].waits:
            issued = max((self.start[prior] + self.seconds[prior] for prior in after), default=0.0)
            waits.append((issued, self.start[activity]))
        passes = [
            (self.start[activity], self.start[activity] + self.seconds[activity])
            for op, activity in self.ranks[rank].passes
            if op.action is Action.RUN
        ]
        busy = sum(stop - start for start, stop in passes)
        return _shared_seconds(passes, waits) / busy if busy > 0 else 0.0


def _key(item: Collective | _Hop) -> Node:
    """Return the key of a communication in `Times`."""
    return item if isinstance(item, Collective) else item[0]


def _shared_seconds(apart: list[tuple[float, float]], others: list[tuple[float, float]]) -> float:
    """Return the seconds of the intervals `apart` that lie within any of the intervals `others`.

    The intervals `apart` do not overlap each other; those of `others` may.
    """
    joined: list[tuple[float, float]] = []
    for start, stop in sorted(others):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    shared, first = 0.0, 0
    for start, stop in sorted(apart):
        while first < len(joined) and joined[first][1] <= start:
            first += 1
        for begin, end in joined[first:]:
            if begin >= stop:
                break
            shared += min(stop, end) - max(start, begin)
    return shared


def _byte_changes(ops: Iterable[Op], cost: CostModel) -> Iterator[float]:
    """Yield the bytes that each operation of a rank keeps on the device, less those it frees."""
    for op in ops:
        if isinstance(op.item, Pass):
            match op.action:
                case Action.RUN:
                    yield cost.byte_change(op.item)
                case Action.OFFLOADED:
                    yield -cost.offload(op.item.stage)[0]
                case Action.RELOAD:
                    yield cost.offload(op.item.stage)[0]


def _timeline_of(walk: _Walk, program: Program, cost: CostModel) -> Timeline:
    """Return the spans of a walk and the peaks of every rank."""
    frees = Kind.F if program.forward_only else Kind.B
    if any(isinstance(op.item, Pass) and op.item.kind is Kind.W for op in program.ranks[0]):
        frees = Kind.W
    compute: list[tuple[Span, ...]] = []
    comm: dict[Collective, Span] = {}
    peak_bytes, peak_in_flight = [], []
    transfers: list[HostTransfer] = []
    for rank, streams in enumerate(walk.ranks):
        runs = [(op.item, activity) for op, activity in streams.passes if op.action is Action.RUN]
        items = [item for item, _ in runs if isinstance(item, Pass)]
        compute.append(tuple(walk.span(rank, item, activity) for item, activity in runs))
        transfers += walk.transfers(rank)
        peak_bytes.append(
            0.0 if program.forward_only else peak(_byte_changes(program.ranks[rank], cost))
        )
        changes = [(item.kind is Kind.F) - (item.kind is frees) for item in items]
        peak_in_flight.append(int(peak(changes)))
        for op, activity in streams.issued:
            if isinstance(op.item, Collective) and op.exchange is not None and op.item not in comm:
                comm[op.item] = walk.span(op.exchange.root, op.item, activity)
    ordered = sorted(comm.values(), key=lambda span: span.start)
    return Timeline(
        tuple(compute),
        tuple(ordered),
        tuple(peak_bytes),
        tuple(peak_in_flight),
        transfers=tuple(transfers),
    )
