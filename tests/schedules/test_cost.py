"""Costs are at least 0. The bytes that a microbatch's passes keep are freed by its later passes."""

import math

import pytest

from schedules.cost import CostModel
from schedules.ir import Kind, Pass

WRONG = [-1.0, -1e-12, math.nan, -math.inf]


@pytest.mark.parametrize("value", WRONG)
@pytest.mark.parametrize(
    ("of", "message"),
    [
        (
            lambda value: {"pass_seconds": {Kind.F: (1.0, 1.0), Kind.B: (2.0, value)}},
            "a B pass cannot take {} s",
        ),
        (lambda value: {"hop_seconds": value}, "a hop cannot take {} s"),
        (
            lambda value: {"barrier_seconds": {"C0": 1.0, "C1": value}},
            "barrier C1 cannot take {} s",
        ),
        (lambda value: {"stage_bytes": (1.0, value)}, "a stage cannot keep {} bytes"),
        (lambda value: {"shard_bytes": (value, 1.0)}, "a shard cannot keep {} bytes"),
        (lambda value: {"weight_bytes": (1.0, value)}, "W cannot need {} bytes"),
    ],
)
def test_a_negative_cost_is_refused(of, message, value):
    with pytest.raises(ValueError, match="costs are at least 0") as caught:
        CostModel(**({"pass_seconds": {}} | of(value)))
    assert str(caught.value) == message.format(value) + "; costs are at least 0"


def test_a_cost_may_be_zero():
    CostModel(dict.fromkeys(Kind, (0.0,)), 0.0, {"C0": 0.0}, (0.0,), (0.0,), (0.0,))


@pytest.mark.parametrize("weights", [(), (3.0, 4.0), (0.0, 0.0)])
def test_bytes_that_the_passes_of_a_microbatch_keep_are_freed_by_them(weights):
    cost = CostModel({}, stage_bytes=(5.0, 6.0), shard_bytes=(0.5, 0.25), weight_bytes=weights)
    change = {kind: [cost.byte_change(Pass(stage, kind, 7)) for stage in range(2)] for kind in Kind}
    assert change[Kind.F] == [5.0, 6.0]
    assert change[Kind.B] == [-5.0, -6.0]
    left = list(weights or (5.0, 6.0))
    assert change[Kind.W] == [-value for value in left]
    for stage in range(2):
        assert change[Kind.F][stage] + change[Kind.I][stage] == left[stage]
    assert change[Kind.S] == [0.5, 0.25]
    assert change[Kind.T] == [-0.5, -0.25]
    assert change[Kind.E] == change[Kind.G] == [0.0, 0.0]
    assert CostModel({}).byte_change(Pass(0, Kind.F, 0)) == 0.0
    # A stage or rank without an entry keeps nothing.
    assert cost.byte_change(Pass(2, Kind.F, 0)) == cost.byte_change(Pass(2, Kind.S, 0)) == 0.0


def test_a_pass_takes_what_its_stage_or_rank_costs():
    cost = CostModel({Kind.F: (1.0, 2.0), Kind.S: (3.0,)}, barrier_seconds={"C0": 4.0})
    assert cost.seconds(Pass(1, Kind.F, 9)) == 2.0
    assert cost.seconds(Pass(0, Kind.S, 9)) == 3.0
    assert cost.seconds(Pass(1, Kind.T, 9)) == 0.0
    assert (cost.barrier("C0"), cost.barrier("C1")) == (4.0, 0.0)
    with pytest.raises(
        ValueError, match=r"no cost for 1S9: 1 value\(s\) of S, one per stage or rank needed"
    ):
        cost.seconds(Pass(1, Kind.S, 9))


def test_uniform_costs_are_those_of_every_stage_and_every_rank():
    cost = CostModel.uniform(6, 3, hop=0.25, barrier=0.5, F=1, S=2)
    assert cost.pass_seconds == {Kind.F: (1,) * 6, Kind.S: (2,) * 3}
    assert cost.hop_seconds == 0.25
    assert {cost.barrier(name) for name in ("CE", "C0", "C1", "C1b", "C2", "CG")} == {0.5}
    assert (cost.stage_bytes, cost.shard_bytes, cost.weight_bytes) == ((1.0,) * 6, (0.0,) * 3, ())
