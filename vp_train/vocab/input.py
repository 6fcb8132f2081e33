"""The input embedding of one shard: pass E looks tokens up, pass G adds their gradient.

T tokens, H hidden, R this rank's rows.  A shard looks up only the K tokens it owns.  The root
receives the T embeddings grouped by shard and puts them in token order.  Gradients go back the same
way.  The executor does the communication.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vp_train.tensors.streams import lend, to_device
from vp_train.vocab.shard import Shard, require_within


class InputLayer:
    """Rows `shards[index]` of the embedding.

    `weight` [R, H]; its main gradient `grad` [R, H] is accumulated in place.
    """

    def __init__(self, weight: Tensor, grad: Tensor, shards: Sequence[Shard], index: int) -> None:
        assert weight.shape == grad.shape
        assert weight.shape[0] == shards[index].num_rows
        self.weight, self.grad, self.shard = weight.detach(), grad, shards[index]
        self.stops = torch.tensor([shard.stop for shard in shards])

    def begin(self, tokens: Tensor) -> InputStep:
        """Begin a step over `tokens` [m, T], int64.

        Pass them on the CPU: on a GPU this call waits for the device.  Raises IndexError for a
        token that is not in the vocabulary.
        """
        return InputStep(self, tokens)


class InputStep:
    """One step of an input layer."""

    def __init__(self, layer: InputLayer, tokens: Tensor) -> None:
        self._layer = layer
        device, stops = layer.weight.device, layer.stops.to(tokens.device)
        require_within(tokens, int(layer.stops[-1]), "token")
        owners = torch.bucketize(tokens, stops, right=True)
        m, n = len(tokens), len(stops)
        shifted = owners + n * torch.arange(m, device=tokens.device)[:, None]
        self._owned = layer.shard.owned(tokens, device)
        self._order = to_device(owners.argsort(dim=1, stable=True), device)
        self._counts = torch.bincount(shifted.flatten(), minlength=m * n).view(m, n).tolist()

    def lend(self) -> None:
        """Record that the current stream uses the step's tensors; see `tensors.streams`."""
        for tensor in (self._order, *(each for owned in self._owned for each in owned.tensors)):
            lend(tensor)

    def counts(self, microbatch: int) -> list[int]:
        """Return how many tokens each shard owns."""
        counts: list[int] = self._counts[microbatch]
        return counts

    @torch.no_grad()
    def e(self, microbatch: int) -> Tensor:
        """Return the embeddings [K, H] of the tokens owned here, in token order."""
        return self._layer.weight[self._owned[microbatch].rows]

    @torch.no_grad()
    def in_order(self, microbatch: int, gathered: Tensor) -> Tensor:
        """Return the embeddings [T, H] in token order from `gathered` [T, H], grouped by shard."""
        return torch.empty_like(gathered).index_copy_(0, self._order[microbatch], gathered)

    @torch.no_grad()
    def by_shard(self, microbatch: int, dy: Tensor) -> Tensor:
        """Return the gradient `dy` [T, H] of the embeddings, grouped by the shard of the token."""
        return dy[self._order[microbatch]]

    @torch.no_grad()
    def g(self, microbatch: int, dy: Tensor) -> None:
        """Add the gradient [K, H] of the tokens owned here to their rows.

        The cost depends on K, not on R.
        """
        grad = self._layer.grad
        grad.index_add_(0, self._owned[microbatch].rows, dy.to(grad.dtype))
