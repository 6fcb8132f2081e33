"""All shards of a vocabulary in one process, with the collectives done by hand."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from schedules.vocab import VOCAB_ALGORITHMS, End, Transfer
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


def make_layer(weight, grad, shard, algorithm, backend, options=PLAIN):
    """`backend`: a name, `recompute` with a fraction after a colon."""
    name, _, fraction = backend.partition(":")
    rows = slice(shard.start, shard.stop)
    return OutputLayer(weight[rows], grad[rows], shard, len(weight), algorithm, name, options, float(fraction or 1))


def run_output(x, weight, targets, grad_loss, *, sizes, algorithm, backend, grad_dtype=None, t_early=False, options=PLAIN):
    """(token losses, dx, dW [V, H], held bytes of each shard after S) of the sharded layer; rank 0 is the root.

    `t_early`: one_barrier runs T before dx is exchanged rather than after.
    """
    grads = torch.zeros_like(weight, dtype=grad_dtype)
    layers = [
        make_layer(weight, grads, shard, algorithm, backend, options) for shard in split_rows(len(weight), len(sizes), sizes)
    ]
    for layer in layers:
        layer.begin(targets[None], grad_loss[None])
        layer.s(0, x)
    held = [layer.held_bytes for layer in layers]
    for barrier in VOCAB_ALGORITHMS[algorithm].barriers:
        if barrier.end is End.INPUT or barrier.name == "C0":
            continue
        if barrier.name == "C2" or (barrier.name == "C1b" and t_early):
            for layer in layers:
                layer.t(0)
        messages = [layer.message(barrier.name, 0) for layer in layers]
        received = exchange(barrier.transfer, messages)
        for message in messages:
            message.fill_(torch.nan)  # a collective may use its input as scratch space
        for layer in layers if barrier.transfer is not Transfer.REDUCE else layers[:1]:
            layer.absorb(barrier.name, 0, received.clone())
    dx = layers[0].input_grad(0)
    if algorithm in ("none", "one_barrier") and not t_early:
        for layer in layers:
            layer.t(0)
    for layer in layers:
        assert largest_kept(layer._microbatches[0]) <= x.shape[0]  # per-token vectors only
    losses = [layer.finish()[0] for layer in layers]
    assert all(torch.equal(losses[0], other) for other in losses)
    return losses[0], dx, grads, held


def largest_kept(state) -> int:
    """Elements of the largest tensor that a microbatch still holds."""
    if isinstance(state, Tensor):
        return state.numel()
    if isinstance(state, list):
        return max(map(largest_kept, state), default=0)
    if is_dataclass(state):
        return max((largest_kept(getattr(state, field.name)) for field in fields(state)), default=0)
    return 0
