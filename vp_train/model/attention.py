"""Causal attention where torch's own kernels do not do: softcapped scores and sliding windows.

By blocks of queries, each against the keys it can see; the backward forms the scores of a block again.  So q, k and v are all
that is kept, and a window costs its own size per query.  Products are in the dtype of q, the softmax in float32 at least.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Rule:
    """Scores are scale * q k, and with `softcap` c then c tanh(scores / c); a query sees the last `window` tokens, or all."""

    scale: float
    softcap: float | None
    window: int | None

    def blocks(self, num_tokens: int) -> Iterator[tuple[slice, slice]]:
        """Queries, and the keys that any of them sees."""
        for start in range(0, num_tokens, _BLOCK):
            stop = min(num_tokens, start + _BLOCK)
            yield slice(start, stop), slice(0 if self.window is None else max(0, start - self.window + 1), stop)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, num_before: int) -> Tensor:
        """q [n, b, heads, d], k and v [t, b, groups, d] -> [n, b, heads * d]; `num_before` keys precede the first query."""
        (n, b, heads, d), (t, _, groups, _) = q.shape, k.shape
        rows = q.view(n, b, groups, -1, d).permute(1, 2, 3, 0, 4).reshape(b, groups, -1, d)  # heads of a group share its keys
        scores = (rows @ k.permute(1, 2, 3, 0)).to(torch.promote_types(q.dtype, torch.float32)) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        hidden = self._hidden(n, t, num_before, q.device)
        weights = scores.view(b, groups, -1, n, t).masked_fill(hidden, -torch.inf).softmax(-1).to(v.dtype)
        context = weights.view(b, groups, -1, t) @ v.permute(1, 2, 0, 3)
        return context.view(b, groups, -1, n, d).permute(3, 0, 1, 2, 4).reshape(n, b, heads * d)

    def _hidden(self, num_queries: int, num_keys: int, num_before: int, device: torch.device) -> Tensor:
        """[queries, keys]: which keys a query does not see."""
        queries = torch.arange(num_before, num_before + num_queries, device=device)[:, None]
        keys = torch.arange(num_keys, device=device)
        hidden = keys > queries
        return hidden if self.window is None else hidden | (keys <= queries - self.window)


def block_attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """q [s, b, heads, d], k and v [s, b, groups, d] -> [s, b, heads * d]."""
    context: Tensor = _BlockAttention.apply(q, k, v, rule)  # type: ignore[no-untyped-call]
    return context


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.rule = rule
        blocks = [rule.attend(q[here], k[seen], v[seen], here.start - seen.start) for here, seen in rule.blocks(len(q))]
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
