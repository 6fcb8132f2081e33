"""The choice of the next token over the shards of the vocabulary.

No rank sees all logits.  Each shard offers its best tokens, and the best of all shards are chosen.
A draw at temperature t is the maximum of z / t + G over the vocabulary, with independent Gumbel
noise G (Gumbel-max; Yellott 1977).  The noise of a token depends on the seed, on the place in the
text and on its id alone.  So the choice does not depend on how the rows are split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vp_train.vocab.shard import Shard

_ROWS = 8_192  # whose logits are computed together, in fp64


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is chosen.

    temperature: 0 takes the most probable token; z / temperature are the logits of a draw.
    top_k: a draw is among so many most probable tokens; None: among all.
    seed: of the noise.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    @property
    def num_offered(self) -> int:
        """Return how many tokens a shard offers."""
        return self.top_k if self.top_k is not None and self.temperature else 1


@torch.no_grad()
def offers(
    x: Tensor, weight: Tensor, shard: Shard, softcap: float | None, sampling: Sampling, place: int
) -> Tensor:
    """Return score and id of the tokens that this shard offers: fp64 [2, num_offered], on the host.

    x: [H], the output of the final norm.
    weight: [R, H], the rows `shard`.
    place: of the token to be chosen, in its text.

    The best comes first; of equal ones, that with the smaller id.  Where the shard has fewer rows
    the scores are -inf, and all are NaN if a logit is.
    """
    parts = [weight[i : i + _ROWS].double() @ x.double() for i in range(0, len(weight), _ROWS)]
    logits = torch.cat(parts).cpu().numpy() if parts else np.zeros(0)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    ids = np.arange(shard.start, shard.stop)
    if sampling.temperature and sampling.top_k is None:
        logits = logits / sampling.temperature + gumbel(sampling.seed, place, ids)
    found = nothing(sampling)
    if np.isnan(logits).any():
        return found.fill_(torch.nan)
    best = _best(logits, ids, sampling.num_offered)
    found[0, : len(best)] = torch.from_numpy(logits[best])
    found[1, : len(best)] = torch.from_numpy(ids[best])
    return found


def nothing(sampling: Sampling) -> Tensor:
    """Return what a rank without rows offers."""
    found = torch.zeros(2, sampling.num_offered, dtype=torch.float64)
    found[0] = -torch.inf
    return found


def choose(offered: Tensor, sampling: Sampling, place: int) -> int:
    """Return the token chosen of those `offered` by all shards, fp64 [n, 2, num_offered]."""
    scores, ids = offered[:, 0].flatten().numpy(), offered[:, 1].flatten().numpy().astype(np.int64)
    best = _best(scores, ids, sampling.num_offered)
    scores, ids = scores[best], ids[best]
    if sampling.temperature and sampling.top_k is not None:
        scores = scores / sampling.temperature + gumbel(sampling.seed, place, ids)
    return int(ids[_best(scores, ids, 1)[0]])


def gumbel(seed: int, place: int, ids: np.ndarray) -> np.ndarray:
    """Return independent draws of the standard Gumbel distribution, one for each of `ids`."""
    key = _mixed(_mixed(np.array([seed % 2**64], dtype=np.uint64)) + np.uint64(place))
    bits = _mixed(key ^ _mixed(ids.astype(np.uint64))) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1)
    noise: np.ndarray = -np.log(-np.log(uniform))
    return noise


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return a hash of each 64-bit number (splitmix64; Steele, Lea and Flood, OOPSLA 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def _best(scores: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    """Return the indices of the `count` best, in order; of equal scores the smaller id first."""
    if count == 1 and len(scores):
        equal = np.flatnonzero(scores == scores.max())
        return equal[np.argmin(ids[equal]), None]
    return np.lexsort((ids, -scores))[:count]
