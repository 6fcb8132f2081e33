"""Sizes of a model that follow from its configuration: parameters, FLOPs, activation bytes.  Pure arithmetic."""

from __future__ import annotations

from vp_train.config import ModelConfig


def kv_size(model: ModelConfig) -> int:
    """Width of the keys, and of the values."""
    return model.num_query_groups * model.hidden_size // model.num_heads


def layer_parameters(model: ModelConfig) -> int:
    """Weights of one layer: qkv and output projections, gate, up and down projections, two norms."""
    h, f = model.hidden_size, model.ffn_hidden_size
    return 2 * h * h + 2 * h * kv_size(model) + 3 * h * f + 2 * h


def num_parameters(model: ModelConfig) -> int:
    """All weights; a tied embedding counts once."""
    vocabulary = model.vocab_size * model.hidden_size * (1 if model.tied_embeddings else 2)
    return model.num_layers * layer_parameters(model) + model.hidden_size + vocabulary


def layer_flops(model: ModelConfig, num_tokens: int) -> int:
    """Forward FLOPs of one layer for whole sequences of `num_tokens` tokens together; attention counts in full, not causal."""
    matrices = layer_parameters(model) - 2 * model.hidden_size
    return 2 * matrices * num_tokens + 4 * model.seq_length * num_tokens * model.hidden_size


def head_in_layers(model: ModelConfig) -> float:
    """FLOPs of the output layer over those of one transformer layer; 6V / (72h + 12s) for a GPT layer with ffn = 4h."""
    return 2 * model.vocab_size * model.hidden_size / layer_flops(model, 1)


def layer_activation_bytes(model: ModelConfig, micro_batch_size: int, item_bytes: int) -> int:
    """Bytes one layer keeps from its forward to its backward, for one microbatch.

    Per token: the input, two normalised copies and a scale of each norm; q and k after RoPE and the whole qkv, for v is a
    view of it; the output and the log-sums of attention; what SwiGLU keeps: gate and up, their silu, sigmoid and product.
    """
    h, f, kv = model.hidden_size, model.ffn_hidden_size, kv_size(model)
    per_token = 2 * (3 * h + 1) + (h + kv) + (h + 2 * kv) + h + model.num_heads + 5 * f
    angles = 4 * model.seq_length * h // model.num_heads
    return item_bytes * (micro_batch_size * model.seq_length * per_token + angles)


def layer_input_bytes(model: ModelConfig, micro_batch_size: int, item_bytes: int) -> int:
    """Bytes of the input of one layer for one microbatch: all that is kept of a layer that is computed again."""
    return item_bytes * micro_batch_size * model.seq_length * model.hidden_size


def layer_weight_grad_bytes(model: ModelConfig, micro_batch_size: int, item_bytes: int) -> int:
    """Bytes one layer keeps from I to W for one microbatch: input and output gradient of its four linear layers."""
    h, f, kv = model.hidden_size, model.ffn_hidden_size, kv_size(model)
    per_token = (3 * h + f) + (h + 2 * kv) + h + 2 * f + h
    return item_bytes * micro_batch_size * model.seq_length * per_token


def final_norm_activation_bytes(model: ModelConfig, micro_batch_size: int, item_bytes: int) -> int:
    """Bytes the final norm keeps for one microbatch: its input, its normalised input and a scale per token."""
    return item_bytes * micro_batch_size * model.seq_length * (2 * model.hidden_size + 1)
