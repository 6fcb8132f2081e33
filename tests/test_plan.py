"""The plan is pure, puts layers and rows where they belong, and predicts what it promises."""

import pytest

from schedules.vocab import End
from tests.pipeline.test_equivalence import config_of
from vp_train.config import ParallelConfig, VocabConfig
from vp_train.placement import redistribute, split_layers
from vp_train.plan import make_plan


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "head", "expected"),
    [
        (32, 8, 0.0, (4,) * 8),  # nothing to make room for
        (32, 8, 6.25, (4, 4, 4, 5, 5, 5, 5, 0)),  # what the published comparison runs at V = 256k
        (32, 8, 1.5625, (4, 4, 4, 4, 4, 4, 5, 3)),  # and at V = 64k
        (8, 4, 2.0, (2, 2, 3, 1)),
        (6, 3, 100.0, (3, 3, 0)),
        (5, 1, 2.0, (5,)),
    ],
)
def test_redistribution_makes_the_slowest_stage_as_fast_as_possible(num_layers, num_stages, head, expected):
    counts = redistribute(num_layers, num_stages, head)
    assert sum(counts) == num_layers
    slowest = max(*counts[:-1], counts[-1] + head) if num_stages > 1 else counts[0]
    best = min(max(-(-(num_layers - k) // max(1, num_stages - 1)), k + head) for k in range(num_layers + 1))
    assert slowest == (best if num_stages > 1 else num_layers)
    assert counts == expected


def test_layers_are_split_evenly_or_as_told():
    model = config_of(4, 1, 100, layers=(3, 2, 0, 1)).model
    told = split_layers(model, ParallelConfig(layers_per_stage=(3, 2, 0, 1)), 4)
    assert told == (range(3), range(3, 5), range(5, 5), range(5, 6))


def test_without_sharding_the_end_ranks_own_the_whole_vocabulary():
    plan = make_plan(config_of(3, 4, 101, vocab=VocabConfig("none")), 3)
    assert [shard.num_rows for shard in plan.shards[End.INPUT]] == [101, 0, 0]
    assert [shard.num_rows for shard in plan.shards[End.OUTPUT]] == [0, 0, 101]


def test_every_rank_computes_the_same_plan():
    config = config_of(4, 8, 1000)
    first, second = make_plan(config, 4), make_plan(config, 4)
    assert first.program == second.program
    assert first.schedule == second.schedule


def test_vocabulary_passes_balance_the_predicted_work():
    plan = make_plan(config_of(4, 8, 1000), 4)
    busy = [plan.timeline.busy(rank) for rank in range(4)]
    assert max(busy) == pytest.approx(min(busy))
