"""The work between matrix products: maximum, exponential, sum and cast of every row of logits.

On CUDA a Triton kernel where Triton is installed; on a CPU in low precision one fused by torch.compile where there is a C++
compiler; otherwise torch operations, which make several passes.  All take the same arguments.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from vp_train.precision import compiled, compiled_exactly, has_compiler


def exponentiate(
    logits: Tensor, least: Tensor, out: Tensor, softcap: float | None, *, usual: bool = False
) -> tuple[Tensor, Tensor]:
    """Write E = exp(z - maximum) of `logits` [T, C] into `out` [T, C] and return (maximum, sum of E), both [T].

    The maximum is at least `least` [T], in whose dtype everything is computed.  With `softcap` c, z = c tanh(logits / c), and
    E is written multiplied by dz / dlogits = 1 - (z / c)^2, which the sum leaves out.  `logits` is spoilt; in the dtype of
    `least`, where nothing is fused on a CPU, it may be `out`.  `usual`: of a size that comes again and again, for which code
    may be compiled.
    """
    if logits.is_cuda and logits.dtype is torch.float32 and _has_triton():
        from vp_train.vocab.triton_rows import exponentiate_rows  # Triton needs a GPU to be of use

        return exponentiate_rows(logits, least, out, softcap)
    if logits.device.type == "cpu" and out.dtype in (torch.bfloat16, torch.float16) and has_compiler():
        fused = compiled_exactly(_functional) if usual else compiled(_functional)
        maximum, total = fused(logits, least, out, softcap)
        return maximum, total
    return unfused(logits, least, out, softcap)


def unfused(logits: Tensor, least: Tensor, out: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """`exponentiate` in torch operations."""
    z = logits.to(least.dtype)  # may be `logits` itself
    slope = None
    if softcap is not None:
        ratio = z.div_(softcap).tanh_()
        slope = 1 - ratio * ratio
        z = ratio.mul_(softcap)
    maximum = torch.maximum(least, z.amax(-1))
    exponential = z.sub_(maximum[:, None]).exp_()
    total = exponential.sum(-1)
    if slope is not None:
        exponential.mul_(slope)
    if exponential.data_ptr() != out.data_ptr():
        out.copy_(exponential)
    return maximum, total


def _functional(logits: Tensor, least: Tensor, out: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """`unfused` without an intermediate written in place: what the compiler makes two loops over a row in cache of."""
    z = logits.to(least.dtype)
    maximum, ratio = z.amax(-1), None
    if softcap is not None:
        maximum = softcap * torch.tanh(maximum / softcap)  # tanh grows with its argument
        ratio = torch.tanh(z / softcap)
        z = ratio * softcap
    maximum = torch.maximum(least, maximum)
    exponential = torch.exp(z - maximum[:, None])
    total = exponential.sum(-1)
    if ratio is not None:
        exponential = exponential * (1 - ratio * ratio)
    out.copy_(exponential)
    return maximum, total


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
