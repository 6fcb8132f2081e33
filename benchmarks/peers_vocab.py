"""Other implementations of an output layer with its loss, for `vocab_passes.py`.

A peer is constructed from x [T, H], weight [R, H], targets [T] and scale = dL/dloss [T], which must
be equal for all tokens.  A call returns the token losses [T], or their mean [1], and dx [T, H].
`grad` [R, H] is dW.  Peers that use autograd have it in the dtype of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor


class Published:
    """Algorithm 2 of arXiv 2411.05288 as published, on a single rank, so without barriers.

    The local softmax is materialised in fp32 and held until T.  Only the formulas are ported.  It
    is the only peer whose method works on a shard.
    """

    def __init__(self, x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor) -> None:
        self._x, self._weight, self._targets, self._scale = x, weight, targets, scale
        self.grad = torch.zeros_like(weight, dtype=torch.float32)

    @torch.no_grad()
    def __call__(self) -> tuple[Tensor, Tensor]:
        x, weight, tokens = self._x, self._weight, torch.arange(len(self._x), device=self._x.device)
        logits = (x @ weight.T).float()
        maximum = logits.amax(-1)
        target_logit = logits[tokens, self._targets]
        exponential = logits.sub_(maximum[:, None]).exp_()
        total = exponential.sum(-1)
        softmax = exponential.div_(total[:, None])  # held from S to T
        a, b = softmax.to(x.dtype) @ weight, weight[self._targets]
        dx = (a - b) * self._scale[:, None].to(x.dtype)
        softmax[tokens, self._targets] -= 1
        self.grad += softmax.mul_(self._scale[:, None]).to(x.dtype).T @ x
        return total.log() + maximum - target_logit, dx


class _ByAutograd:
    """A peer made of a function (x, weight, targets) -> mean loss, differentiated by autograd."""

    def __init__(self, loss: Callable[[Tensor, Tensor, Tensor], Tensor], *inputs: Tensor) -> None:
        x, weight, self._targets, _ = inputs
        self._x, self._weight, self._loss = x.requires_grad_(), weight.requires_grad_(), loss

    def __call__(self) -> tuple[Tensor, Tensor]:
        self._x.grad = None
        loss = self._loss(self._x, self._weight, self._targets)
        loss.backward()  # type: ignore[no-untyped-call]
        assert self._x.grad is not None
        return loss.detach()[None], self._x.grad

    @property
    def grad(self) -> Tensor:
        assert self._weight.grad is not None
        return self._weight.grad


def _eager(*inputs: Tensor) -> _ByAutograd:
    """Return torch's cross entropy of materialised logits."""
    return _ByAutograd(
        lambda x, weight, y: torch.nn.functional.cross_entropy((x @ weight.T).float(), y), *inputs
    )


def _torch_chunked(*inputs: Tensor) -> _ByAutograd:
    """Return torch.nn.functional.linear_cross_entropy, which works in chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    function = torch.nn.functional.linear_cross_entropy
    return _ByAutograd(lambda x, weight, y: function(x, weight, y, options=options), *inputs)


def _liger(*inputs: Tensor) -> _ByAutograd:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as function

    return _ByAutograd(lambda x, weight, y: function(x, weight, y), *inputs)


def _cut(*inputs: Tensor) -> _ByAutograd:
    from cut_cross_entropy import linear_cross_entropy

    kind = "cce" if inputs[0].is_cuda else "torch_compile"
    return _ByAutograd(lambda x, weight, y: linear_cross_entropy(x, weight, y, impl=kind), *inputs)


PEERS: dict[str, Callable[..., Any]] = {
    "published": Published,
    "torch cross_entropy": _eager,
    "torch linear_cross_entropy": _torch_chunked,
    "liger-kernel": _liger,
    "cut-cross-entropy": _cut,
}


def installed() -> dict[str, str]:
    """Return the versions of the installed peer packages."""
    names = [
        package
        for package in ("liger-kernel", "cut-cross-entropy", "triton")
        if _distribution(package)
    ]
    return {name: metadata.version(name) for name in names}


def _distribution(name: str) -> bool:
    return any(True for _ in metadata.distributions(name=name))
