"""A program takes as long as its schedule: lowering adds no waiting."""

import pytest

from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.lower import Action, lower
from schedules.problem import Problem
from schedules.simulate import simulate
from schedules.vocab import VOCAB_ALGORITHMS


class Clocks:
    """Runs a program as the executor does: a rank's operations one after the other, communication beside them."""

    def __init__(self, problem, cost):
        self._problem, self._cost = problem, cost
        self._sent, self._ended = {}, {}
        self._started = {}
        self._issued = {}  # per end, the collectives in the order of their start on any rank
        self._now = [0.0] * problem.layout.num_ranks

    def run(self, program):
        """The seconds until the last rank is done."""
        left = [list(reversed(ops)) for ops in program.ranks]
        moved = True
        while moved:
            moved = False
            for rank, ops in enumerate(left):
                while ops and self._do(rank, ops[-1]):
                    ops.pop()
                    moved = True
        assert not any(left)
        return max(self._now)

    def _do(self, rank, op):
        """Whether `op` could be done."""
        done_at = self._now[rank]
        match op.action:
            case Action.RUN:
                done_at += self._cost.seconds(op.item)
            case Action.SEND:
                self._sent[op.item] = done_at
            case Action.START:
                self._start(rank, op.item)
            case Action.ARRIVE if op.item in self._sent:
                done_at = self._sent[op.item] + self._cost.hop_seconds
            case Action.WAIT if op.item in self._ended:
                done_at = self._ended[op.item]
            case Action.ARRIVE | Action.WAIT:
                return False
        self._now[rank] = max(self._now[rank], done_at)
        return True

    def _start(self, rank, item):
        end = self._problem.algorithm.barrier(item.barrier).end
        started = self._started.setdefault(item, {})
        started[rank] = self._now[rank]
        order = self._issued.setdefault(end, [])
        if len(started) == 1:
            order.append(item)
        free_at = 0.0
        for each in order:  # a communicator is free for one after the other
            if len(self._started[each]) < len(self._problem.shard_ranks(end)):
                return
            if each not in self._ended:
                begin = max(free_at, *self._started[each].values())
                self._ended[each] = begin + self._cost.barrier(each.barrier)
            free_at = self._ended[each]


@pytest.mark.parametrize("algorithm", sorted(VOCAB_ALGORITHMS))
@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 12)])
def test_a_program_takes_as_long_as_its_schedule(p, m, name, algorithm):
    family = GENERATORS[name]
    layout = family.layout_of(p)
    problem = Problem(layout, m, VOCAB_ALGORITHMS[algorithm], family.split_backward)
    seconds = {"F": 1.0, "B": 2.0, "I": 1.1, "W": 0.9, "S": 0.57, "T": 0.31, "E": 0.05, "G": 0.03}
    cost = CostModel.uniform(layout.num_stages, p, hop=0.07, barrier=0.13, **seconds)
    schedule = generate(name, problem, cost)
    taken = Clocks(problem, cost).run(lower(schedule, problem, cost))
    assert taken == pytest.approx(simulate(schedule, problem, cost).makespan)
