"""A kernel that occupies thread blocks without work, like an NCCL kernel that waits for a peer."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WARPS = 16  # warps per thread block, as in NCCL's kernels


@triton.jit
def _now():
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;",
        constraints="=l",
        args=[],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _spin(spent, nanoseconds):
    """Spin in one program per thread block.  `spent` gets the nanoseconds of every block."""
    start = _now()
    passed = start - start
    while passed < nanoseconds:
        passed = _now() - start
    tl.store(spent + tl.program_id(0), passed)


def spin(num_blocks: int, seconds: float) -> Tensor:
    """Occupy `num_blocks` thread blocks on the current stream for `seconds`.

    Returns the nanoseconds of every block, int64 [num_blocks].
    """
    spent = torch.zeros(num_blocks, dtype=torch.int64, device="cuda")
    _spin[(num_blocks,)](spent, int(seconds * 1e9), num_warps=_WARPS)
    return spent
