"""Sizes of a model that follow from its configuration: parameters, FLOPs, activation bytes.  Pure arithmetic."""

from __future__ import annotations

from dataclasses import replace

from vp_train.config import ModelConfig


def tensor_share(model: ModelConfig, tp: int) -> ModelConfig:
    """The model whose layers are what one of `tp` ranks has of each: a part of the heads and of the feed-forward width.

    Inputs, outputs and norms of a layer are whole on every rank.
    """
    return replace(
        model,
        num_heads=model.num_heads // tp,
        num_query_groups=model.num_query_groups // tp,
        head_size=head_size(model),
        ffn_hidden_size=model.ffn_hidden_size // tp,
    )


def head_size(model: ModelConfig) -> int:
    """Width of one head of queries, keys or values."""
    return model.hidden_size // model.num_heads if model.head_size is None else model.head_size


def query_size(model: ModelConfig) -> int:
    """Width of the queries, and of the output of attention."""
    return model.num_heads * head_size(model)


def kv_size(model: ModelConfig) -> int:
    """Width of the keys, and of the values."""
    return model.num_query_groups * head_size(model)


def is_gated(model: ModelConfig) -> bool:
    """Whether the MLP has a gate projection beside the one up."""
    return model.activation != "gelu"


def layer_matrix_parameters(model: ModelConfig) -> int:
    """Weights of the matrices of one layer: qkv and output projections, gate, up and down projections."""
    h, q = model.hidden_size, query_size(model)
    return (
        h * (2 * q + 2 * kv_size(model)) + (3 if is_gated(model) else 2) * h * model.ffn_hidden_size
    )


def layer_parameters(model: ModelConfig) -> int:
    """Weights of one layer: matrices, biases and norms."""
    h, qkv = model.hidden_size, query_size(model) + 2 * kv_size(model)
    biases = qkv if model.linear_bias or model.qkv_bias else 0
    if model.linear_bias:
        biases += 2 * h + (2 if is_gated(model) else 1) * model.ffn_hidden_size
    norms = (4 if model.post_norms else 2) * _norm_parameters(model)
    return (
        layer_matrix_parameters(model)
        + biases
        + norms
        + (2 * head_size(model) if model.qk_norm else 0)
    )


def num_parameters(model: ModelConfig) -> int:
    """All weights; a tied embedding counts once."""
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    layers = model.num_layers * layer_parameters(model)
    return layers + final_norm_parameters(model) + position_parameters(model) + vocabulary


def final_norm_parameters(model: ModelConfig) -> int:
    """Weights of the norm after the last layer."""
    return _norm_parameters(model)


def position_parameters(model: ModelConfig) -> int:
    """Weights that stage 0 has besides its layers and rows of the embedding."""
    return model.seq_length * model.hidden_size if model.positions == "learned" else 0


def _norm_parameters(model: ModelConfig) -> int:
    return (2 if model.normalisation == "layernorm" else 1) * model.hidden_size


def layer_flops(model: ModelConfig, num_tokens: int) -> int:
    """Forward FLOPs of one layer for whole sequences of `num_tokens` tokens together; attention counts in full, not causal.

    Where some layers see a window only, the mean over all layers.
    """
    window = min(model.sliding_window or model.seq_length, model.seq_length)
    seen = sum(
        window if model.is_local(layer) else model.seq_length for layer in range(model.num_layers)
    )
    attention = 4 * num_tokens * query_size(model) * seen // model.num_layers
    return 2 * layer_matrix_parameters(model) * num_tokens + attention


def recomputed_part(model: ModelConfig, recompute: str) -> float:
    """FLOPs that a backward runs again over those of a forward; attention runs as far as its output projection."""
    if recompute == "selective":
        projections = 2 * layer_matrix_parameters(model)
        attention = layer_flops(model, 1) - projections
        return (2 * model.hidden_size * (query_size(model) + 2 * kv_size(model)) + attention) / (
            projections + attention
        )
    return {"none": 0.0, "full": 1.0}[recompute]


def head_in_layers(model: ModelConfig) -> float:
    """FLOPs of the output layer over those of one transformer layer; 6V / (72h + 12s) for a GPT layer with ffn = 4h."""
    return 2 * model.vocab_size * model.hidden_size / layer_flops(model, 1)


def layer_activation_bytes(
    model: ModelConfig,
    micro_batch_size: int,
    item_bytes: int,
    *,
    fused_norms: bool = False,
    recompute: str = "none",
    sequence_ranks: int = 1,
) -> int:
    """Bytes one layer keeps from its forward to its backward, for one microbatch.  torch fuses an RMSNorm on CUDA.

    Per token: the norms; the inputs of attention and of the MLP; what attention keeps besides, unless it runs again; and what
    the activation of the MLP keeps: all it is given and its output, and with a gate also the two factors.  A layer that runs
    again as a whole keeps its input alone.  Norms and these inputs may be split over `sequence_ranks`.
    """
    if recompute == "full":
        return _input_bytes(model, micro_batch_size, item_bytes) // sequence_ranks
    norm_bytes = (
        (4 if model.post_norms else 2)
        * _norm_bytes(model, item_bytes, fused=fused_norms)
        // sequence_ranks
    )
    per_token = (
        2 * model.hidden_size // sequence_ranks
        + (5 if is_gated(model) else 2) * model.ffn_hidden_size
    )
    attention = (
        _attention_bytes(model, micro_batch_size, item_bytes, fused_norms)
        if recompute == "none"
        else 0
    )
    return micro_batch_size * model.seq_length * (item_bytes * per_token + norm_bytes) + attention


def _attention_bytes(
    model: ModelConfig, micro_batch_size: int, item_bytes: int, fused_norms: bool
) -> int:
    """What attention keeps of a microbatch besides its input.

    The whole qkv, for v is a view of it; q and k before the products; output and log-sums.  Norms of q and k keep these
    normalised, and where they work in fp32 on less also as they came.
    """
    q, kv, n = query_size(model), kv_size(model), model.num_heads
    per_token = (q + 2 * kv) + q
    if model.positions == "rope" or model.qk_norm:
        per_token += q + kv  # otherwise q and k are views of qkv as well
    if model.qk_norm and item_bytes < 4 and not fused_norms:
        per_token += 4 // item_bytes * (2 * (q + kv) + (n + model.num_query_groups))
    elif model.qk_norm:
        per_token += (q + kv) + (n + model.num_query_groups)
        if 1 < model.num_query_groups < n:
            per_token += q  # heads of several groups do not lie together in qkv
    if model.attention_softcap is None:
        per_token += n
    angles = 4 * model.seq_length * head_size(model) if model.positions == "rope" else 0
    return item_bytes * (micro_batch_size * model.seq_length * per_token + angles)


def _norm_bytes(model: ModelConfig, item_bytes: int, *, fused: bool) -> int:
    """What a norm keeps of a token besides its output: its input and statistics; an RMSNorm that is not fused works in fp32.

    It keeps its input, that normalised, and a scale.
    """
    precise = max(4, item_bytes)
    if model.normalisation == "layernorm":
        return item_bytes * model.hidden_size + 2 * precise
    return (
        item_bytes * model.hidden_size + precise if fused else precise * (2 * model.hidden_size + 1)
    )


def _input_bytes(model: ModelConfig, micro_batch_size: int, item_bytes: int) -> int:
    """[T, H], the input of a layer."""
    return item_bytes * micro_batch_size * model.seq_length * model.hidden_size


def embedding_activation_bytes(model: ModelConfig, micro_batch_size: int, item_bytes: int) -> int:
    """Bytes the first stage keeps for one microbatch besides its layers': its input, where that is not the first layer's."""
    changed = model.embedding_scale or model.positions == "learned"
    return _input_bytes(model, micro_batch_size, item_bytes) if changed else 0


def layer_weight_grad_bytes(model: ModelConfig, micro_batch_size: int, item_bytes: int) -> int:
    """Bytes one layer keeps from I to W for one microbatch: input and output gradient of its four linear layers."""
    h, f, q = model.hidden_size, model.ffn_hidden_size, query_size(model)
    inputs = h + q + h + f
    gradients = (q + 2 * kv_size(model)) + h + (2 if is_gated(model) else 1) * f + h
    return item_bytes * micro_batch_size * model.seq_length * (inputs + gradients)


def final_norm_activation_bytes(
    model: ModelConfig, micro_batch_size: int, item_bytes: int, *, fused_norms: bool = False
) -> int:
    """Bytes the final norm keeps for one microbatch."""
    return micro_batch_size * model.seq_length * _norm_bytes(model, item_bytes, fused=fused_norms)
