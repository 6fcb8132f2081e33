"""Sizes that follow from a model's configuration: parameters, FLOPs, activation bytes.

Pure arithmetic, without torch.
"""

from __future__ import annotations

from dataclasses import replace

from vp_train.config import ModelConfig


def tensor_share(model: ModelConfig, tp: int) -> ModelConfig:
    """Return a model whose layers have the size of one of `tp` tensor-parallel shares.

    A share has a part of the heads and of the feed-forward width.  Inputs, outputs and norms of a
    layer are whole on every rank.
    """
    if tp == 1:
        return model
    return replace(
        model,
        num_heads=model.num_heads // tp,
        num_query_groups=model.num_query_groups // tp,
        head_size=head_size(model),
        ffn_hidden_size=model.ffn_hidden_size // tp,
    )


def head_size(model: ModelConfig) -> int:
    """Return the width of one head of queries, keys or values."""
    return model.hidden_size // model.num_heads if model.head_size is None else model.head_size


def query_size(model: ModelConfig) -> int:
    """Return the width of the queries, which is that of the output of attention."""
    return model.num_heads * head_size(model)


def kv_size(model: ModelConfig) -> int:
    """Return the width of the keys, which is that of the values."""
    return model.num_query_groups * head_size(model)


def is_gated(model: ModelConfig) -> bool:
    """Return whether the MLP has a gate projection in addition to the up projection."""
    return model.activation != "gelu"


# The fewest values of the feed-forward width in a microbatch for which compiled code pays.  On an
# H100 it saves 12 % of a layer of llama3_8b (117 million values), which then takes 18.7 ms.  The
# host takes up to 6.3 ms to issue that layer, so those below about a third would wait for the host.
_PAYS_ON_CPU, _PAYS_ON_CUDA = 1 << 19, 42_000_000


def can_compile(model: ModelConfig) -> bool:
    """Return whether layers have elementwise work that can be compiled.

    LayerNorm and GELU are torch's own kernels.
    """
    return model.normalisation == "rmsnorm" or model.positions == "rope" or is_gated(model)


def compiles_layers(
    setting: str, model: ModelConfig, num_values: int, item_bytes: int, *, on_cuda: bool
) -> bool:
    """Return whether elementwise work of layers is compiled, if there is a compiler.

    setting: a value of run.compile; `auto` compiles where that takes less time.
    num_values: of the feed-forward width in a microbatch, on one tensor-parallel rank.
    """
    if setting == "off" or not can_compile(model):
        return False
    if setting == "on":
        return True
    if on_cuda:
        return num_values >= _PAYS_ON_CUDA
    return item_bytes == 2 and num_values >= _PAYS_ON_CPU


def linear_parameters(model: ModelConfig) -> tuple[int, int, int, int]:
    """Return the weights of the matrices qkv, output, up (with gate) and down of one layer."""
    h, q, f = model.hidden_size, query_size(model), model.ffn_hidden_size
    return h * (q + 2 * kv_size(model)), h * q, (2 if is_gated(model) else 1) * h * f, h * f


def layer_matrix_parameters(model: ModelConfig) -> int:
    """Return the number of weights in the matrices of one layer.

    These are the qkv, output, gate, up and down projections.
    """
    h, q = model.hidden_size, query_size(model)
    return (
        h * (2 * q + 2 * kv_size(model)) + (3 if is_gated(model) else 2) * h * model.ffn_hidden_size
    )


def layer_parameters(model: ModelConfig) -> int:
    """Return the number of weights of one layer: matrices, biases and norms."""
    h, qkv = model.hidden_size, query_size(model) + 2 * kv_size(model)
    biases = qkv if model.linear_bias or model.qkv_bias else 0
    if model.linear_bias:
        biases += 2 * h + (2 if is_gated(model) else 1) * model.ffn_hidden_size
    of_heads = 0
    if model.qk_norm:
        whole = query_size(model) + kv_size(model)
        of_heads = whole if model.qk_norm_whole else 2 * head_size(model)
    norms = num_norms(model) * _norm_parameters(model)
    return layer_matrix_parameters(model) + biases + norms + of_heads


def num_norms(model: ModelConfig) -> int:
    """Return the number of norms over hidden_size in a layer."""
    return 2 * model.pre_norms + 2 * model.post_norms


def num_parameters(model: ModelConfig) -> int:
    """Return the number of all weights; a tied embedding counts once."""
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    layers = model.num_layers * layer_parameters(model)
    return layers + final_norm_parameters(model) + position_parameters(model) + vocabulary


def final_norm_parameters(model: ModelConfig) -> int:
    """Return the number of weights of the norm after the last layer."""
    return _norm_parameters(model)


def position_parameters(model: ModelConfig) -> int:
    """Return the number of weights of the learned positions, which stage 0 holds."""
    return model.seq_length * model.hidden_size if model.positions == "learned" else 0


def _norm_parameters(model: ModelConfig) -> int:
    return (2 if model.normalisation == "layernorm" else 1) * model.hidden_size


def layer_flops(model: ModelConfig, num_tokens: int) -> int:
    """Return the forward FLOPs of one layer for whole sequences with `num_tokens` tokens in total.

    Attention counts in full, as if it were not causal.  If some layers have a sliding window, this
    is the mean over all layers.
    """
    window = min(model.sliding_window or model.seq_length, model.seq_length)
    seen = sum(
        window if model.is_local(layer) else model.seq_length for layer in range(model.num_layers)
    )
    attention = 4 * num_tokens * query_size(model) * seen // model.num_layers
    return 2 * layer_matrix_parameters(model) * num_tokens + attention


def recomputed_part(model: ModelConfig, recompute: str) -> float:
    """Return the recomputed FLOPs of a backward as a fraction of those of a forward.

    `selective` recomputes attention with its output projection.  `full` recomputes the layer up to
    the last tensor that its backward needs.
    """
    qkv, projection, _, down = linear_parameters(model)
    whole = layer_flops(model, 1)
    attention = whole - 2 * layer_matrix_parameters(model)
    repeated = {
        "none": 0,
        "selective": 2 * (qkv + projection) + attention,
        "full": whole if repeats_down_projection(model) else whole - 2 * down,
    }
    return repeated[recompute] / whole


def repeats_down_projection(model: ModelConfig) -> bool:
    """Return whether full recomputation forms the MLP's output again.

    Nothing needs it unless a norm follows.  A gated MLP does not keep that projection's input
    either, so the recomputation ends before it.
    """
    return model.post_norms or not is_gated(model)


def head_in_layers(model: ModelConfig) -> float:
    """Return the FLOPs of the output layer divided by those of one transformer layer.

    This is 6V / (72h + 12s) for a GPT layer with ffn = 4h.
    """
    return 2 * model.vocab_size * model.hidden_size / layer_flops(model, 1)


def layer_activation_bytes(
    model: ModelConfig,
    micro_batch_size: int,
    item_bytes: int,
    *,
    on_cuda: bool = False,
    recompute: str = "none",
    sequence_ranks: int = 1,
) -> int:
    """Return the bytes that one layer keeps from forward to backward for one microbatch.

    A layer keeps, per token: what its norms keep; the inputs of attention and of the MLP; what
    attention keeps internally, unless it is recomputed; and two tensors of the feed-forward width,
    gate and up, or input and output of an activation without a gate.  The output of one with a gate
    is formed again.  A layer that is recomputed as a whole keeps only its input.

    on_cuda: whether attention runs by the kernels for CUDA.
    recompute: `none`, `selective` or `full`.
    sequence_ranks: over how many ranks sequence parallelism splits the norms and the inputs.
    """
    if recompute == "full":
        return _input_bytes(model, micro_batch_size, item_bytes) // sequence_ranks
    norm_bytes = num_norms(model) * _norm_bytes(model, item_bytes) // sequence_ranks
    per_token = 2 * model.hidden_size // sequence_ranks + 2 * model.ffn_hidden_size
    attention = 0
    if recompute == "none":
        attention = _attention_bytes(model, micro_batch_size, item_bytes, on_cuda=on_cuda)
    return micro_batch_size * model.seq_length * (item_bytes * per_token + norm_bytes) + attention


def _attention_bytes(
    model: ModelConfig, micro_batch_size: int, item_bytes: int, *, on_cuda: bool
) -> int:
    """Return the bytes that attention keeps for one microbatch in addition to its input.

    It keeps q, k and v as they enter the products, and the output with its log-sums.  With norms of
    q and k it keeps the output of the qkv projection too, of which v is a view, and the statistics.
    """
    q, kv, n, groups = query_size(model), kv_size(model), model.num_heads, model.num_query_groups
    per_token = (q + 2 * kv) + q
    # On CUDA all kernels keep log-sums.
    statistics = n if model.attention_softcap is None or on_cuda else 0
    if model.qk_norm:
        per_token += q + kv
        statistics += 2 if model.qk_norm_whole else n + groups
    elif model.positions != "rope" and 1 < groups < n:
        per_token += q  # a copy: the heads of several groups are not contiguous in qkv
    precise = max(4, item_bytes)
    return micro_batch_size * model.seq_length * (item_bytes * per_token + precise * statistics)


def _norm_bytes(model: ModelConfig, item_bytes: int) -> int:
    """Return the bytes that a norm keeps per token in addition to its output.

    These are its input and statistics: one number, or two of a LayerNorm.
    """
    statistics = 2 if model.normalisation == "layernorm" else 1
    return item_bytes * model.hidden_size + max(4, item_bytes) * statistics


def _input_bytes(model: ModelConfig, micro_batch_size: int, item_bytes: int) -> int:
    """Return the bytes of the input [T, H] of a layer."""
    return item_bytes * micro_batch_size * model.seq_length * model.hidden_size


def embedding_activation_bytes(model: ModelConfig, micro_batch_size: int, item_bytes: int) -> int:
    """Return the bytes that the first stage keeps per microbatch in addition to its layers.

    That is its input, if scaling or learned positions make it differ from the first layer's input.
    """
    scaled = model.embedding_scale or model.embedding_multiplier != 1
    changed = scaled or model.positions == "learned"
    return _input_bytes(model, micro_batch_size, item_bytes) if changed else 0


def layer_weight_grad_bytes(model: ModelConfig, micro_batch_size: int, item_bytes: int) -> int:
    """Return the bytes that one layer keeps from pass I to pass W for one microbatch.

    These are the inputs and output gradients of its four linear layers.
    """
    h, f, q = model.hidden_size, model.ffn_hidden_size, query_size(model)
    inputs = h + q + h + f
    gradients = (q + 2 * kv_size(model)) + h + (2 if is_gated(model) else 1) * f + h
    return item_bytes * micro_batch_size * model.seq_length * (inputs + gradients)


def final_norm_activation_bytes(model: ModelConfig, micro_batch_size: int, item_bytes: int) -> int:
    """Return the bytes that the final norm keeps for one microbatch."""
    return micro_batch_size * model.seq_length * _norm_bytes(model, item_bytes)
