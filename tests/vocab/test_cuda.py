"""The passes on a GPU, and the Triton kernels in Triton's interpreter, if Triton is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.vocab.kernels import COMPARISONS, compare_chunks, compare_terms
from tests.vocab.ranks import make_layer, run_output
from tests.vocab.test_output import ALGORITHMS, OPTIONS, assert_equal, inputs
from vp_train.vocab import chunks, joined, rows
from vp_train.vocab.input import InputLayer
from vp_train.vocab.reference import cross_entropy
from vp_train.vocab.shard import Shard, split_rows

ROOT = Path(__file__).parents[2]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
with_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton (pip install vp-train[triton])"
)


@pytest.mark.slow
@with_triton
def test_the_triton_kernels_are_right_in_the_interpreter_and_few():
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "tests.vocab.kernels"],
        check=True,
        env=environment,
        timeout=100,
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    for num_chunks, (s, lse, message, t) in zip((1, 3), json.loads(done.stdout), strict=True):
        assert s == {"mm.out": num_chunks, "_extend": num_chunks, "mm.default": 1} | (
            {"_relate": 1} if num_chunks > 1 else {}
        )
        assert lse == {"stack.default": 1, "_combine": 1}
        assert message == {"_input_term": 1}
        assert t == {"_scale": 1, "addmm_.default": 1, "_subtract_targets": 1}
        assert sum(map(sum, (s.values(), t.values()))) < 8 * num_chunks


@with_triton
def test_owned_tokens_that_begin_anywhere_need_no_further_code():
    from vp_train.vocab.triton_rows import _subtract_targets

    free = {
        parameter.name
        for parameter in _subtract_targets.params
        if parameter.do_not_specialize_on_alignment
    }
    assert free == {"positions", "rows"}


@with_triton
def test_warps_are_measured_where_a_kernel_runs_whose_sums_may_differ(monkeypatch):
    from vp_train.vocab import triton_rows

    monkeypatch.setattr(rows, "has_triton", lambda: True)
    monkeypatch.setattr(triton_rows, "fastest_warps", lambda *arguments: arguments)
    shape, gpu, cpu = (64, 4_096), torch.device("cuda"), torch.device("cpu")
    assert rows.fastest_warps(shape, torch.float16, gpu) == (shape, torch.float16, gpu)
    assert rows.fastest_warps(shape, torch.float16, cpu) is None
    assert rows.fastest_warps(shape, torch.float64, gpu) is None
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert rows.fastest_warps(shape, torch.float16, gpu) is None


@with_triton
def test_warps_of_a_row_leave_a_thread_few_values_and_the_usual_number_is_first():
    from vp_train.vocab.triton_rows import warps_of

    for num_columns in (1, 17, 2_048, 4_096, 8_193, 16_384, 32_768, 65_536):
        usual, *others = warps_of(num_columns)
        for num_warps in (usual, *others):
            assert num_warps in (1, 2, 4, 8, 16, 32)
            assert num_columns <= 32 * 64 * num_warps
        assert set(others) <= {usual // 2, 2 * usual}


@with_triton
def test_the_fastest_warps_are_taken_if_they_gain_a_twentieth(monkeypatch):
    from vp_train.vocab import triton_rows

    now, seen, seconds = [0.0], set(), {}

    class Event:
        def __init__(self, **_):
            self.at = 0.0

        def record(self):
            self.at = now[0]

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return end.at - self.at

    def extend(logits, out, running, references, row_of_token, *rest):
        assert logits.shape == out.shape == (3, 4_096)
        assert running.shape[1:] == references.shape == row_of_token.shape == (3,)
        assert out.dtype is torch.bfloat16
        num_warps = rest[-1]
        now[0] += seconds[num_warps] + (0.0 if num_warps in seen else 100.0)  # it is compiled
        seen.add(num_warps)

    monkeypatch.setattr(triton_rows, "extend", extend)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for times, fastest in (
        ({8: 1.0, 4: 0.94, 16: 0.97}, 4),
        ({8: 1.0, 4: 0.96, 16: 0.97}, None),
        ({8: 1.0, 4: 2.0, 16: 0.5}, 16),
        ({8: 1.0, 4: 2.0, 16: 3.0}, None),
    ):
        seconds |= times
        seen.clear()
        found = triton_rows.fastest_warps((3, 4_096), torch.bfloat16, torch.device("cpu"))
        assert found == fastest


@on_gpu
@pytest.mark.parametrize(
    ("compare", "case"),
    [*COMPARISONS, (compare_chunks, (64, 20_001)), (compare_terms, (64, 4_096))],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_triton_kernels_equal_torch(compare, case):
    compare(case, torch.device("cuda"))


@on_gpu
def test_the_number_of_warps_is_one_of_the_table():
    found = rows.fastest_warps((64, 4_096), torch.bfloat16, torch.device("cuda"))
    assert found is None or found in triton_rows_table(4_096)


def triton_rows_table(num_columns):
    from vp_train.vocab import triton_rows

    return triton_rows.warps_of(num_columns)


@on_gpu
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", ["chunked", "recompute", "recompute:0.4"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)],
)
def test_shards_on_a_gpu_equal_the_whole(
    monkeypatch, algorithm, backend, dtype, tolerance, options
):
    monkeypatch.setitem(chunks.CHUNKS, "cuda", chunks.ChunkSize(1, 24, 24))
    monkeypatch.setattr(joined, "PANEL_BYTES", 1)
    case = [tensor.cuda() for tensor in inputs(101, dtype)]
    truth = cross_entropy(case[0].double(), case[1].double(), case[2], case[3].double(), options)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    sharded = run_output(
        *case,
        sizes=[0, 60, 41],
        algorithm=algorithm,
        backend=backend,
        grad_dtype=wide,
        options=options,
    )
    assert_equal([tensor.double() for tensor in sharded[:3]], truth, tolerance)


@on_gpu
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_held_on_a_gpu_is_a_matrix_of_sixteen_bits_or_x_alone(algorithm):
    t, h, r = 64, 32, 5000
    x = torch.randn(t, h, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(r, h, device="cuda", dtype=torch.bfloat16)
    targets = torch.arange(t, device="cuda")
    held = {}
    for backend in ("chunked", "recompute"):
        layer = make_layer(
            weight, torch.zeros_like(weight, dtype=torch.float32), Shard(0, r), algorithm, backend
        )
        step = layer.begin(targets[None], torch.ones(1, t, device="cuda"))
        step.s(0, x)
        held[backend] = step.held_bytes
    assert held["recompute"] <= t * (2 * h + 16)
    assert held["chunked"] - held["recompute"] == t * r * 2


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_embeddings_on_a_gpu_are_those_of_the_cpu_and_their_gradient_is_the_same_every_time(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(101, 8, generator=generator).to(dtype)
    tokens = torch.randint(0, 101, (2, 4096), generator=generator)
    dy = torch.randn(4096, 8, generator=generator).to(dtype)
    wide, shards = torch.float64 if dtype is torch.float64 else torch.float32, split_rows(101, 2)

    def rows_and_gradient(device):
        weights, grad = weight.to(device), torch.zeros(101, 8, dtype=wide, device=device)
        layers = [
            InputLayer(weights[s.start : s.stop], grad[s.start : s.stop], shards, i)
            for i, s in enumerate(shards)
        ]
        steps = [layer.begin(tokens.to(device)) for layer in layers]
        rows = [step.e(1) for step in steps]
        parts = steps[0].by_shard(1, dy.to(device)).split(steps[0].counts(1))
        for step, part in zip(steps, parts, strict=True):
            step.g(1, part)
        return steps[0].in_order(1, torch.cat(rows)).cpu(), grad.cpu()

    torch.use_deterministic_algorithms(True)
    try:
        on_cpu, *on_gpu_twice = (
            rows_and_gradient("cpu"),
            rows_and_gradient("cuda"),
            rows_and_gradient("cuda"),
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(on_gpu_twice[0][1], on_gpu_twice[1][1])
    assert torch.equal(on_gpu_twice[0][0], on_cpu[0])
    assert torch.allclose(
        on_gpu_twice[0][1], on_cpu[1], rtol=1e-12 if dtype is torch.float64 else 1e-4, atol=1e-5
    )
