"""The seconds of the matrix products and of the attention of a layer, measured on one device."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn import functional

from vp_train.model import shape
from vp_train.planning.physics import linear_shapes
from vp_train.planning.workload import Workload

_TRIES, _IN_A_ROW = 5, 4


def forward_seconds(work: Workload) -> tuple[float, float]:
    """Return the seconds of the products of a layer's forward, and of its causal attention.

    The layer is one tensor-parallel share on one microbatch of `work`.  Values are normal noise: a
    product of zeros would be faster.
    """
    device, dtype = torch.device(work.device), getattr(torch, work.dtype)
    generator = torch.Generator(device).manual_seed(1)

    def noise(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    def taken(run: Callable[[], object]) -> float:
        """Return the seconds of one call, the median over tries of several in a row."""
        found = []
        for _ in range(_TRIES + 1):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            for _ in range(_IN_A_ROW):
                run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            found.append((time.perf_counter() - began) / _IN_A_ROW)
        return median(found[1:])

    model = work.share
    with torch.no_grad():
        products = 0.0
        for outputs, inputs in linear_shapes(model):
            x, weight = noise(work.num_tokens, inputs), noise(outputs, inputs)
            products += taken(lambda x=x, weight=weight: x @ weight.T)  # type: ignore[misc]
        heads = (work.micro_batch_size, model.num_heads, model.seq_length, shape.head_size(model))
        q, k, v = noise(*heads), noise(*heads), noise(*heads)
        attention = taken(lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    return products, attention


def num_multiprocessors(work: Workload) -> int:
    """Return the multiprocessors of the GPU, 0 for a CPU."""
    if work.device != "cuda":
        return 0
    count: int = torch.cuda.get_device_properties(0).multi_processor_count
    return count
