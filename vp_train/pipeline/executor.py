"""The executor: a table of handlers and a loop.  The program decides everything; see `schedules.lower`.

Shapes: b sequences of s tokens in a microbatch, T = s * b tokens, H hidden, R this rank's vocabulary rows.  Activations are
[s, b, H] between layers and [T, H] in the vocabulary passes, which are views of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from schedules.ir import Kind, Pass
from schedules.lower import Action, Op
from schedules.problem import Collective, Problem
from schedules.vocab import Barrier, End
from vp_train.pipeline.buffers import Buffers, Once
from vp_train.pipeline.comms import Comms, Pending
from vp_train.precision import statistics_dtype
from vp_train.vocab.input import InputLayer
from vp_train.vocab.loss import token_weights
from vp_train.vocab.output import OutputLayer


class WeightGrads(Protocol):
    """The weight gradients of a stage that pass I leaves for pass W; see `model.linear`."""

    def deferring(self, microbatch: int) -> AbstractContextManager[None]: ...
    def drain(self, microbatch: int) -> None: ...
    def assert_empty(self) -> None: ...


class StageModule(Protocol):
    """A pipeline stage: [s, b, H] -> [s, b, H]; attention stays within `segments` [b, s], if given."""

    @property
    def weight_grads(self) -> WeightGrads: ...
    def completing(self, done: Callable[[Sequence[str]], None]) -> AbstractContextManager[None]: ...
    def __call__(self, x: Tensor, segments: Tensor | None) -> Tensor: ...


class Observer(Protocol):
    """Watches passes run; `recorder.Recorder` measures them."""

    def observe(self, item: Pass) -> AbstractContextManager[None]: ...


class _Blind:
    def observe(self, item: Pass) -> AbstractContextManager[None]:
        return nullcontext()


BLIND: Observer = _Blind()


@dataclass(frozen=True, slots=True)
class Part:
    """What one pipeline rank owns: stages by their global number, and its shards of the vocabulary layers, if any."""

    stages: Mapping[int, StageModule]
    input_layer: InputLayer | None
    output_layer: OutputLayer | None
    dtype: torch.dtype
    device: torch.device
    hidden_size: int
    normalisation: str = "token"  # of the loss; see loss.token_weights
    leads: bool = True  # first of the tensor-parallel ranks: all of them have what it sends
    data: dist.ProcessGroup | None = None  # the same part in all replicas
    ready: Callable[[Pass], None] | None = None  # called when the gradient that a pass adds to is complete
    ready_names: Callable[[Sequence[str]], None] | None = None  # called with parameters of a stage before that, in the pass
    need: Callable[[Pass], None] | None = None  # called before a pass reads parameters


class Executor:
    """Runs one rank's operations over batches of tokens and labels, each [m, b, s] int64 (labels IGNORE_INDEX: no loss).

    Gradients accumulate in the `grad` of the stages' parameters and of the vocabulary layers.
    """

    def __init__(self, ops: tuple[Op, ...], problem: Problem, rank: int, part: Part, comms: Comms) -> None:
        self._ops, self._problem, self._rank, self._part, self._comms = ops, problem, rank, part, comms
        self._last = {op.item for op in ops if op.action is Action.READY}
        self._tensors: Buffers[Tensor] = Buffers()
        self._arriving: Buffers[Pending] = Buffers()
        self._barriers: Buffers[Once] = Buffers()
        self._saved: Buffers[tuple[Tensor, GradientEdge]] = Buffers()
        self._actions = {
            Action.RUN: self._run,
            Action.SEND: self._send,
            Action.RECV: self._receive,
            Action.ARRIVE: self._arrive,
            Action.START: self._start,
            Action.WAIT: self._wait,
            Action.READY: self._ready,
        }
        self._passes = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.I: self._input_backward,
            Kind.W: self._weight_backward,
            Kind.S: self._softmax,
            Kind.T: self._weight_grad,
            Kind.E: self._embed,
            Kind.G: self._embedding_grad,
        }

    def step(
        self,
        tokens: Tensor,
        labels: Tensor,
        observer: Observer = BLIND,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        loss_scale: float = 1.0,
    ) -> Tensor | None:
        """Run the program once; returns this replica's term of the loss, fp64 [], on ranks that hold output rows.

        The loss is normalised over all microbatches of all replicas, `mask` [m, b, s] scaling that of each token; a batch
        without a labelled token has loss 0.  Tokens of different `segments` [m, b, s] do not see each other; they are best on
        the CPU.  Gradients are those of the loss times `loss_scale`.
        """
        precise = statistics_dtype(self._part.dtype)
        weights = token_weights(labels, mask, self._part.normalisation, precise, self._part.data)
        losses = self._run_program(tokens, labels, weights * loss_scale, observer, segments)
        return None if losses is None else (losses.double() * weights).sum()

    def logprobs(self, tokens: Tensor, labels: Tensor, segments: Tensor | None = None) -> Tensor | None:
        """The log-probability of every label [m, b, s], 0 where it is IGNORE_INDEX, on ranks that hold output rows; fp32, or
        fp64 where that is computed in.

        Collective over the replica.  No [T, V] exists anywhere.  Raises ValueError unless the program is one of evaluation,
        whose losses are the negative log-likelihoods, for m microbatches.
        """
        if not self._problem.forward_only:
            raise ValueError("this executor trains; log-probabilities are what RankModel.evaluator has")
        losses = self._run_program(tokens, labels, torch.zeros(labels.shape, device=labels.device), BLIND, segments)
        return None if losses is None else -losses

    def _run_program(
        self, tokens: Tensor, labels: Tensor, weights: Tensor, observer: Observer, segments: Tensor | None
    ) -> Tensor | None:
        """The losses of all tokens [m, b, s], each of which counts `weights` [m, b, s]."""
        m, b, s = tokens.shape
        if m != self._problem.num_microbatches:
            setting = "run.eval_microbatches" if self._problem.forward_only else "num_microbatches"
            raise ValueError(
                f"{m} microbatches for a program of {self._problem.num_microbatches}; give as many, or plan the run with "
                f"{setting}={m} for each replica"
            )
        self._observer, self._segments = observer, segments
        self._shape = (s, b, self._part.hidden_size)
        self._num_tokens = s * b
        output = self._part.output_layer
        if self._part.input_layer is not None:
            self._part.input_layer.begin(_flat(tokens))
        if output is not None:
            output.begin(_flat(labels), _flat(weights))
        for op in self._ops:
            self._actions[op.action](op)
        self._comms.drain()
        for buffers in (self._tensors, self._arriving, self._barriers, self._saved):
            buffers.assert_empty()
        for stage in self._part.stages.values():
            stage.weight_grads.assert_empty()
        return None if output is None else output.finish().view(m, s, b).transpose(1, 2)

    # Passes

    def _run(self, op: Op) -> None:
        assert isinstance(op.item, Pass)
        if self._part.need is not None:
            self._part.need(op.item)
        with self._observer.observe(op.item), self._completing(op.item):
            self._passes[op.item.kind](op.item)

    def _completing(self, item: Pass) -> AbstractContextManager[None]:
        if item not in self._last or item.kind not in (Kind.B, Kind.W) or self._part.ready_names is None:
            return nullcontext()
        return self._part.stages[item.stage].completing(self._part.ready_names)

    def _forward(self, item: Pass) -> None:
        x = self._tensors.take("x", item.stage, item.microbatch)
        segments = None if self._segments is None else self._segments[item.microbatch]
        if self._problem.forward_only:
            with torch.no_grad():
                y = self._part.stages[item.stage](x, segments)
        else:
            x.requires_grad_()
            with torch.enable_grad():
                y = self._part.stages[item.stage](x, segments)
            # What y was computed from is enough for its backward, without y.
            self._saved.put("xy", item.stage, item.microbatch, (x, get_gradient_edge(y)))
        self._tensors.put("x", item.stage + 1, item.microbatch, y.detach())

    def _backward(self, item: Pass) -> None:
        x, y = self._saved.take("xy", item.stage, item.microbatch)
        torch.autograd.backward(y, self._tensors.take("dy", item.stage, item.microbatch))
        assert x.grad is not None
        self._tensors.put("dy", item.stage - 1, item.microbatch, x.grad)

    def _input_backward(self, item: Pass) -> None:
        with self._part.stages[item.stage].weight_grads.deferring(item.microbatch):
            self._backward(item)

    def _weight_backward(self, item: Pass) -> None:
        self._part.stages[item.stage].weight_grads.drain(item.microbatch)

    def _softmax(self, item: Pass) -> None:
        x = self._tensors.take("x", "C0", item.microbatch)
        self._output.s(item.microbatch, x, keep=not self._problem.forward_only)

    def _weight_grad(self, item: Pass) -> None:
        self._output.t(item.microbatch)

    def _embed(self, item: Pass) -> None:
        self._tensors.put("x", "CE", item.microbatch, self._input.e(item.microbatch))

    def _embedding_grad(self, item: Pass) -> None:
        self._input.g(item.microbatch, self._tensors.take("dy", "CG", item.microbatch))

    @property
    def _output(self) -> OutputLayer:
        assert self._part.output_layer is not None
        return self._part.output_layer

    @property
    def _input(self) -> InputLayer:
        assert self._part.input_layer is not None
        return self._part.input_layer

    # Hops

    def _send(self, op: Op) -> None:
        assert isinstance(op.item, Pass)
        assert op.peer is not None
        name, stage = _product(op.item)
        tensor = self._tensors.take(name, stage, op.item.microbatch)
        self._comms.send(tensor.contiguous(), op.peer, upstream=name == "dy")

    def _receive(self, op: Op) -> None:
        assert isinstance(op.item, Pass)
        assert op.peer is not None
        name, stage = _product(op.item)
        pending = self._comms.receive(self._empty(*self._shape), op.peer, upstream=name == "dy")
        self._arriving.put(name, stage, op.item.microbatch, pending)

    def _arrive(self, op: Op) -> None:
        assert isinstance(op.item, Pass)
        name, stage = _product(op.item)
        received = self._arriving.take(name, stage, op.item.microbatch).wait()
        self._tensors.put(name, stage, op.item.microbatch, received)

    # Barriers

    def _start(self, op: Op) -> None:
        assert isinstance(op.item, Collective)
        barrier, i = self._problem.algorithm.barrier(op.item.barrier), op.item.microbatch
        root = self._problem.root(barrier.end)
        delivers = self._rank in self._problem.receivers(op.item)
        if isinstance(barrier.after, Kind):
            message = self._message(barrier, i, at_root=root == self._rank)
            counts = self._input.counts(i) if barrier.end is End.INPUT else ()
            pending = self._comms.collective(barrier.end, barrier.transfer, message, root, delivers=delivers, counts=counts)
        else:
            continued = self._continued(barrier, self._barriers.look("barrier", barrier.after, i), i)
            pending = self._comms.collective_aside(barrier.end, barrier.transfer, continued, root, delivers=delivers)
        if delivers:
            self._barriers.put("barrier", barrier.name, i, Once(partial(self._hear, barrier, i, pending)))

    def _continued(self, barrier: Barrier, earlier: Once | None, microbatch: int) -> Callable[[], Tensor]:
        """The message of a barrier that continues `earlier`, for which it waits unless a pass has.

        It may be called beside the passes.
        """

        def message() -> Tensor:
            if earlier is not None:
                earlier()
            return self._output.message(barrier.name, microbatch)

        return message

    def _message(self, barrier: Barrier, microbatch: int, *, at_root: bool) -> Tensor:
        """This rank's contribution: tokens [.., H] at the ends of the layers, what the output layer says in between."""
        match barrier.name:
            case "CE":
                return self._tensors.take("x", "CE", microbatch)
            case "C0":
                x = self._tensors.take("x", self._problem.last_stage + 1, microbatch) if at_root else None
                if x is None or not self._part.leads:
                    return self._empty(self._num_tokens, self._part.hidden_size)
                return x.reshape(self._num_tokens, -1).contiguous()
            case "CG":
                dy = self._tensors.take("dy", -1, microbatch) if at_root else None
                if dy is None or not self._part.leads:
                    return self._empty(0, self._part.hidden_size)
                return self._input.by_shard(microbatch, dy.reshape(self._num_tokens, -1))
            case _:
                return self._output.message(barrier.name, microbatch)

    def _wait(self, op: Op) -> None:
        assert isinstance(op.item, Collective)
        self._barriers.take("barrier", op.item.barrier, op.item.microbatch)()

    def _ready(self, op: Op) -> None:
        assert isinstance(op.item, Pass)
        if self._part.ready is not None:
            self._part.ready(op.item)

    def _hear(self, barrier: Barrier, microbatch: int, pending: Pending) -> None:
        """Wait for what `barrier` delivers and hand it on."""
        received = pending.wait()
        match barrier.name:
            case "CE":
                self._tensors.put("x", 0, microbatch, self._input.in_order(microbatch, received).view(self._shape))
            case "C0":
                self._tensors.put("x", "C0", microbatch, received)
            case "CG":
                self._tensors.put("dy", "CG", microbatch, received)
            case name:
                self._output.absorb(name, microbatch, received)
                if Kind.B in barrier.before:
                    dx = self._output.input_grad(microbatch)
                    self._tensors.put("dy", self._problem.last_stage, microbatch, dx.view(self._shape))

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._part.dtype, device=self._part.device)


def _product(item: Pass) -> tuple[str, int]:
    """Where the output of a stage pass goes: the input of the next stage, or the output gradient of the previous one."""
    return ("x", item.stage + 1) if item.kind is Kind.F else ("dy", item.stage - 1)


def _flat(values: Tensor) -> Tensor:
    """[m, b, s] -> [m, T] in the order of [s, b, H] flattened."""
    return values.transpose(1, 2).reshape(len(values), -1)
