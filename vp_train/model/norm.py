"""The norms of a decoder: torch's own, and the RMSNorm whose weights are centred at zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from vp_train.config import ModelConfig


class ZeroCentredRMSNorm(nn.Module):
    """The norm x / rms(x) * (1 + weight) of Gemma: weight decay pulls it towards the identity."""

    def __init__(
        self,
        hidden_size: int,
        eps: float,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        **_: object,  # megatron-core passes its own configuration too
    ) -> None:
        super().__init__()
        self._epsilon = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension: [.., h] -> [.., h]."""
        return nn.functional.rms_norm(x, self.weight.shape, 1 + self.weight, self._epsilon)


class WholeRMSNorm(nn.Module):
    """The norm of OLMo 2 over all `num_heads` heads of the queries, or of the keys, of a token."""

    def __init__(self, hidden_size: int, eps: float, num_heads: int, **_: object) -> None:
        super().__init__()
        self._epsilon = eps
        self.weight = nn.Parameter(torch.ones(num_heads * hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last two dimensions together: [s, b, heads, d] -> the same."""
        y = nn.functional.rms_norm(x.flatten(-2), self.weight.shape, self.weight, self._epsilon)
        return y.view(x.shape)


def build_norm(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return a norm over hidden_size with its initial values."""
    size, epsilon = model.hidden_size, model.norm_epsilon
    if model.normalisation == "layernorm":
        return nn.LayerNorm(size, epsilon, dtype=dtype, device=device)
    if model.zero_centred_norm:
        return ZeroCentredRMSNorm(size, epsilon, dtype=dtype, device=device)
    return nn.RMSNorm(size, epsilon, dtype=dtype, device=device)


class ResidualAdd(nn.Module):
    """The residual addition, with a norm of what is added or with a multiplier of it.

    It takes the place of megatron-core's bias-dropout-add.

    norm: the norm after attention or MLP, None for none.
    """

    def __init__(self, norm: nn.Module | None, multiplier: float) -> None:
        super().__init__()
        self.norm, self._multiplier = norm, multiplier

    def forward(
        self, training: bool, fused: bool
    ) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """Return the function that megatron-core calls with (x, bias), residual, dropout rate."""
        return self._add

    def _add(
        self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
    ) -> Tensor:
        x, bias = x_with_bias
        added: Tensor = x if bias is None else x + bias
        if self.norm is not None:
            added = self.norm(added)
        return residual + (added if self._multiplier == 1 else added * self._multiplier)
