"""What the passes do on a GPU; the Triton kernel also without one, in Triton's interpreter, where Triton is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from tests.vocab.ranks import run_output
from tests.vocab.test_output import ALGORITHMS, OPTIONS, assert_equal, inputs
from vp_train.vocab import backends, rows
from vp_train.vocab.reference import cross_entropy

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

INTERPRETED = """
import torch
from vp_train.vocab import rows, triton_rows
torch.manual_seed(0)
for shape in ((5, 33), (2, 5000), (3, 1), (0, 7)):
    for softcap in (None, 5.0):
        for dtype in (torch.bfloat16, torch.float16):
            logits, least = torch.randn(shape) * 4, torch.linspace(-20, 20, shape[0])
            ours, theirs = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
            pairs = zip(
                (*triton_rows.exponentiate_rows(logits, least, ours, softcap), ours.float()),
                (*rows.unfused(logits.clone(), least, theirs, softcap), theirs.float()),
            )
            for mine, other in pairs:
                assert torch.allclose(mine, other, rtol=8e-3 if mine.shape == shape else 1e-5, atol=1e-6), (shape, dtype)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (pip install vp-train[triton])")
def test_the_triton_kernel_is_right_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment, timeout=120)


@on_gpu
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_triton_kernel_equals_torch(dtype, softcap):
    logits = torch.randn(64, 20_001, device="cuda") * 4
    least = torch.linspace(-20, 20, 64, device="cuda")
    fused, unfused = torch.empty_like(logits, dtype=dtype), torch.empty_like(logits, dtype=dtype)
    ours = rows.exponentiate(logits, least, fused, softcap)
    theirs = rows.unfused(logits, least, unfused, softcap)
    for mine, other in zip((*ours, fused.float()), (*theirs, unfused.float()), strict=True):
        assert torch.allclose(mine, other, rtol=8e-3 if mine.dim() == 2 else 1e-5, atol=1e-6)


@on_gpu
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["chunked", "recompute", "recompute:0.4"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
def test_shards_on_a_gpu_equal_the_whole(monkeypatch, algorithm, backend, dtype, tolerance, options):
    monkeypatch.setitem(backends._CHUNK_BYTES, "cuda", 30 * 11 * 4)
    case = [tensor.cuda() for tensor in inputs(101, dtype)]
    truth = cross_entropy(case[0].double(), case[1].double(), case[2], case[3].double(), options)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    sharded = run_output(*case, sizes=[0, 60, 41], algorithm=algorithm, backend=backend, grad_dtype=wide, options=options)
    assert_equal([tensor.double() for tensor in sharded[:3]], truth, tolerance)
