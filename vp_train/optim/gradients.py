"""The main gradients of one rank: what every backward adds to, and the optimizer reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vp_train.optim.buckets import Bucket, FlatLayout
from vp_train.tensors.precision import statistics_dtype


class Gradients:
    """One flat tensor, fp32 for parameters of less and in their dtype else; the gradient of each parameter is a view of it.

    All parameters have the same dtype and device.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], layout: FlatLayout) -> None:
        self.layout = layout
        self._parameters = dict(parameters)
        first = next(iter(parameters.values()), torch.empty(0))
        self.dtype = statistics_dtype(first.dtype)
        self.flat = torch.zeros(layout.num_elements, dtype=self.dtype, device=first.device)
        self._views: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            start, stop = layout.bounds[name]
            self._views[name] = self.flat[start:stop].view(parameter.shape)
            if parameter.dtype is not self.dtype:
                parameter.grad_dtype = self.dtype  # autograd casts what it adds
            parameter.grad = self._views[name]

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    def of(self, bucket: Bucket) -> Tensor:
        """The gradients of a bucket and its padding, which is 0, in one piece."""
        return self.flat[bucket.start : bucket.stop]

    def zero(self) -> None:
        """Clear all gradients in place: the vocabulary layers accumulate into these very tensors."""
        self.flat.zero_()
        for name, parameter in self._parameters.items():
            parameter.grad = self._views[name]
