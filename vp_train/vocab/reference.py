"""The truth: an unsharded output layer by autograd of torch's own cross entropy."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, grad_loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token losses [T], dL/dx [T, H] and dL/dweight [V, H] for x [T, H], weight [V, H], targets [T] (-100: no loss).

    `grad_loss` [T] is dL/d(token loss).
    """
    with torch.enable_grad():
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        losses = torch.nn.functional.cross_entropy(x @ weight.T, targets, reduction="none")
        torch.autograd.backward(losses, grad_loss)
    assert x.grad is not None
    assert weight.grad is not None
    return losses.detach(), x.grad, weight.grad
