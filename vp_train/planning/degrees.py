"""The division of the ranks of a run into replicas, pipelines and tensor-parallel groups.

Pure: no I/O and no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from vp_train.config import ConfigError, ModelConfig, ParallelConfig
from vp_train.model.shape import kv_size, query_size, tensor_share
from vp_train.units import count_words

_OTHER_NUMBER_STARTED = (
    "were started; start as many (--ranks or torchrun --nproc-per-node), or change a degree"
)
_DEFAULT_PP = 4  # pipeline ranks to start if parallel.pp is not set
MOST_ON_A_NODE = 256  # each takes hundreds of megabytes, and no node has more than 16 GPUs


@dataclass(frozen=True, slots=True)
class Degrees:
    """The degrees of parallelism of dp x pp x tp ranks.

    Ranks that communicate most often are neighbours: tp varies fastest, then pp, then dp.
    """

    dp: int
    pp: int
    tp: int

    @property
    def num_ranks(self) -> int:
        return self.dp * self.pp * self.tp

    def place(self, rank: int) -> tuple[int, int, int]:
        """Return the replica, the pipeline rank and the tensor-parallel rank of `rank`."""
        replica, within = divmod(rank, self.pp * self.tp)
        return replica, *divmod(within, self.tp)

    def rank(self, replica: int, pipeline_rank: int, tensor_rank: int) -> int:
        """Return the rank at this place; the inverse of `place`."""
        return (replica * self.pp + pipeline_rank) * self.tp + tensor_rank

    def ranks_of(self, pipeline_rank: int) -> str:
        """Return the ranks of a pipeline rank in the first replica in words: `1`, or `2-3`."""
        first = self.rank(0, pipeline_rank, 0)
        return f"{first}" if self.tp == 1 else f"{first}-{first + self.tp - 1}"

    def __str__(self) -> str:
        return f"dp={self.dp} x pp={self.pp} x tp={self.tp}"


def wanted_ranks(parallel: ParallelConfig) -> int:
    """Return how many ranks to start if torchrun has not started them already."""
    return (parallel.dp or 1) * (parallel.pp or _DEFAULT_PP) * parallel.tp


def check_node(num_ranks: int) -> None:
    """Raise ConfigError for more ranks than one machine is ever asked to start."""
    if num_ranks > MOST_ON_A_NODE:
        raise ConfigError(
            f"{num_ranks:,} ranks on one machine, where at most {MOST_ON_A_NODE} start; lower "
            "parallel.dp, parallel.pp or parallel.tp, or start the run on several nodes"
        )


def split_ranks(
    parallel: ParallelConfig, num_ranks: int, *, otherwise: str = _OTHER_NUMBER_STARTED
) -> Degrees:
    """Return the degrees of a run of `num_ranks` ranks; unset ones are inferred from that number.

    otherwise: what the error says about another number of ranks, and the way out.

    Raises ConfigError with all the numbers if they do not fit.
    """
    degrees = {"parallel.dp": parallel.dp, "parallel.pp": parallel.pp, "parallel.tp": parallel.tp}
    if parallel.dp is None and parallel.pp is None:
        degrees["parallel.dp"] = 1
    known = 1
    for value in degrees.values():
        known *= value or 1
    named = (
        " x ".join(f"{name}={value}" for name, value in degrees.items() if value not in (None, 1))
        or "parallel.pp=1"
    )
    is_open = None in degrees.values()
    if num_ranks % known or (not is_open and num_ranks != known):
        raise ConfigError(
            f"{named} needs {'a multiple of ' if is_open else ''}{count_words(known, 'rank')}, "
            f"but {num_ranks} {otherwise}"
        )
    rest = num_ranks // known
    return Degrees(degrees["parallel.dp"] or rest, degrees["parallel.pp"] or rest, parallel.tp)


_FLOAT8_MULTIPLE = 16  # of which the widths of a scaled product must be a multiple


def check_float8_split(model: ModelConfig, tp: int) -> None:
    """Check that scaled products in float8 take the linear layers of one of `tp` ranks.

    Call it after `check_tensor_split`.  Raises ConfigError.
    """
    share = tensor_share(model, tp)
    queries, keys = query_size(share), kv_size(share)
    widths = {
        "model.hidden_size": model.hidden_size,
        "the width of the queries": queries,
        "the width of queries, keys and values": queries + 2 * keys,
        "model.ffn_hidden_size": share.ffn_hidden_size,
    }
    for name, width in widths.items():
        if width % _FLOAT8_MULTIPLE:
            of_rank = f" on each of parallel.tp={tp} ranks" if tp > 1 else ""
            raise ConfigError(
                f"run.linear_dtype=float8: {name} is {width}{of_rank}, and a scaled product needs "
                f"a multiple of {_FLOAT8_MULTIPLE}; change the width, or drop run.linear_dtype"
            )


def check_tensor_split(
    model: ModelConfig, tp: int, *, sequences: bool = False, num_ranks: int = 0
) -> None:
    """Check that attention heads and the feed-forward width split evenly over `tp` ranks.

    With `sequences` the sequence length must split too.  Raises ConfigError, which names the
    degrees that divide all of this, and all `num_ranks` if these are known, not 0.
    """
    if sequences and tp == 1:
        raise ConfigError(
            "parallel.sequence_parallel=true has nothing to split over with parallel.tp=1; "
            "drop it, or raise tp"
        )
    if model.qk_norm_whole and tp > 1:
        raise ConfigError(
            f"model.qk_norm_whole=true does not go with parallel.tp={tp}, because the norm needs "
            "all heads on one rank; use parallel.tp=1, and a larger parallel.pp"
        )
    names = ["num_heads", "num_query_groups", "ffn_hidden_size"] + ["seq_length"] * sequences
    for name in names:
        value = getattr(model, name)
        if value % tp:
            common = gcd(num_ranks, *(getattr(model, one) for one in names))
            raise ConfigError(
                f"model.{name}={value} does not split over parallel.tp={tp}; "
                f"{_fitting_degrees(common, name, sequences=sequences)}"
            )


def _fitting_degrees(common: int, name: str, *, sequences: bool) -> str:
    """Return what to use where `model.NAME` does not split, whose degrees must divide `common`."""
    fitting = [tp for tp in range(1, common + 1) if common % tp == 0]
    drop = "drop parallel.sequence_parallel"
    if sequences:
        fitting.remove(1)  # which splits no sequence
        if not fitting:
            return drop if name == "seq_length" else f"{drop}, and use parallel.tp=1"
    first, last = ", ".join(map(str, fitting[:-1])), fitting[-1]
    use = f"use parallel.tp={f'{first} or ' * bool(first)}{last}"
    return f"{use}, or {drop}" if name == "seq_length" else use
