"""All shards of a vocabulary in one process, with the collectives done by hand."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from schedules.ir import Kind
from schedules.vocab import VOCAB_ALGORITHMS, End, Payload, Transfer
from vp_train.vocab.loss import LossOptions
from vp_train.vocab.output import OutputLayer
from vp_train.vocab.shard import split_rows

PLAIN = LossOptions()


def exchange(transfer: Transfer, messages: list[Tensor]) -> Tensor:
    stacked = torch.stack(messages)
    match transfer:
        case Transfer.ALL_GATHER:
            return stacked
        case Transfer.ALL_MAX:
            return stacked.amax(0)
        case _:
            return stacked.sum(0)


def make_layer(weight, grad, shard, algorithm, backend, options=PLAIN, sum_dtype=None):
    """Return the layer of one shard.  `backend` is a name, or `recompute:` with a fraction."""
    name, _, fraction = backend.partition(":")
    rows = slice(shard.start, shard.stop)
    pass_of_dx = None if algorithm == "evaluate" else VOCAB_ALGORITHMS[algorithm].input_gradient
    fraction = float(fraction or 1)
    return OutputLayer(
        weight[rows],
        grad[rows],
        shard,
        vocab_size=len(weight),
        input_gradient=pass_of_dx,
        backend=name,
        options=options,
        recompute_fraction=fraction,
        sum_dtype=sum_dtype,
    )


def run_output(
    x,
    weight,
    targets,
    grad_loss,
    *,
    sizes,
    algorithm,
    backend,
    grad_dtype=None,
    t_early=False,
    options=PLAIN,
    sum_dtype=None,
):
    """Return token losses [T], dx [T, H], dW [V, H] and each shard's held bytes after S.

    Rank 0 is the root.  With `t_early`, one_barrier runs T before dx is exchanged, else after.
    """
    grads = torch.zeros_like(weight, dtype=grad_dtype)
    layers = [
        make_layer(weight, grads, shard, algorithm, backend, options, sum_dtype)
        for shard in split_rows(len(weight), len(sizes), sizes)
    ]
    steps = [layer.begin(targets[None], grad_loss[None]) for layer in layers]
    for step in steps:
        step.s(0, x)
    held = [step.held_bytes for step in steps]
    for barrier in VOCAB_ALGORITHMS[algorithm].barriers:
        if barrier.end is End.INPUT or barrier.payload is Payload.ACTIVATIONS:
            continue
        if barrier.after is Kind.T or (barrier.payload is Payload.INPUT_GRADIENT and t_early):
            for step in steps:
                step.t(0)
        messages = [step.message(barrier.payload, 0) for step in steps]
        received = exchange(barrier.transfer, messages)
        for message in messages:
            message.fill_(torch.nan)  # a collective may use its input as scratch space
        for step in steps if barrier.transfer is not Transfer.REDUCE else steps[:1]:
            step.absorb(barrier.payload, 0, received.clone())
    dx = steps[0].input_grad(0)
    if algorithm in ("none", "one_barrier") and not t_early:
        for step in steps:
            step.t(0)
    for step in steps:
        assert largest_kept(step._microbatches[0]) <= x.shape[0]  # per-token vectors only
    losses = [step.finish()[0] for step in steps]
    assert all(torch.equal(losses[0], other) for other in losses)
    return losses[0], dx, grads, held


def largest_kept(state) -> int:
    """Return the elements of the largest tensor that a microbatch still holds."""
    if isinstance(state, Tensor):
        return state.numel()
    if isinstance(state, list):
        return max(map(largest_kept, state), default=0)
    if is_dataclass(state):
        return max((largest_kept(getattr(state, field.name)) for field in fields(state)), default=0)
    return 0
