"""Compare predicted memory per rank with what torch allocates in a real step on CPUs.

    python benchmarks/plan_memory.py [--cases NAME ...] [--json FILE]

The models are small.  The second of two steps is measured.  A storage that torch makes during the
step counts from its first operation until it is freed.  Storages from before the step count too.
Memory that libraries allocate outside torch does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from provenance import provenance

from vp_train.assembly import build_rank
from vp_train.config import RunConfig
from vp_train.mesh import build_mesh
from vp_train.planning.degrees import wanted_ranks
from vp_train.planning.memory import rank_memory
from vp_train.planning.plan import make_plan
from vp_train.profile.live import LiveStorages, leave_compiled_code_alone
from vp_train.settings import load_config

COMMON = ["model.num_layers=8", "num_microbatches=8"]
ZERO1 = ["parallel.pp=2", "parallel.dp=2", "optim.name=zero1"]
CASES = {
    "1f1b": [],
    "1f1b, none": ["vocab=none"],
    "1f1b, two_barrier, V 131,072": ["vocab=two_barrier", "model.vocab_size=131072"],
    "1f1b, recompute backend": ["vocab.backend=recompute"],
    "1f1b, recompute": ["parallel.recompute=full"],
    "1f1b, selective": ["parallel.recompute=selective"],
    "1f1b, tied, float64, V 8,192": [
        "model.tied_embeddings=true",
        "run.dtype=float64",
        "model.vocab_size=8192",
    ],
    "gpipe, 2 x 256 tokens": ["schedule=gpipe", "micro_batch_size=2"],
    "zb_h1": ["schedule=zb_h1"],
    "v_half": ["schedule=v_half"],
    "v_half, recompute": ["schedule=v_half", "parallel.recompute=full"],
    "v_half, selective": ["schedule=v_half", "parallel.recompute=selective"],
    "v_min, m = 16": ["schedule=v_min", "num_microbatches=16"],
    "v_min, recompute, m = 16": [
        "schedule=v_min",
        "parallel.recompute=full",
        "num_microbatches=16",
    ],
    "interleaved": ["schedule=interleaved", "parallel.pp=2"],
    "1f1b, pp=2 x tp=2": ["parallel.pp=2", "parallel.tp=2"],
    "1f1b, dp=2 x pp=2, zero1": ZERO1,
    "1f1b, bfloat16": ["run.dtype=bfloat16"],
    "dp=2 x pp=2, zero1, bfloat16, m = 1": [*ZERO1, "run.dtype=bfloat16", "num_microbatches=1"],
    "small_qwen, dp=2 x pp=2, zero1, bfloat16": ["model=small_qwen", *ZERO1, "run.dtype=bfloat16"],
    "small_gemma, bfloat16": ["model=small_gemma", "run.dtype=bfloat16"],
}


@dataclass(frozen=True, slots=True)
class Row:
    """The memory of one rank of a case, in bytes."""

    case: str
    rank: int
    state: float
    activations: float
    vocabulary: float
    working: float
    predicted: float
    measured: int
    measured_state: int

    @property
    def error(self) -> float:
        """The relative error of the prediction."""
        return self.predicted / self.measured - 1


def measure(rank: int, num_ranks: int, port: int, case: str, config: RunConfig, path: str) -> None:
    """Build a rank in this process, run two steps, and write its row to the directory `path`."""
    torch.set_num_threads(1)
    leave_compiled_code_alone()
    store = dist.TCPStore(
        "127.0.0.1", port, num_ranks, is_master=rank == 0, timeout=timedelta(seconds=60)
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    plan = make_plan(config, num_ranks)
    mesh = build_mesh(plan.degrees, plan.problem)
    model = build_rank(config, plan, mesh)
    generator = torch.Generator().manual_seed(1)
    shape = (config.num_microbatches, config.micro_batch_size, config.model.seq_length)
    tokens, labels = (
        torch.randint(0, config.model.vocab_size, shape, generator=generator) for _ in range(2)
    )

    def step() -> None:
        model.gradients.zero()
        model.train_step(tokens, labels)
        model.optimizer.reduce()
        model.optimizer.squared_norm()
        model.optimizer.step(1e-3, 0.5)

    step()
    live = LiveStorages()
    live.add_existing()
    before = live.peak
    with live:
        step()
    memory = rank_memory(plan, config.optim, mesh.pipeline_rank)
    row = Row(
        case,
        rank,
        memory.state,
        memory.activations,
        memory.vocabulary,
        memory.working,
        memory.total,
        live.peak,
        before,
    )
    Path(path, str(rank)).write_text(json.dumps(asdict(row)))
    dist.barrier()
    os._exit(0)


def measured(case: str, overrides: list[str], directory: Path) -> list[Row]:
    """Run one case, and return the rows of its ranks."""
    config = load_config([*COMMON, *overrides])
    num_ranks = wanted_ranks(config.parallel)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(
        measure, (num_ranks, port, case, config, str(directory)), nprocs=num_ranks
    )
    return [Row(**json.loads((directory / str(rank)).read_text())) for rank in range(num_ranks)]


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    arguments = parser.parse_args()
    rows: list[Row] = []
    print(
        "| case | rank | state | activations | held shards | working | predicted | measured "
        "| error |\n" + "|---" * 9 + "|"
    )
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as directory:
            found = measured(case, CASES[case], Path(directory))
        rows += found
        for row in found:
            parts = (
                row.state,
                row.activations,
                row.vocabulary,
                row.working,
                row.predicted,
                row.measured,
            )
            sizes = " | ".join(f"{size / 2**20:.1f}" for size in parts)
            print(f"| {case} | {row.rank} | {sizes} | {row.error:+.1%} |", flush=True)
    errors = [abs(row.error) for row in rows]
    mean = sum(errors) / len(errors)
    print(f"MiB; {len(rows)} ranks, largest error {max(errors):.1%}, mean {mean:.1%}")
    if arguments.json:
        result = provenance() | {"rows": [asdict(row) | {"error": row.error} for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
