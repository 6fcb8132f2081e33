"""The main gradients of one rank: every backward adds to them, and the optimizer reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vp_train.optim.buckets import Bucket, FlatLayout
from vp_train.tensors.precision import statistics_dtype


class Gradients:
    """The gradients of all parameters as views of one flat tensor.

    It is fp32, or fp64 for fp64 parameters.  All parameters have the same dtype and device.
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
                parameter.grad_dtype = self.dtype  # autograd casts the gradients that it adds
            parameter.grad = self._views[name]

    def __getitem__(self, name: str) -> Tensor:
        return self._views[name]

    @property
    def by_name(self) -> Mapping[str, Tensor]:
        """The gradient of every parameter."""
        return self._views

    def of(self, bucket: Bucket) -> Tensor:
        """Return the gradients of `bucket` and its padding, which is 0, as one view."""
        return self.flat[bucket.start : bucket.stop]

    def zero(self) -> None:
        """Set all gradients to 0 in place, since the vocabulary layers hold these tensors."""
        self.flat.zero_()
        for name, parameter in self._parameters.items():
            parameter.grad = self._views[name]


class Poison:
    """A number that shows whether this rank's gradients are finite before replicas sum them.

    Afterwards all replicas have the same sums, and none can tell where a NaN came from.
    """

    def __init__(self) -> None:
        self._mark: Tensor | None = None

    def add(self, gradients: Tensor) -> None:
        """Look at `gradients` once; this does not wait for the device."""
        if not gradients.numel():
            return
        low, high = torch.aminmax(gradients.detach())
        mark = (low + high) * 0  # NaN if either is infinite or NaN
        self._mark = mark if self._mark is None else self._mark + mark

    def take(self) -> Tensor | None:
        """Return 0, [], or NaN if anything was not finite; None if nothing was looked at.

        The next step begins.
        """
        mark, self._mark = self._mark, None
        return mark
