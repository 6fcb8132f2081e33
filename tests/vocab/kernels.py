"""Compare kernels with torch in float64, and count the launches of S and T.

`python -m tests.vocab.kernels` does so in Triton's interpreter, which `test_cuda` starts.  The
functions of `rows` take the kernels for fp32 statistics and torch's operations for fp64.  On a CPU
they take kernels in C++ for matrices in 16 bits.
"""

from __future__ import annotations

import os
from collections import Counter

import torch
from _pytest.monkeypatch import MonkeyPatch
from torch.utils._python_dispatch import TorchDispatchMode

from schedules.vocab import Payload
from tests.vocab.ranks import PLAIN, make_layer, run_output
from vp_train.vocab import chunks, joined, rows
from vp_train.vocab.loss import LossOptions
from vp_train.vocab.reference import cross_entropy
from vp_train.vocab.shard import Shard

SHAPES = ((5, 33), (3, 1), (0, 7), (2, 1_030))  # the last is longer than a block of hidden values
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def close(ours, true, dtype=torch.float32):
    """Compare with float64, up to the roundings of `dtype`."""
    relative = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert torch.allclose(ours.cpu().double(), true, rtol=relative, atol=1e-5)


def compare_chunks(shape, device, *, rounds=False):
    """Compare three chunks of falling and rising logits, made relative to one reference.

    Targets lie in one of the chunks, or in none.  P has more space between its rows than columns.
    With `rounds` the logits have the dtype of P.
    """
    generator = torch.Generator().manual_seed(0)
    num_tokens, num_columns = shape
    row_of_token = torch.randint(-1, 3 * num_columns + 1, (num_tokens,), generator=generator)
    parts = [torch.randn(shape, generator=generator) * 4 + offset for offset in (0, -9, 9)]
    for softcap, dtype in ((None, torch.bfloat16), (5.0, torch.float16), (None, torch.float32)):
        if rounds:
            parts = [part.to(dtype).double() for part in parts]

        def run(statistics, dtype, device, softcap=softcap, parts=parts):
            memory = torch.zeros(num_tokens, 3 * num_columns + 8, dtype=dtype, device=device)
            p = memory[:, : 3 * num_columns]
            running = torch.full((3, num_tokens), torch.nan, dtype=statistics, device=device)
            references = torch.empty(3, num_tokens, dtype=statistics, device=device)
            for index, part in enumerate(parts):
                start = index * num_columns
                out = p[:, start : start + num_columns]
                logits = part.to(device, dtype if rounds else statistics)
                if dtype is statistics:  # in a run these are written in place
                    logits = out.copy_(logits)
                where = row_of_token.to(device)
                rows.extend(logits, out, running, references[index], where, start, softcap)
            rows.relate(p, references, num_columns)
            again = torch.empty(shape, dtype=dtype, device=device)
            rows.exponentials(parts[2].to(device, statistics), again, running[0], softcap)
            assert not memory[:, 3 * num_columns :].any()
            return p, again, running

        ours = run(torch.float32, dtype, device)
        true = run(torch.float64, torch.float64, torch.device("cpu"))
        for mine, other, kind in zip(ours, true, (dtype, dtype, torch.float32), strict=True):
            close(mine, other, kind)
        assert rounds or torch.equal(ours[0][:, 2 * num_columns :], ours[1])


def compare_combination(num_shards, device):
    """Compare lse and loss, in any layout; one shard may have no rows.  Maxima lie far apart."""
    generator = torch.Generator().manual_seed(3)
    gathered = torch.rand(num_shards, 3, 150, generator=generator) + 0.5
    gathered[:, 0] *= 400
    gathered[num_shards // 2 + 1 :, 0] = -torch.inf
    gathered[num_shards // 2 + 1 :, 1] = 0
    ignored = torch.arange(150) % 7 == 0
    scattered = gathered.transpose(0, 2).contiguous().transpose(0, 2)
    for z_loss, given in ((0.0, gathered), (0.1, gathered), (0.1, scattered)):
        ours = rows.combine(given.to(device), ignored.to(device), z_loss, torch.bfloat16)
        true = rows.combine(gathered.double(), ignored, z_loss, torch.float64)
        for mine, other in zip(ours[:3], true, strict=True):
            close(mine, other)


def compare_terms(shape, device):
    """Compare `input_term`, `scale` and `subtract_targets`, with and without what is optional."""
    generator = torch.Generator().manual_seed(1)
    num_tokens, hidden = shape
    ids = torch.randint(0, 22, (1, num_tokens), generator=generator)
    vectors = torch.rand(5, num_tokens, generator=generator)
    shared, product = (torch.randn(n, hidden, generator=generator) for n in (1, num_tokens))
    for dtype in DTYPES:
        matrix = torch.randn(11, hidden, generator=generator).to(dtype)
        x = torch.randn(shape, generator=generator).to(dtype)
        for some in (False, True):

            def run(statistics, device, some=some, matrix=matrix, x=x, dtype=dtype):
                plain = statistics is torch.float64
                lse, reference, scales, gain, factor = vectors.to(device, statistics)
                (owned,) = Shard(5, 16).owned(ids, device)
                scale, z_loss = (scales, 0.1) if some else (0.9, 0.0)
                more = {"z_loss": z_loss, "dtype": statistics if plain or not some else dtype}
                if some:
                    more |= {"shared": shared[0].to(device, statistics), "gain": gain}
                weight = matrix.to(device, torch.float64 if plain else dtype)
                tokens = x.to(device, weight.dtype)
                term = rows.input_term(
                    product.to(device, statistics, copy=True),
                    reference,
                    lse,
                    weight,
                    owned,
                    scale,
                    **more,
                )
                softmax = {"reference": reference, "lse": lse, "z_loss": z_loss} if some else {}
                scaled = rows.scale(tokens, factor, torch.empty_like(tokens), **softmax)
                grad = torch.ones(11, hidden, dtype=statistics, device=device)
                rows.subtract_targets(grad, tokens, owned, factor, scale)
                return term, scaled, grad

            ours, true = run(torch.float32, device), run(torch.float64, torch.device("cpu"))
            for mine, other in zip(ours[:3], true, strict=True):
                close(mine, other, mine.dtype)


COMPARISONS = [
    *((compare_chunks, shape) for shape in SHAPES),
    *((compare_combination, num_shards) for num_shards in (1, 4)),
    *((compare_terms, shape) for shape in SHAPES),
]


class Launches(TorchDispatchMode):
    """Counts of what would be launched on a GPU: operations of torch that compute, and kernels."""

    FREE = (
        "new_empty",
        "alias",
        "unbind",
        "empty",
        "view",
        "slice",
        "select",
        "permute",
        "unsqueeze",
        "detach",
    )

    def __init__(self, monkeypatch):
        super().__init__()
        self.counts = Counter()
        from vp_train.vocab import triton_rows

        for name in ("_extend", "_relate", "_combine", "_input_term", "_scale"):
            monkeypatch.setattr(triton_rows, name, _Counted(name, triton_rows, self))
        name = "_subtract_targets"
        monkeypatch.setattr(triton_rows, name, _Counted(name, triton_rows, self))
        self.inside = False

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = str(function).removeprefix("aten.")
        if not self.inside and not name.startswith(self.FREE):
            self.counts[name] += 1
        return function(*arguments, **(named or {}))


class _Counted:
    """A kernel whose launches are counted; what the interpreter does inside of it is not."""

    def __init__(self, name, module, launches):
        self._name, self._kernel, self._launches = name, getattr(module, name), launches

    def __getitem__(self, grid):
        def launch(*arguments, **named):
            self._launches.counts[self._name] += 1
            self._launches.inside = True
            try:
                self._kernel[grid](*arguments, **named)
            finally:
                self._launches.inside = False

        return launch


def count_launches(monkeypatch, device, num_chunks):
    """Return how often S and T of `num_chunks` chunks, and all between them, launch something."""
    num_tokens, hidden = 4, 8
    monkeypatch.setitem(chunks.CHUNKS, "cuda", chunks.ChunkSize(1, 16, 16))
    monkeypatch.setattr("vp_train.vocab.backends.Chunked", joined.Joined)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16 * num_chunks, hidden, generator=generator).to(device)
    x = torch.randn(num_tokens, hidden, generator=generator).to(device)
    layer = make_layer(
        weight, torch.zeros_like(weight), Shard(0, len(weight)), "one_barrier", "chunked", PLAIN
    )
    step = layer.begin(torch.zeros(1, num_tokens, dtype=torch.int64), torch.ones(1, num_tokens))
    found = []
    with Launches(monkeypatch) as launches:
        for work in (
            lambda: step.s(0, x),
            lambda: step.absorb(Payload.STATISTICS, 0, step.message(Payload.STATISTICS, 0)[None]),
            lambda: step.absorb(Payload.INPUT_GRADIENT, 0, step.message(Payload.INPUT_GRADIENT, 0)),
            lambda: step.t(0),
        ):
            launches.counts.clear()
            work()
            found.append(dict(launches.counts))
    return found


def compare_warm_up(monkeypatch):
    """The warm-up launches every kernel of a step, and adds nothing to the gradient."""
    num_tokens, num_rows, hidden = 4, 48, 8
    monkeypatch.setitem(chunks.CHUNKS, "cuda", chunks.ChunkSize(1, 16, 16))
    monkeypatch.setattr("vp_train.vocab.backends.Chunked", joined.Joined)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, hidden, generator=generator) for n in (num_tokens, num_rows))
    targets, weights = torch.arange(num_tokens), torch.ones(num_tokens)
    for algorithm in ("one_barrier", "two_barrier"):
        grad = torch.zeros_like(weight)
        layer = make_layer(weight, grad, Shard(0, num_rows), algorithm, "chunked", PLAIN)
        with MonkeyPatch.context() as patched, Launches(patched) as launches:
            layer.warm_up(num_tokens)
            warmed = {name for name in launches.counts if name.startswith("_")}
        assert not grad.any()
        with MonkeyPatch.context() as patched, Launches(patched) as launches:
            run_output(
                *(x, weight, targets, weights),
                sizes=[num_rows],
                algorithm=algorithm,
                backend="chunked",
            )
            used = {name for name in launches.counts if name.startswith("_")}
        assert used <= warmed, used - warmed
        assert "_subtract_targets" in used


def compare_layers(monkeypatch, device):
    """Compare the whole layer on shards, through the kernels, with the unsharded one."""
    monkeypatch.setitem(chunks.CHUNKS, "cuda", chunks.ChunkSize(1, 16, 16))
    monkeypatch.setattr("vp_train.vocab.backends.Chunked", joined.Joined)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 8, generator=generator) for n in (5, 75))
    targets, weights = torch.tensor([0, 74, 30, -100, 30]), torch.tensor([1.0, 1, 1, 0, 1])
    for algorithm, backend, options in (
        ("one_barrier", "chunked", LossOptions(z_loss=0.01)),
        ("two_barrier", "recompute:0.6", LossOptions(softcap=3.0)),
    ):
        case = [tensor.to(device) for tensor in (x, weight, targets, weights)]
        ours = run_output(
            *case, sizes=[40, 35], algorithm=algorithm, backend=backend, options=options
        )
        true = cross_entropy(x.double(), weight.double(), targets, weights.double(), options)
        for mine, other in zip(ours[:3], true, strict=True):
            assert (mine.cpu().double() - other).abs().max() <= 1e-5 * other.abs().max()


def main() -> None:
    """Run everything in Triton's interpreter, and print the launches for one and three chunks."""
    import json

    assert os.environ["TRITON_INTERPRET"] == "1"
    cpu = torch.device("cpu")
    for compare, case in COMPARISONS:
        compare(case, cpu)
    with MonkeyPatch.context() as monkeypatch:
        compare_layers(monkeypatch, cpu)
    with MonkeyPatch.context() as monkeypatch:
        compare_warm_up(monkeypatch)
    counts = []
    for num_chunks in (1, 3):
        with MonkeyPatch.context() as monkeypatch:
            counts.append(count_launches(monkeypatch, cpu, num_chunks))
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
