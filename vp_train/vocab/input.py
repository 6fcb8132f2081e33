"""The input embedding of one shard: pass E looks tokens up, pass G adds their gradient.

T tokens, H hidden, R this rank's rows.  Communication between the two and the pipeline is the executor's.
"""

from __future__ import annotations

from torch import Tensor

from vp_train.vocab.shard import Shard


class InputLayer:
    """Rows `shard` of the embedding: `weight` [R, H] and its main gradient `grad` [R, H], accumulated in place."""

    def __init__(self, weight: Tensor, grad: Tensor, shard: Shard) -> None:
        assert weight.shape == grad.shape
        assert weight.shape[0] == shard.num_rows
        self._weight, self._grad, self._shard = weight.detach(), grad, shard

    def e(self, tokens: Tensor) -> Tensor:
        """Embeddings [T, H] of `tokens` [T], zero where another shard owns the token: the sum over shards is the embedding."""
        positions, rows = self._shard.owned(tokens)
        embedded = self._weight.new_zeros(tokens.shape[0], self._weight.shape[1])
        return embedded.index_copy_(0, positions, self._weight[rows])

    def g(self, tokens: Tensor, dy: Tensor) -> None:
        """Add the gradient `dy` [T, H] of the embeddings to the rows owned here; the cost is the tokens, not R."""
        positions, rows = self._shard.owned(tokens)
        self._grad.index_add_(0, rows, dy[positions].to(self._grad.dtype))
