"""Time of S and T on one shard against their floor, three matrix products of the same sizes timed in the same run.

OMP_NUM_THREADS=1 python benchmarks/vocab_passes.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

from vp_train.vocab.output import OutputLayer
from vp_train.vocab.shard import Shard

SHAPES = ((512, 512, 16_384), (256, 256, 32_768))  # tokens, hidden, rows
ROUNDS, REPEATS = 5, 3


def seconds(work: Callable[[], object]) -> float:
    """The fastest of a few repeats."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def passes(layer: OutputLayer, algorithm: str, x: torch.Tensor, targets: torch.Tensor, grad_loss: torch.Tensor) -> None:
    """One microbatch of a vocabulary that is a single shard: every barrier delivers its own message."""
    layer.s(0, x, targets)
    layer.absorb("C1", 0, layer.message("C1", 0)[None])
    if algorithm == "one_barrier":
        layer.absorb("C1b", 0, layer.message("C1b", 0))
    layer.t(0, grad_loss)
    if algorithm == "two_barrier":
        layer.absorb("C2", 0, layer.message("C2", 0))
    layer.input_grad(0, grad_loss)
    layer.release(0)


def measure(dtype: torch.dtype, shape: tuple[int, int, int], algorithm: str) -> dict[str, Any]:
    """Median ratio over alternating rounds."""
    tokens, hidden, rows = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weight = (torch.randn(rows, hidden, generator=generator) * 0.05).to(dtype)
    targets = torch.randint(0, rows, (tokens,), generator=generator)
    grad_loss = torch.full((tokens,), 1 / tokens).to(dtype)
    layer = OutputLayer(weight, torch.zeros(rows, hidden), Shard(0, rows), algorithm, "chunked")
    logits, product = torch.empty(tokens, rows, dtype=dtype), torch.empty(rows, hidden, dtype=dtype)

    def floor() -> None:
        torch.mm(x, weight.T, out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.T, x, out=product)

    def ours() -> None:
        passes(layer, algorithm, x, targets, grad_loss)

    ours()
    floor()
    pairs = [(seconds(ours), seconds(floor)) for _ in range(ROUNDS)]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "hidden": hidden,
        "rows": rows,
        "algorithm": algorithm,
        "milliseconds": 1e3 * statistics.median(mine for mine, _ in pairs),
        "floor_milliseconds": 1e3 * statistics.median(other for _, other in pairs),
        "ratio": statistics.median(mine / other for mine, other in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the table as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            for algorithm in ("one_barrier", "two_barrier"):
                rows.append(measure(dtype, shape, algorithm))
                print(json.dumps(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(provenance() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
