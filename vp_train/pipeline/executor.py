"""The executor: a loop over the operations of a program, and a handler for each kind of operation.

It decides nothing itself; see `schedules.lower` for programs.

Shapes: a microbatch has b sequences of s tokens, so T = s * b tokens; H hidden, R this rank's
vocabulary rows.  Activations are [s, b, H] between layers and [T, H] in the vocabulary passes;
these are views of each other.  With sequence parallelism over n ranks, hops and stages have [s / n,
b, H].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from schedules.ir import Kind, Pass
from schedules.lower import Action, Exchange, Op, Program
from schedules.problem import Collective
from schedules.vocab import Payload
from vp_train.pipeline.buffers import Buffers
from vp_train.pipeline.comms import Comms, Delivery
from vp_train.pipeline.offload import HostLink, Owner, SavedActivations, storages_of
from vp_train.tensors.alignment import PASSES_AHEAD
from vp_train.tensors.pending import Pending
from vp_train.tensors.precision import statistics_dtype
from vp_train.tensors.streams import Lead, Mark, streams_of
from vp_train.vocab.input import InputLayer, InputStep
from vp_train.vocab.loss import IGNORE_INDEX, token_weights
from vp_train.vocab.output import OutputLayer, OutputStep, Targets


class WeightGrads(Protocol):
    """The weight gradients of a stage that pass I leaves for pass W; see `model.linear`."""

    @property
    def held_bytes(self) -> int: ...
    def deferring(self, microbatch: int) -> AbstractContextManager[None]: ...
    def drain(self, microbatch: int) -> None: ...
    def assert_empty(self) -> None: ...


class StageModule(Owner, Protocol):
    """A pipeline stage [s, b, H] -> [s, b, H]; attention stays within `segments` [b, s]."""

    @property
    def weight_grads(self) -> WeightGrads: ...
    def __call__(self, x: Tensor, segments: Tensor | None) -> Tensor: ...
    def fixed_weights(self) -> AbstractContextManager[None]:
        """Return a context in which no weight that has been read changes."""
        ...

    def reading(self, need: Callable[[Sequence[str]], None]) -> AbstractContextManager[None]:
        """Within this context call `need` with the names of each layer before the pass reads it."""
        ...

    def completing(self, done: Callable[[Sequence[str]], None]) -> AbstractContextManager[None]:
        """Within this context call `done` with the names of each layer whose gradients complete."""
        ...

    def offloading(
        self, hooks: Callable[[], AbstractContextManager[None]]
    ) -> AbstractContextManager[None]:
        """Within this context run the layers that are offloaded inside `hooks()`."""
        ...


class Observer(Protocol):
    """Watches a step: `stopwatch.Stopwatch` sums seconds, `recorder.Recorder` keeps all spans."""

    def observe(self, item: Pass, held_bytes: Callable[[], int]) -> AbstractContextManager[None]:
        """Return a context for a pass.  `held_bytes` returns what S keeps for T and I for W."""
        ...

    def waits(self, action: Action, item: object) -> AbstractContextManager[None]:
        """Return a context for a wait of the passes: for what `action` says, of `item`.

        A wait for weights may lie within a pass.  Issuing a copy to the host or back counts as a
        wait: on a CPU it is the copy.
        """
        ...

    def watch(self, name: str, channel: str, pending: Pending) -> Pending:
        """Return `pending`, the communication `name`; an observer may wrap it to time it.

        Those of one `channel` end in the order in which they were issued.
        """
        ...


class _Blind:
    def observe(self, item: Pass, held_bytes: Callable[[], int]) -> AbstractContextManager[None]:
        return nullcontext()

    def waits(self, action: Action, item: object) -> AbstractContextManager[None]:
        return nullcontext()

    def watch(self, name: str, channel: str, pending: Pending) -> Pending:
        return pending


BLIND: Observer = _Blind()


class WeightUpdates(Protocol):
    """The executor's calls to the optimizer, about the weights of this rank."""

    def need(self, item: Pass) -> None:
        """Wait until the weights that `item` reads have arrived."""
        ...

    def need_of(self, names: Sequence[str]) -> None:
        """Wait until the weights `names` have arrived, in the pass that is about to read them."""
        ...

    def announce(self, names: Sequence[str]) -> None:
        """Record that the gradients of `names` are complete while the pass is still running."""
        ...

    def complete(self, item: Pass) -> None:
        """Record that all gradients that `item` adds to are complete, announced or not."""
        ...


class _NoUpdates:
    def need(self, item: Pass) -> None:
        pass

    def need_of(self, names: Sequence[str]) -> None:
        pass

    def announce(self, names: Sequence[str]) -> None:
        pass

    def complete(self, item: Pass) -> None:
        pass


NO_UPDATES: WeightUpdates = _NoUpdates()


@dataclass(frozen=True, slots=True)
class RankModules:
    """The modules of one pipeline rank.

    stages: by global stage number.
    input_layer, output_layer: the vocabulary rows of this rank, None if it has none there.
    normalisation: see `loss.token_weights`.
    leads: whether this is the first of the tensor-parallel ranks.  All of them have the same
        activations, and only this one contributes them to collectives.
    over_replicas: sums a number, fp64 [], over all replicas.
    sequence_parts: the number of ranks over which sequence parallelism splits hops and stages.
    """

    stages: Mapping[int, StageModule]
    input_layer: InputLayer | None
    output_layer: OutputLayer | None
    dtype: torch.dtype
    device: torch.device
    hidden_size: int
    normalisation: str = "token"
    leads: bool = True
    over_replicas: Callable[[Tensor], Tensor] | None = None
    updates: WeightUpdates = NO_UPDATES
    sequence_parts: int = 1


@dataclass(frozen=True, slots=True)
class PlacedBatch:
    """What the vocabulary layers read of a batch, on the device once it has reached `mark`."""

    inputs: InputStep | None
    targets: Targets | None
    mark: Mark

    def lend(self) -> None:
        """Record that the current stream uses the tensors; see `tensors.streams`."""
        for part in (self.inputs, self.targets):
            if part is not None:
                part.lend()


class Executor:
    """Runs one rank's operations over batches of tokens and labels, both [m, b, s] int64.

    Labels of IGNORE_INDEX have no loss.  Pass batches on the CPU; the layers copy what they need,
    or have copied it if `place` was called before.
    Gradients accumulate in the `grad` of the stages' parameters and of the vocabulary layers.
    """

    def __init__(self, program: Program, rank: int, modules: RankModules, comms: Comms) -> None:
        self._program, self._rank, self._modules, self._comms = program, rank, modules, comms
        self._streams = streams_of(modules.device)
        self._lead = Lead(self._streams, PASSES_AHEAD)
        self._link = HostLink(self._streams, modules.device)
        self.operation: Op | None = None  # which runs now or has run last; other threads may look

    @property
    def host_bytes(self) -> int:
        """Return the bytes of host memory that are there for activations, used or not."""
        return self._link.memory.num_bytes

    @property
    def moved_bytes(self) -> int:
        """Return the bytes of activations that were copied to the host and back in all steps."""
        return self._link.moved_bytes

    def follow(self, program: Program) -> None:
        """Run `program` from the next step on; it has the same stages and rows on every rank."""
        self._program = program

    def place(self, tokens: Tensor, labels: Tensor) -> PlacedBatch:
        """Copy to the device what a later step over this batch reads of it.

        Another thread may call this while a step runs: on CUDA the copies have their own stream.
        Raises IndexError for a token or label that is not in the vocabulary.
        """
        with self._streams.beside("batch"):
            return self._place(tokens, labels)

    def _place(self, tokens: Tensor, labels: Tensor) -> PlacedBatch:
        inputs, outputs = self._modules.input_layer, self._modules.output_layer
        return PlacedBatch(
            None if inputs is None else inputs.begin(_flat(tokens)),
            None if outputs is None else outputs.place(_flat(labels)),
            self._streams.mark(),
        )

    def step(
        self,
        tokens: Tensor,
        labels: Tensor,
        observer: Observer = BLIND,
        *,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        loss_scale: float = 1.0,
        placed: PlacedBatch | None = None,
    ) -> Tensor | None:
        """Run the program once; return this replica's term of the loss.

        The result is fp64 [] on ranks that hold output rows, None on the others.  The loss is
        normalised over all microbatches of all replicas.  A batch without any label has loss 0.

        mask: [m, b, s], scales the loss of each token.
        segments: [m, b, s]; tokens of different segments do not see each other.  Pass it on the
        CPU.
        loss_scale: a factor on the gradients, but not on the returned loss.
        placed: the result of `place` for this batch.

        Raises ValueError unless there are as many microbatches as in the program.
        """
        modules = self._modules
        precise = statistics_dtype(modules.dtype)
        with observer.waits(Action.WAIT, "tokens of all replicas"):
            weights = token_weights(
                labels, mask, modules.normalisation, precise, modules.over_replicas, modules.device
            )
        losses = self._run(tokens, labels, weights * loss_scale, observer, segments, placed)
        return None if losses is None else (losses.double() * weights).sum()

    def logprobs(
        self, tokens: Tensor, labels: Tensor, segments: Tensor | None = None
    ) -> Tensor | None:
        """Return the log-probability of every label [m, b, s] on ranks that hold output rows.

        It is 0 where the label is IGNORE_INDEX.  The dtype is fp32, or fp64 for fp64 compute.  No
        tensor [T, V] exists anywhere.  Collective over the replica.  Raises ValueError for a
        training program, and unless there are as many microbatches as in the program.
        """
        if not self._program.forward_only:
            raise ValueError(
                "this executor runs a training program; "
                "call logprobs of RankModel.evaluator instead"
            )
        nothing = torch.zeros(labels.shape, device=labels.device)
        losses = self._run(tokens, labels, nothing, BLIND, segments)
        return None if losses is None else -losses

    def hidden(self, tokens: Tensor, positions: Tensor) -> Tensor | None:
        """Return the output of the final norm at one token of each sequence: [m, b, H].

        `positions` [m, b], int64, says at which.  None on ranks without output rows.  Collective
        and restricted as `logprobs`.
        """
        assert self._program.forward_only
        m, b, s = tokens.shape
        found: dict[int, Tensor] = {}
        nothing = torch.zeros(tokens.shape)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        if self._run(tokens, labels, nothing, BLIND, None, outputs_of=found) is None:
            return None
        x = torch.stack([found[i].view(s, b, -1) for i in range(m)])
        microbatch, sequence = torch.meshgrid(torch.arange(m), torch.arange(b), indexing="ij")
        return x[microbatch, positions, sequence]

    def _run(
        self,
        tokens: Tensor,
        labels: Tensor,
        weights: Tensor,
        observer: Observer,
        segments: Tensor | None,
        placed: PlacedBatch | None = None,
        outputs_of: dict[int, Tensor] | None = None,
    ) -> Tensor | None:
        """Run the program; return the losses of all tokens [m, b, s], or None.

        `weights` [m, b, s] are dL/d(token loss).  `outputs_of` gets the input x [T, H] of the
        output layer by microbatch.
        """
        m, b, s = tokens.shape
        program, modules = self._program, self._modules
        if m != program.num_microbatches:
            setting = "run.eval_microbatches" if program.forward_only else "num_microbatches"
            raise ValueError(
                f"{m} microbatches for a program of {program.num_microbatches}; pass "
                f"{program.num_microbatches}, or plan the run with {setting}={m} for each replica"
            )
        if placed is None:
            placed = self._place(tokens, labels)
        else:
            self._streams.follow(placed.mark)
            placed.lend()
        outputs = None
        if modules.output_layer is not None:
            assert placed.targets is not None
            outputs = modules.output_layer.begin(placed.targets, _flat(weights))
        step = _Step(
            modules,
            self._comms,
            observer,
            inputs=placed.inputs,
            outputs=outputs,
            segments=segments,
            shape=(s // modules.sequence_parts, b, modules.hidden_size),
            trains=not program.forward_only,
            outputs_of=outputs_of,
            offloads=_Offloads(self._link, modules.stages, program.ranks[self._rank]),
        )
        with ExitStack() as fixed:
            for stage in modules.stages.values():
                fixed.enter_context(stage.fixed_weights())
            for op in program.ranks[self._rank]:
                self.operation = op
                step.run[op.action](op)
                if op.action is Action.RUN:
                    self._lead.passed()
        losses = step.finish()
        return None if losses is None else losses.view(m, s, b).transpose(1, 2)


class _StageInput(torch.autograd.Function):
    """The input of a stage in a forward pass; its gradient is appended to `gradients`.

    A leaf in its place would hold the input, also while that waits in host memory.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, leaf: Tensor, gradients: list[Tensor]) -> Tensor:
        ctx.gradients = gradients
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.gradients.append(grads[0])
        return None, None, None


class _Offloads:
    """The activations of a step that the program moves to the host and back.

    ops: the operations of this rank.
    """

    def __init__(
        self, link: HostLink, stages: Mapping[int, StageModule], ops: Sequence[Op]
    ) -> None:
        self._link = link
        self._moved = {op.item for op in ops if op.action is Action.OFFLOAD}
        numbers = {item.stage for item in self._moved if isinstance(item, Pass)}
        self._owned = {number: storages_of(stages[number]) for number in numbers}
        self._kept: dict[Pass, SavedActivations] = {}

    def keeping(self, stage: StageModule, item: Pass) -> AbstractContextManager[None]:
        """Return the context for the forward pass `item`, which may be one that is moved."""
        if item not in self._moved:
            return nullcontext()
        kept = self._kept[item] = self._link.keep(str(item), self._owned[item.stage])
        return stage.offloading(kept.hooks)

    def of(self, op: Op) -> SavedActivations:
        """Return what the forward pass `op.item` has kept."""
        assert isinstance(op.item, Pass)
        return self._kept[op.item]

    def read(self, item: Pass) -> None:
        """Forget what the backward pass `item` has read."""
        self._kept.pop(Pass(item.stage, Kind.F, item.microbatch), None)

    @property
    def device_bytes(self) -> int:
        """Return the bytes that are held on the device."""
        return sum(kept.device_bytes for kept in self._kept.values())

    def assert_empty(self) -> None:
        """Assert that everything was read."""
        assert not self._kept, f"never read by a backward pass: {sorted(map(str, self._kept))}"


class _Step:
    """One run of a program: its state, and the handlers of its operations."""

    def __init__(
        self,
        modules: RankModules,
        comms: Comms,
        observer: Observer,
        *,
        inputs: InputStep | None,
        outputs: OutputStep | None,
        segments: Tensor | None,
        shape: tuple[int, int, int],
        trains: bool,
        outputs_of: dict[int, Tensor] | None,
        offloads: _Offloads,
    ) -> None:
        self._modules, self._comms, self._observer = modules, comms, observer
        self._inputs, self._outputs = inputs, outputs
        self._segments, self._shape, self._trains = segments, shape, trains
        self._outputs_of, self._offloads = outputs_of, offloads
        self._tensors: Buffers[Tensor] = Buffers()
        self._arriving: Buffers[Pending] = Buffers()
        self._delivering: Buffers[Delivery] = Buffers()
        self._saved: Buffers[tuple[list[Tensor], GradientEdge]] = Buffers()
        self._first_reader: Pass | None = None  # of its stage's weights, if they are on their way
        self.run: dict[Action, Callable[[Op], None]] = {
            Action.RUN: self._pass,
            Action.SEND: self._send,
            Action.RECV: self._receive,
            Action.ARRIVE: self._arrive,
            Action.START: self._start,
            Action.WAIT: self._wait,
            Action.NEED: self._need,
            **dict.fromkeys(_MOVES, self._move),
        }
        self._passes: dict[Kind, Callable[[Pass], None]] = {
            Kind.F: self._forward,
            Kind.B: self._backward,
            Kind.I: self._input_backward,
            Kind.W: self._weight_backward,
            Kind.S: self._softmax,
            Kind.T: self._weight_grad,
            Kind.E: self._embed,
            Kind.G: self._embedding_grad,
        }
        self._messages: dict[Payload, Callable[[Exchange, int], Tensor]] = {
            Payload.EMBEDDINGS: self._form_embeddings,
            Payload.ACTIVATIONS: self._form_activations,
            Payload.EMBEDDING_GRADIENT: self._form_embedding_gradient,
            Payload.STATISTICS: self._form_output,
            Payload.MAXIMUM: self._form_output,
            Payload.SUMS: self._form_output,
            Payload.INPUT_GRADIENT: self._form_output,
        }
        self._deliveries: dict[Payload, Callable[[Exchange, int, Tensor], None]] = {
            Payload.EMBEDDINGS: self._deliver_embeddings,
            Payload.ACTIVATIONS: self._deliver_activations,
            Payload.EMBEDDING_GRADIENT: self._deliver_embedding_gradient,
            Payload.STATISTICS: self._deliver_output,
            Payload.MAXIMUM: self._deliver_output,
            Payload.SUMS: self._deliver_output,
            Payload.INPUT_GRADIENT: self._deliver_input_gradient,
        }

    def finish(self) -> Tensor | None:
        """Wait for all communications; return the losses [m, T], None without output rows."""
        with self._observer.waits(Action.WAIT, "messages"):
            self._comms.drain()
        for buffers in (self._tensors, self._arriving, self._delivering, self._saved):
            buffers.assert_empty()
        for stage in self._modules.stages.values():
            stage.weight_grads.assert_empty()
        self._offloads.assert_empty()
        return None if self._outputs is None else self._outputs.finish()

    # Passes

    def _pass(self, op: Op) -> None:
        item = op.item
        assert isinstance(item, Pass)
        stages, updates = self._modules.stages, self._modules.updates
        layered = op.completes and not item.kind.is_vocabulary
        layers: AbstractContextManager[None] = nullcontext()
        if layered:
            layers = stages[item.stage].completing(updates.announce)
        elif item == self._first_reader:
            layers = stages[item.stage].reading(self._need_of)
        with self._observer.observe(item, self._held_bytes), layers:
            self._passes[item.kind](item)
        if op.completes:
            updates.complete(item)

    def _held_bytes(self) -> int:
        output = 0 if self._outputs is None else self._outputs.held_bytes
        of_stages = sum(s.weight_grads.held_bytes for s in self._modules.stages.values())
        return output + of_stages + self._offloads.device_bytes

    def _need(self, op: Op) -> None:
        """Wait for a vocabulary matrix.  A pass of a stage waits itself, layer by layer."""
        assert isinstance(op.item, Pass)
        if op.item.kind.is_vocabulary:
            with self._observer.waits(op.action, op.item):
                self._modules.updates.need(op.item)
        else:
            self._first_reader = op.item

    def _need_of(self, names: Sequence[str]) -> None:
        with self._observer.waits(Action.NEED, self._first_reader):
            self._modules.updates.need_of(names)

    def _forward(self, item: Pass) -> None:
        x = self._tensors.take("x", item.stage, item.microbatch)
        segments = None if self._segments is None else self._segments[item.microbatch]
        stage = self._modules.stages[item.stage]
        if self._trains:
            gradients: list[Tensor] = []
            with torch.enable_grad(), self._offloads.keeping(stage, item):
                x = _StageInput.apply(x, torch.empty(0, requires_grad=True), gradients)  # type: ignore[no-untyped-call]
                y = stage(x, segments)
            # The gradient edge is enough for the backward, so y itself need not be kept.
            self._saved.put("y", item.stage, item.microbatch, (gradients, get_gradient_edge(y)))
        else:
            with torch.no_grad():
                y = stage(x, segments)
        self._tensors.put("x", item.stage + 1, item.microbatch, y.detach())

    def _backward(self, item: Pass) -> None:
        gradients, y = self._saved.take("y", item.stage, item.microbatch)
        torch.autograd.backward(y, self._tensors.take("dy", item.stage, item.microbatch))
        (dx,) = gradients
        self._offloads.read(item)
        self._tensors.put("dy", item.stage - 1, item.microbatch, dx)

    def _input_backward(self, item: Pass) -> None:
        with self._modules.stages[item.stage].weight_grads.deferring(item.microbatch):
            self._backward(item)

    def _weight_backward(self, item: Pass) -> None:
        self._modules.stages[item.stage].weight_grads.drain(item.microbatch)

    def _softmax(self, item: Pass) -> None:
        x = self._tensors.take("x", Payload.ACTIVATIONS, item.microbatch)
        if self._outputs_of is not None:
            self._outputs_of[item.microbatch] = x
        self._output.s(item.microbatch, x, keep=self._trains)

    def _weight_grad(self, item: Pass) -> None:
        self._output.t(item.microbatch)

    def _embed(self, item: Pass) -> None:
        self._tensors.put("x", Payload.EMBEDDINGS, item.microbatch, self._input.e(item.microbatch))

    def _embedding_grad(self, item: Pass) -> None:
        self._input.g(
            item.microbatch, self._tensors.take("dy", Payload.EMBEDDING_GRADIENT, item.microbatch)
        )

    @property
    def _output(self) -> OutputStep:
        assert self._outputs is not None
        return self._outputs

    @property
    def _input(self) -> InputStep:
        assert self._inputs is not None
        return self._inputs

    # Activations in host memory

    def _move(self, op: Op) -> None:
        kept = self._offloads.of(op)
        with self._observer.waits(op.action, op.item):
            _MOVES[op.action](kept)
        if kept.copying is not None:
            self._observer.watch(str(op), op.action, kept.copying)

    # Hops

    def _send(self, op: Op) -> None:
        assert isinstance(op.item, Pass)
        assert op.peer is not None
        name, stage = _product(op.item)
        tensor = self._tensors.take(name, stage, op.item.microbatch).contiguous()
        self._comms.send(tensor, op.peer, watch=self._watch(op))

    def _receive(self, op: Op) -> None:
        assert isinstance(op.item, Pass)
        assert op.peer is not None
        name, stage = _product(op.item)
        buffer = self._empty(*self._shape)
        pending = self._comms.receive(buffer, op.peer, watch=self._watch(op))
        self._arriving.put(name, stage, op.item.microbatch, pending)

    def _arrive(self, op: Op) -> None:
        assert isinstance(op.item, Pass)
        name, stage = _product(op.item)
        with self._observer.waits(op.action, op.item):
            received = self._arriving.take(name, stage, op.item.microbatch).wait()
        self._tensors.put(name, stage, op.item.microbatch, received)

    def _watch(self, op: Op) -> Callable[[Pending], Pending]:
        hop = f"{op.action} {op.peer}"
        channel = hop if op.exchange is None else op.exchange.end
        return partial(self._observer.watch, str(op.item), channel)

    # Barriers

    def _start(self, op: Op) -> None:
        exchange, node = op.exchange, op.item
        assert exchange is not None
        assert isinstance(node, Collective)
        payload, i = exchange.payload, node.microbatch
        before = exchange.continues
        delivery = self._comms.start(
            exchange,
            partial(self._messages[payload], exchange, i),
            partial(self._deliveries[payload], exchange, i),
            self._input.counts(i) if exchange.counted else (),
            None if before is None else self._delivering.look("barrier", before.barrier, i),
            self._watch(op),
        )
        if delivery is not None:
            self._delivering.put("barrier", node.barrier, i, delivery)

    def _wait(self, op: Op) -> None:
        assert isinstance(op.item, Collective)
        deliver = self._delivering.take("barrier", op.item.barrier, op.item.microbatch)
        with self._observer.waits(op.action, op.item):
            deliver()

    # The message of each payload.  A collective also needs the ranks that contribute nothing.

    def _form_embeddings(self, exchange: Exchange, i: int) -> Tensor:
        return self._tensors.take("x", exchange.payload, i)

    def _form_activations(self, exchange: Exchange, i: int) -> Tensor:
        x = self._tensors.take("x", exchange.stage + 1, i) if exchange.contributes else None
        if x is None or not self._modules.leads:
            return self._empty(self._num_tokens, self._modules.hidden_size)
        return x.reshape(self._num_tokens, -1).contiguous()

    def _form_embedding_gradient(self, exchange: Exchange, i: int) -> Tensor:
        dy = self._tensors.take("dy", exchange.stage - 1, i) if exchange.contributes else None
        if dy is None or not self._modules.leads:
            return self._empty(0, self._modules.hidden_size)
        return self._input.by_shard(i, dy.reshape(self._num_tokens, -1))

    def _form_output(self, exchange: Exchange, i: int) -> Tensor:
        return self._output.message(exchange.payload, i)

    # The handling of each result

    def _deliver_embeddings(self, exchange: Exchange, i: int, received: Tensor) -> None:
        x = self._input.in_order(i, received).view(self._whole_shape)
        self._tensors.put("x", exchange.stage, i, x)

    def _deliver_activations(self, exchange: Exchange, i: int, received: Tensor) -> None:
        self._tensors.put("x", exchange.payload, i, received)

    def _deliver_embedding_gradient(self, exchange: Exchange, i: int, received: Tensor) -> None:
        self._tensors.put("dy", exchange.payload, i, received)

    def _deliver_output(self, exchange: Exchange, i: int, received: Tensor) -> None:
        self._output.absorb(exchange.payload, i, received)

    def _deliver_input_gradient(self, exchange: Exchange, i: int, received: Tensor) -> None:
        self._output.absorb(exchange.payload, i, received)
        dx = self._output.input_grad(i).view(self._whole_shape)
        self._tensors.put("dy", exchange.stage, i, dx)

    @property
    def _whole_shape(self) -> tuple[int, int, int]:
        s, b, hidden = self._shape
        return s * self._modules.sequence_parts, b, hidden

    @property
    def _num_tokens(self) -> int:
        s, b, _ = self._whole_shape
        return s * b

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self._modules.dtype, device=self._modules.device)


_MOVES: dict[Action, Callable[[SavedActivations], None]] = {
    Action.OFFLOAD: SavedActivations.offload,
    Action.OFFLOADED: SavedActivations.offloaded,
    Action.RELOAD: SavedActivations.reload,
    Action.RESTORED: SavedActivations.restored,
}


def _product(item: Pass) -> tuple[str, int]:
    """Return name and stage under which the output of a stage pass is stored.

    It is the input of the next stage, or the output gradient of the previous stage.
    """
    return ("x", item.stage + 1) if item.kind is Kind.F else ("dy", item.stage - 1)


def _flat(values: Tensor) -> Tensor:
    """Flatten [m, b, s] to [m, T], in the token order of a flattened [s, b, H]."""
    return values.transpose(1, 2).reshape(len(values), -1)
