"""Steady states without a bubble for little memory, constructed rank by rank.

With a V-shaped placement a microbatch walks over the ranks four times: F of the first chunks down
from rank 0, F of the second chunks up, I of the second chunks down, I of the first chunks up. In a
period without a bubble the passes of a rank follow each other on a circle. So a rank has as many
choices as circles of its eight passes, 5,040, and their rotations. A choice for rank r and one for
rank r + 1 go together if all four walks have the time to pass. A beam search adds one rank after
the other. It keeps choices under the caps, and prefers those that leave the walks the most time.

The passes of a rank with less work count as if they took longer, all by the same factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

from schedules.bound import longest
from schedules.generators.fill import LOOSE
from schedules.generators.steady import Ring
from schedules.ir import Kind, Pass
from schedules.network import Network
from schedules.problem import Problem

_TINY = 1e-7  # seconds, in periods
_WIDTH = 24  # choices for a rank that go on to the next
_PAIRS = 1_000  # of a choice for a rank and one for the next, whose other passes are placed
_TURNS = 3  # periods that a pair of walks may take beyond the fewest
_SPARE = 2.0  # by how much the output layer may take longer than it must, in passes F
_DOWN = np.array([1.0, -1.0, 1.0, -1.0])  # 1 where a walk goes from rank 0 down, else -1

_Floats = NDArray[np.float64]
_Indices = NDArray[np.intp]


def tight_rings(
    network: Network, problem: Problem, caps: Sequence[float], period: float
) -> Iterator[Ring]:
    """Yield rings in which a period takes `period` seconds and rank r keeps at most `caps[r]`.

    There is at most one for each number of periods that the walks of F and those of I take, the
    shortest first. None if there is nothing to do or the layout is no V with a split backward.
    """
    if problem.layout.name != "v" or not problem.split_backward or period <= 0:
        return
    builder = _Builder(network, problem, caps, period)
    for turns in sorted(product(range(_TURNS + 1), repeat=2), key=lambda pair: (sum(pair), pair)):
        ring = builder.ring(turns)
        if ring is not None:
            yield ring


@dataclass(frozen=True, slots=True)
class _Rank:
    """The passes of a rank on its circle.

    `nodes`: F of the first and second chunk, I of the second and first, W of the second and first,
    then S and T if it has them. `changes`: the bytes that each keeps less those it frees. `ends`:
    when it changes them, after its start. `words`: the starts after that of the first F in seconds,
    one row per circle. Row g of `groups` has those of the four F and I in the rows from `begins[g]`
    to `begins[g + 1]`.
    """

    nodes: tuple[int, ...]
    changes: _Floats
    ends: _Floats
    cap: float
    words: _Floats
    groups: _Floats
    begins: _Indices

    @classmethod
    def of(cls, network: Network, nodes: Sequence[int], period: float, cap: float) -> _Rank:
        rank = network.lanes[nodes[0]]
        work = sum(network.seconds[k] for k, lane in enumerate(network.lanes) if lane == rank)
        lengths = np.array([network.seconds[k] for k in nodes])
        lengths[-1] += work - lengths.sum()  # G and E run right after the last of the passes
        if work > 0:
            lengths *= period / work
        else:  # any lengths are right, and equal ones leave the walks the most choices
            lengths[:] = period / len(nodes)
        circles = np.array([(0, *rest) for rest in permutations(range(1, len(nodes)))])
        along = lengths[circles]
        words = np.empty_like(along)
        np.put_along_axis(words, circles, np.cumsum(along, 1) - along, 1)
        _, first, which = np.unique(
            np.round(words[:, :4] / period, 9), axis=0, return_index=True, return_inverse=True
        )
        counts = np.bincount(which.reshape(-1), minlength=len(first))
        changes = np.array([network.byte_change[k] for k in nodes])
        return cls(
            nodes=tuple(nodes),
            changes=changes,
            ends=np.where(changes < 0, [network.seconds[k] for k in nodes], 0.0),
            cap=cap * LOOSE,
            words=words[np.argsort(which.reshape(-1), kind="stable")],
            groups=words[first, :4],
            begins=np.concatenate([[0], np.cumsum(counts)]),
        )


@dataclass(frozen=True, slots=True)
class _Beam:
    """Choices for a rank, one per row. Times are in seconds from the F of the last stage.

    `starts`: of the passes of the rank. `slack`: what the walks of F, and those of I, may still
    take longer than they must. `spare`: what the output layer takes longer. `parents`: the rows of
    the rank before.
    """

    starts: _Floats
    slack: _Floats
    spare: _Floats
    parents: _Indices

    def best(self, width: int) -> _Beam:
        """Return the choices with the most slack, at most `width`, of equal walks the first."""
        order = np.argsort(-np.round(_score(self.slack), 9), kind="stable")
        keys = np.round(np.column_stack([self.starts[order, :4], self.spare[order]]), 6)
        _, first = np.unique(keys, axis=0, return_index=True)
        rows = order[np.sort(first)[:width]]
        return _Beam(self.starts[rows], self.slack[rows], self.spare[rows], self.parents[rows])


def _score(slack: _Floats) -> _Floats:
    """Return how good choices with this slack are."""
    score: _Floats = slack.min(1) + 0.25 * slack.sum(1)
    return score


class _Builder:
    """The beam search for one period."""

    def __init__(
        self, network: Network, problem: Problem, caps: Sequence[float], period: float
    ) -> None:
        self._network, self._period = network, period
        layout = problem.layout
        self._keys = keys = {
            (node.stage, node.kind): k
            for k, node in enumerate(network.nodes)
            if isinstance(node, Pass)
        }
        self._ranks: list[_Rank] = []
        for rank in range(layout.num_ranks):
            first, second = layout.stages_of(rank)
            names = [(first, Kind.F), (second, Kind.F), (second, Kind.I), (first, Kind.I)]
            names += [(second, Kind.W), (first, Kind.W), (rank, Kind.S), (rank, Kind.T)]
            nodes = [keys[name] for name in names if name in keys]
            self._ranks.append(_Rank.of(network, nodes, period, caps[rank]))
        pairs = zip(self._ranks, self._ranks[1:], strict=False)
        self._steps = [  # the least seconds that the four walks take between two ranks
            np.array(
                [
                    self._step(*sorted((above.nodes[walk], below.nodes[walk]), key=self._stage))
                    if walk < 2
                    else self._step(
                        *sorted(
                            (above.nodes[walk], below.nodes[walk]), key=self._stage, reverse=True
                        )
                    )
                    for walk in range(4)
                ]
            )
            for above, below in pairs
        ]
        bottom = self._ranks[-1].nodes
        least = [network.seconds[bottom[0]], network.seconds[bottom[2]]]
        self._least = np.array(least) + sum(s.reshape(2, 2).sum(1) for s in self._steps)
        root = self._ranks[0].nodes
        self._after = longest(network, [root[1]])
        self._turn = self._after[root[2]]  # the least from F to I of the last stage
        # The passes of the output layer that come between these two share its spare time.
        self._between = [
            longest(network, [k])[root[2]] > 0
            for k in (keys.get((0, Kind.S)), keys.get((0, Kind.T)))
            if k is not None
        ]

    def _stage(self, k: int) -> int:
        node = self._network.nodes[k]
        assert isinstance(node, Pass)
        return node.stage

    def _step(self, earlier: int, later: int) -> float:
        """Return the least seconds from the start of a pass to that of its follower."""
        return self._network.seconds[earlier] + dict(self._network.followers[earlier])[later]

    def ring(self, turns: Sequence[int]) -> Ring | None:
        """Return a ring whose walks of F and of I take `turns` periods beyond the fewest."""
        beams = [self._roots(turns).best(4 * _WIDTH)]
        for above, rank in enumerate(self._ranks[1:]):
            if not len(beams[-1].starts):
                return None
            beams.append(self._next(beams[-1], self._steps[above], rank).best(_WIDTH))
        if not len(beams[-1].starts):
            return None
        row = 0
        at: dict[int, float] = {}
        for rank, beam in zip(reversed(self._ranks), reversed(beams), strict=True):
            at |= dict(zip(rank.nodes, beam.starts[row].tolist(), strict=True))
            row = int(beam.parents[row])
        return self._closed(at)

    def _roots(self, turns: Sequence[int]) -> _Beam:
        """Return the choices for rank 0."""
        rank, period = self._ranks[0], self._period
        starts = rank.words - rank.words[:, 1:2]
        back = self._from(starts[:, 2], self._turn)
        spare = back - self._turn
        most = _SPARE * self._network.seconds[rank.nodes[1]] * max(1, sum(self._between))
        rows = np.nonzero(spare <= most + _TINY * period)[0]
        starts, back, spare = starts[rows], back[rows], spare[rows]
        walks = np.zeros((len(rows), 4))
        latest = -self._least[0]
        walks[:, 0] = -self._from(-starts[:, 0], -latest) - turns[0] * period
        walks[:, 2] = back
        walks[:, 3] = self._from(starts[:, 3], back + self._least[1]) + turns[1] * period
        slack = np.column_stack([latest - walks[:, 0], walks[:, 3] - back - self._least[1]])
        beam = _Beam(starts, slack, spare, np.zeros(len(rows), np.intp))
        return self._fitting(rank, beam, walks)

    def _next(self, beam: _Beam, steps: _Floats, rank: _Rank) -> _Beam:
        """Return the choices for `rank` after those of the rank above it."""
        soonest = beam.starts[:, :4] + _DOWN * steps
        period, found = self._period, []
        for walk in range(4):  # this walk does not wait, the others are late
            offset = soonest[:, walk, None] - rank.groups[None, :, walk]
            late = _DOWN * (rank.groups[None] + offset[:, :, None] - soonest[:, None])
            late -= period * np.floor(late / period + _TINY)
            slack = beam.slack[:, None] - late.reshape(*offset.shape, 2, 2).sum(3)
            parents, groups = np.nonzero((slack >= -_TINY * period).all(2))
            columns = parents, groups, offset[parents, groups], *slack[parents, groups].T
            found.append(np.column_stack([*columns, late[parents, groups]]))
        pairs = np.concatenate(found)
        slack = pairs[:, 3:5]
        pairs = pairs[np.argsort(-np.round(_score(slack), 9), kind="stable")[:_PAIRS]]
        parents, groups = pairs[:, 0].astype(np.intp), pairs[:, 1].astype(np.intp)
        walks = soonest[parents] + _DOWN * pairs[:, 5:]
        # Every choice of F and I stands for several circles, by the places of other passes.
        counts = (rank.begins[1:] - rank.begins[:-1])[groups]
        chosen = np.repeat(np.arange(len(groups)), counts)
        within = np.arange(len(chosen)) - np.repeat(np.cumsum(counts) - counts, counts)
        words = rank.begins[groups][chosen] + within
        starts = rank.words[words] + pairs[chosen, 2:3]
        parents = parents[chosen]
        grown = _Beam(starts, pairs[chosen, 3:5], beam.spare[parents], parents)
        return self._fitting(rank, grown, walks[chosen])

    def _fitting(self, rank: _Rank, beam: _Beam, walks: _Floats) -> _Beam:
        """Return the choices, with `walks` as starts of F and I, that fit under the rank's cap.

        Their other passes get the earliest starts that are allowed. S, and T if the backward waits
        for it, have a part of the spare time to start in.
        """
        starts, period, seconds = beam.starts.copy(), self._period, self._network.seconds
        starts[:, :4] = walks
        starts[:, 4] = self._from(starts[:, 4], starts[:, 2] + seconds[rank.nodes[2]])
        starts[:, 5] = self._from(starts[:, 5], starts[:, 3] + seconds[rank.nodes[3]])
        fits = np.ones(len(starts), bool)
        since, share = np.zeros(len(starts)), beam.spare / max(1, sum(self._between))
        for place, between in zip(range(6, len(rank.nodes)), self._between, strict=False):
            due = self._after[rank.nodes[place]] + since
            starts[:, place] = self._from(starts[:, place], due)
            if between:
                fits &= starts[:, place] <= due + share + _TINY * period
                since = since + share
        kept = self._most_kept(rank, starts[fits])
        rows = np.nonzero(fits)[0][kept <= rank.cap]
        return _Beam(starts[rows], beam.slack[rows], beam.spare[rows], beam.parents[rows])

    def _most_kept(self, rank: _Rank, starts: _Floats) -> _Floats:
        """Return the most bytes that the rank keeps at any time in each row."""
        changed = starts + rank.ends
        most = np.zeros(len(starts))
        for place in np.nonzero(rank.changes > 0)[0]:
            passed = starts[:, place, None] - changed + _TINY * self._period
            most = np.maximum(most, np.floor(passed / self._period) @ rank.changes)
        return most

    def _from(self, starts: _Floats, earliest: _Floats | float) -> _Floats:
        """Return `starts` moved by whole periods to the first time from `earliest` on."""
        periods = np.ceil((earliest - starts) / self._period - _TINY)
        moved: _Floats = starts + self._period * periods
        return moved

    def _closed(self, at: dict[int, float]) -> Ring | None:
        """Return the ring of passes that start `at` these times, with E and G; None if it blocks.

        They run behind the last pass of their rank, in the order T, G, E.
        """
        network, period, keys = self._network, self._period, self._keys
        begin = at[keys[0, Kind.F]]
        tail = longest(network, [keys[0, Kind.I]])
        order = dict.fromkeys(at, 0)
        for rank in self._ranks:
            lane, last = network.lanes[rank.nodes[0]], rank.nodes[-1]
            gather, embed = keys.get((lane, Kind.G)), keys.get((lane, Kind.E))
            now = at[last] + network.seconds[last]
            order[last] = -3
            if gather is not None:
                due = at[keys[0, Kind.I]] + tail[gather]
                at[gather] = now + period * math.ceil((due - now) / period - _TINY)
                order[gather] = -2
                now += network.seconds[gather]
            if embed is not None:
                due = begin - longest(network, [embed])[keys[0, Kind.F]]
                at[embed] = now - period * math.ceil((now - due) / period - _TINY)
                order[embed] = -1
        turn = [0] * network.size
        timed = []
        for k, start in at.items():
            turn[k] = math.floor((start - begin) / period + _TINY)
            timed.append((round(start - begin - turn[k] * period, 9), order[k], k))
        words: list[list[int]] = [[] for _ in range(network.num_ranks)]
        for _, _, k in sorted(timed):
            words[network.lanes[k]].append(k)
        ring = Ring(network, words, turn)
        return None if ring.rate() is None else ring
