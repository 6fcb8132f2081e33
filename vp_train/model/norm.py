"""The norms of a decoder, and what the halves of a layer add to the residual stream."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vp_train.config import ModelConfig
from vp_train.model.elementwise import Fuse, NormRule, residual_norm
from vp_train.model.linear import add_bias


def norm_rule(model: ModelConfig) -> NormRule:
    """Return the rule of all norms of a model."""
    return NormRule(
        model.norm_epsilon,
        centre=1.0 if model.zero_centred_norm else 0.0,
        subtracts_mean=model.normalisation == "layernorm",
    )


class Norm(nn.Module):
    """A norm over the last values: x / rms(x) * (weight + centre), or a LayerNorm.

    It is the identity at first.  With a centre of 1 weight decay pulls it towards the identity.

    num_heads: of how many heads of size `hidden_size` it is, all together, as in OLMo 2.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        rule: NormRule,
        fuse: Fuse,
        *,
        num_heads: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        **_: object,  # megatron-core passes its own configuration too
    ) -> None:
        super().__init__()
        size = num_heads * hidden_size
        self.rule, self._fuse = rule, fuse
        self.weight = nn.Parameter(torch.full((size,), 1 - rule.centre, dtype=dtype, device=device))
        bias = None
        if rule.subtracts_mean:
            bias = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension: [.., h] -> [.., h]."""
        return self.after(x, None)[1]

    def after(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return residual + x, or x without a residual, and its norm; all are [.., h]."""
        weight, rule = self.weight, self.rule
        if not rule.subtracts_mean:
            return residual_norm(x, residual, weight, rule, self._fuse)
        # torch has a kernel, and autograd in C++ takes the host less time than a function of ours.
        total = x if residual is None else residual + x
        y = nn.functional.layer_norm(total, weight.shape, weight, self.bias, rule.epsilon)
        return total, y


def build_norm(model: ModelConfig, dtype: torch.dtype, device: torch.device, fuse: Fuse) -> Norm:
    """Return a norm over hidden_size with its initial values."""
    return Norm(model.hidden_size, norm_rule(model), fuse, dtype=dtype, device=device)


class Addend(nn.Module):
    """What a half of a layer adds to the residual stream: its output, with the bias.

    It takes the place of megatron-core's bias-dropout-add.

    norm: the norm after attention or MLP, None for none.
    multiplier: is applied last.
    """

    def __init__(self, norm: Norm | None, multiplier: float) -> None:
        super().__init__()
        self.norm, self._multiplier = norm, multiplier

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Map [T, h] to [T, h]."""
        added = x if bias is None else add_bias(x, bias)
        if self.norm is not None:
            added = self.norm(added)
        return added if self._multiplier == 1 else added * self._multiplier
