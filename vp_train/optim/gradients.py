"""The main gradients of one rank: what every backward adds to, and the optimizer reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vp_train.precision import statistics_dtype

_ALIGNMENT = 64  # elements, so that every gradient begins where vectors and cache lines do


class Gradients:
    """One flat tensor, fp32 for parameters of less and in their dtype else; the gradient of each parameter is a view of it.

    All parameters have the same dtype and device.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        first = next(iter(parameters.values()), torch.empty(0))
        self.dtype = statistics_dtype(first.dtype)
        sizes = {name: -(-parameter.numel() // _ALIGNMENT) * _ALIGNMENT for name, parameter in parameters.items()}
        self.flat = torch.zeros(sum(sizes.values()), dtype=self.dtype, device=first.device)
        self._views: dict[str, Tensor] = {}
        for (name, parameter), padded in zip(parameters.items(), self.flat.split_with_sizes(list(sizes.values())), strict=True):
            self._views[name] = padded[: parameter.numel()].view(parameter.shape)
            if parameter.dtype is not self.dtype:
                parameter.grad_dtype = self.dtype  # autograd casts what it adds
            parameter.grad = self._views[name]

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def zero(self) -> None:
        """Clear all gradients in place: the vocabulary layers accumulate into these very tensors."""
        self.flat.zero_()
        for name, parameter in self._parameters.items():
            parameter.grad = self._views[name]
