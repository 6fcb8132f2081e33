"""The reference of all tests: an unsharded output layer by autograd of torch's cross entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from vp_train.vocab.loss import IGNORE_INDEX, LossOptions

_PLAIN = LossOptions()


def cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, grad_loss: Tensor, options: LossOptions = _PLAIN
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the token losses [T], dL/dx [T, H] and dL/dweight [V, H].

    x: [T, H].  weight: [V, H].  targets: [T], int64, IGNORE_INDEX where there is no loss.
    grad_loss: dL/d(token loss) [T].
    """
    with torch.enable_grad():
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        logits = x @ weight.T
        if options.softcap is not None:
            logits = options.softcap * torch.tanh(logits / options.softcap)
        losses = torch.nn.functional.cross_entropy(
            logits,
            targets,
            reduction="none",
            ignore_index=IGNORE_INDEX,
            label_smoothing=options.label_smoothing,
        )
        losses = losses + options.z_loss * (logits.logsumexp(-1) ** 2).masked_fill(
            targets == IGNORE_INDEX, 0.0
        )
        torch.autograd.backward(losses, grad_loss)
    assert x.grad is not None
    assert weight.grad is not None
    return losses.detach(), x.grad, weight.grad
