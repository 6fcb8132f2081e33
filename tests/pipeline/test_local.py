"""Ranks in one process: any timing gives the same bits, and a rank that fails ends all others."""

import time
from dataclasses import replace
from itertools import product
from threading import Event

import pytest
import torch

from schedules.generators import GENERATORS
from schedules.vocab import VOCAB_ALGORITHMS, Transfer
from tests.local import exchange, run_locally
from tests.pipeline.equivalence import config_of
from tests.pipeline.truth import random_batch
from tests.schedules.cases import problem
from vp_train.config import VocabConfig
from vp_train.pipeline.local import RankLost, Switchboard, run_ranks
from vp_train.planning.plan import make_plan

NUM_STEPS, DELAY_SECONDS = 2, 4e-4
CPU = torch.device("cpu")


def gradients_of(config, plan, batch, **board):
    """Return the loss and the gradients of one step of all ranks."""
    return gradients_of_steps(config, plan, batch, 1, **board)[0]


def gradients_of_steps(config, plan, batch, num_steps, **board):
    """Return the loss and the gradients of all ranks in each of several steps with one batch."""

    def work(rank, model, together):
        steps = []
        for _ in range(num_steps):
            model.gradients.zero()
            loss = model.train_step(*batch)
            model.optimizer.reduce()
            found = {} if loss is None else {"loss": loss}
            steps.append(
                found | {name: value.grad.clone() for name, value in model.parameters.items()}
            )
        return steps

    of_ranks = run_locally(config, plan, work, **board)
    return [
        {
            f"{rank} {name}": tensor
            for rank, found in enumerate(step)
            for name, tensor in found.items()
        }
        for step in zip(*of_ranks, strict=True)
    ]


CASES = list(product(GENERATORS, VOCAB_ALGORITHMS))


@pytest.mark.parametrize(("name", "algorithm"), CASES)
def test_delays_change_no_bit(name, algorithm):
    """Every case has its own seed, and every step has other delays: 64 steps in all."""
    stages = GENERATORS[name].layout_of(3).num_stages
    config = config_of(
        3, 4, 101, schedule=name, vocab=VocabConfig(algorithm), num_stages=stages, tied=True
    )
    plan, batch = make_plan(config, 3), random_batch(config, 1)
    expected = gradients_of(config, plan, batch)
    delays = {"delay_seconds": DELAY_SECONDS, "seed": CASES.index((name, algorithm))}
    for step, found in enumerate(gradients_of_steps(config, plan, batch, NUM_STEPS, **delays)):
        assert found.keys() == expected.keys()
        different = [
            name for name, tensor in found.items() if not torch.equal(tensor, expected[name])
        ]
        assert not different, f"step {step}"


def test_messages_are_copies():
    """A sender may change a message after it was read, without effect on the receiver."""
    board = Switchboard(problem(2, 1, "none"), CPU)

    def work(rank):
        transport = board.transport(rank)
        if rank == 0:
            message = torch.ones(3)
            transport.send(message, 1, watch=lambda pending: pending).wait()
            message.fill_(7)
            return None
        received = transport.receive(torch.empty(3), 0, watch=lambda pending: pending).wait()
        time.sleep(0.05)
        return received.tolist()

    assert run_ranks(board, work) == [None, [1.0, 1.0, 1.0]]


COUNTS = (2, 0, 3)


@pytest.mark.parametrize("transfer", Transfer)
def test_every_collective_delivers_what_its_name_says(transfer):
    board = Switchboard(problem(3, 1, "one_barrier"), CPU, delay_seconds=0.01)

    def work(rank):
        item = exchange(transfer, rank)
        rows = {Transfer.GATHER: COUNTS[rank], Transfer.SCATTER: 5 if rank == 1 else 0}.get(
            transfer, 2
        )
        own = torch.arange(rows) + 10.0 * rank
        counts = COUNTS if transfer in (Transfer.GATHER, Transfer.SCATTER) else ()
        pending = board.transport(rank).collective(
            item, lambda: own, counts, watch=lambda pending: pending
        )
        return pending.wait().tolist() if item.delivers else None

    gathered = [[0.0, 1.0], [10.0, 11.0], [20.0, 21.0]]
    expected = {
        Transfer.BROADCAST: [[10.0, 11.0]] * 3,
        Transfer.REDUCE: [None, [30.0, 33.0], None],
        Transfer.GATHER: [None, [0.0, 1.0, 20.0, 21.0, 22.0], None],
        Transfer.SCATTER: [[10.0, 11.0], [], [12.0, 13.0, 14.0]],
        Transfer.ALL_MAX: [[20.0, 21.0]] * 3,
        Transfer.ALL_SUM: [[30.0, 33.0]] * 3,
        Transfer.ALL_GATHER: [gathered] * 3,
    }
    assert run_ranks(board, work) == expected[transfer]


def test_a_rank_that_fails_ends_the_others_with_its_own_error():
    config = config_of(3, 2, 101)
    config = replace(config, parallel=replace(config.parallel, pp=3))

    def work(rank, model, together):
        if rank == 1:
            raise ZeroDivisionError("rank 1 is broken")
        model.train_step(*random_batch(config, 1))

    with pytest.raises(ZeroDivisionError, match="rank 1 is broken"):
        run_locally(config, make_plan(config, 3), work)


@pytest.mark.parametrize("first", [0, 1])
def test_of_several_errors_the_first_counts_that_is_no_lack_of_another_rank(first):
    board = Switchboard(problem(3, 1, "none"), CPU, timeout_seconds=0.01)
    lost, ended = Event(), Event()

    def work(rank):
        if rank == 2:  # which is the first of all to fail
            transport = board.transport(2)
            try:
                transport.receive(torch.empty(1), 1, watch=lambda pending: pending).wait()
            finally:
                lost.set()
        assert lost.wait(5)
        time.sleep(0.02)
        if rank != first:
            assert ended.wait(5)
            time.sleep(0.02)
        ended.set()
        raise ZeroDivisionError(f"rank {rank} is broken")

    with pytest.raises(ZeroDivisionError, match=f"rank {first} is broken"):
        run_ranks(board, work)


def test_a_rank_that_never_answers_is_named():
    board = Switchboard(problem(2, 1, "none"), CPU, timeout_seconds=0.1)

    def work(rank):
        if rank == 0:
            board.transport(0).receive(torch.empty(1), 1, watch=lambda pending: pending).wait()

    with pytest.raises(RankLost, match=r"\('hop', 1, 0, 0\) has not come for 0.1 s"):
        run_ranks(board, work)
