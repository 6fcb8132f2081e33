"""Megatron-core's transformer layer as one module that can be built on any device.

Megatron builds the modules of a layer and names their parameters.  The forward is ours, because
megatron's has no place where the elementwise work of neighbours could be one function.

The only importer of `megatron.core` layers.  The import takes seconds, so it happens when the first
layer is built.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vp_train.config import ModelConfig
from vp_train.model.attention import (
    Documents,
    Rule,
    attend_documents,
    attend_flexibly,
    block_attention,
    whole_sequences,
)
from vp_train.model.elementwise import Fuse, Gate, Gelu, Heads, SplitHeads, plain
from vp_train.model.linear import (
    PLAIN,
    ColumnLinear,
    LateInput,
    LinearProducts,
    RowLinear,
    SequenceSplit,
    WeightGradStore,
)
from vp_train.model.norm import Addend, Norm, build_norm, norm_rule
from vp_train.model.shape import head_size, is_gated
from vp_train.quiet import quiet_deprecations, quiet_megatron


class CoreAttention(nn.Module):
    """Causal attention in the place of megatron's, which always allocates on CUDA.

    It uses torch's kernels where they support the case, else `attention.block_attention`.  `window`
    is the number of tokens that a query sees, None for all earlier ones.

    Documents packed into a sequence do not use a mask.  Its s^2 entries would be kept for the
    backward, the kernels would also compute the hidden scores, and flash attention on CUDA accepts
    none.  On CUDA one kernel computes all documents; elsewhere there is one call per document.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        *,
        softmax_scale: float | None = None,
        softcap: float | None,
        window: int | None,
        **_: object,
    ) -> None:
        super().__init__()
        self._scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self._softcap, self._window = softcap, window

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Documents | None,
        *_: object,
        **__: object,
    ) -> Tensor:
        """Attend: query [b, heads, s, d], key and value [b, groups, s, d] -> [s * b, heads * d].

        With `documents`, attention stays within each of them.
        """
        b, s = len(query), query.shape[2]
        windowed = self._window is not None and self._window < s
        if documents is None and query.is_cuda and (windowed or self._softcap is not None):
            # The kernels for these cases on CUDA take documents, here one of every sequence.
            documents = whole_sequences(query.device, b, s)
        if documents is None:
            return self._attend(query, key, value)
        q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
        context = None
        if self._softcap is None:
            context = attend_documents(q, k, v, documents, self._scale, self._window)
        if context is None:
            rule = Rule(self._scale, self._softcap, self._window)
            context = attend_flexibly(q, k, v, documents, rule)
        if context is None:
            pieces = zip(
                *(torch.split(tensor, list(documents.lengths)) for tensor in (q, k, v)),
                strict=True,
            )
            context = torch.cat(
                [self._attend(*(part.transpose(0, 1)[None] for part in piece)) for piece in pieces]
            )
        return context.view(b, s, -1).transpose(0, 1).flatten(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend as `forward` does, within whole sequences."""
        window = self._window
        if window is not None and window >= query.shape[2]:
            window = None
        if self._softcap is not None or window is not None:
            q, k, v = (tensor.permute(2, 0, 1, 3) for tensor in (query, key, value))
            context = block_attention(q, k, v, Rule(self._scale, self._softcap, window))
            return context.flatten(0, 1)
        grouped = query.shape[1] != key.shape[1]
        context = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self._scale, enable_gqa=grouped
        )
        b, heads, s, d = context.shape
        return context.permute(2, 0, 1, 3).reshape(s * b, heads * d)


def rotary_table(
    model: ModelConfig, *, local: bool, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return cosines and sines of rotary embeddings (arXiv 2104.09864).

    They are [2, s, 1, 1, 1, head_size / 2], for queries and keys [s, b, groups, heads, head_size].

    They are computed in fp64 and rounded to `dtype`.  With `local` the base is that of local
    layers, if the model has one; then there is no scaling.
    """
    size = head_size(model)
    own = local and model.rope_local_base is not None
    base = model.rope_local_base if own and model.rope_local_base is not None else model.rope_base
    frequencies = base ** (-torch.arange(0, size, 2, dtype=torch.float64, device=device) / size)
    if not own:
        frequencies = _scaled(frequencies, model)
    angles = torch.outer(
        torch.arange(model.seq_length, dtype=torch.float64, device=device), frequencies
    )
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)[:, :, None, None, None]


def _scaled(frequencies: Tensor, model: ModelConfig) -> Tensor:
    """Return the frequencies for a longer context than the model was trained with first.

    `linear` divides all of them by the factor, `llama3` and `yarn` only the low ones.
    """
    if model.rope_scaling == "none":
        return frequencies
    slower = frequencies / model.rope_factor
    if model.rope_scaling == "linear":
        return slower
    turns = frequencies * model.rope_original_length / (2 * math.pi)
    if model.rope_scaling == "yarn":
        return _yarn(frequencies, slower, model)
    kept = (
        (turns - model.rope_low_frequency) / (model.rope_high_frequency - model.rope_low_frequency)
    ).clamp(0, 1)
    return kept * frequencies + (1 - kept) * slower


def _yarn(frequencies: Tensor, slower: Tensor, model: ModelConfig) -> Tensor:
    """Blend frequencies and slower ones by their index, as YaRN does (arXiv 2309.00071).

    The ramp begins and ends at whole indices: those with rope_high_frequency and with
    rope_low_frequency turns.
    """
    size = head_size(model)

    def index(turns: float) -> float:
        ratio = math.log(model.rope_original_length / (turns * 2 * math.pi))
        return size * ratio / (2 * math.log(model.rope_base))

    first = max(math.floor(index(model.rope_high_frequency)), 0)
    last = min(math.ceil(index(model.rope_low_frequency)), size - 1)
    pairs = torch.arange(len(frequencies), dtype=frequencies.dtype, device=frequencies.device)
    divided = ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
    return divided * slower + (1 - divided) * frequencies


def _softmax_scale(model: ModelConfig) -> float | None:
    """Return what scores are multiplied by, None for 1 / sqrt(head_size).

    YaRN multiplies queries and keys by a factor, so scores by its square.
    """
    if model.rope_scaling != "yarn":
        return None if model.attention_divisor is None else model.attention_divisor**-0.5
    factor = model.rope_attention_factor
    if factor is None:
        factor = 0.1 * math.log(model.rope_factor) + 1
    divisor = head_size(model) if model.attention_divisor is None else model.attention_divisor
    return float(divisor**-0.5 * factor**2)


_MLP = ("layer.pre_mlp_layernorm.", "layer.mlp.", "layer.mlp_bda.")  # parts of a layer's MLP half


@dataclass(frozen=True, slots=True)
class _Parts:
    """The modules of a layer that its forward calls; a norm that the model lacks is None."""

    input_norm: Norm | None
    qkv: nn.Module
    q_norm: Norm | None
    k_norm: Norm | None
    core_attention: nn.Module
    projection: nn.Module
    attention_addend: nn.Module
    mlp_norm: Norm | None
    fc1: nn.Module
    fc2: nn.Module
    mlp_addend: nn.Module

    @classmethod
    def of(cls, layer: nn.Module) -> _Parts:
        """Return the parts of megatron's `layer`."""

        def norm(name: str) -> Norm | None:
            module = layer.get_submodule(name)
            return module if isinstance(module, Norm) else None

        return cls(
            norm("input_layernorm"),
            layer.get_submodule("self_attention.linear_qkv"),
            norm("self_attention.q_layernorm"),
            norm("self_attention.k_layernorm"),
            layer.get_submodule("self_attention.core_attention"),
            layer.get_submodule("self_attention.linear_proj"),
            layer.get_submodule("self_attn_bda"),
            norm("pre_mlp_layernorm"),
            layer.get_submodule("mlp.linear_fc1"),
            layer.get_submodule("mlp.linear_fc2"),
            layer.get_submodule("mlp_bda"),
        )


class DecoderLayer(nn.Module):
    """Decoder layer `index` of the whole model: norm, attention, norm, MLP, without dropout.

    Weights are uninitialised.

    group: the tensor-parallel ranks, each with a part of the heads and of the feed-forward width.
    store: takes the weight gradients.
    products: form the products of the linear layers.
    fuse: how elementwise work runs.
    recompute: `none`, `selective` or `full`, as in ParallelConfig.
    split_sequences: sequence parallelism: x is this rank's part of every sequence.
    """

    def __init__(
        self,
        model: ModelConfig,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        group: dist.ProcessGroup,
        store: WeightGradStore,
        products: LinearProducts = PLAIN,
        fuse: Fuse = plain,
        recompute: str = "none",
        split_sequences: bool = False,
    ) -> None:
        super().__init__()
        with quiet_megatron():
            self.layer = _build(
                model, index, dtype, device, group, store, products, fuse, split_sequences
            )
        quiet_deprecations()
        self._parts = _Parts.of(self.layer)
        self._store, self._fuse, self._activation = store, fuse, model.activation
        tp = group.size()
        self._heads = Heads(
            model.num_heads // tp,
            model.num_query_groups // tp,
            head_size(model),
            norm_rule(model) if model.qk_norm else None,
        )
        self._call_on_middle: Callable[[], None] | None = None
        self._recompute = recompute

    def on_middle(self, call: Callable[[], None]) -> None:
        """Call `call` in every forward between attention and MLP, before the MLP's norm is read."""
        self._call_on_middle = call

    def halves(self) -> tuple[list[str], list[str]]:
        """Return the names of the parameters of attention and of the MLP, with their norms."""
        names = [name for name, _ in self.named_parameters()]
        of_mlp = [name for name in names if name.startswith(_MLP)]
        return [name for name in names if name not in of_mlp], of_mlp

    def forward(
        self,
        x: Tensor,
        num_sequences: int,
        rotary: tuple[Tensor, Tensor] | None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Map [T, h] to [T, h], for T tokens in the order of [s, b].

        num_sequences: b.
        rotary: the cosines and sines of `rotary_table`, None without rotary embeddings.  Positions
            are not reset at a document's start, because scores depend only on their differences.
        """
        run = partial(self._run, b=num_sequences, rotary=rotary, documents=documents)
        y: Tensor = self._again("full", run, x)
        return y

    def _again(self, part: str, function: Callable[[Tensor], Any], x: Tensor) -> Any:
        """Return function(x), which the backward computes again if it recomputes this `part`."""
        if self._recompute != part:
            return function(x)
        # A layer draws no random numbers, so there is no RNG state to preserve.
        result: Any = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
        return result

    def _run(
        self,
        x: Tensor,
        b: int,
        rotary: tuple[Tensor, Tensor] | None,
        documents: Documents | None,
    ) -> Tensor:
        parts = self._parts
        x, normed = _normed(parts.input_norm, x, None)
        attend = partial(self._attend, b=b, rotary=rotary, documents=documents)
        added = parts.attention_addend(*self._again("selective", attend, normed))
        if self._call_on_middle is not None:
            self._call_on_middle()
        x, normed = _normed(parts.mlp_norm, added, x)
        added = parts.mlp_addend(*self._feed_forward(normed))
        y: Tensor = x + added
        return y

    def _attend(
        self,
        x: Tensor,
        b: int,
        rotary: tuple[Tensor, Tensor] | None,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output of attention [T, h], and a bias that it still lacks."""
        parts = self._parts
        of_q, of_k = (
            None if norm is None else norm.weight for norm in (parts.q_norm, parts.k_norm)
        )
        (q, k, v), _ = parts.qkv(x, SplitHeads(self._heads, b, rotary, (of_q, of_k), self._fuse))
        y: tuple[Tensor, Tensor | None] = parts.projection(parts.core_attention(q, k, v, documents))
        return y

    def _feed_forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output of the MLP [T, h], and a bias that it still lacks."""
        parts, late = self._parts, None
        if self._activation == "gelu":
            h, _ = parts.fc1(x, Gelu())
        else:
            late = LateInput(self._store)
            h, _ = parts.fc1(x, Gate(self._activation, late, self._fuse))
        y: tuple[Tensor, Tensor | None] = parts.fc2(h, late)
        return y


def _normed(norm: Norm | None, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return residual + x, or x without a residual, and its norm; without a norm that twice."""
    if norm is not None:
        return norm.after(x, residual)
    total = x if residual is None else residual + x
    return total, total


def _build(
    model: ModelConfig,
    index: int,
    dtype: torch.dtype,
    device: torch.device,
    group: dist.ProcessGroup,
    store: WeightGradStore,
    products: LinearProducts,
    fuse: Fuse,
    split_sequences: bool,
) -> nn.Module:
    """Return megatron-core's layer `index`, with our linear functions, norms and attention."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    config = _transformer_config(model, dtype, device, group.size())
    spec = get_gpt_layer_local_spec(normalization=config.normalization, qk_layernorm=model.qk_norm)
    _set_linears(spec.submodules, model, group, store, products, split_sequences)
    _set_norms(spec.submodules, model, dtype, device, fuse)
    window = model.sliding_window if model.is_local(index) else None
    spec.submodules.self_attention.submodules.core_attention = partial(
        CoreAttention, softcap=model.attention_softcap, window=window
    )
    groups = ProcessGroupCollection()
    groups.tp = groups.pp = groups.cp = group  # layers use only tp; the others must exist
    layer: nn.Module = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    return layer.to(device=device, dtype=dtype)


def _transformer_config(
    model: ModelConfig, dtype: torch.dtype, device: torch.device, tensor_parallel: int
) -> Any:
    """Return megatron-core's TransformerConfig of the model's layers."""
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=head_size(model),
        softmax_scale=_softmax_scale(model),
        ffn_hidden_size=model.ffn_hidden_size,
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[model.normalisation],
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=is_gated(model),
        activation_func=nn.functional.silu
        if model.activation == "swiglu"
        else partial(nn.functional.gelu, approximate="tanh"),
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=tensor_parallel,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
    )


def _set_linears(
    parts: Any,
    model: ModelConfig,
    group: dist.ProcessGroup,
    store: WeightGradStore,
    products: LinearProducts,
    split_sequences: bool,
) -> None:
    """Put our linear functions into the specification of a layer's parts."""
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.spec_utils import ModuleSpec

    attention, mlp = parts.self_attention.submodules, parts.mlp.submodules
    sequence, reduce = None, mappings.reduce_from_tensor_model_parallel_region
    if split_sequences:
        sequence, reduce = SequenceSplit(group), _scatter_sum
    column: dict[str, Any] = {"store": store, "products": products, "sequence": sequence}
    row = {"store": store, "products": products, "reduce": reduce}
    attention.linear_qkv = partial(ColumnLinear, **column)
    attention.linear_proj = mlp.linear_fc2 = ModuleSpec(module=RowLinear, params=row)
    columns = 2 if is_gated(model) else 1  # gate and up
    mlp.linear_fc1 = ModuleSpec(module=ColumnLinear, params=column | {"parts": columns})


def _set_norms(
    parts: Any, model: ModelConfig, dtype: torch.dtype, device: torch.device, fuse: Fuse
) -> None:
    """Put our norms into the specification of a layer's parts: before, within and after them."""
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec

    common = {"rule": norm_rule(model), "fuse": fuse}
    norm = ModuleSpec(module=Norm, params=common) if model.pre_norms else IdentityOp
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    if model.qk_norm:
        attention = parts.self_attention.submodules
        whole = (model.num_heads, model.num_query_groups) if model.qk_norm_whole else (1, 1)
        attention.q_layernorm, attention.k_layernorm = (
            ModuleSpec(module=Norm, params=common | {"num_heads": number}) for number in whole
        )
    parts.self_attn_bda, parts.mlp_bda = (
        ModuleSpec(
            module=Addend,
            params={
                "norm": build_norm(model, dtype, device, fuse) if model.post_norms else None,
                "multiplier": model.residual_multiplier,
            },
        )
        for _ in range(2)
    )


def _scatter_sum(y: Tensor, group: dist.ProcessGroup) -> Tensor:
    from megatron.core.tensor_parallel import mappings

    part: Tensor = mappings.reduce_scatter_to_sequence_parallel_region(y, group=group)
    return part


def split_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's part [s / n, b, h] of x [s, b, h], which is equal on all n ranks."""
    from megatron.core.tensor_parallel import mappings

    part: Tensor = mappings.scatter_to_sequence_parallel_region(x, group=group)
    return part


def join_sequence(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return x [s, b, h] from the parts [s / n, b, h] of all ranks of `group`.

    All ranks must then compute the same: the backward takes this rank's part of the gradient.
    """
    from megatron.core.tensor_parallel import mappings

    whole: Tensor = mappings.gather_from_sequence_parallel_region(
        x, tensor_parallel_output_grad=False, group=group
    )
    return whole


def set_collectives(all_gather: Callable[..., Any], reduce_scatter: Callable[..., Any]) -> None:
    """Let megatron-core use these collectives; it has taken torch's when it was imported."""
    from megatron.core.tensor_parallel import mappings

    mappings.dist_all_gather_func, mappings.dist_reduce_scatter_func = all_gather, reduce_scatter
