"""The batch of a step in sequences, as typed or about so many tokens."""

from __future__ import annotations

import math
from dataclasses import replace

from vp_train.config import ConfigError, RunConfig
from vp_train.planning.degrees import split_ranks


def batch_of(config: RunConfig) -> int:
    """Return the sequences of a step: num_microbatches x micro_batch_size x parallel.dp."""
    return config.num_microbatches * config.micro_batch_size * (config.parallel.dp or 1)


def with_replicas(config: RunConfig) -> RunConfig:
    """Return `config` with the parallel.dp that a run on its cluster infers, so its batch is set.

    Degrees that do not go with the cluster stay as they are.
    """
    try:
        dp = split_ranks(config.parallel, config.cluster.num_gpus).dp
    except ConfigError:
        return config
    return replace(config, parallel=replace(config.parallel, dp=dp))


def with_batch_of(config: RunConfig, num_tokens: int, multiple: int = 1) -> RunConfig:
    """Return `config` with a batch of about so many tokens, a `multiple` of so many sequences.

    Where these do not divide the tokens, it is of the counts within 5 % that a power of two divides
    best, because dp must divide the batch.
    """
    length = config.model.seq_length
    if num_tokens < length:
        raise ConfigError(
            f"--tokens {num_tokens} is less than one sequence of model.seq_length={length:,}; "
            f"write for example --tokens {8 * length}, or lower model.seq_length"
        )
    exact, rest = divmod(num_tokens, length * multiple)
    if rest:
        wanted = num_tokens / length / multiple
        near = range(math.ceil(0.95 * wanted), int(1.05 * wanted) + 1)
        exact = max(
            near or (max(1, exact),), key=lambda count: (count & -count, -abs(count - wanted))
        )
    exact *= multiple
    parallel = replace(config.parallel, dp=None, pp=None, tp=1)
    try:
        return replace(config, num_microbatches=exact, micro_batch_size=1, parallel=parallel)
    except ConfigError:
        raise ConfigError(
            f"--tokens {num_tokens} is {exact:,} sequences of model.seq_length={length:,}, more "
            "than a step can have; use fewer tokens"
        ) from None
