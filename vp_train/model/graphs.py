"""The passes of a stage as CUDA graphs: recorded once, then each is a single launch.

A layer takes the host some forty operations forward and eighty backward.  Where layers are small,
the GPU waits for them.  A graph has the addresses of all tensors it reads and writes, so a
microbatch that is between its forward and its backward needs a set of graphs of its own, with the
activations that it keeps.  Such a set is a `_Slot`.  There are as many as microbatches are in
flight at once, and each is recorded when it is first needed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import count
from threading import Lock
from typing import Any
from weakref import WeakMethod

import torch
from torch import Tensor, nn

from vp_train.model.linear import WeightGradStore
from vp_train.model.stage import Stage

Work = Callable[[], None]
_recording = Lock()  # torch records one graph of a process at a time
_numbers = count(-2, -1)  # of slots, unlike those of microbatches


class GraphRecorder:
    """Records work on `stream` as CUDA graphs whose memory is one pool."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Return what runs `work` again on the same tensors.  `work` itself is not run."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            # Other threads copy batches to the device, and NCCL's looks at its events.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with suppress(Exception):  # of a recording that the first error has ended
                    graph.capture_end()
                raise
            graph.capture_end()
        return graph.replay


@contextmanager
def _recording_alone() -> Iterator[None]:
    """Let no other thread record meanwhile, and nothing be freed that CUDA frees at no such time.

    These are graphs that only Python's garbage collector finds, and memory that torch has cached.
    """
    with _recording:
        gc.collect()
        torch.cuda.empty_cache()
        collects = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


def repeated(work: Work) -> Work:
    """Return what runs the method `work` anew, in the place of its graph on a CPU.

    It does not keep the slot that has the method: a slot that keeps itself is freed late.
    """
    reference = WeakMethod(work)

    def run() -> None:
        method = reference()
        assert method is not None
        method()

    return run


class _Slot:
    """The graphs of a stage for one microbatch in flight, and their tensors.

    like: an input x [s, b, h] of the stage, which has the shape of its output.
    split: the backward is I and W.
    """

    def __init__(
        self, stage: Stage, like: Tensor, record: Callable[[Work], Work], *, split: bool
    ) -> None:
        self._stage, self._number = stage, next(_numbers)
        self._x, self._dy = torch.empty_like(like).requires_grad_(), torch.empty_like(like)
        self._y = self._dx = like  # until they are recorded
        self.held_bytes = 0  # between I and W
        self._forward = record(self._record_forward)
        self._backward = record(self._record_input_backward if split else self._record_backward)
        self._weights = record(self._record_weights) if split else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the output y [s, b, h] for x [s, b, h]."""
        self._x.detach().copy_(x)
        self._forward()
        return self._y.detach().clone()  # it may be read when this slot has another microbatch

    def backward(self, dy: Tensor) -> Tensor:
        """Return dx [s, b, h] for dy [s, b, h], and add the gradients of weights if not split."""
        self._dy.copy_(dy)
        self._backward()
        return self._dx.clone()

    def weights(self) -> None:
        """Add the gradients of weights that a split backward has left."""
        assert self._weights is not None
        self._weights()

    def _record_forward(self) -> None:
        with torch.enable_grad():
            self._y = self._stage(self._x)

    def _record_backward(self) -> None:
        torch.autograd.backward(self._y, self._dy)
        assert self._x.grad is not None
        self._dx, self._x.grad = self._x.grad, None

    def _record_input_backward(self) -> None:
        store = self._stage.weight_grads
        before = store.held_bytes
        with store.deferring(self._number):
            self._record_backward()
        self.held_bytes = store.held_bytes - before

    def _record_weights(self) -> None:
        self._stage.weight_grads.drain(self._number)


class _Replayed(torch.autograd.Function):
    """A stage whose forward and backward are those of a slot."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: GraphedStage) -> Tensor:
        ctx.stage, ctx.slot = stage, stage.take(x)
        y: Tensor = ctx.slot.forward(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.stage.backward(ctx.slot, *grads), None


class GraphedStage(nn.Module):
    """`stage` with its training passes as CUDA graphs; all else is as in the stage.

    All parameters must stay where they are, and so must their gradients, which must exist.  A pass
    that reads weights first waits for all of them, and one that completes gradients announces them
    at its end.  All microbatches have the same shape, and none has packed documents.

    split: the backward is I and W.
    """

    def __init__(self, stage: Stage, *, split: bool) -> None:
        super().__init__()
        self.stage, self._split = stage, split
        self._stream: torch.cuda.Stream | None = None
        self._recorded: list[int] = []  # addresses
        self._free: list[_Slot] = []
        self.weight_grads = _WeightGrads(stage.weight_grads, self._free)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """Map [s, b, h] to [s, b, h], as `Stage` does."""
        if not torch.is_grad_enabled():
            y: Tensor = self.stage(x, segments)
            return y
        assert segments is None
        return _Replayed.apply(x, self)  # type: ignore[no-untyped-call, no-any-return]

    def take(self, like: Tensor) -> _Slot:
        """Return a slot that no microbatch has, for an input `like` this [s, b, h]."""
        if self._free:
            return self._free.pop()
        self._recorded = self._addresses()
        if not like.is_cuda:
            return _Slot(self.stage, like, repeated, split=self._split)
        with _recording_alone():
            if self._stream is None:
                # One for all slots, because autograd adds to a parameter on a stream that stays.
                self._stream = torch.cuda.Stream(like.device)  # type: ignore[no-untyped-call]
                self._warm_up(like, self._stream)
            return _Slot(self.stage, like, GraphRecorder(self._stream), split=self._split)

    def _addresses(self) -> list[int]:
        """Return the addresses of all parameters and gradients, which graphs have recorded."""
        tensors = [(parameter, parameter.grad) for parameter in self.stage.parameters()]
        assert all(gradient is not None for _, gradient in tensors)
        return [tensor.data_ptr() for pair in tensors for tensor in pair if tensor is not None]

    def _warm_up(self, like: Tensor, stream: torch.cuda.Stream) -> None:
        """Run the passes once, because what libraries do at first cannot be recorded.

        Zeros are added to the gradients.
        """
        slot, zeros = _Slot(self.stage, like, repeated, split=self._split), torch.zeros_like(like)
        current = torch.cuda.current_stream(like.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            slot.forward(zeros)
            slot.backward(zeros)
            if self._split:
                slot.weights()
        current.wait_stream(stream)
        del slot, zeros
        torch.cuda.empty_cache()  # no other work takes the memory of this stream

    def backward(self, slot: _Slot, dy: Tensor) -> Tensor:
        """Return dx [s, b, h] for dy [s, b, h]; free `slot`, or let it wait for its W."""
        dx = slot.backward(dy)
        self.weight_grads.follow(slot)
        return dx

    def fixed_weights(self) -> AbstractContextManager[None]:
        """Return the context of the stage, at the start of a step."""
        assert self._recorded in ([], self._addresses()), "a parameter or a gradient has moved"
        return self.stage.fixed_weights()

    @contextmanager
    def reading(self, need: Callable[[Sequence[str]], None]) -> Iterator[None]:
        """Call `need` with all parameters, unit by unit in the order of the forward."""
        for unit in self.stage.units[::-1]:
            need(unit)
        yield

    @contextmanager
    def completing(self, done: Callable[[Sequence[str]], None]) -> Iterator[None]:
        """Call `done` with each of the stage's units at the end of this context."""
        yield
        for unit in self.stage.units:
            done(unit)

    def offloading(
        self, hooks: Callable[[], AbstractContextManager[None]]
    ) -> AbstractContextManager[None]:
        """Refuse: the activations of a graph stay in its memory."""
        raise AssertionError("activations of CUDA graphs are not offloaded")


class _WeightGrads:
    """The weight gradients that a graphed stage leaves for pass W, by microbatch."""

    def __init__(self, store: WeightGradStore, free: list[_Slot]) -> None:
        self._store, self._free = store, free
        self._waiting: dict[int, _Slot] = {}
        self._current: int | None = None

    @contextmanager
    def deferring(self, microbatch: int) -> Iterator[None]:
        """Within this context a backward leaves them for `drain(microbatch)`."""
        self._current = microbatch
        try:
            yield
        finally:
            self._current = None

    def follow(self, slot: _Slot) -> None:
        """Take `slot` after its backward: it waits for its W, or is free."""
        if self._current is None:
            self._free.append(slot)
        else:
            self._waiting[self._current] = slot

    def drain(self, microbatch: int) -> None:
        """Compute those of `microbatch`."""
        slot = self._waiting.pop(microbatch)
        slot.weights()
        self._free.append(slot)

    @property
    def held_bytes(self) -> int:
        """Return the bytes of the tensors that wait."""
        return sum(slot.held_bytes for slot in self._waiting.values())

    def assert_empty(self) -> None:
        """Assert that every pass I was followed by its W."""
        self._store.assert_empty()
        assert not self._waiting, f"weight gradients of {sorted(self._waiting)} were not computed"
