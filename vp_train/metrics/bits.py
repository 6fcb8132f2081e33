"""Bits per byte of text: a loss that models with other tokenizers can be compared by."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vp_train.data import Source
from vp_train.mesh import Mesh


class BitsPerByte:
    """Converts the losses of validation sets.  It counts labels and bytes of each set once."""

    def __init__(self, source: Source, mesh: Mesh) -> None:
        self._source, self._mesh = source, mesh
        self._counts: dict[str, list[float]] = {}  # labels and bytes of every validation set

    def of(self, name: str, labels: Tensor, loss: float) -> float | None:
        """Return `loss`, in nats per token, in bits per byte of the set `name`.

        `labels` are those of this replica.  It is None where bytes are not known.  Collective in
        the first call for a set.
        """
        lengths = self._source.byte_lengths
        if lengths is None:
            return None
        if name not in self._counts:
            own = torch.zeros(2, dtype=torch.float64)
            if self._mesh.pipeline_rank == self._mesh.tensor_rank == 0:
                counted = labels[labels >= 0]
                own += torch.tensor([len(counted), int(lengths[counted].sum())])
            self._counts[name] = self._mesh.steps.all_gather(own).sum(0).tolist()
        num_labels, num_bytes = self._counts[name]
        return loss * (num_labels / num_bytes) / math.log(2) if num_bytes else None
