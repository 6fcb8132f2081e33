"""Linear layers whose weight gradient can wait: pass I leaves (x, dy) in a store, pass W turns them into dW.

In the place of megatron-core's parallel linear layers, so that splitting the backward walks no autograd graph twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vp_train.tensors.precision import accumulate
from vp_train.tensors.slices import TensorSlice

_Product = tuple[nn.Parameter, Tensor, Tensor]


class WeightGradStore:
    """The weight-gradient products of one stage.  They are computed at once, unless a backward runs under `deferring`."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[_Product]] = {}
        self._current: list[_Product] | None = None
        self._computed: Callable[[nn.Parameter], None] | None = None

    @contextmanager
    def watching(self, computed: Callable[[nn.Parameter], None]) -> Iterator[None]:
        """A drain inside calls `computed` with the weight of every product, when that is added to its gradient."""
        self._computed = computed
        try:
            yield
        finally:
            self._computed = None

    @contextmanager
    def deferring(self, microbatch: int) -> Iterator[None]:
        """Products of a backward run inside wait for `drain(microbatch)`."""
        self._current = self._waiting[microbatch] = []
        try:
            yield
        finally:
            self._current = None

    def put(self, weight: nn.Parameter, x: Tensor, dy: Tensor) -> None:
        """weight.grad [out, in] += dy^T x for x [T, in] and dy [T, out], now or later."""
        if self._current is None:
            _accumulate(weight, x, dy)
        else:
            self._current.append((weight, x, dy))

    def drain(self, microbatch: int) -> None:
        """Compute what waits for `microbatch`, in the order of its backward."""
        for weight, x, dy in self._waiting.pop(microbatch):
            _accumulate(weight, x, dy)
            if self._computed is not None:
                self._computed(weight)

    @property
    def held_bytes(self) -> int:
        """Bytes of the tensors that wait; a storage that several of them share counts once."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for products in self._waiting.values()
            for _, x, dy in products
            for tensor in (x, dy)
        }
        return sum(storages.values())

    def assert_empty(self) -> None:
        """Every I was followed by its W."""
        assert not self._waiting, (
            f"weight gradients of microbatches {sorted(self._waiting)} were not computed"
        )


@torch.no_grad()  # W runs outside of a backward: a graph from the gradient would keep x and dy of every microbatch
def _accumulate(weight: nn.Parameter, x: Tensor, dy: Tensor) -> None:
    gradient = weight.grad
    if gradient is None:
        weight.grad = dy.T @ x
    elif gradient.dtype is dy.dtype:
        gradient.addmm_(dy.T, x)
    elif gradient.is_cuda:  # the product is never rounded to the dtype of x and dy
        torch.addmm(gradient, dy.T, x, out_dtype=gradient.dtype, out=gradient)
    else:
        accumulate(gradient, dy.T @ x)


@dataclass(frozen=True, slots=True)
class SequenceSplit:
    """Sequence parallelism (arXiv 2205.05198): between linear layers each of n tensor-parallel ranks has a part of the tokens.

    `gather` makes [s, b, h] of the parts [s / n, b, h]; `scatter` sums [s, b, h] over the ranks and gives each its part.
    """

    gather: Callable[[Tensor], Tensor]
    scatter: Callable[[Tensor], Tensor]


class _LinearFunction(torch.autograd.Function):
    """y = x W^T, with dW handed to the store instead of autograd; dx is summed over `group` while dW is computed.

    With `sequence` x and dx are parts of sequences, and y and dy whole; x is gathered again for dW.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        store: WeightGradStore,
        group: dist.ProcessGroup | None,
        sequence: SequenceSplit | None,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.store, ctx.group, ctx.sequence = weight, store, group, sequence
        return (x if sequence is None else sequence.gather(x)) @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (dy,) = grads
        (x,) = ctx.saved_tensors
        dx, summed = dy @ ctx.weight, None
        if ctx.sequence is not None:
            dx, x = ctx.sequence.scatter(dx), ctx.sequence.gather(x)
        elif ctx.group is not None:
            summed = dist.all_reduce(dx, group=ctx.group, async_op=True)
        ctx.store.put(ctx.weight, x.flatten(0, -2), dy.flatten(0, -2))
        if summed is not None:
            summed.wait()
        return dx, None, None, None, None


class _StoredLinear(nn.Module):
    """A linear layer, called as megatron-core calls its own: returns (y, bias), the bias None where y has it already.

    The gradient of the bias is a sum, so it does not wait.  `split` is that of `weight` over the tensor-parallel ranks.
    """

    split: TensorSlice | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        config: Any,
        store: WeightGradStore,
        bias: bool,
        skip_bias_add: bool,
    ) -> None:
        super().__init__()
        self._store, self._skip_bias_add = store, skip_bias_add
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.bias = (
            nn.Parameter(torch.empty(output_size, dtype=config.params_dtype)) if bias else None
        )

    def _with_bias(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.bias is None or self._skip_bias_add:
            return y, self.bias
        return y + self.bias, None


class ColumnLinear(_StoredLinear):
    """Each of the ranks of `tp_group` computes a part of the output, of each of `parts` equal parts of it."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        store: WeightGradStore,
        tp_group: dist.ProcessGroup,
        sequence: SequenceSplit | None = None,
        parts: int = 1,
        bias: bool = False,
        skip_bias_add: bool = False,
        **_: object,
    ) -> None:
        super().__init__(
            input_size, output_size // tp_group.size(), config, store, bias, skip_bias_add
        )
        self._sequence = sequence
        self._group = tp_group if tp_group.size() > 1 else None
        self.split = (
            None
            if self._group is None
            else TensorSlice.even(0, output_size, tp_group.rank(), tp_group.size(), parts)
        )

    @property
    def splits(self) -> dict[str, TensorSlice]:
        """Of its parameters, where they are split."""
        return (
            {} if self.split is None else {name: self.split for name, _ in self.named_parameters()}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, in], or [s / n, b, in] of sequences that are split, -> [s, b, out / n]."""
        y: Tensor = _LinearFunction.apply(x, self.weight, self._store, self._group, self._sequence)  # type: ignore[no-untyped-call]
        return self._with_bias(y)


class RowLinear(_StoredLinear):
    """Each of the ranks of `tp_group` has a part of the input, and the whole bias; `reduce` sums their outputs.

    Where sequences are split it also gives each rank its part of the sum.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        store: WeightGradStore,
        tp_group: dist.ProcessGroup,
        reduce: Callable[[Tensor, dist.ProcessGroup], Tensor],
        bias: bool = False,
        skip_bias_add: bool = False,
        **_: object,
    ) -> None:
        super().__init__(
            input_size // tp_group.size(), output_size, config, store, bias, skip_bias_add
        )
        self._reduce = reduce
        self._group = tp_group if tp_group.size() > 1 else None
        self.split = (
            None
            if self._group is None
            else TensorSlice.even(1, input_size, tp_group.rank(), tp_group.size())
        )

    @property
    def splits(self) -> dict[str, TensorSlice]:
        """Of its parameters, where they are split."""
        return {} if self.split is None else {"weight": self.split}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """[s, b, in / n] -> [s, b, out], or [s / n, b, out]."""
        y: Tensor = _LinearFunction.apply(x, self.weight, self._store, None, None)  # type: ignore[no-untyped-call]
        if self._group is not None:
            y = self._reduce(y, self._group)
        return self._with_bias(y)
