"""Causal attention for the cases that torch's scaled_dot_product_attention does not support.

Softcapped scores and sliding windows: `block_attention` computes blocks of queries, each against
the keys it can see.  The backward computes the scores of a block again.  So only q, k and v are
kept, and the cost per query is the size of the window.  Products are in the dtype of q, the softmax
in float32 at least.

Packed documents on CUDA: `attend_documents` uses torch's variable-length attention.  With one call
per document cuDNN would make a plan for every new length, which takes 70 to 160 ms of host time on
an H100.  It knows windows, but no softcaps.

Everything else on CUDA: `attend_flexibly` uses torch's FlexAttention, one kernel for all rules with
the same softcap.  In each of them a query sees the keys from one on up to its own, and that first
key is data of the kernel.  So windows, and documents of other lengths, need no new kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from vp_train.tensors.compiling import compiled_as_called, compiles_on
from vp_train.tensors.streams import to_device

_BLOCK = 256  # queries
_MASK_BLOCK = 128  # queries, and keys, of a block of FlexAttention's mask
_LEAST_HEAD_SIZE, _MOST_HEAD_SIZE = 16, 256  # that the kernels on CUDA support


@dataclass(frozen=True, slots=True)
class Documents:
    """The n documents of a microbatch, in the order of its sequences.

    lengths: the number of tokens of each document.
    bounds: where each document begins, and where the last one ends: int32 [n + 1] on CUDA, None
        elsewhere.
    """

    lengths: tuple[int, ...]
    bounds: Tensor | None
    _masks: dict[int | None, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def on(cls, device: torch.device, lengths: tuple[int, ...]) -> Documents:
        """Return documents of `lengths` for attention on `device`, without waiting for it."""
        if device.type != "cuda":
            return cls(lengths, None)
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return cls(lengths, to_device(bounds, device))

    def mask(self, window: int | None) -> Any:
        """Return the mask of FlexAttention for these documents and a window, made once."""
        if window not in self._masks:
            assert self.bounds is not None
            self._masks[window] = block_mask(first_keys(self.bounds, sum(self.lengths), window))
        return self._masks[window]


@lru_cache(maxsize=16)  # of sizes of microbatches, which are few
def whole_sequences(device: torch.device, num_sequences: int, length: int) -> Documents:
    """Return sequences of one document each for attention on `device`."""
    return Documents.on(device, (length,) * num_sequences)


def first_keys(bounds: Tensor, num_tokens: int, window: int | None) -> Tensor:
    """Return the first key that each query sees: int32 [num_tokens].  It never falls.

    bounds: as in `Documents`.
    """
    starts = torch.repeat_interleave(bounds[:-1], bounds.diff(), output_size=num_tokens)
    if window is None:
        return starts
    index = torch.arange(num_tokens, dtype=torch.int32, device=bounds.device)
    return torch.maximum(starts, index - (window - 1))


def block_mask(first: Tensor) -> Any:
    """Return the mask of FlexAttention in which query i sees the keys [first[i], i].

    first: int32 [T], which never falls.

    Of the blocks of keys that a block of queries sees, those that all its queries see as a whole
    need no mask.  They follow each other, as do those before them, which are seen in part.  The
    last block is its own, the diagonal one, which is always seen in part.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_tokens, size = len(first), _MASK_BLOCK
    own = torch.arange(-(-num_tokens // size), dtype=torch.int32, device=first.device)
    begin = first[::size] // size
    last_query = ((own + 1) * size - 1).clamp(max=num_tokens - 1)
    whole = torch.minimum((first[last_query] + size - 1) // size, own)
    in_part = begin[:, None] + own
    blocks = torch.where(in_part < whole[:, None], in_part, own[:, None])
    whole_blocks = (whole[:, None] + own).clamp(max=len(own) - 1)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[query])

    return BlockMask.from_kv_blocks(
        (whole - begin + 1)[None, None],
        blocks[None, None],
        (own - whole)[None, None],
        whole_blocks[None, None],
        BLOCK_SIZE=size,
        mask_mod=seen,
        seq_lengths=(num_tokens, num_tokens),
    )


def attend_flexibly(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, rule: Rule
) -> Tensor | None:
    """Attend within each document: q [T, heads, d], k and v [T, groups, d] -> [T, heads * d].

    Returns None where there is no kernel: on a CPU, on a GPU older than Ampere or without Triton,
    in float64, and for heads of less than 16 or more than 256 values.
    """
    if documents.bounds is None or not _suits_flexible(q):
        return None
    heads = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    context: Tensor = _flex_attention()(
        *heads,
        score_mod=None if rule.softcap is None else _capped(rule.softcap),
        block_mask=documents.mask(rule.window),
        scale=rule.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return context[0].transpose(0, 1).flatten(1)


def _suits_flexible(q: Tensor) -> bool:
    """Return whether a compiled FlexAttention takes q: dtype, head size and GPU."""
    if q.dtype is torch.float64 or not _LEAST_HEAD_SIZE <= q.shape[-1] <= _MOST_HEAD_SIZE:
        return False
    on_cuda = q.is_cuda and compiles_on(q.device)
    return on_cuda and torch.cuda.get_device_capability(q.device) >= (8, 0)


@cache
def _flex_attention() -> Callable[..., Any]:
    """Return torch's FlexAttention, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    return compiled_as_called(flex_attention)


@cache
def _capped(softcap: float) -> Callable[..., Tensor]:
    """Return the function of FlexAttention that caps a score; one, or it would be compiled anew."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def attend_documents(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, scale: float, window: int | None
) -> Tensor | None:
    """Attend within each document: q [T, heads, d], k and v [T, groups, d] -> [T, heads * d].

    `window` is that of `Rule`.  Returns None where torch has no kernel: on a CPU or a GPU older
    than Ampere, for dtypes of more than 16 bits, and for heads of more than 256 values or of a
    number that 8 does not divide.
    """
    attend = _variable_length_attention()
    if documents.bounds is None or attend is None or not _suits_flash(q):
        return None
    longest, bounds = max(documents.lengths), documents.bounds
    left = -1 if window is None else window - 1
    context: Tensor = attend(
        q, k, v, bounds, bounds, longest, longest, scale=scale, window_size=(left, 0)
    )
    return context.flatten(1)


def _suits_flash(q: Tensor) -> bool:
    """Return whether flash attention takes q, backward too: dtype, head size and GPU."""
    size = q.shape[-1]
    if q.dtype not in (torch.bfloat16, torch.float16) or size > _MOST_HEAD_SIZE or size % 8:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


@cache
def _variable_length_attention() -> Callable[..., Any] | None:
    """Return torch's variable-length attention, None if it accepts no scale or no window."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    takes = inspect.signature(varlen_attn).parameters
    if "scale" not in takes or "window_size" not in takes:
        return None
    return partial(varlen_attn, enable_gqa=True) if "enable_gqa" in takes else varlen_attn


@dataclass(frozen=True, slots=True)
class Rule:
    """The rule by which attention computes and masks scores.

    Scores are scale * q k, and with a `softcap` c then c tanh(scores / c).  A query sees the last
    `window` tokens including itself, or all earlier ones if `window` is None.
    """

    scale: float
    softcap: float | None
    window: int | None

    def blocks(self, num_tokens: int) -> Iterator[tuple[slice, slice]]:
        """Yield blocks of queries, each with the range of keys that any of them sees."""
        for start in range(0, num_tokens, _BLOCK):
            stop = min(num_tokens, start + _BLOCK)
            yield (
                slice(start, stop),
                slice(0 if self.window is None else max(0, start - self.window + 1), stop),
            )

    def attend(self, q: Tensor, k: Tensor, v: Tensor, num_before: int) -> Tensor:
        """Attend: q [n, b, heads, d], k and v [t, b, groups, d] -> [n, b, heads * d].

        `num_before` keys precede the first query.
        """
        (n, b, heads, d), (t, _, groups, _) = q.shape, k.shape
        # The heads of a group share its keys, so one product takes them all.
        rows = q.view(n, b, groups, -1, d).permute(1, 2, 3, 0, 4).reshape(b, groups, -1, d)
        scores = (rows @ k.permute(1, 2, 3, 0)).to(
            torch.promote_types(q.dtype, torch.float32)
        ) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        hidden = self._hidden(n, t, num_before, q.device)
        weights = (
            scores.view(b, groups, -1, n, t).masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
        )
        context = weights.view(b, groups, -1, t) @ v.permute(1, 2, 0, 3)
        return context.view(b, groups, -1, n, d).permute(3, 0, 1, 2, 4).reshape(n, b, heads * d)

    def _hidden(
        self, num_queries: int, num_keys: int, num_before: int, device: torch.device
    ) -> Tensor:
        """Return which keys a query does not see: bool [queries, keys]."""
        queries = torch.arange(num_before, num_before + num_queries, device=device)[:, None]
        keys = torch.arange(num_keys, device=device)
        hidden = keys > queries
        return hidden if self.window is None else hidden | (keys <= queries - self.window)


def block_attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """Attend by blocks: q [s, b, heads, d], k and v [s, b, groups, d] -> [s, b, heads * d]."""
    context: Tensor = _BlockAttention.apply(q, k, v, rule)  # type: ignore[no-untyped-call]
    return context


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.rule = rule
        blocks = [
            rule.attend(q[here], k[seen], v[seen], here.start - seen.start)
            for here, seen in rule.blocks(len(q))
        ]
        return torch.cat(blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (dy,) = grads
        q, k, v = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for here, seen in ctx.rule.blocks(len(q)):
            leaves = [part.detach().requires_grad_() for part in (q[here], k[seen], v[seen])]
            with torch.enable_grad():
                y = ctx.rule.attend(*leaves, here.start - seen.start)
            dq[here], of_k, of_v = torch.autograd.grad(y, leaves, dy[here])
            dk[seen] += of_k
            dv[seen] += of_v
        return dq, dk, dv, None
