"""One pipeline stage: a slice of the layers, and their initial values, which no layout can change."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vp_train.config import ModelConfig
from vp_train.model.linear import WeightGradStore
from vp_train.model.megatron import DecoderLayer, rotary_table

_ROWS_PER_BLOCK = 1024


class Stage(nn.Module):
    """The layers `layers` (global numbers, perhaps none) and, on the last stage, the final norm.

    Parameters are named by global layer, `layers.7...`, and initialised from (seed, global layer) alone.  With `recompute` a
    layer keeps its input, and its backward (I, if that is split) runs its forward once more.
    """

    def __init__(
        self,
        model: ModelConfig,
        layers: range,
        *,
        final_norm: bool,
        dtype: torch.dtype,
        device: torch.device,
        group: dist.ProcessGroup,
        seed: int,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self._recompute = recompute
        self.weight_grads = WeightGradStore()
        self.layers = nn.ModuleDict(
            {str(index): DecoderLayer(model, dtype, device, group, self.weight_grads) for index in layers}
        )
        for index, layer in self.layers.items():
            _initialise(layer, model, _generator(seed, f"layer {index}"))
        self.final_norm = nn.RMSNorm(model.hidden_size, model.norm_epsilon, dtype=dtype, device=device) if final_norm else None
        angles = rotary_table(model.seq_length, model.hidden_size // model.num_heads, model.rope_base, device)
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        """[s, b, h] -> [s, b, h], s at most model.seq_length; attention stays within `segments` [b, s], if given."""
        documents = None if segments is None else document_lengths(segments)
        given = (self.get_buffer("angles")[: len(x)], documents)
        for layer in self.layers.values():
            x = checkpoint(layer, x, *given, use_reentrant=False) if self._recompute else layer(x, *given)
        return x if self.final_norm is None else self.final_norm(x)


def document_lengths(segments: Tensor) -> tuple[int, ...] | None:
    """The numbers of tokens of the documents in `segments` [b, s], sequence after sequence; None if each has only one.

    A document is a run of equal segments.  Reads values: on CUDA it would wait for the device.
    """
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = begins.flatten().nonzero().flatten().tolist()
    if len(starts) == len(segments):
        return None
    return tuple(stop - start for start, stop in pairwise([*starts, segments.numel()]))


def init_rows(
    name: str, start: int, stop: int, model: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Rows [start, stop) of the initial `embedding` or `output` matrix [stop - start, H].

    Blocks of rows have generators of their own: a shard draws the same values as the whole matrix would.
    """
    rows = torch.empty(stop - start, model.hidden_size, dtype=dtype, device=device)
    for block in range(start // _ROWS_PER_BLOCK, math.ceil(stop / _ROWS_PER_BLOCK)):
        first = block * _ROWS_PER_BLOCK
        values = torch.randn(_ROWS_PER_BLOCK, model.hidden_size, generator=_generator(seed, f"{name} {block}"))
        low, high = max(start, first), min(stop, first + _ROWS_PER_BLOCK)
        rows[low - start : high - start] = values[low - first : high - first] * model.init_std
    return rows


def _generator(seed: int, what: str) -> torch.Generator:
    """A generator for `what`, independent of all others of the same seed."""
    mixed = seed
    for byte in what.encode():
        mixed = (mixed * 1_000_003 + byte) % (1 << 63)
    return torch.Generator().manual_seed(mixed)


@torch.no_grad()
def _initialise(layer: nn.Module, model: ModelConfig, generator: torch.Generator) -> None:
    """Normal with init_std, smaller by sqrt(2 L) where a matrix writes to the residual stream; norms are ones."""
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        writes = "linear_proj" in name or "linear_fc2" in name
        std = model.init_std / math.sqrt(2 * model.num_layers) if writes else model.init_std
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
