"""The Hugging Face tensors that make up each of our tensors, and the order of their rows.

Our tensors follow megatron-core.  q, k and v are one matrix whose rows are interleaved by query
group.  The gate and up projections are one matrix, gate above up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vp_train.config import ModelConfig
from vp_train.model.shape import head_size, is_gated


@dataclass(frozen=True, slots=True)
class Entry:
    """One of our tensors, and the Hugging Face tensors that it is made of.

    `theirs[i]` has shape (rows[i], *width).  Our tensor, of shape (sum(rows), *width), consists of
    `groups` equal blocks.  Block g is the concatenation of block g of every one of theirs.
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    width: tuple[int, ...] = ()
    groups: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of our tensor."""
        return (sum(self.rows), *self.width)

    @property
    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each Hugging Face tensor, by name."""
        return {
            name: (rows, *self.width) for name, rows in zip(self.theirs, self.rows, strict=True)
        }

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Build our tensor from theirs, given in the order of `theirs`."""
        if len(theirs) == 1:
            return theirs[0]
        return torch.cat([self._grouped(part) for part in theirs], 1).flatten(0, 1)

    def split(self, ours: Tensor) -> list[Tensor]:
        """Split our tensor into theirs, in the order of `theirs`."""
        if len(self.theirs) == 1:
            return [ours]
        sizes = [rows // self.groups for rows in self.rows]
        return [part.flatten(0, 1) for part in torch.split(self._grouped(ours), sizes, 1)]

    def _grouped(self, tensor: Tensor) -> Tensor:
        """Reshape [rows, ...] to [groups, rows / groups, ...]."""
        return tensor.reshape(self.groups, -1, *tensor.shape[1:])


def entries(model: ModelConfig) -> Iterator[Entry]:
    """Yield an entry for every parameter of the model, in the order of its layers."""
    h = model.hidden_size
    yield Entry("embedding.weight", ("model.embed_tokens.weight",), (model.vocab_size,), (h,))
    for layer in range(model.num_layers):
        yield from _layer(model, f"layers.{layer}.layer.", f"model.layers.{layer}.")
    yield Entry("final_norm.weight", ("model.norm.weight",), (h,))
    if not model.tied_embeddings:
        yield Entry("output.weight", ("lm_head.weight",), (model.vocab_size,), (h,))


def _layer(model: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    h, f, d = model.hidden_size, model.ffn_hidden_size, head_size(model)
    q, kv = model.num_heads * d, model.num_query_groups * d

    def linear(
        name: str,
        parts: Sequence[str],
        rows: Sequence[int],
        width: int,
        bias: bool,
        groups: int = 1,
    ) -> Iterator[Entry]:
        for kind in ("weight", "bias") if bias else ("weight",):
            sources = tuple(f"{theirs}{part}.{kind}" for part in parts)
            yield Entry(
                f"{ours}{name}.{kind}",
                sources,
                tuple(rows),
                (width,) if kind == "weight" else (),
                groups,
            )

    def norm(name: str, source: str, size: int = h) -> Entry:
        return Entry(f"{ours}{name}.weight", (f"{theirs}{source}.weight",), (size,))

    yield norm("input_layernorm", "input_layernorm")
    parts, with_bias = (
        [f"self_attn.{name}_proj" for name in "qkv"],
        model.qkv_bias or model.linear_bias,
    )
    yield from linear(
        "self_attention.linear_qkv", parts, (q, kv, kv), h, with_bias, model.num_query_groups
    )
    if model.qk_norm:
        yield norm("self_attention.q_layernorm", "self_attn.q_norm", d)
        yield norm("self_attention.k_layernorm", "self_attn.k_norm", d)
    yield from linear(
        "self_attention.linear_proj", ["self_attn.o_proj"], (h,), q, model.linear_bias
    )
    if model.post_norms:
        yield norm("self_attn_bda.norm", "post_attention_layernorm")
        yield norm("pre_mlp_layernorm", "pre_feedforward_layernorm")
        yield norm("mlp_bda.norm", "post_feedforward_layernorm")
    else:
        yield norm("pre_mlp_layernorm", "post_attention_layernorm")
    gate = ["mlp.gate_proj", "mlp.up_proj"] if is_gated(model) else ["mlp.up_proj"]
    yield from linear("mlp.linear_fc1", gate, (f,) * len(gate), h, model.linear_bias)
    yield from linear("mlp.linear_fc2", ["mlp.down_proj"], (h,), f, model.linear_bias)
