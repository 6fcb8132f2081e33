"""The Hugging Face tensors that make up each of our tensors, and the order of their rows.

Our tensors follow megatron-core.  q, k and v are one matrix whose rows are interleaved by query
group.  The gate and up projections are one matrix, gate above up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vp_train.config import ModelConfig
from vp_train.model.shape import head_size, is_gated


@dataclass(frozen=True, slots=True)
class Entry:
    """One of our tensors, and the Hugging Face tensors that it is made of.

    It consists of parts, one per element of `rows`: part i has shape (rows[i], *width).  Our
    tensor, of shape (sum(rows), *width), consists of `groups` equal blocks.  Block g is the
    concatenation of block g of every part.

    theirs: the name of each part, or the only name of a tensor in which the parts are stacked.
    transposed: theirs are stored as (*width, rows).
    """

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    width: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of our tensor."""
        return (sum(self.rows), *self.width)

    @property
    def their_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each Hugging Face tensor, by name."""
        rows = (sum(self.rows),) if self._stacked else self.rows
        shapes = [(number, *self.width) for number in rows]
        if self.transposed:
            shapes = [shape[::-1] for shape in shapes]
        return dict(zip(self.theirs, shapes, strict=True))

    @property
    def _stacked(self) -> bool:
        return len(self.theirs) < len(self.rows)

    def join(self, theirs: Sequence[Tensor]) -> Tensor:
        """Build our tensor from theirs, given in the order of `theirs`."""
        parts = [self._turned(tensor) for tensor in theirs]
        if self._stacked:
            parts = list(torch.split(parts[0], list(self.rows)))
        if len(parts) == 1:
            return parts[0].contiguous()
        return torch.cat([self._grouped(part) for part in parts], 1).flatten(0, 1)

    def split(self, ours: Tensor) -> list[Tensor]:
        """Split our tensor into theirs, in the order of `theirs`."""
        sizes = [rows // self.groups for rows in self.rows]
        parts = [part.flatten(0, 1) for part in torch.split(self._grouped(ours), sizes, 1)]
        if self._stacked:
            parts = [torch.cat(parts)]
        return [self._turned(part).contiguous() for part in parts]

    def _turned(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.transposed else tensor

    def _grouped(self, tensor: Tensor) -> Tensor:
        """Reshape [rows, ...] to [groups, rows / groups, ...]."""
        return tensor.reshape(self.groups, -1, *tensor.shape[1:])


# What a sandwich of norms calls the norm before the MLP; without it the norm after attention has
# the name that other models give to the one before the MLP.
_BETWEEN = "pre_feedforward_layernorm"


@dataclass(frozen=True, slots=True)
class Names:
    """The names that an architecture has for its tensors.

    prefix: before all names but that of the output layer; a file of the model without an output
        layer has none.
    parts: the names of the tensors, or the only one in which they are stacked, of each of our
        tensors in a layer, without .weight and .bias.
    transposed: whether matrices of linear layers are stored as [inputs, outputs].
    """

    prefix: str = "model."
    embedding: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    parts: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {
            "input_layernorm": ("input_layernorm",),
            "self_attention.linear_qkv": (
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
            ),
            "self_attention.q_layernorm": ("self_attn.q_norm",),
            "self_attention.k_layernorm": ("self_attn.k_norm",),
            "self_attention.linear_proj": ("self_attn.o_proj",),
            "self_attn_bda.norm": ("post_attention_layernorm",),
            "pre_mlp_layernorm": ("post_attention_layernorm",),
            "mlp_bda.norm": ("post_feedforward_layernorm",),
            "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
            "mlp.linear_fc2": ("mlp.down_proj",),
        }
    )
    transposed: bool = False


LLAMA = Names()
PHI3 = Names(
    parts=LLAMA.parts
    | {  # type: ignore[operator]
        "self_attention.linear_qkv": ("self_attn.qkv_proj",),
        "mlp.linear_fc1": ("mlp.gate_up_proj",),
    }
)
GPT2 = Names(
    prefix="transformer.",
    embedding="wte",
    layers="h",
    final_norm="ln_f",
    parts={
        "input_layernorm": ("ln_1",),
        "self_attention.linear_qkv": ("attn.c_attn",),
        "self_attention.linear_proj": ("attn.c_proj",),
        "pre_mlp_layernorm": ("ln_2",),
        "mlp.linear_fc1": ("mlp.c_fc",),
        "mlp.linear_fc2": ("mlp.c_proj",),
    },
    transposed=True,
)
OUTPUT = "lm_head.weight"


def entries(model: ModelConfig, names: Names = LLAMA) -> Iterator[Entry]:
    """Yield an entry for every parameter of the model, in the order of its layers.

    `names` must have those of a family that can express the model.
    """
    h, prefix = model.hidden_size, names.prefix
    embedding = (f"{prefix}{names.embedding}.weight",)
    yield Entry("embedding.weight", embedding, (model.vocab_size,), (h,))
    if model.positions == "learned":
        yield Entry("positions", (f"{prefix}wpe.weight",), (model.seq_length,), (h,))
    for layer in range(model.num_layers):
        ours, theirs = f"layers.{layer}.layer.", f"{prefix}{names.layers}.{layer}."
        yield from _layer(model, names, ours, theirs)
    yield from _norm(model, "final_norm", f"{prefix}{names.final_norm}", h)
    if not model.tied_embeddings:
        yield Entry("output.weight", (OUTPUT,), (model.vocab_size,), (h,))


def _norm(model: ModelConfig, ours: str, theirs: str, size: int) -> Iterator[Entry]:
    for kind in ("weight", "bias") if model.normalisation == "layernorm" else ("weight",):
        yield Entry(f"{ours}.{kind}", (f"{theirs}.{kind}",), (size,))


def _layer(model: ModelConfig, names: Names, ours: str, theirs: str) -> Iterator[Entry]:
    h, f, d = model.hidden_size, model.ffn_hidden_size, head_size(model)
    q, kv, groups = model.num_heads * d, model.num_query_groups * d, model.num_query_groups

    def linear(
        name: str, rows: Sequence[int], width: int, bias: bool, groups: int = 1
    ) -> Iterator[Entry]:
        for kind in ("weight", "bias") if bias else ("weight",):
            yield Entry(
                f"{ours}{name}.{kind}",
                tuple(f"{theirs}{part}.{kind}" for part in names.parts[name]),
                tuple(rows),
                (width,) if kind == "weight" else (),
                groups,
                names.transposed and kind == "weight",
            )

    def norm(name: str, size: int = h) -> Iterator[Entry]:
        source = names.parts[name][0]
        if name == "pre_mlp_layernorm" and model.post_norms:
            source = _BETWEEN
        return _norm(model, f"{ours}{name}", f"{theirs}{source}", size)

    if model.pre_norms:
        yield from norm("input_layernorm")
    with_bias = model.qkv_bias or model.linear_bias
    yield from linear("self_attention.linear_qkv", (q, kv, kv), h, with_bias, groups)
    if model.qk_norm:
        yield from norm("self_attention.q_layernorm", q if model.qk_norm_whole else d)
        yield from norm("self_attention.k_layernorm", kv if model.qk_norm_whole else d)
    yield from linear("self_attention.linear_proj", (h,), q, model.linear_bias)
    if model.post_norms:
        yield from norm("self_attn_bda.norm")
    if model.pre_norms:
        yield from norm("pre_mlp_layernorm")
    if model.post_norms:
        yield from norm("mlp_bda.norm")
    columns = 2 if is_gated(model) else 1  # gate and up
    yield from linear("mlp.linear_fc1", (f,) * columns, h, model.linear_bias)
    yield from linear("mlp.linear_fc2", (h,), f, model.linear_bias)
