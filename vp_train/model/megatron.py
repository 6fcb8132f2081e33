"""Megatron-core's transformer layer, as one module this project can build on any device.

The only importer of `megatron.core` layers.  The import takes seconds, so it happens when the first layer is built.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vp_train.config import ModelConfig
from vp_train.model.linear import StoredLinear, WeightGradStore
from vp_train.quiet import quiet_megatron


class CoreAttention(nn.Module):
    """Causal attention by torch's scaled_dot_product_attention, in the place of megatron's, which allocates on CUDA.

    Documents packed into a sequence are attended to one by one rather than under a mask: the s^2 entries of a mask are kept for
    the backward, the kernels compute what it hides too, and flash attention on CUDA does not take one.
    """

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **_: object) -> None:
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, documents: tuple[int, ...] | None, *_: object, **__: object
    ) -> Tensor:
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d]; `documents` as `document_lengths`."""
        if documents is None:
            return self._attend(query, key, value)
        s, b = query.shape[:2]
        pieces = zip(*(torch.split(_in_order(tensor), list(documents)) for tensor in (query, key, value)), strict=True)
        return torch.cat([self._attend(q, k, v) for q, k, v in pieces]).view(b, s, -1).transpose(0, 1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        grouped = query.shape[2] != key.shape[2]
        context = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return context.permute(2, 0, 1, 3).flatten(2)


def _in_order(tensor: Tensor) -> Tensor:
    """[s, b, ...] -> [b * s, 1, ...], sequence after sequence."""
    return tensor.transpose(0, 1).flatten(0, 1).unsqueeze(1)


def rotary_table(seq_length: int, head_size: int, base: float, device: torch.device) -> Tensor:
    """The angles [s, 1, 1, head_size] of rotary embeddings (arXiv 2104.09864), in float64: megatron casts their sines."""
    frequencies = base ** (-torch.arange(0, head_size, 2, dtype=torch.float64, device=device) / head_size)
    angles = torch.outer(torch.arange(seq_length, dtype=torch.float64, device=device), frequencies)
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer: RMSNorm, grouped-query attention with RoPE, RMSNorm, SwiGLU; no biases, no dropout.

    `group` is the tensor-parallel process group, of size 1; `store` takes the weight gradients.  Weights are uninitialised.
    """

    def __init__(
        self, model: ModelConfig, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup, store: WeightGradStore
    ) -> None:
        super().__init__()
        with quiet_megatron():
            self.layer = _build(model, dtype, device, group, store)

    def forward(self, x: Tensor, angles: Tensor, documents: tuple[int, ...] | None = None) -> Tensor:
        """[s, b, h] -> [s, b, h]; `documents` as `stage.document_lengths`.

        Angles go on counting from one document to the next: scores depend on differences alone.
        """
        hidden: Tensor
        hidden, _ = self.layer(x, attention_mask=documents, rotary_pos_emb=angles)  # megatron only hands the mask on
        return hidden


def _build(
    model: ModelConfig, dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup, store: WeightGradStore
) -> nn.Module:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.spec_utils import ModuleSpec, build_module

    on_cpu = device.type == "cpu"
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_query_groups,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        use_cpu_initialization=on_cpu,
        perform_initialization=False,
    )
    groups = ProcessGroupCollection()
    groups.tp = groups.pp = groups.cp = group
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    attention.core_attention = CoreAttention
    attention.linear_qkv = partial(StoredLinear, store=store)
    attention.linear_proj = mlp.linear_fc1 = mlp.linear_fc2 = ModuleSpec(module=StoredLinear, params={"store": store})
    layer: nn.Module = build_module(spec, config=config, layer_number=1, pg_collection=groups)
    return layer.to(device=device, dtype=dtype)
