"""The helper that starts ranks: it must report failures and hangs rather than wait for them."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankFailed


def reduced(rank, world_size, value):
    total = torch.tensor(float(rank + value))
    dist.all_reduce(total)
    return rank, total.item()


def fail_on_rank_one(rank, world_size):
    if rank == 1:
        raise RuntimeError("deliberate")
    dist.barrier()


def sleep_on_rank_one(rank, world_size):
    if rank == 1:
        time.sleep(60)


def test_results_come_in_rank_order(ranks):
    assert ranks(2).run(reduced, 10) == [(0, 21.0), (1, 21.0)]


def test_a_failure_names_the_rank_and_shows_its_traceback_and_the_ranks_recover(ranks):
    with pytest.raises(RankFailed, match=r"(?s)rank 1 of 2:.*RuntimeError: deliberate"):
        ranks(2).run(fail_on_rank_one)
    assert ranks(2).run(reduced, 0)[0] == (0, 1.0)


def test_a_hang_ends_at_the_timeout_with_the_stacks(ranks):
    with pytest.raises(RankFailed, match=r"(?s)no answer within 0.5 s.*sleep_on_rank_one"):
        ranks(2).run(sleep_on_rank_one, timeout=0.5)
