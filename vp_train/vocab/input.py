"""The input embedding of one shard: pass E looks tokens up, pass G adds their gradient.

T tokens, H hidden, R this rank's rows.  A shard looks up only the K tokens it owns.  The root gets the rows of all shards one
shard after the other, T together, and puts them in order; gradients go back the same way.  Communication is the executor's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vp_train.vocab.shard import Shard, require_within


class InputLayer:
    """Rows `shards[index]` of the embedding: `weight` [R, H] and its main gradient `grad` [R, H], accumulated in place."""

    def __init__(self, weight: Tensor, grad: Tensor, shards: Sequence[Shard], index: int) -> None:
        assert weight.shape == grad.shape
        assert weight.shape[0] == shards[index].num_rows
        self._weight, self._grad, self._shard = weight.detach(), grad, shards[index]
        self._vocab_size = shards[-1].stop
        self._stops = torch.tensor([shard.stop for shard in shards], device=weight.device)

    def begin(self, tokens: Tensor) -> None:
        """A step over `tokens` [m, T].  Raises IndexError for a token that the vocabulary does not have."""
        require_within(tokens, self._vocab_size, "token")
        owners = torch.bucketize(tokens, self._stops, right=True)
        m, n = len(tokens), len(self._stops)
        shifted = owners + n * torch.arange(m, device=tokens.device)[:, None]
        self._owned = self._shard.owned(tokens)
        self._order = owners.argsort(dim=1, stable=True)
        self._counts = torch.bincount(shifted.flatten(), minlength=m * n).view(m, n).tolist()

    def counts(self, microbatch: int) -> list[int]:
        """How many tokens each shard owns."""
        counts: list[int] = self._counts[microbatch]
        return counts

    @torch.no_grad()
    def e(self, microbatch: int) -> Tensor:
        """Embeddings [K, H] of the tokens owned here, in their order."""
        return self._weight[self._owned[microbatch].rows]

    @torch.no_grad()
    def in_order(self, microbatch: int, gathered: Tensor) -> Tensor:
        """The embeddings [T, H] from those of all shards, one shard after the other."""
        return torch.empty_like(gathered).index_copy_(0, self._order[microbatch], gathered)

    @torch.no_grad()
    def by_shard(self, microbatch: int, dy: Tensor) -> Tensor:
        """The gradient [T, H] of the embeddings, one shard's tokens after the other's."""
        return dy[self._order[microbatch]]

    @torch.no_grad()
    def g(self, microbatch: int, dy: Tensor) -> None:
        """Add the gradient [K, H] of the tokens owned here to their rows; the cost is the tokens, not R."""
        self._grad.index_add_(0, self._owned[microbatch].rows, dy.to(self._grad.dtype))
