"""A message that must be waited for is sent beside the passes."""

import gc
import threading
import time

import pytest
import torch
import torch.distributed as dist

from schedules.vocab import End, Transfer
from vp_train.pipeline.comms import Comms
from vp_train.pipeline.groups import Groups

PASS_SECONDS, MESSAGE_SECONDS = 1.0, 0.2


def comms_of(world_size, *, through_host=False):
    everyone = list(range(world_size))
    forward, backward, output = (dist.new_group(everyone) for _ in range(3))
    hops = {(peer, upstream): backward if upstream else forward for peer in everyone for upstream in (False, True)}
    groups = Groups(tuple(everyone), tuple(everyone), hops, {End.INPUT: None, End.OUTPUT: output})
    return Comms(groups, torch.device("cpu"), through_host=through_host)


def sum_while_rank_1_computes(rank, world_size):
    """Seconds until rank 0 has the sum, and the sum; rank 1 is in a pass all the time."""
    comms = comms_of(world_size)

    def message():
        time.sleep(MESSAGE_SECONDS)
        return torch.full((2,), rank + 1.0)

    dist.barrier()
    start = time.monotonic()
    pending = comms.collective_aside(End.OUTPUT, Transfer.REDUCE, message, 0, delivers=rank == 0)
    following = comms.collective(End.OUTPUT, Transfer.BROADCAST, torch.full((2,), 7.0 - rank), 0, delivers=True)
    if rank == 1:
        time.sleep(PASS_SECONDS)
        seconds = 0.0
    else:
        pending.wait()
        seconds = time.monotonic() - start
    received = following.wait().tolist()
    comms.drain()
    return seconds, pending.wait().tolist(), received


def test_a_pass_does_not_delay_what_others_wait_for(ranks):
    (seconds, total, first), (*_, second) = ranks(2).run(sum_while_rank_1_computes)
    assert MESSAGE_SECONDS <= seconds < PASS_SECONDS
    assert total == [3.0, 3.0]
    assert first == second == [7.0, 7.0]  # issued after the sum on both ranks, though its message was there first


def fail_aside(rank, world_size):
    comms = comms_of(world_size)

    def message():
        raise ZeroDivisionError(f"no message on rank {rank}")

    pending = comms.collective_aside(End.OUTPUT, Transfer.REDUCE, message, 0, delivers=True)
    with pytest.raises(ZeroDivisionError, match=f"no message on rank {rank}"):
        pending.wait()
    return True


def test_an_error_beside_the_passes_is_raised_where_the_result_is_waited_for(ranks):
    assert ranks(2).run(fail_aside) == [True, True]


def threads_left_by_comms(rank, world_size):
    """Threads before, with and right after a Comms that has issued something beside the passes."""
    before = set(threading.enumerate())
    comms = comms_of(world_size)
    comms.collective_aside(End.OUTPUT, Transfer.ALL_SUM, lambda: torch.ones(2), 0, delivers=True).wait()
    during = set(threading.enumerate()) - before
    del comms
    gc.collect()
    return len(during), len(set(threading.enumerate()) - before)


def test_the_thread_has_ended_when_its_comms_are_gone(ranks):
    assert ranks(2).run(threads_left_by_comms) == [(1, 0), (1, 0)]


COUNTS = (2, 0, 3)


def gather_and_scatter(rank, world_size, through_host):
    """What arrives of the tokens that each rank owns, and what comes back; rank 1 is the root."""
    comms = comms_of(world_size, through_host=through_host)
    own = torch.full((COUNTS[rank], 2), float(rank))
    gathered = comms.collective(End.OUTPUT, Transfer.GATHER, own, 1, delivers=rank == 1, counts=COUNTS).wait()
    message = gathered * 10 if rank == 1 else own[:0]
    scattered = comms.collective(End.OUTPUT, Transfer.SCATTER, message, 1, delivers=True, counts=COUNTS).wait()
    hop = comms.receive(torch.empty(1), (rank - 1) % world_size, upstream=False)
    comms.send(torch.tensor([float(rank)]), (rank + 1) % world_size, upstream=False)
    received = hop.wait().item()
    comms.drain()
    return gathered.tolist(), scattered.tolist(), received


@pytest.mark.parametrize("through_host", [False, True])
def test_rows_are_gathered_in_rank_order_and_scattered_to_their_owners(ranks, through_host):
    results = ranks(3).run(gather_and_scatter, through_host)
    assert [gathered for gathered, _, _ in results] == [[], [[0.0, 0.0]] * 2 + [[2.0, 2.0]] * 3, []]
    assert [scattered for _, scattered, _ in results] == [[[0.0, 0.0]] * 2, [], [[20.0, 20.0]] * 3]
    assert [received for *_, received in results] == [2.0, 0.0, 1.0]
