"""Count the bytes per parameter that an optimizer sends between replicas in a step.

    python benchmarks/traffic.py --json benchmarks/results/traffic_cpu.json

Every collective of torch.distributed is counted in the process that calls it, with the bytes that a
rank of a ring of dp ranks sends.  An all-reduce sends 2 (dp - 1) / dp of its bytes.  A
reduce-scatter or all-gather sends (dp - 1) / dp of them.  `limit` is the value for dp -> infinity.
`Replicas.scatter_sum` counts as the reduce-scatter that it is with NCCL.  gloo has none and runs an
all-reduce, so it sends more.

The results are the reason why DeepSpeed is used only with `optim.offload=true`.  It all-reduces
whole gradients, so in bfloat16 it sends 8 + 2 bytes per parameter, one bucket after another, while
the next pass waits.  The rows `zero1, offload` are measured with DeepSpeed.  ZeRO-1 without
offload, which still used DeepSpeed at commit 5ea462e, had the same 10.0 bytes.  Our own buckets
send 4 + 2 bytes, and overlap with the passes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from vp_train.assembly import build_rank
from vp_train.config import RunConfig
from vp_train.mesh import build_mesh
from vp_train.optim.replicas import Replicas
from vp_train.planning.plan import make_plan
from vp_train.settings import load_config

COMMON = ["model=nano", "parallel.pp=1", "vocab=none", "run.dtype=bfloat16"]
OPTIMIZERS = {
    "adamw": ["optim.name=adamw"],
    "zero1": ["optim.name=zero1"],
    "zero1, offload": ["optim.name=zero1", "optim.offload=true"],
}
# For every collective: the index of the argument whose bytes count, and how often a ring of n ranks
# sends them, without the factor (n - 1) / n.
COUNTED = {
    "all_reduce": (0, 2),
    "reduce": (0, 1),
    "broadcast": (0, 1),
    "reduce_scatter_tensor": (1, 1),
    "reduce_scatter_single": (1, 1),
    "all_gather_into_tensor": (0, 1),
    "all_gather_single": (0, 1),
}
UNKNOWN = (
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "all_to_all_single",
    "send",
    "isend",
    "batch_isend_irecv",
)


@dataclass(frozen=True, slots=True)
class Row:
    """The traffic of a rank in a step.  `sent` and `limit` are bytes per parameter."""

    optimizer: str
    dp: int
    parameters: int
    sent: float
    limit: float
    calls: dict[str, int]


class Traffic:
    """A counter of the collectives of this process, from its construction on.

    It replaces the functions of torch.distributed.
    """

    def __init__(self) -> None:
        self.limit = 0
        self.calls: dict[str, int] = {}
        self._inside = False
        for name, (position, times) in COUNTED.items():
            if hasattr(dist, name):  # some exist only in newer versions of torch
                setattr(dist, name, self._counting(name, getattr(dist, name), position, times))
        Replicas.scatter_sum = self._counting(  # type: ignore[method-assign]
            "scatter_sum", Replicas.scatter_sum, 1, 1
        )
        for name in UNKNOWN:
            setattr(dist, name, self._refusing(name, getattr(dist, name)))

    def _counting(
        self, name: str, collective: Callable[..., Any], position: int, times: int
    ) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self._inside:  # called by another collective, which is counted already
                return collective(*arguments, **options)
            keyword = {0: ("tensor", "output_tensor"), 1: ("input", "input_tensor")}[position]
            found = [options[key] for key in keyword if key in options]
            values: Tensor = arguments[position] if len(arguments) > position else found[0]
            self.limit += times * values.nbytes
            self.calls[name] = self.calls.get(name, 0) + 1
            self._inside = True
            try:
                return collective(*arguments, **options)
            finally:
                self._inside = False

        return call

    def _refusing(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            assert self._inside, f"{name} is not counted"
            return collective(*arguments, **options)

        return call


def measure(
    rank: int, num_ranks: int, port: int, optimizer: str, config: RunConfig, path: str
) -> None:
    """Count the collectives of the second of two optimizer steps, without passes.

    This is the main function of a process.  Rank 0 writes the row to the file `path`.
    """
    torch.set_num_threads(1)
    store = dist.TCPStore(
        "127.0.0.1", port, num_ranks, is_master=rank == 0, timeout=timedelta(seconds=120)
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    plan = make_plan(config, num_ranks)
    mesh = build_mesh(plan.degrees, plan.problem)
    traffic = Traffic()  # before DeepSpeed stores references to the collectives
    model = build_rank(config, plan, mesh)
    for _ in range(2):
        traffic.limit, traffic.calls = 0, {}
        model.gradients.zero()
        model.gradients.flat.fill_(1e-3 * (rank + 1))
        model.optimizer.ready(list(model.parameters))
        model.optimizer.reduce()
        model.optimizer.squared_norm()
        model.optimizer.step(1e-3, 1.0)
        model.optimizer.settle()
    if rank == 0:
        limit = traffic.limit / model.num_parameters
        sent = limit * (num_ranks - 1) / num_ranks
        row = Row(optimizer, num_ranks, model.num_parameters, sent, limit, traffic.calls)
        Path(path).write_text(json.dumps(asdict(row)))
    dist.barrier()
    os._exit(0)


def measured(optimizer: str, dp: int) -> Row:
    """Start `dp` replicas, and return the counted row."""
    config = load_config([*COMMON, *OPTIMIZERS[optimizer]])
    config = replace(config, parallel=replace(config.parallel, dp=dp))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "row")
        multiprocessing.spawn(measure, (dp, port, optimizer, config, str(path)), nprocs=dp)
        return Row(**json.loads(path.read_text()))


def main() -> None:
    from provenance import provenance

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS), metavar="NAME"
    )
    parser.add_argument("--dp", type=int, nargs="+", default=[2, 4], help="numbers of replicas")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    arguments = parser.parse_args()
    rows = [measured(optimizer, dp) for optimizer in arguments.optimizers for dp in arguments.dp]
    text = json.dumps(
        provenance() | {"dtype": "bfloat16", "rows": [asdict(row) for row in rows]}, indent=1
    )
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
