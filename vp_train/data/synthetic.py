"""Synthetic text with known entropy, from a Markov chain.

With probability q the next token is the successor of the current one, otherwise a draw from a Zipf
distribution.  The successor map is a keyed permutation.  A model has something to learn at any
vocabulary size, and its loss has an exact lower limit: the conditional entropy.
"""

from __future__ import annotations

import numpy as np

_FOLLOW = 0.75  # probability of the successor
_EXPONENT, _OFFSET = 1.1, 2.7  # Zipf-Mandelbrot: p(rank) ~ (rank + 2.7) ** -1.1


class SyntheticText:
    """A generator of samples over `vocab_size` tokens.  `seed` keys permutation and draws."""

    def __init__(self, vocab_size: int, seed: int) -> None:
        self._seed = seed
        weights = (np.arange(vocab_size) + 1 + _OFFSET) ** -_EXPONENT
        self._probabilities = weights / weights.sum()
        self._cumulative = np.cumsum(self._probabilities)
        self._cumulative[-1] = 1.0
        self._successor = np.random.default_rng([seed, 0]).permutation(vocab_size)

    def sample(self, stream: int, index: int, length: int) -> np.ndarray:
        """Return sample `index` of `stream`, int64 [length].

        It is a pure function of seed, stream, index and length.
        """
        random = np.random.default_rng([self._seed, 1 + stream, index])
        drawn = np.searchsorted(self._cumulative, random.random(length), side="right")
        follows = random.random(length) < _FOLLOW
        follows[0] = False
        positions = np.arange(length)
        # A chain is a drawn token followed by its successors.  `start` is where the chain of each
        # token was drawn, and `links` is how often the successor map applies since then.
        start = np.maximum.accumulate(np.where(follows, 0, positions))
        links = positions - start
        # The first chain may have begun before the sample.  The text is thus stationary from the
        # first token on, and `entropy` is exact for any length.
        links[start == 0] += random.geometric(1 - _FOLLOW) - 1
        tokens = drawn[start]
        for link in range(links.max()):
            behind = links > link
            tokens[behind] = self._successor[tokens[behind]]
        return tokens.astype(np.int64)

    def entropy(self) -> float:
        """Return the conditional entropy of a token given the previous one, in nats.

        It is averaged over the stationary distribution of tokens.
        """
        z, q = self._probabilities, _FOLLOW
        # The stationary distribution is the sum over n of (1 - q) q^n times z mapped n times to
        # its successors.
        stationary = np.zeros_like(z)
        term = (1 - q) * z
        while term.sum() > 1e-14:
            stationary += term
            following = np.empty_like(term)
            following[self._successor] = q * term
            term = following
        # After token t, every token v has probability (1 - q) z_v, plus q if v succeeds t.  The sum
        # over all v is common to all t; only the term of the successor is corrected.
        mixed = (1 - q) * z
        total = -(mixed * np.log(mixed)).sum()
        at_successor = mixed[self._successor]
        correction = at_successor * np.log(at_successor) - (q + at_successor) * np.log(
            q + at_successor
        )
        return float(total + (stationary * correction).sum())
