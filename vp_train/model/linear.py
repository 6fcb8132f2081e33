"""Linear layers whose weight gradient can wait: pass I stores (x, dy), and pass W computes dW.

They replace megatron-core's parallel linear layers.  So a split backward does not walk the autograd
graph twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vp_train.tensors.collectives import all_gather_single, reduce_scatter_single
from vp_train.tensors.precision import accumulate
from vp_train.tensors.slices import TensorSlice

_Product = tuple[nn.Parameter, Tensor, Tensor]


class Products(Protocol):
    """The products of linear layers with their weights W [out, in]; dW is not one of them."""

    def output(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None = None) -> Tensor:
        """Return x W^T [.., out] for x [.., in], plus `bias` [out] if there is one."""
        ...

    def input_gradient(self, dy: Tensor, weight: nn.Parameter) -> Tensor:
        """Return dy W [.., in] for dy [.., out]."""
        ...

    def fixed_weights(self) -> AbstractContextManager[None]:
        """Return a context in which no weight changes, so that what they give may be kept."""
        ...


@dataclass(frozen=True, slots=True)
class PlainProducts:
    """Products in the dtype of the weights."""

    def output(self, x: Tensor, weight: nn.Parameter, bias: Tensor | None = None) -> Tensor:
        """Return x W^T [.., out] for x [.., in], plus `bias` [out] if there is one."""
        return nn.functional.linear(x, weight, bias)

    def input_gradient(self, dy: Tensor, weight: nn.Parameter) -> Tensor:
        """Return dy W [.., in] for dy [.., out]."""
        return dy @ weight

    def fixed_weights(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()


PLAIN: Products = PlainProducts()


class WeightGradStore:
    """The weight-gradient products of one stage.

    A product is computed at once, unless the backward runs inside `deferring`.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[_Product]] = {}
        self._current: list[_Product] | None = None
        self._computed: Callable[[nn.Parameter], None] | None = None

    @contextmanager
    def watching(self, computed: Callable[[nn.Parameter], None]) -> Iterator[None]:
        """Within this context `drain` calls `computed(weight)` after each product it has added."""
        self._computed = computed
        try:
            yield
        finally:
            self._computed = None

    @contextmanager
    def deferring(self, microbatch: int) -> Iterator[None]:
        """Within this context the products of a backward wait for `drain(microbatch)`."""
        self._current = self._waiting[microbatch] = []
        try:
            yield
        finally:
            self._current = None

    def put(self, weight: nn.Parameter, x: Tensor, dy: Tensor) -> None:
        """Add dy^T x to weight.grad [out, in] for x [T, in] and dy [T, out], now or in `drain`."""
        if self._current is None:
            _accumulate(weight, x, dy)
        else:
            self._current.append((weight, x, dy))

    def drain(self, microbatch: int) -> None:
        """Compute the products that wait for `microbatch`, in the order of its backward."""
        for weight, x, dy in self._waiting.pop(microbatch):
            _accumulate(weight, x, dy)
            if self._computed is not None:
                self._computed(weight)

    def discard(self, microbatch: int) -> None:
        """Forget the products that wait for `microbatch`, if any do."""
        self._waiting.pop(microbatch, None)

    @property
    def held_bytes(self) -> int:
        """Return the bytes of the tensors that wait; a storage that several share counts once."""
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for products in self._waiting.values()
            for _, x, dy in products
            for tensor in (x, dy)
        }
        return sum(storages.values())

    def assert_empty(self) -> None:
        """Assert that every pass I was followed by its W."""
        assert not self._waiting, (
            f"weight gradients of microbatches {sorted(self._waiting)} were not computed"
        )


class LateInput:
    """Stands for the store in one call of a linear layer whose input is formed again.

    The layer keeps no input.  In the backward it gives its product to `put` first, and `form` then
    passes it on to the store with the input.
    """

    def __init__(self, store: WeightGradStore) -> None:
        self._store = store
        self._product: tuple[nn.Parameter, Tensor] | None = None

    def put(self, weight: nn.Parameter, dy: Tensor) -> None:
        """Keep a product until its input is there, for dy [T, out]."""
        self._product = weight, dy

    def form(self, x: Tensor) -> None:
        """Pass the product on with its input x [.., in]."""
        assert self._product is not None
        weight, dy = self._product
        self._product = None
        self._store.put(weight, x.flatten(0, -2), dy)


# W runs outside a backward, where autograd would record a graph that keeps x and dy.
@torch.no_grad()
def _accumulate(weight: nn.Parameter, x: Tensor, dy: Tensor) -> None:
    gradient = weight.grad
    if gradient is None:
        weight.grad = dy.T @ x
    elif gradient.dtype is dy.dtype:
        gradient.addmm_(dy.T, x)
    elif gradient.is_cuda:  # out_dtype: the product is not rounded to the dtype of x and dy
        torch.addmm(gradient, dy.T, x, out_dtype=gradient.dtype, out=gradient)
    else:
        accumulate(gradient, dy.T @ x)


@dataclass(frozen=True, slots=True)
class Started:
    """A collective in progress, and the tensor that its result will be in."""

    work: Any
    result: Tensor

    def wait(self) -> Tensor:
        """Return the result; on CUDA the current stream waits for it, else the host."""
        self.work.wait()
        return self.result


@dataclass(frozen=True, slots=True)
class SequenceSplit:
    """The communication of sequence parallelism (arXiv 2205.05198) over the ranks of `group`.

    Between linear layers each of n tensor-parallel ranks has a part of every sequence.
    """

    group: dist.ProcessGroup

    def gather(self, part: Tensor) -> Started:
        """Start the all-gather [s / n, b, h] -> [s, b, h]."""
        size = self.group.size()
        whole = part.new_empty((part.shape[0] * size, *part.shape[1:]))
        return Started(
            all_gather_single(whole, part.contiguous(), self.group, async_op=True), whole
        )

    def scatter(self, whole: Tensor) -> Started:
        """Start the reduce-scatter [s, b, h] -> [s / n, b, h]."""
        size = self.group.size()
        part = whole.new_empty((whole.shape[0] // size, *whole.shape[1:]))
        return Started(
            reduce_scatter_single(part, whole.contiguous(), self.group, async_op=True), part
        )


class _LinearFunction(torch.autograd.Function):
    """The product y = x W^T + b, whose backward hands dW to the store instead of autograd.

    `products` form y and dx.  dx is summed over `group` while dW is computed.  With `sequence`, x
    and dx are parts of sequences, and y and dy are whole.  The backward gathers x again for dW,
    while dx is computed, and scatters dx while dW is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: Tensor | None,
        store: WeightGradStore | LateInput,
        products: Products,
        group: dist.ProcessGroup | None,
        sequence: SequenceSplit | None,
    ) -> Tensor:
        ctx.save_for_backward(None if isinstance(store, LateInput) else x)
        ctx.weight, ctx.store, ctx.products = weight, store, products
        ctx.group, ctx.sequence = group, sequence
        return products.output(x if sequence is None else sequence.gather(x).wait(), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        (x,) = ctx.saved_tensors
        gathered = None if ctx.sequence is None else ctx.sequence.gather(x)
        dx, summed = ctx.products.input_gradient(dy, ctx.weight), None
        if gathered is not None:
            summed, x = ctx.sequence.scatter(dx), gathered.wait()
        elif ctx.group is not None:
            summed = Started(dist.all_reduce(dx, group=ctx.group, async_op=True), dx)
        if isinstance(ctx.store, LateInput):
            ctx.store.put(ctx.weight, dy.flatten(0, -2))
        else:
            ctx.store.put(ctx.weight, x.flatten(0, -2), dy.flatten(0, -2))
        # The gradient of the bias is a cheap sum, so it does not wait for W.
        dbias = dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return dx if summed is None else summed.wait(), None, dbias, None, None, None, None


class _StoredLinear(nn.Module):
    """A linear layer with the interface of megatron-core's: it returns (y, bias).

    The returned bias is None if y already contains it.  `split` is the slice of the weight that
    this tensor-parallel rank holds.
    """

    split: TensorSlice | None

    def __init__(
        self,
        input_size: int,
        output_size: int,
        config: Any,
        store: WeightGradStore,
        *,
        products: Products,
        bias: bool,
    ) -> None:
        super().__init__()
        self._store, self._products = store, products
        self.weight = nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        self.bias = (
            nn.Parameter(torch.empty(output_size, dtype=config.params_dtype)) if bias else None
        )


class ColumnLinear(_StoredLinear):
    """A linear layer whose output is split over the ranks of `tp_group`.

    The output consists of `parts` equal parts, such as gate and up.  A rank has a share of every
    part.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        store: WeightGradStore,
        products: Products = PLAIN,
        tp_group: dist.ProcessGroup,
        sequence: SequenceSplit | None = None,
        parts: int = 1,
        bias: bool = False,
        **_: object,
    ) -> None:
        super().__init__(
            input_size,
            output_size // tp_group.size(),
            config,
            store,
            products=products,
            bias=bias,
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
        """Return the slice of each parameter that is split."""
        return (
            {} if self.split is None else {name: self.split for name, _ in self.named_parameters()}
        )

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Map [s, b, in], or [s / n, b, in] with sequence parallelism, to [s, b, out / n]."""
        others = self._store, self._products, self._group, self._sequence
        y: Tensor = _LinearFunction.apply(x, self.weight, self.bias, *others)  # type: ignore[no-untyped-call]
        return y, None


class RowLinear(_StoredLinear):
    """A linear layer whose input is split over the ranks of `tp_group`; the bias is whole.

    `reduce` sums the outputs: an all-reduce, or a reduce-scatter with sequence parallelism.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        store: WeightGradStore,
        products: Products = PLAIN,
        tp_group: dist.ProcessGroup,
        reduce: Callable[[Tensor, dist.ProcessGroup], Tensor],
        bias: bool = False,
        skip_bias_add: bool = False,
        **_: object,
    ) -> None:
        super().__init__(
            input_size // tp_group.size(),
            output_size,
            config,
            store,
            products=products,
            bias=bias,
        )
        self._reduce, self._skip_bias_add = reduce, skip_bias_add
        self._group = tp_group if tp_group.size() > 1 else None
        self.split = (
            None
            if self._group is None
            else TensorSlice.even(1, input_size, tp_group.rank(), tp_group.size())
        )

    @property
    def splits(self) -> dict[str, TensorSlice]:
        """Return the slice of each parameter that is split."""
        return {} if self.split is None else {"weight": self.split}

    def forward(self, x: Tensor, late: LateInput | None = None) -> tuple[Tensor, Tensor | None]:
        """Map [s, b, in / n] to [s, b, out], or to [s / n, b, out] with sequence parallelism.

        With `late` x is not kept for the weight gradient; whoever formed it forms it again.
        """
        # A bias must be added once, to the sum.
        own, to_sum = (self.bias, None) if self._group is None else (None, self.bias)
        y: Tensor = _LinearFunction.apply(  # type: ignore[no-untyped-call]
            x, self.weight, own, late or self._store, self._products, None, None
        )
        if self._group is not None:
            y = self._reduce(y, self._group)
        if to_sum is None or self._skip_bias_add:
            return y, to_sum
        return y + to_sum, None
