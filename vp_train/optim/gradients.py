"""The main gradients of one rank: what every backward adds to, and the optimizer reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        self._bounds: dict[str, tuple[int, int]] = {}
        start = 0
        for name, parameter in parameters.items():
            self._bounds[name] = start, start + sizes[name]
            self._views[name] = self.flat[start : start + parameter.numel()].view(parameter.shape)
            start += sizes[name]
            if parameter.dtype is not self.dtype:
                parameter.grad_dtype = self.dtype  # autograd casts what it adds
            parameter.grad = self._views[name]

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def span(self, names: Sequence[str]) -> Tensor:
        """The gradients of `names`, neighbours in the order of the parameters, in one piece."""
        start, stop = self._bounds[names[0]][0], self._bounds[names[-1]][1]
        assert stop - start == sum(self._bounds[name][1] - self._bounds[name][0] for name in names)
        return self.flat[start:stop]

    def zero(self) -> None:
        """Clear all gradients in place: the vocabulary layers accumulate into these very tensors."""
        self.flat.zero_()
        for name, parameter in self._parameters.items():
            parameter.grad = self._views[name]
