"""Every schedule with every vocabulary algorithm computes what one unsharded process computes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schedules.generators import GENERATORS
from tests.pipeline.equivalence import ALGORITHMS, SHARDED, assert_equivalent_locally, config_of
from vp_train.config import LossConfig, ParallelConfig, ScheduleConfig, VocabConfig

pytestmark = pytest.mark.usefixtures("unrefined")


@pytest.mark.parametrize("p", [2, 3, 4])
@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_every_schedule_equals_one_process(name, p):
    """Every schedule has each algorithm with each number of ranks and of microbatches.

    It has every algorithm, and every number of microbatches, with tied matrices and without.
    """
    stages = GENERATORS[name].layout_of(p).num_stages
    cases = [(j, (1, 2, 2 * p)[(j + p) % 3], one) for j, one in enumerate(ALGORITHMS)]
    configs = [
        config_of(
            p,
            m,
            101,
            schedule=name,
            vocab=VocabConfig(algorithm),
            tied=(j + p) % 2 == 1,
            num_stages=stages,
        )
        for j, m, algorithm in cases
    ]
    assert_equivalent_locally(p, configs, 1e-9)


def test_a_solved_schedule_and_recomputation_equal_one_process():
    config = config_of(3, 4, 101, num_stages=6)
    solved = replace(config, schedule=ScheduleConfig("auto", cap_microbatches=4.5))
    mixed = ("full", "none", "selective", "full", "selective", "none")
    recomputed = [
        replace(
            config_of(3, 4, 101, schedule="v_half", num_stages=6),
            parallel=ParallelConfig(**options),
        )
        for options in (
            {"recompute": "full"},
            {"recompute": "selective"},
            {"recompute_per_stage": mixed},
        )
    ]
    assert_equivalent_locally(3, [solved, *recomputed], 1e-9)


def test_unequal_shards_and_stages_equal_one_process():
    configs = [
        config_of(
            3,
            4,
            101,
            vocab=VocabConfig(algorithm, shards=(0, 90, 11)),
            layers=(2, 2, 0),
            backend=backend,
        )
        for algorithm in SHARDED
        for backend in ("reference", "chunked", "recompute")
    ]
    assert_equivalent_locally(3, configs, 1e-9)


def test_ranks_without_rows_equal_one_process():
    """T takes no time on such a rank, and may come before the barrier that continues C1."""
    configs = [
        config_of(4, 3, 101, vocab=VocabConfig(algorithm, shards=(0, 101, 0, 0)))
        for algorithm in SHARDED
    ]
    assert_equivalent_locally(4, configs, 1e-9)


LOSSES = [
    {"loss": LossConfig(label_smoothing=0.1, z_loss=0.01)},
    {"loss": LossConfig(z_loss=0.01, normalisation="sequence"), "softcap": 3.0},
    {"loss": LossConfig(label_smoothing=0.1, normalisation="sequence"), "tied": True},
]


@pytest.mark.parametrize("masked", [False, True])
def test_loss_options_and_masks_equal_one_process(masked):
    configs = [
        config_of(3, 4, 101, vocab=VocabConfig(algorithm), **options)
        for algorithm in ALGORITHMS
        for options in LOSSES
    ]
    assert_equivalent_locally(3, configs, 1e-9, masked=masked)


def test_packed_documents_equal_documents_that_run_alone():
    """The one process runs each document alone from position 0."""
    plain = [
        config_of(2, 4, 101, schedule=name, num_stages=stages)
        for name, stages in (("1f1b", 2), ("zb_h1", 2), ("v_half", 4))
    ]
    recomputed = [
        replace(config, parallel=replace(config.parallel, recompute="full")) for config in plain
    ]
    undivided = config_of(
        2, 3, 101, vocab=VocabConfig("none"), loss=LossConfig(normalisation="sequence")
    )
    assert_equivalent_locally(2, [*plain, *recomputed, undivided], 1e-9, packed=True)
    assert_equivalent_locally(2, [plain[1], recomputed[1]], 1e-9, masked=True, packed=True)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_smaller_than_the_ranks_equals_one_process(tied):
    configs = [
        config_of(4, 3, size, vocab=VocabConfig(algorithm), tied=tied)
        for algorithm in ALGORITHMS
        for size in (2, 3)
    ]
    assert_equivalent_locally(4, configs, 1e-9)


def test_float32_stays_within_1e_4():
    configs = [
        config_of(2, 4, 100, vocab=VocabConfig(algorithm), dtype="float32")
        for algorithm in ALGORITHMS
    ]
    assert_equivalent_locally(2, configs, 1e-4)
