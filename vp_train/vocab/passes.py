"""What passes S and T of one shard are, whatever computes them.

T tokens, H hidden, R rows of the shard.  The logits are z = x W^T [T, R], or c tanh(x W^T / c) with
a softcap c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vp_train.vocab.shard import Owned

_LARGEST = 2.0**15  # float16 holds this much


@dataclass(frozen=True, slots=True)
class Softmax:
    """The part of the softmax that one shard computes, all in the statistics dtype.

    reference: [T], what exponentials are relative to: about the largest logit of this shard's rows.
    total: sum exp(z - reference) [T].
    target_logit: z at the target [T], 0 where this shard does not own the target.
    input_term: P W [T, H] with P = exp(z - reference) dz / d(x W^T), None unless requested.
    """

    reference: Tensor
    total: Tensor
    target_logit: Tensor
    input_term: Tensor | None


@dataclass(frozen=True, slots=True)
class Product:
    """P W [T, H] in the statistics dtype, for P relative to `reference` [T]; None is lse itself."""

    values: Tensor
    reference: Tensor | None


class Backend(Protocol):
    """The two passes over `weight` [R, H], with `grad` [R, H] accumulated in place."""

    def prepare(self, num_tokens: int) -> None:
        """Prepare for microbatches of so many tokens, before a step; this may wait for a device."""
        ...

    def s(self, x: Tensor, owned: Owned, *, input_term: bool, keep: bool) -> tuple[Softmax, object]:
        """Return the softmax of x [T, H], and with `keep` the state that `t` needs."""
        ...

    def t(
        self,
        held: object,
        x: Tensor,
        lse: Tensor,
        grad_loss: Tensor,
        *,
        z_loss: float,
        input_term: bool,
    ) -> Product | None:
        """Add (P grad_loss (1 + 2 z_loss lse))^T x to `grad`; return P W if `input_term`.

        P = exp(z - lse) dz / d(x W^T); `lse` and `grad_loss` are [T].  `held` comes from `s` and
        can be used only once.
        """
        ...

    def held_bytes(self, held: object) -> int:
        """Return the bytes of `held`."""
        ...


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def lifted(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return `scale` [T] times a power of two, and the inverse of that power [].

    x * scale would underflow in float16.  The power makes it as large as a sum over T rows in
    float16 allows, for factors of at most 1, such as P of `Chunked`.  A sum in fp32 allows any P.
    """
    if not len(x):
        return scale, None
    largest = len(x) * (x.abs().amax(-1) * scale.abs()).max()
    exponent = torch.log2(_LARGEST / largest).floor().clamp_max(64)
    exponent = torch.where((largest > 0) & largest.isfinite(), exponent, 0.0)
    return scale * torch.exp2(exponent), torch.exp2(-exponent)
