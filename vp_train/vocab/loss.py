"""The training loss: options of the token loss, and the weights that sum token losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vp_train.tensors.streams import to_device

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class LossOptions:
    """Options of the loss of a token.

    With logits z over V rows, target y and lse = log sum exp z, the loss is

        lse - (1 - a) z_y - (a / V) sum z + l lse^2        a = label_smoothing, l = z_loss

    With `softcap` c every logit is first replaced by c tanh(z / c).

    Raises ValueError for values out of range, and for label smoothing together with a softcap: the
    sum of capped logits is not a product with the sum of the rows, so it would cost another pass
    over [T, R].
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label smoothing of {self.label_smoothing} is out of range; it must lie in [0, 1)"
            )
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(
                f"a z-loss of {self.z_loss} is out of range; it must be at least 0 and finite"
            )
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(
                f"a logit softcap of {self.softcap} is out of range; "
                "it must be above 0 and finite, or none"
            )
        if self.softcap is not None and self.label_smoothing:
            raise ValueError(
                f"label smoothing of {self.label_smoothing} with a logit softcap of "
                f"{self.softcap} is not supported; turn one of the two off"
            )

    @property
    def measured(self) -> LossOptions:
        """Return the options of evaluation, which measures the plain negative log-likelihood."""
        return replace(self, label_smoothing=0.0, z_loss=0.0)


def token_weights(
    labels: Tensor,
    mask: Tensor | None,
    normalisation: str,
    dtype: torch.dtype,
    over_replicas: Callable[[Tensor], Tensor] | None,
    device: torch.device | None = None,
) -> Tensor:
    """Return the weight of each token's loss [m, b, s], on `device` or else on that of `labels`.

    The weighted sum of token losses over all replicas is the loss of the batch.  A batch without
    any label has weights of 0.  With labels on the host nothing waits for the device.

    labels: [m, b, s]; IGNORE_INDEX where a token has no loss.
    mask: [m, b, s], scales the loss of each token.
    normalisation: `token` is the mean over all tokens, weighted by the mask.  `sequence` is the
    mean
        over sequences of the mean over their tokens; a sequence without a loss does not count.
    over_replicas: sums a number, fp64 [], over the data-parallel ranks.  It must not queue behind
        the all-gather of parameters.
    """
    weights = (labels != IGNORE_INDEX).to(dtype)
    if mask is not None:
        weights = weights * mask.to(dtype)
    if normalisation == "sequence":
        per_sequence = weights.sum(-1, keepdim=True)
        weights = torch.where(per_sequence > 0, weights / per_sequence, 0.0)
    total = weights.sum(dtype=torch.float64)
    if over_replicas is not None:
        total = over_replicas(total.cpu()).to(labels.device)
    weights = torch.where(total > 0, weights / total, 0.0).to(dtype)
    return weights if device is None else to_device(weights, device)
