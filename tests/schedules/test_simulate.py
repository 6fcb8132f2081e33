"""The times of a step: those of nodes alone are those of a sweep, bit by bit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedules import simulate
from schedules.generators import GENERATORS, base_order
from schedules.generators.weave import PREFERENCES, STARTS, weave
from schedules.graph import DeadlockError
from schedules.network import Network
from schedules.simulate import sweep, timed
from schedules.vocab import VOCAB_ALGORITHMS
from tests.schedules.test_replay import costs_of, problem_of


def networks(name, algorithm, p, m, seed):
    """Yield networks with orders: a woven step in both directions of time."""
    problem = problem_of(name, algorithm, p, m)
    network = Network.of(problem, costs_of(problem, seed))
    for preference in (STARTS[0], PREFERENCES[1]):
        orders = weave(base_order(name, problem), problem, network, preference)
        yield network, orders
        yield network.reversed(), [order[::-1] for order in orders]


@pytest.mark.parametrize("algorithm", sorted(VOCAB_ALGORITHMS))
@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_times_alone_are_those_of_a_sweep(name, algorithm):
    """Also where all costs are equal, so that several collectives become ready at once."""
    for p, m, seed in (
        (1, 3, "one"),
        (3, 7, "three"),
        (4, 9, None),
        (4, 12, "four"),
        (8, 16, None),
    ):
        for network, orders in networks(name, algorithm, p, m, f"{name} {seed}" if seed else None):
            swept, found = sweep(network, orders), timed(network, orders)
            assert (found.start, found.makespan) == (swept.start, swept.makespan)


def test_a_sweep_is_asked_only_where_two_collectives_become_ready_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr(simulate, "sweep", lambda *of: asked.append(of) or sweep(*of))
    for name in ("1f1b", "v_half"):
        for network, orders in networks(name, "two_barrier", 4, 8, name):
            timed(network, orders)
    assert not asked, "random costs"
    for network, orders in networks("gpipe", "naive", 8, 16, None):
        timed(network, orders)
    assert asked, "equal costs"
    asked.clear()
    problem = problem_of("gpipe", "naive", 8, 16)
    cost = costs_of(problem, None)
    free = replace(cost, barrier_seconds=dict.fromkeys(cost.barrier_seconds, 0.0))
    network = Network.of(problem, free)
    orders = weave(base_order("gpipe", problem), problem, network, STARTS[0])
    found = timed(network, orders)
    assert not asked, "collectives that take no time"
    swept = sweep(network, orders)
    assert (found.start, found.makespan) == (swept.start, swept.makespan)


@pytest.mark.parametrize("change", ["deadlock", "missing"])
def test_times_alone_refuse_what_a_sweep_does(change):
    (network, orders), *_ = networks("1f1b", "one_barrier", 2, 4, "refused")
    if change == "deadlock":
        orders[1].reverse()
    else:
        orders[1].pop()
    refusals = []
    for times_of in (sweep, timed):
        with pytest.raises((DeadlockError, ValueError)) as caught:
            times_of(network, orders)
        refusals.append((caught.type, str(caught.value)))
    assert refusals[0] == refusals[1]
