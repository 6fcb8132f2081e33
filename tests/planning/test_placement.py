"""Stages differ by at most one layer, and rows fill the time that layers leave."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schedules.layout import Layout
from schedules.vocab import End
from tests.pipeline.equivalence import config_of
from vp_train.config import ConfigError, CostConfig, ParallelConfig, VocabConfig
from vp_train.planning.placement import balance, fill_with_rows, split_layers
from vp_train.planning.plan import plan_step

layouts = st.builds(
    lambda name, num_ranks, chunks: Layout(
        name, num_ranks, {"linear": 1, "v": 2}.get(name, chunks)
    ),
    st.sampled_from(["linear", "loop", "v"]),
    st.integers(1, 8),
    st.integers(1, 4),
)


@given(st.integers(1, 70), layouts)
def test_balanced_stages_and_ranks_differ_by_at_most_one_layer(num_layers, layout):
    counts = balance(num_layers, layout)
    loads = [
        sum(counts[stage] for stage in layout.stages_of(rank)) for rank in range(layout.num_ranks)
    ]
    assert len(counts) == layout.num_stages
    assert sum(counts) == num_layers
    assert max(counts) - min(counts) <= 1
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize(
    ("num_layers", "layout", "expected"),
    [
        (7, Layout("linear", 4), (2, 2, 2, 1)),
        (10, Layout("loop", 4, 2), (2, 2, 1, 1, 1, 1, 1, 1)),
        (14, Layout("loop", 4, 2), (2, 2, 2, 2, 2, 2, 1, 1)),
        (10, Layout("v", 4, 2), (2, 2, 1, 1, 1, 1, 1, 1)),
        (13, Layout("v", 4, 2), (2, 2, 2, 2, 2, 1, 1, 1)),
        (3, Layout("v", 2, 2), (1, 1, 1, 0)),
    ],
)
def test_layers_left_over_go_to_the_ranks_that_have_fewest(num_layers, layout, expected):
    assert balance(num_layers, layout) == expected
    parts = split_layers(
        config_of(1, 1, 64, layers=(num_layers,)).model,
        ParallelConfig(placement="balanced"),
        layout,
    )
    assert tuple(map(len, parts)) == expected
    assert [layer for part in parts for layer in part] == list(range(num_layers))


seconds = st.floats(1e-3, 10.0)


@given(
    st.lists(st.tuples(st.floats(0.0, 1e3), seconds), min_size=1, max_size=8), st.integers(1, 400)
)
def test_rows_fill_up_like_water(ranks, num_rows):
    busy, row_seconds = zip(*ranks, strict=True)
    rows = fill_with_rows(num_rows, busy, row_seconds)
    assert sum(rows) == num_rows
    assert min(rows) >= 0
    best = list(busy)
    for _ in range(num_rows):  # row by row to where it ends first: no split has a lower maximum
        rank = min(range(len(best)), key=lambda r: best[r] + row_seconds[r])
        best[rank] += row_seconds[rank]
    loads = [b + count * e for b, count, e in zip(busy, rows, row_seconds, strict=True)]
    assert max(loads) <= max(best) + max(row_seconds) * (1 + 1e-9)
    for poor, rich in (
        (a, b) for a in range(len(rows)) for b in range(len(rows)) if rows[a] == 0 and rows[b] > 1
    ):
        assert busy[poor] >= loads[rich] - 2 * max(row_seconds)


@given(st.lists(st.floats(0.0, 100.0), min_size=2, max_size=8), st.integers(1, 10_000))
def test_a_rank_with_less_other_work_gets_at_least_as_many_rows(busy, num_rows):
    rows = fill_with_rows(num_rows, busy, [0.01] * len(busy))
    order = sorted(range(len(busy)), key=busy.__getitem__)
    assert all(rows[earlier] >= rows[later] - 1 for earlier, later in pairwise(order))


@pytest.mark.parametrize(
    ("num_rows", "busy", "row_seconds", "expected"),
    [
        (100, (3, 3, 3, 3), (1, 1, 1, 1), [25, 25, 25, 25]),
        (10, (0, 4, 20), (1, 1, 1), [7, 3, 0]),
        (12, (0, 0), (1, 2), [8, 4]),
        (3, (5, 0), (1, 1), [0, 3]),
        (7, (2.0,), (0.1,), [7]),
        (5, (0, 0, 0), (1, 1, 1), [2, 2, 1]),
        (32_768, (1e13, 1e13, 2e13), (1e-6, 1e-6, 1e-6), [16_384, 16_384, 0]),
    ],
)
def test_rows_in_known_cases(num_rows, busy, row_seconds, expected):
    assert fill_with_rows(num_rows, busy, row_seconds) == expected


def balanced(layers, *, vocab_size=4000, schedule="1f1b", **cost):
    """Return a step of 4 ranks with vocab.balance, and with an even split; E and G take no time."""
    config = config_of(4, 6, vocab_size, layers=layers, schedule=schedule)
    config = replace(config, cost=CostConfig(collective_seconds=0, **cost))
    return tuple(
        plan_step(replace(config, vocab=VocabConfig(balance=on)), 4) for on in (True, False)
    )


def rows_of(plan, end=End.OUTPUT):
    return [shard.num_rows for shard in plan.shards[end]]


def busiest(plan):
    return max(plan.timeline.busy(rank) for rank in range(4))


@pytest.mark.parametrize("layers", [(2, 2, 2, 1), (3, 1, 1, 2), (1, 1, 1, 1), (9, 0, 1, 0)])
def test_balanced_rows_make_room_for_layers(layers):
    plan, even = balanced(layers)
    rows = rows_of(plan)
    assert rows == rows_of(plan, End.INPUT)
    assert sum(rows) == 4000
    assert all(rows[a] > rows[b] for a in range(4) for b in range(4) if layers[a] < layers[b])
    assert busiest(plan) == pytest.approx(
        sum(even.timeline.busy(rank) for rank in range(4)) / 4, rel=0.01
    )
    assert busiest(plan) <= busiest(even) * (1 + 1e-9)


def test_a_rank_that_is_busy_enough_gets_no_rows():
    plan, even = balanced((30, 1, 1, 1), vocab_size=400)
    assert rows_of(plan)[0] == 0
    assert busiest(plan) < busiest(even)


@pytest.mark.parametrize("slow", range(4))
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_a_slow_rank_gets_fewer_rows_and_all_are_busy_equally_long(slow, schedule):
    slowness = tuple(1.25 if rank == slow else 1.0 for rank in range(4))
    plan, even = balanced((2, 2, 2, 2), schedule=schedule, rank_slowness=slowness)
    rows = rows_of(plan)
    assert all(rows[slow] < count for rank, count in enumerate(rows) if rank != slow)
    busy = [plan.timeline.busy(rank) for rank in range(4)]
    assert max(busy) == pytest.approx(min(busy), rel=0.01)
    assert busiest(plan) < busiest(even)


@pytest.mark.parametrize("recomputed", [("full", "none", "selective", "none"), ("full",) * 4])
@pytest.mark.parametrize("fraction", [0.25, 1.0])
def test_balanced_rows_count_what_is_recomputed(recomputed, fraction):
    config = config_of(4, 6, 4000, layers=(2, 2, 2, 1))
    config = replace(
        config,
        cost=CostConfig(collective_seconds=0),
        parallel=replace(config.parallel, recompute_per_stage=recomputed),
        vocab=VocabConfig(balance=True, backend="recompute", recompute_fraction=fraction),
    )
    busy = [plan_step(config, 4).timeline.busy(rank) for rank in range(4)]
    assert max(busy) == pytest.approx(min(busy), rel=0.01)


def test_rows_that_cost_nothing_are_split_evenly():
    plan, even = balanced((2, 2, 2, 1), output_row_seconds=0.0)
    assert rows_of(plan) == rows_of(even)


def test_without_shards_there_is_nothing_to_balance():
    config = config_of(4, 6, 400, vocab=VocabConfig("none", balance=True))
    assert rows_of(plan_step(config, 4)) == [0, 0, 0, 400]


@pytest.mark.parametrize(
    ("vocab", "vocab_size", "message"),
    [
        (
            VocabConfig(shards=(1, 2, 3)),
            6,
            r"vocab.shards=\[1, 2, 3\]: 3 shards with 6 rows; give 4 sizes .* add up to 6",
        ),
        (VocabConfig(shards=(7, -1, 0, 0)), 6, "give 4 sizes of at least 0"),
        (
            VocabConfig("none", shards=(6, 0, 0, 0)),
            6,
            "needs a sharded vocabulary, but vocab=none; drop one",
        ),
    ],
)
def test_rows_that_do_not_add_up_are_named(vocab, vocab_size, message):
    with pytest.raises(ConfigError, match=message):
        plan_step(config_of(4, 2, vocab_size, vocab=vocab), 4)


@pytest.mark.parametrize("values", [(1.0,), (1.0, 1.0, 1.0, 1.0, 2.0)])
@pytest.mark.parametrize("balance_rows", [False, True])
def test_a_slowness_for_every_rank_or_none(values, balance_rows):
    config = replace(
        config_of(4, 2, 400, vocab=VocabConfig(balance=balance_rows)),
        cost=CostConfig(rank_slowness=values),
    )
    with pytest.raises(
        ConfigError, match=rf"has {len(values)} values; give one for each of the 4 ranks"
    ):
        plan_step(config, 4)


@pytest.mark.parametrize("values", [(), (1.0, 0.0), (-1.0, 1.0)])
def test_a_slowness_is_above_zero(values):
    with pytest.raises(ConfigError, match=r"cost.rank_slowness=.*(must be above 0|has no value)"):
        CostConfig(rank_slowness=values)


@pytest.mark.parametrize(
    ("num_layers", "pp", "num_chunks", "named"),
    [
        (80, 16, 2, "5 or 1"),
        (80, 4, 3, "2 or 4 or 5"),
        (24, 4, 4, "3 or 2 or 6"),
        (5, 5, 2, "1"),
        (81, 16, 2, None),
    ],
)
def test_chunks_that_divide_come_first_and_another_model_last(num_layers, pp, num_chunks, named):
    config = config_of(4, 6, 400)
    model = replace(config.model, num_layers=num_layers)
    with pytest.raises(ConfigError) as caught:
        split_layers(model, config.parallel, Layout("loop", pp, num_chunks))
    ways = str(caught.value).partition("; use ")[2].split(", ")
    assert ways[-1].startswith("or model.num_layers=")
    assert ways[-3:-1] == ["parallel.placement=balanced", "parallel.layers_per_stage"]
    assert ways[:-3] == ([] if named is None else [f"schedule.num_chunks={named}"])
    for count in [] if named is None else named.split(" or "):
        split_layers(model, config.parallel, Layout("loop", pp, int(count)))
