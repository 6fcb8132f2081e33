"""The operations of `rows` as Triton kernels for CUDA.  The only importer of triton.

Each is one launch.  `rows` says what they compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

_PER_THREAD = 64  # values of a row per thread, at most
_HIDDEN_BLOCK = 1_024  # hidden values of a row per program
_TOKEN_BLOCK = 128  # tokens per program of `combine`
_WARM_CALLS, _TIMED_CALLS = 2, 10  # of each entry of a table
_GAIN = 0.95  # a faster entry than the usual one must gain this much, so that noise decides nothing


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _extend(  # type: ignore[no-untyped-def]
    logits,
    out,
    running,
    references,
    row_of_token,
    logits_stride,
    out_stride,
    start,
    num_tokens,
    num_columns,
    softcap,
    slack,
    capped: tl.constexpr,
    first: tl.constexpr,
    updates: tl.constexpr,
    writes: tl.constexpr,
    block: tl.constexpr,
):
    """Run `rows.extend` with one program per token, which has the whole row in its registers."""
    token = tl.program_id(0)
    row = logits + token.to(tl.int64) * logits_stride
    columns = tl.arange(0, block)
    inside = columns < num_columns
    if updates:
        column = tl.load(row_of_token + token) - start
        among = (column >= 0) & (column < num_columns)
        target = tl.load(row + column, mask=among, other=0.0).to(tl.float32)
    z = tl.load(row + columns, mask=inside, other=float("-inf")).to(tl.float32)
    if updates:
        largest = tl.max(z, 0)
        if capped:
            largest = softcap * _tanh(largest / softcap)  # tanh grows with its argument
        if first:
            reference = largest
        else:
            before = tl.load(running + token)
            reference = tl.where(largest > before + slack, largest, before)
    else:
        reference = tl.load(running + token)
    if capped:
        ratio = _tanh(z / softcap)
        exponential = tl.where(inside, tl.exp(softcap * ratio - reference), 0.0)
        written = exponential * (1 - ratio * ratio)
    else:
        exponential = tl.exp(z - reference)
        written = exponential
    if writes:
        place = out + token.to(tl.int64) * out_stride + columns
        tl.store(place, written.to(out.dtype.element_ty), mask=inside)
    if updates:
        total = tl.sum(exponential, 0)
        if not first:
            total += tl.load(running + num_tokens + token) * tl.exp(before - reference)
            target = tl.where(among, target, tl.load(running + 2 * num_tokens + token))
        tl.store(running + token, reference)
        tl.store(running + num_tokens + token, total)
        tl.store(running + 2 * num_tokens + token, target)
        tl.store(references + token, reference)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _tanh(value):  # type: ignore[no-untyped-def]
    return 2 * tl.sigmoid(2 * value) - 1


def extend(
    logits: Tensor,
    out: Tensor | None,
    running: Tensor,
    references: Tensor | None,
    row_of_token: Tensor,
    start: int,
    softcap: float | None,
    slack: float,
    num_warps: int | None,
) -> None:
    """Do what `rows.extend` does for fp32 statistics; `num_warps` is one of `warps_of`."""
    num_tokens, num_columns = logits.shape
    if num_tokens:
        with _gpu_of(logits):
            _extend[(num_tokens,)](
                logits,
                logits if out is None else out,
                running,
                running if references is None else references,
                row_of_token,
                logits.stride(0),
                0 if out is None else out.stride(0),
                start,
                num_tokens,
                num_columns,
                softcap or 1.0,
                slack,
                capped=softcap is not None,
                first=start == 0,
                updates=references is not None,
                writes=out is not None,
                block=_block_of(num_columns),
                num_warps=num_warps or warps_of(num_columns)[0],
            )


def warps_of(num_columns: int) -> Sequence[int]:
    """Return the numbers of warps that `extend` may use for a row, the usual one first."""
    usual = min(32, max(4, _block_of(num_columns) // (32 * 16)))
    least = max(1, _block_of(num_columns) // (32 * _PER_THREAD))
    return [usual, *(n for n in (usual // 2, usual * 2) if least <= n <= 32)]


def fastest_warps(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> int | None:
    """Do what `rows.fastest_warps` does: time `extend` with every entry of the table."""
    table = warps_of(shape[1])
    logits = torch.zeros(shape, device=device)
    out = torch.empty(shape, dtype=dtype, device=device)
    running = torch.zeros(3, shape[0], device=device)
    row_of_token = torch.full(shape[:1], -1, device=device)

    def milliseconds(num_warps: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        for call in range(_WARM_CALLS + _TIMED_CALLS):
            if call == _WARM_CALLS:
                begin.record()
            extend(logits, out, running, running[0], row_of_token, 16, None, 1.0, num_warps)
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    times = {num_warps: milliseconds(num_warps) for num_warps in table}
    best = min(table, key=times.__getitem__)
    return best if times[best] < _GAIN * times[table[0]] else None


def _block_of(num_columns: int) -> int:
    return max(16, int(triton.next_power_of_2(num_columns)))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _relate(  # type: ignore[no-untyped-def]
    values, references, stride, num_tokens, size, last, block: tl.constexpr
):
    """Run `rows.relate` with one program per token and chunk, which mostly has nothing to do."""
    token, chunk = tl.program_id(0), tl.program_id(1)
    own = tl.load(references + chunk * num_tokens + token)
    reference = tl.load(references + last * num_tokens + token)
    if own != reference:
        factor = tl.exp(own - reference)
        place = values + token.to(tl.int64) * stride + chunk * size
        column = 0
        # Not `range`: Triton 3.6's interpreter does not accept one that ends at an argument.
        while column < size:
            columns = column + tl.arange(0, block)
            value = tl.load(place + columns, mask=columns < size).to(tl.float32) * factor
            tl.store(place + columns, value.to(values.dtype.element_ty), mask=columns < size)
            column += block


def relate(values: Tensor, references: Tensor, size: int) -> None:
    """Do what `rows.relate` does for fp32 references."""
    last, num_tokens = len(references) - 1, len(values)
    if last > 0 and num_tokens:
        block = min(_HIDDEN_BLOCK, triton.next_power_of_2(size))
        with _gpu_of(values):
            _relate[(num_tokens, last)](
                values, references, values.stride(0), num_tokens, size, last, block=block
            )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _combine(  # type: ignore[no-untyped-def]
    gathered, ignored, lse, loss, num_shards, num_tokens, z_loss, block: tl.constexpr
):
    """Run `rows.combine` with one program per block of tokens."""
    tokens = tl.program_id(0) * block + tl.arange(0, block)
    inside = tokens < num_tokens
    maximum = tl.full([block], float("-inf"), tl.float32)
    shard = 0
    while shard < num_shards:
        place = gathered + shard * 3 * num_tokens + tokens
        maximum = tl.maximum(maximum, tl.load(place, mask=inside, other=0.0))
        shard += 1
    total = tl.zeros([block], tl.float32)
    target = tl.zeros([block], tl.float32)
    shard = 0
    while shard < num_shards:
        place = gathered + shard * 3 * num_tokens + tokens
        scale = tl.exp(tl.load(place, mask=inside, other=0.0) - maximum)
        total += tl.load(place + num_tokens, mask=inside, other=1.0) * scale
        target += tl.load(place + 2 * num_tokens, mask=inside, other=0.0)
        shard += 1
    value = maximum + tl.log(total)
    tl.store(lse + tokens, value, mask=inside)
    value = value - target + z_loss * value * value
    counts = tl.load(ignored + tokens, mask=inside, other=1) == 0
    tl.store(loss + tokens, tl.where(counts, value, 0.0), mask=inside)


def combine(gathered: Tensor, ignored: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Do what `rows.combine` does for fp32 statistics."""
    assert gathered.is_contiguous()
    num_shards, _, num_tokens = gathered.shape
    lse, loss = gathered.new_empty(2, num_tokens)
    if num_tokens:
        with _gpu_of(gathered):
            _combine[(triton.cdiv(num_tokens, _TOKEN_BLOCK),)](
                gathered,
                ignored.view(torch.uint8),
                lse,
                loss,
                num_shards,
                num_tokens,
                z_loss,
                block=_TOKEN_BLOCK,
            )
    return lse, loss


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _softmax_factor(references, lses, token, z_loss):  # type: ignore[no-untyped-def]
    lse = tl.load(lses + token)
    return tl.exp(tl.load(references + token) - lse) * (1 + 2 * z_loss * lse)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _input_term(  # type: ignore[no-untyped-def]
    product,
    out,
    references,
    lses,
    weight,
    row_of_token,
    target_scales,
    shared,
    gains,
    hidden,
    target_scale,
    z_loss,
    has_scales: tl.constexpr,
    has_shared: tl.constexpr,
    has_gain: tl.constexpr,
    block: tl.constexpr,
):
    """Run `rows.input_term` with one program per token and block of hidden values."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < hidden
    place = token.to(tl.int64) * hidden + columns
    factor = _softmax_factor(references, lses, token, z_loss)
    value = tl.load(product + place, mask=inside).to(tl.float32) * factor
    row = tl.load(row_of_token + token)
    if row >= 0:
        scale = tl.load(target_scales + token) if has_scales else target_scale
        value -= scale * tl.load(weight + row * hidden + columns, mask=inside).to(tl.float32)
    if has_shared:
        value -= tl.load(shared + columns, mask=inside)
    if has_gain:
        value *= tl.load(gains + token)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def input_term(
    product: Tensor,
    out: Tensor,
    reference: Tensor,
    lse: Tensor,
    weight: Tensor,
    row_of_token: Tensor,
    target_scale: Tensor | float,
    z_loss: float,
    shared: Tensor | None,
    gain: Tensor | None,
) -> None:
    """Do what `rows.input_term` does, for contiguous tensors; write it into `out`."""
    assert all(tensor.is_contiguous() for tensor in (product, out, weight))
    num_tokens, hidden = product.shape
    scales = target_scale if isinstance(target_scale, Tensor) else None
    if num_tokens:
        grid, block = _grid(num_tokens, hidden)
        with _gpu_of(product):
            _input_term[grid](
                product,
                out,
                reference,
                lse,
                weight,
                row_of_token,
                lse if scales is None else scales,
                lse if shared is None else shared,
                lse if gain is None else gain,
                hidden,
                1.0 if isinstance(target_scale, Tensor) else target_scale,
                z_loss,
                has_scales=scales is not None,
                has_shared=shared is not None,
                has_gain=gain is not None,
                block=block,
            )


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _scale(  # type: ignore[no-untyped-def]
    x,
    out,
    factors,
    references,
    lses,
    hidden,
    z_loss,
    has_reference: tl.constexpr,
    block: tl.constexpr,
):
    """Run `rows.scale` with one program per token and block of hidden values."""
    token = tl.program_id(0)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < hidden
    place = token.to(tl.int64) * hidden + columns
    factor = tl.load(factors + token)
    if has_reference:
        factor *= _softmax_factor(references, lses, token, z_loss)
    value = tl.load(x + place, mask=inside).to(tl.float32) * factor
    tl.store(out + place, value.to(out.dtype.element_ty), mask=inside)


def scale(
    x: Tensor,
    factor: Tensor,
    out: Tensor,
    reference: Tensor | None,
    lse: Tensor | None,
    z_loss: float,
) -> None:
    """Do what `rows.scale` does for fp32 factors and contiguous tensors."""
    assert x.is_contiguous()
    assert out.is_contiguous()
    if len(x):
        grid, block = _grid(*x.shape)
        with _gpu_of(x):
            _scale[grid](
                x,
                out,
                factor,
                factor if reference is None else reference,
                factor if lse is None else lse,
                x.shape[1],
                z_loss,
                has_reference=reference is not None,
                block=block,
            )


# The owned tokens of a microbatch begin anywhere in those of the step.
@triton.jit(do_not_specialize_on_alignment=["positions", "rows"])  # type: ignore[untyped-decorator, unused-ignore]
def _subtract_targets(  # type: ignore[no-untyped-def]
    grad,
    x,
    positions,
    rows,
    factors,
    target_scales,
    hidden,
    target_scale,
    has_scales: tl.constexpr,
    block: tl.constexpr,
):
    """Run `rows.subtract_targets` with one program per owned token and block of hidden values."""
    index = tl.program_id(0)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    inside = columns < hidden
    token = tl.load(positions + index)
    scale = tl.load(target_scales + token) if has_scales else target_scale
    factor = -scale * tl.load(factors + token)
    value = tl.load(x + token * hidden + columns, mask=inside, other=0.0).to(tl.float32) * factor
    place = grad + tl.load(rows + index) * hidden + columns
    tl.atomic_add(place, value, mask=inside, sem="relaxed")


def subtract_targets(
    grad: Tensor,
    x: Tensor,
    positions: Tensor,
    rows: Tensor,
    factor: Tensor,
    target_scale: Tensor | float,
) -> None:
    """Do what `rows.subtract_targets` does for a contiguous fp32 gradient."""
    assert grad.is_contiguous()
    assert x.is_contiguous()
    scales = target_scale if isinstance(target_scale, Tensor) else None
    if len(positions):
        grid, block = _grid(len(positions), x.shape[1])
        with _gpu_of(grad):
            _subtract_targets[grid](
                grad,
                x,
                positions,
                rows,
                factor,
                factor if scales is None else scales,
                x.shape[1],
                1.0 if isinstance(target_scale, Tensor) else target_scale,
                has_scales=scales is not None,
                block=block,
            )


def _gpu_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Return a context in which the GPU of `tensor` is current: Triton launches on that one.

    A thread beside the passes has GPU 0, whatever the rank.
    """
    if not tensor.is_cuda:  # Triton's interpreter
        return nullcontext()
    guard: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return guard


def _grid(num_rows: int, hidden: int) -> tuple[tuple[int, int], int]:
    """Return the grid, a program per row and block of hidden values, and the size of a block."""
    block = min(_HIDDEN_BLOCK, triton.next_power_of_2(hidden))
    return (num_rows, triton.cdiv(hidden, block)), block
