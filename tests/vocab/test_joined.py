"""The backend of GPUs, run on a CPU: its mathematics without kernels."""

from itertools import product

import pytest
import torch

from tests.vocab.ranks import PLAIN, make_layer, run_output
from tests.vocab.test_output import ALGORITHMS, OPTIONS, H, T, assert_equal, inputs
from vp_train.tensors import compiling
from vp_train.vocab import backends, chunks, joined, rows
from vp_train.vocab.reference import cross_entropy
from vp_train.vocab.shard import Shard

BACKENDS = ["chunked", "recompute", "recompute:0.4"]


@pytest.fixture(autouse=True)
def small_chunks_of_a_gpu(monkeypatch):
    """Use it on the CPU, uncompiled, in chunks of 8 rows and panels of 16."""
    monkeypatch.setattr(compiling, "_finds_compiler", lambda: False)
    monkeypatch.setattr(backends, "Chunked", joined.Joined)
    monkeypatch.setitem(chunks.CHUNKS, "cuda", chunks.ChunkSize(1, 8, 8))
    monkeypatch.setattr(joined, "PANEL_BYTES", 16 * T * 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ["none", *ALGORITHMS])
def test_shards_equal_the_whole_in_float64(algorithm, backend):
    kinds = (([101], 1.0), ([0, 60, 1, 40], 1.0), ([50, 51], 300.0))
    for options, (sizes, scale) in product(OPTIONS, kinds):
        case = inputs(101, scale=scale)
        sharded = run_output(
            *case, sizes=sizes, algorithm=algorithm, backend=backend, options=options
        )
        assert all(tensor.isfinite().all() for tensor in sharded[:3])
        assert_equal(sharded, cross_entropy(*case, options), 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bfloat16_stays_near_float64(algorithm, backend):
    case = inputs(101, torch.bfloat16)
    truth = cross_entropy(case[0].double(), case[1].double(), case[2], case[3].double())
    wide = {"algorithm": algorithm, "backend": backend, "grad_dtype": torch.float32}
    sharded = run_output(*case, sizes=[50, 51], **wide)
    assert_equal([tensor.double() for tensor in sharded[:3]], truth, 3e-2)


def test_a_reference_moves_only_to_a_logit_far_above_it():
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    later = torch.tensor([[1.0, 3.0], [0.0, 100.0], [-9.0, -9.0]])
    running, references = torch.full((3, 3), torch.nan), torch.empty(2, 3)
    p, nowhere = torch.empty(3, 4), torch.full((3,), -1)
    rows.extend(logits.clone(), p[:, :2], running, references[0], nowhere, 0, None)
    rows.extend(later.clone(), p[:, 2:], running, references[1], nowhere, 2, None)
    assert references[1].tolist() == [1, 100, 1]
    rows.relate(p, references, 2)
    exact = torch.exp(torch.cat([logits, later], 1) - references[1][:, None])
    assert torch.allclose(p, exact)
    assert torch.allclose(running[1], exact.sum(1))
    assert p.max() <= 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_it_holds_the_exponentials_of_the_rows_kept_and_nothing_else(dtype):
    x, weight, targets, _ = inputs(101, dtype)
    for backend, kept in (("chunked", 101), ("recompute", 0), ("recompute:0.4", 61)):
        layer = make_layer(
            weight, torch.zeros(101, H), Shard(0, 101), "one_barrier", backend, PLAIN
        )
        step = layer.begin(targets[None], torch.ones(1, T))
        step.s(0, x)
        aligned = -(-kept * dtype.itemsize // 16) * 16
        assert step.held_bytes == T * (aligned + H * dtype.itemsize + 4 * 4)


def test_on_a_cpu_it_refuses_float16_in_which_its_products_overflow():
    weight = torch.zeros(3, H, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"overflow float16; take Chunked"):
        joined.Joined(weight, torch.zeros(3, H), None, 0.5)


@pytest.mark.parametrize("num_tokens", [0, 1, T, 3 * T])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("recompute", [0.0, 0.4, 1.0])
def test_panels_are_all_rows_and_those_not_kept_are_as_wide_as_memory_allows(
    recompute, keep, num_tokens
):
    weight = torch.zeros(101, H, dtype=torch.float64)
    panels = list(joined.Joined(weight, weight, None, recompute)._panels(num_tokens, keep))
    assert [row for panel in panels for row in range(panel.start, panel.stop)] == [*range(101)]
    chunks_of_all = [chunk for panel in panels for chunk in panel.chunks]
    assert [row for chunk in chunks_of_all for row in range(*chunk)] == [*range(101)]
    assert max(stop - start for start, stop in chunks_of_all) == 8
    kept = [panel.start for panel in panels if panel.kept]
    assert kept == ([round(recompute * 101)] if keep and recompute < 1 else [])
    scratch = [panel for panel in panels if not panel.kept]
    for panel in scratch:
        rows, is_last = panel.stop - panel.start, panel is scratch[-1]
        assert rows <= max(8, 16 * T / max(1, num_tokens))
        assert is_last or (rows + 8) * num_tokens > 16 * T


def test_evaluation_writes_no_exponentials():
    x, weight, targets, _ = inputs(101)
    (owned,) = Shard(0, 101).owned(targets[None], x.device)
    layer = joined.Joined(weight, weight, None, 0.0)
    softmax, held = layer.s(x, owned, input_term=False, keep=False)
    assert held is None
    assert softmax.input_term is None
    assert {name for name, _ in layer._products._scratch} == {"product"}
