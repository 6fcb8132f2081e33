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


def build_norm(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Return a norm over hidden_size with its initial values."""
    size, epsilon = model.hidden_size, model.norm_epsilon
    if model.normalisation == "layernorm":
        return nn.LayerNorm(size, epsilon, dtype=dtype, device=device)
    if model.zero_centred_norm:
        return ZeroCentredRMSNorm(size, epsilon, dtype=dtype, device=device)
    return nn.RMSNorm(size, epsilon, dtype=dtype, device=device)


class PostNormAdd(nn.Module):
    """The norm after attention or MLP, and the residual addition.

    It takes the place of megatron-core's bias-dropout-add.
    """

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(
        self, training: bool, fused: bool
    ) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """Return the function that megatron-core calls with (x, bias), residual, dropout rate."""
        return self._add

    def _add(
        self, x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float
    ) -> Tensor:
        x, bias = x_with_bias
        normed: Tensor = self.norm(x if bias is None else x + bias)
        return residual + normed
