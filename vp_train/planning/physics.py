"""The seconds of matrix products, attention and elementwise kernels on one device.

A pass is a sum of three parts.  Each follows from shapes and from one rate of the device:

- a matrix product [m, k] x [k, n] runs in tiles, and tiles in waves over the multiprocessors, so
  that small products leave some of them idle;
- causal attention computes the half of the squares below the diagonal, and short sequences reach
  a smaller part of its rate;
- norms, activation functions, sums and rotations read and write memory.

Without a number of multiprocessors a device has one rate for all FLOPs and nothing else takes time.
Pure arithmetic, without torch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from vp_train.config import ConfigError, CostConfig, ModelConfig
from vp_train.model import shape

# Rows and columns of a tile of a product, and the rate of a full wave relative to the fastest one.
_TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.95), (128, 64, 0.8))
_FILL = 128  # values of the inner dimension that a tile takes to fill and drain its pipeline
_SPLITS = (1, 2, 4)  # parts of the inner dimension that tiles of their own may sum
_SHORT = 1_024  # tokens; sequences of this length reach half of the rate of attention
# A backward of attention over its forward: 2.5 times the products, at five sixths of the rate.  In
# the layer of llama3_8b on an H100 it was 2.86 and 3.02.
_ATTENTION_BACKWARD = 3.0
# torch's kernels on parts of rows, and its sums over tokens, reach half of the bandwidth: on an
# H100 a layer of llama3_8b that is not compiled takes 22.0 ms, and four sums for biases 95 us.
_SLOW = 2.0
_TERM_VALUES = 2 + 2.5 + 2.5  # that S and T move per token and hidden value: `terms_seconds`
_CAST = 1 + 2  # values of 2 bytes that a cast between 2 and 4 bytes moves
_FORWARD_KERNELS, _BACKWARD_KERNELS = 14, 40  # of a layer
# More of a norm that is cast: of each tensor, of the weight, and the sum of weight and centre.
_FORWARD_CASTS, _BACKWARD_CASTS = 4, 5


@dataclass(frozen=True, slots=True)
class Device:
    """The rates of one GPU.

    flops_per_second: of a large matrix product.
    attention_flops_per_second: of causal attention over long sequences, half of the squares.
    bytes_per_second: of elementwise kernels.
    kernel_seconds: fixed time of one kernel.
    multiprocessors: 0 for a device with one rate for all FLOPs.
    """

    flops_per_second: float
    attention_flops_per_second: float
    bytes_per_second: float
    kernel_seconds: float
    multiprocessors: int

    @classmethod
    def of(cls, cost: CostConfig) -> Device:
        """Return the device that `cost` describes.

        Raises ConfigError if it has only some of the rates.
        """
        names = ("matrix_flops_per_second", "attention_flops_per_second", "memory_bytes_per_second")
        product, attention, memory = rates = [getattr(cost, name) for name in names]
        if product is None and attention is None and memory is None:
            assert cost.flops_per_second is not None, "costs that are still open"
            return cls(cost.flops_per_second, cost.flops_per_second, math.inf, 0.0, 0)
        if product is None or attention is None or memory is None:
            given = ", ".join(
                f"{name}={'null' if rate is None else f'{rate:g}'}"
                for name, rate in zip(names, rates, strict=True)
            )
            raise ConfigError(f"cost: {given}; give all three, or none")
        kernel, multiprocessors = cost.kernel_seconds or 0.0, cost.multiprocessors or 0
        return cls(product, attention, memory, kernel, multiprocessors)

    @property
    def is_split(self) -> bool:
        """Return whether attention and bytes have rates of their own."""
        return self.bytes_per_second < math.inf

    def product(self, rows: int, columns: int, depth: int) -> float:
        """Return the seconds of [rows, depth] x [depth, columns]."""
        if not rows * columns * depth:
            return 0.0
        if not self.multiprocessors:
            return 2.0 * rows * columns * depth / self.flops_per_second
        area = _wave_area(self.multiprocessors, rows, columns, depth)
        return 2.0 * area / self.flops_per_second

    def moved(self, num_bytes: float) -> float:
        """Return the seconds of elementwise kernels that read and write these bytes."""
        return num_bytes / self.bytes_per_second


@functools.cache
def _wave_area(multiprocessors: int, rows: int, columns: int, depth: int) -> float:
    """Return rows x columns x depth of a product as if every wave were full and ideal.

    The product is at least as large.  The best tile is taken.
    """
    best = math.inf
    for height, width, rate in _TILES:
        tiles = math.ceil(rows / height) * math.ceil(columns / width)
        for parts in _SPLITS:
            waves = math.ceil(tiles * parts / multiprocessors)
            deep = math.ceil(depth / parts) + _FILL
            best = min(best, waves * multiprocessors * height * width * deep / rate)
    return best


class LayerSeconds(NamedTuple):
    """The seconds of one layer on one microbatch, without communication.

    `weight_grad` are the products dW of its four linear layers, `input_grad` the rest of a
    backward.  `selective` and `full` are the parts of `forward` that a backward with this
    recomputation repeats.
    """

    forward: float
    input_grad: float
    weight_grad: float
    selective: float
    full: float

    def again(self, recompute: str) -> float:
        """Return the seconds that a backward with this recomputation adds."""
        return {"none": 0.0, "selective": self.selective, "full": self.full}[recompute]


def layer_seconds(
    device: Device,
    model: ModelConfig,
    num_tokens: int,
    *,
    item_bytes: int,
    sum_bytes: int,
    compiled: bool,
    sequence_ranks: int = 1,
    linear_speed: float = 1.0,
) -> LayerSeconds:
    """Return the seconds of one layer of `model`, a tensor-parallel share, on `num_tokens` tokens.

    item_bytes, sum_bytes: of a weight or activation, and of a gradient that dW is added to.
    compiled: whether elementwise work is, see run.compile.
    sequence_ranks: over how many ranks sequence parallelism splits norms and residuals.
    linear_speed: how much faster than at the rate of the device linear layers form y and dx.
    """
    tokens, attention = num_tokens, attention_seconds(device, model, num_tokens)
    products = linear_shapes(model)
    forward = [
        device.product(tokens, outputs, inputs) / linear_speed for outputs, inputs in products
    ]
    selective = attention + sum(forward[:2])
    left_out = 0.0 if shape.repeats_down_projection(model) else forward[3]
    if not device.is_split:  # a backward takes twice as long as the forward, in two equal halves
        whole = shape.layer_flops(model, tokens) / device.flops_per_second
        less = whole - (1 - 1 / linear_speed) * (
            2 * shape.layer_matrix_parameters(model) * tokens / device.flops_per_second
        )
        return LayerSeconds(less, less, whole, selective, less - left_out)
    backward = sum(device.product(tokens, inputs, outputs) for outputs, inputs in products)
    backward /= linear_speed
    weights = sum(device.product(outputs, inputs, tokens) for outputs, inputs in products)
    kernels = device.kernel_seconds
    there, back = _moved_values(model, compiled, sequence_ranks, item_bytes)
    weights += device.moved(sum_bytes * shape.layer_matrix_parameters(model)) + 4 * kernels
    cast = _casts_norms(model, compiled, item_bytes)
    norms = cast * (shape.num_norms(model) + 2 * model.qk_norm)  # one each of queries and keys
    there_kernels = _FORWARD_KERNELS + _FORWARD_CASTS * norms
    back_kernels = _BACKWARD_KERNELS - 4 + _BACKWARD_CASTS * norms
    rest = device.moved(item_bytes * tokens * there) + there_kernels * kernels
    whole = sum(forward) + attention + rest
    return LayerSeconds(
        whole,
        backward
        + _ATTENTION_BACKWARD * attention
        + device.moved(item_bytes * tokens * back)
        + back_kernels * kernels,
        weights,
        selective,
        whole - left_out,
    )


def linear_shapes(model: ModelConfig) -> tuple[tuple[int, int], ...]:
    """Return outputs and inputs of the qkv, output, up (with gate) and down projections."""
    h, q, f = model.hidden_size, shape.query_size(model), model.ffn_hidden_size
    wide = (2 if shape.is_gated(model) else 1) * f
    return (q + 2 * shape.kv_size(model), h), (h, q), (wide, h), (h, f)


def attention_seconds(device: Device, model: ModelConfig, num_tokens: int) -> float:
    """Return the seconds of the forward of attention in one layer, the mean over all layers.

    A device with one rate computes whole squares.  Otherwise only what the mask leaves is computed.
    """
    length = model.seq_length
    windows = [
        min(model.sliding_window or length, length) if model.is_local(layer) else length
        for layer in range(model.num_layers)
    ]
    per_key = 4.0 * num_tokens * shape.query_size(model) / len(windows)
    if not device.is_split:
        return per_key * sum(windows) / device.attention_flops_per_second
    seen = sum(window - window**2 / (2 * length) for window in windows)
    return per_key * seen * (1 + _SHORT / length) / device.attention_flops_per_second


def elementwise_bytes(
    model: ModelConfig, num_tokens: int, item_bytes: int, compiled: bool, sequence_ranks: int = 1
) -> tuple[float, float]:
    """Return the bytes that elementwise kernels of a layer move in its forward and its backward.

    What is read or written at half of the bandwidth counts twice.
    """
    there, back = _moved_values(model, compiled, sequence_ranks, item_bytes)
    return item_bytes * num_tokens * there, item_bytes * num_tokens * back


def _casts_norms(model: ModelConfig, compiled: bool, item_bytes: int) -> bool:
    """Return whether norms cast what they read and write: to fp32, and back to 2 bytes."""
    return model.zero_centred_norm and not compiled and item_bytes == 2


def _moved_values(
    model: ModelConfig, compiled: bool, sequence_ranks: int, item_bytes: int
) -> tuple[float, float]:
    """Return the values per token that elementwise kernels move in a forward and in a backward.

    They are those of `model/elementwise.py`.  A norm reads x and writes y, and its backward reads
    dy and x and writes dx.  A residual sum reads two and writes one.  Compiled, one kernel forms
    the first sum and the RMSNorm after it, another its gradient and the sum with that from
    elsewhere, and one kernel each splits and rotates heads, and opens gates.  Norms centred
    at zero compute in fp32: if nothing is compiled, values of 2 bytes are cast before and after.
    """
    h, f = model.hidden_size / sequence_ranks, model.ffn_hidden_size
    q, kv = shape.query_size(model), shape.kv_size(model)
    turned, qkv, gated = q + kv, q + 2 * kv, shape.is_gated(model)
    norm, norm_back = 2, 3
    if _casts_norms(model, compiled, item_bytes):
        norm, norm_back = _CAST + 2 * 2 + _CAST, 2 * _CAST + 3 * 2 + _CAST
    there = norm * h * shape.num_norms(model) + 2 * 3 * h
    back = norm_back * h * shape.num_norms(model) + 2 * 3 * h
    if compiled and model.pre_norms and model.normalisation == "rmsnorm":
        there, back = there - h, back - 2 * 2 * h
    splits, norms = model.positions == "rope" or model.qk_norm, model.qk_norm
    back += 2 * qkv  # of queries, keys and values together
    if splits and compiled:
        there += 2 * (turned if norms else qkv)
        back += turned * norms
    elif splits:
        rotation = 7 * turned * (model.positions == "rope")
        there += _SLOW * (rotation + (norm * turned if norms else 2 * kv))
        back += _SLOW * (rotation + norm_back * turned * norms)
    if not gated:
        there, back = there + 2 * f, back + 3 * f
    elif compiled:
        there, back = there + 3 * f, back + 6 * f
    else:
        there, back = there + _SLOW * 5 * f, back + _SLOW * 14 * f
    # The products add biases, whose gradients are sums over tokens.
    if model.linear_bias or model.qkv_bias:
        back += _SLOW * qkv
    if model.linear_bias:
        back += _SLOW * ((2 if gated else 1) * f + 2 * h)
    return there, back


def output_seconds(
    device: Device,
    num_tokens: int,
    hidden_size: int,
    num_rows: int,
    sum_bytes: int,
    *,
    logit_bytes: float,
) -> float:
    """Return the seconds of S and T of one shard: three products, and what is done to each logit.

    sum_bytes: of a gradient that dW is added to.
    logit_bytes: read and written per token and row.
    """
    if not num_rows:
        return 0.0
    products = (
        device.product(num_tokens, num_rows, hidden_size)
        + device.product(num_tokens, hidden_size, num_rows)
        + device.product(num_rows, hidden_size, num_tokens)
    )
    if not device.is_split:
        return products
    moved = device.moved(num_rows * (num_tokens * logit_bytes + hidden_size * sum_bytes))
    return products + moved + terms_seconds(device, num_tokens, hidden_size, sum_bytes)


def terms_seconds(device: Device, num_tokens: int, hidden_size: int, sum_bytes: int) -> float:
    """Return the part of `output_seconds` that is not for each row: the terms of the targets.

    dL/dx is scaled, which reads and writes it as precisely as gradients.  Then the row of the
    target is subtracted from it, and x from the gradient of that row, each two such values and one
    in half the precision.
    """
    return device.moved(_TERM_VALUES * sum_bytes * num_tokens * hidden_size)
