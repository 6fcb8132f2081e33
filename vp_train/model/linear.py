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
from vp_train.tensors.pending import Issued
from vp_train.tensors.precision import accumulate, column_sums, statistics_dtype
from vp_train.tensors.slices import TensorSlice

_Product = tuple[nn.Parameter, Tensor, Tensor]


class LinearProducts(Protocol):
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


PLAIN: LinearProducts = PlainProducts()


class WeightGradStore:
    """The weight-gradient products of one stage.

    A product is computed at once, unless the backward runs inside `deferring`.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, list[_Product]] = {}
        self._current: list[_Product] | None = None
        self._reached: Callable[[nn.Parameter], None] | None = None
        self._computed: Callable[[nn.Parameter], None] | None = None

    @contextmanager
    def watching(
        self,
        *,
        reached: Callable[[nn.Parameter], None],
        computed: Callable[[nn.Parameter], None],
    ) -> Iterator[None]:
        """Within this context announce what a backward or `drain` does.

        A backward calls `reached(weight)` when it enters the layer of a weight, and `drain` calls
        `computed(weight)` after each product it has added.
        """
        self._reached, self._computed = reached, computed
        try:
            yield
        finally:
            self._reached = self._computed = None

    def reach(self, weight: nn.Parameter) -> None:
        """Note that a backward enters the layer of `weight`."""
        if self._reached is not None:
            self._reached(weight)

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

    @torch.no_grad()  # autograd would record a graph that keeps x and dy
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
    """Takes the place of the store in a call of a linear layer whose input is formed again.

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


def add_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Add `gradient` to parameter.grad, maybe of another dtype, within a backward.

    Autograd would first cast it to the parameter's dtype, and would take a node of the graph for
    it.
    """
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad.add_(gradient)


def _add_bias_gradient(bias: Tensor, dy: Tensor) -> None:
    """Add the sum over the tokens of dy [T, out] to bias.grad [out]."""
    add_gradient(bias, column_sums(dy, statistics_dtype(dy.dtype)))


class _BiasFunction(torch.autograd.Function):
    """The sum x + b, whose backward adds to b.grad what autograd would first round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.bias = bias
        return x + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        _add_bias_gradient(ctx.bias, dy)
        return dy, None


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """Return x + b for x [T, out] and b [out]."""
    y: Tensor = _BiasFunction.apply(x, bias)  # type: ignore[no-untyped-call]
    return y


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
class SequenceSplit:
    """The communication of sequence parallelism (arXiv 2205.05198) over the ranks of `group`.

    Between linear layers each of n tensor-parallel ranks has a part of every sequence.
    """

    group: dist.ProcessGroup

    def gather(self, part: Tensor) -> Issued:
        """Start the all-gather [s / n, ..] -> [s, ..]; a dimension [s * b] is one too."""
        size = self.group.size()
        whole = part.new_empty((part.shape[0] * size, *part.shape[1:]))
        return Issued(all_gather_single(whole, part.contiguous(), self.group, async_op=True), whole)

    def scatter(self, whole: Tensor) -> Issued:
        """Start the reduce-scatter [s, ..] -> [s / n, ..]."""
        size = self.group.size()
        part = whole.new_empty((whole.shape[0] // size, *whole.shape[1:]))
        return Issued(
            reduce_scatter_single(part, whole.contiguous(), self.group, async_op=True), part
        )


@dataclass(frozen=True, slots=True)
class LinearRule:
    """How a linear layer is computed.

    store: takes its weight gradient.
    products: form y and dx.
    group: the ranks over which dx is summed, None if it is not.
    sequence: splits x and dx, but not y and dy; None for whole sequences.
    """

    store: WeightGradStore
    products: LinearProducts = PLAIN
    group: dist.ProcessGroup | None = None
    sequence: SequenceSplit | None = None


class Epilogue(Protocol):
    """Elementwise work on the output y of a linear layer.

    It says what the layer keeps of y for the backward.
    """

    def forward(self, y: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
        """Return a tensor or a tuple of tensors, and what to keep for the backward."""
        ...

    def backward(self, grads: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> Tensor:
        """Return dL/dy for the gradients of what `forward` has returned first."""
        ...


class _LinearFunction(torch.autograd.Function):
    """The product y = x W^T + b, whose backward hands dW to the store instead of autograd.

    dx is summed over the group while dW is computed.  With a split sequence the backward gathers x
    again for dW, while dx is computed, and scatters dx while dW is.  With `late` x is not kept.
    An `epilogue` belongs to the same function because every function takes the host some 20 us.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        rule: LinearRule,
        epilogue: Epilogue | None,
        late: LateInput | None,
    ) -> Any:
        ctx.weight, ctx.bias, ctx.rule, ctx.epilogue, ctx.late = weight, bias, rule, epilogue, late
        whole = x if rule.sequence is None else rule.sequence.gather(x).wait()
        y: Any = rule.products.output(whole, weight, bias)
        kept: tuple[Tensor, ...] = ()
        if epilogue is not None:
            y, kept = epilogue.forward(y)
        ctx.save_for_backward(x if late is None else None, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, rule, late = ctx.weight, ctx.rule, ctx.late
        rule.store.reach(weight)
        x, *kept = ctx.saved_tensors
        dy = grads[0] if ctx.epilogue is None else ctx.epilogue.backward(grads, kept)
        rows = dy.flatten(0, -2)
        gathered = None if rule.sequence is None else rule.sequence.gather(x)
        dx, summed = rule.products.input_gradient(dy, weight), None
        if gathered is not None:
            summed, x = rule.sequence.scatter(dx), gathered.wait()
        elif rule.group is not None:
            summed = Issued(dist.all_reduce(dx, group=rule.group, async_op=True), dx)
        if late is None:
            rule.store.put(weight, x.flatten(0, -2), rows)
        else:
            late.put(weight, rows)
        if ctx.bias is not None:  # a cheap sum, so it does not wait for W
            _add_bias_gradient(ctx.bias, rows)
        return dx if summed is None else summed.wait(), None, None, None, None, None


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
        rule: LinearRule,
        *,
        bias: bool,
    ) -> None:
        super().__init__()
        self._rule = rule
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
        products: LinearProducts = PLAIN,
        tp_group: dist.ProcessGroup,
        sequence: SequenceSplit | None = None,
        parts: int = 1,
        bias: bool = False,
        **_: object,
    ) -> None:
        group = tp_group if tp_group.size() > 1 else None
        rule = LinearRule(store, products, group, sequence)
        super().__init__(input_size, output_size // tp_group.size(), config, rule, bias=bias)
        self.split = (
            None
            if group is None
            else TensorSlice.even(0, output_size, tp_group.rank(), tp_group.size(), parts)
        )

    @property
    def splits(self) -> dict[str, TensorSlice]:
        """Return the slice of each parameter that is split."""
        return (
            {} if self.split is None else {name: self.split for name, _ in self.named_parameters()}
        )

    def forward(self, x: Tensor, epilogue: Epilogue | None = None) -> tuple[Any, None]:
        """Map [T, in], or [T / n, in] with sequence parallelism, to [T, out / n].

        With an `epilogue` return what it makes of that.
        """
        y = _LinearFunction.apply(x, self.weight, self.bias, self._rule, epilogue, None)  # type: ignore[no-untyped-call]
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
        products: LinearProducts = PLAIN,
        tp_group: dist.ProcessGroup,
        reduce: Callable[[Tensor, dist.ProcessGroup], Tensor],
        bias: bool = False,
        skip_bias_add: bool = False,
        **_: object,
    ) -> None:
        rule = LinearRule(store, products)
        super().__init__(input_size // tp_group.size(), output_size, config, rule, bias=bias)
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
        """Map [T, in / n] to [T, out], or to [T / n, out] with sequence parallelism.

        With `late` x is not kept for the weight gradient; whoever formed it forms it again.
        """
        # A bias must be added once, to the sum.
        own, to_sum = (self.bias, None) if self._group is None else (None, self.bias)
        y: Tensor = _LinearFunction.apply(x, self.weight, own, self._rule, None, late)  # type: ignore[no-untyped-call]
        if self._group is not None:
            y = self._reduce(y, self._group)
        if to_sum is None or self._skip_bias_add:
            return y, to_sum
        return add_bias(y, to_sum), None
