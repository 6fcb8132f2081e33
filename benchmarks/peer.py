"""Compare this trainer with torch.distributed.pipelining's 1F1B on two gloo ranks of one thread.

    python benchmarks/peer.py [--vocab 32768 131072] [--rounds 3] [--steps 4] [--before DIR]
        [--json FILE]

There are three systems.  `torch` is Schedule1F1B with the embedding on the first stage, and output
layer and cross entropy on the last.  `none` is ours with the same placement.  `one_barrier` is ours
with that vocabulary algorithm.  All have the same layers, initial values, tokens, AdamW and
clipping, and must report the same loss.  The systems take turns, every run in new processes.
Medians over the rounds are compared.

With `--before DIR`, a checkout of an earlier commit, our systems also run with its code, next to
the runs with this one.  `ratio_to_before` is the median over the rounds of the ratio of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from provenance import provenance

SYSTEMS = ("torch", "none", "one_barrier")
RANKS, WARMUP = 2, 1
HERE = Path(__file__).resolve().parents[1]


def config_of(vocab_size: int, algorithm: str) -> Any:
    """Return the configuration that all systems share, with this vocabulary algorithm."""
    from vp_train.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, VocabConfig

    return RunConfig(
        model=ModelConfig(
            num_layers=8,
            hidden_size=256,
            num_heads=8,
            num_query_groups=4,
            seq_length=256,
            vocab_size=vocab_size,
        ),
        vocab=VocabConfig(algorithm=algorithm),
        parallel=ParallelConfig(pp=RANKS),
        optim=OptimConfig(warmup_steps=1),
        num_microbatches=8,
        micro_batch_size=1,
    )


def ours(config: Any) -> Any:
    """Return a function (tokens, labels) -> loss that trains one step with this trainer."""
    from vp_train.assembly import build_rank
    from vp_train.mesh import build_mesh
    from vp_train.optim.adamw import clip_scale, gather_health
    from vp_train.planning.plan import make_plan

    plan = make_plan(config, RANKS)
    mesh = build_mesh(plan.degrees, plan.problem)
    model = build_rank(config, plan, mesh)

    def step(tokens: Any, labels: Any) -> float:
        model.gradients.zero()
        loss = model.train_step(tokens, labels)
        model.optimizer.reduce()
        health = gather_health(
            loss if model.reports_loss else None, model.optimizer.squared_norm(), mesh.world
        )
        model.optimizer.step(
            config.optim.lr, clip_scale(health.grad_norm, config.optim.clip_grad_norm)
        )
        return float(health.loss)

    return step


def peer(config: Any, rank: int) -> Any:
    """Return a function (tokens, labels) -> loss that trains one step with torch's pipelining."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    from vp_train.communication.control import ControlGroup
    from vp_train.model.stage import Stage, init_rows
    from vp_train.optim.adamw import build_adamw, clip_scale, gather_health
    from vp_train.optim.optimizer import squared_norm

    model, cpu = config.model, torch.device("cpu")
    alone = [dist.new_group([r]) for r in range(RANKS)][rank]
    half = model.num_layers // 2

    def matrix(name: str) -> nn.Parameter:
        return nn.Parameter(
            init_rows(name, 0, model.vocab_size, model, config.run.seed, torch.float32, cpu)
        )

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = matrix("embedding")
            self.stage = Stage(
                model,
                range(half),
                final_norm=False,
                dtype=torch.float32,
                device=cpu,
                group=alone,
                seed=config.run.seed,
            )

        def forward(self, tokens: Any) -> Any:
            return self.stage(
                nn.functional.embedding(tokens, self.embedding).transpose(0, 1)
            ).transpose(0, 1)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = range(half, model.num_layers)
            self.stage = Stage(
                model,
                layers,
                final_norm=True,
                dtype=torch.float32,
                device=cpu,
                group=alone,
                seed=config.run.seed,
            )
            self.output = matrix("output")

        def forward(self, x: Any) -> Any:
            return nn.functional.linear(self.stage(x.transpose(0, 1)).transpose(0, 1), self.output)

    module = First() if rank == 0 else Last()
    stage = PipelineStage(module, rank, RANKS, cpu)

    def loss_of(logits: Any, labels: Any) -> Any:
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    schedule = Schedule1F1B(stage, config.num_microbatches, loss_fn=loss_of, scale_grads=True)
    parameters = list(module.parameters())
    optimizer = build_adamw(parameters, config.optim)

    def step(tokens: Any, labels: Any) -> float:
        optimizer.zero_grad()
        losses: list[Any] = []
        if rank == 0:
            schedule.step(tokens.flatten(0, 1), return_outputs=False)
        else:
            schedule.step(target=labels.flatten(0, 1), losses=losses, return_outputs=False)
        mean = torch.stack(losses).mean().detach() if losses else None
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        health = gather_health(mean, squared_norm(gradients), ControlGroup.flat(dist.group.WORLD))
        torch._foreach_mul_(gradients, clip_scale(health.grad_norm, config.optim.clip_grad_norm))
        optimizer.step()
        return float(health.loss)

    return step


def worker(system: str, vocab_size: int, steps: int, rank: int, port: int, out: str) -> None:
    """Run one rank of one run, and write its figures as JSON to `out`."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS
    )
    config = config_of(vocab_size, "none" if system == "torch" else system)
    step = peer(config, rank) if system == "torch" else ours(config)
    generator = torch.Generator().manual_seed(0)
    shape = (config.num_microbatches, config.micro_batch_size, config.model.seq_length + 1)
    text = torch.randint(0, vocab_size, shape, generator=generator)
    tokens, labels = text[..., :-1].contiguous(), text[..., 1:].contiguous()
    losses = [step(tokens, labels) for _ in range(WARMUP)]
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    losses += [step(tokens, labels) for _ in range(steps)]
    dist.barrier()
    figures = {
        "losses": losses,
        "tokens_per_second": steps * tokens.numel() / (time.perf_counter() - wall),
        "cpu_seconds_per_step": (time.process_time() - cpu) / steps,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    Path(out).write_text(json.dumps(figures))


def run(system: str, vocab_size: int, steps: int, checkout: Path = HERE) -> dict[str, Any]:
    """Run a system with the code of `checkout` on all ranks, and return its figures."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        outs = [f"{directory}/{rank}.json" for rank in range(RANKS)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
        processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    str(checkout / "benchmarks" / "peer.py"),
                    "--worker",
                    system,
                    str(vocab_size),
                    str(steps),
                    str(rank),
                    str(port),
                    out,
                ],
                env=environment,
            )
            for rank, out in enumerate(outs)
        ]
        if any(process.wait() for process in processes):
            raise SystemExit(f"{system} at V={vocab_size} failed")
        ranks = [json.loads(Path(out).read_text()) for out in outs]
    return {
        "system": system,
        "before": checkout != HERE,
        "vocab": vocab_size,
        "tokens_per_second": ranks[0]["tokens_per_second"],
        "cpu_seconds_per_step": [rank["cpu_seconds_per_step"] for rank in ranks],
        "peak_rss_mib": [rank["peak_rss_mib"] for rank in ranks],
        "first_loss": ranks[-1]["losses"][0],
        "last_loss": ranks[-1]["losses"][-1],
    }


def compare(runs: list[dict[str, Any]], vocab_size: int) -> dict[str, Any]:
    """Return the medians of every system, and their ratios to `torch` and to `before`."""

    def figures(system: str, figure: Any, before: bool = False) -> list[float]:
        return [
            figure(r)
            for r in runs
            if (r["system"], r["vocab"], r["before"]) == (system, vocab_size, before)
        ]

    def median(system: str, figure: Any) -> float:
        return statistics.median(figures(system, figure))

    table: dict[str, Any] = {"vocab": vocab_size}
    for system in SYSTEMS:
        table[system] = {
            "tokens_per_second": median(system, lambda r: r["tokens_per_second"]),
            "busiest_rank_cpu_seconds_per_step": median(
                system, lambda r: max(r["cpu_seconds_per_step"])
            ),
            "largest_rank_peak_rss_mib": median(system, lambda r: max(r["peak_rss_mib"])),
        }
    for system in SYSTEMS[1:]:
        table[system]["ratio_to_torch"] = {
            name: table[system][name] / table["torch"][name]
            for name in table["torch"]
            if name != "ratio_to_torch"
        }
        if any(r["before"] for r in runs):
            table[system]["ratio_to_before"] = {
                name: statistics.median(
                    now / then
                    for now, then in zip(
                        figures(system, of), figures(system, of, before=True), strict=True
                    )
                )
                for name, of in (
                    ("tokens_per_second", lambda r: r["tokens_per_second"]),
                    ("cpu_seconds_per_step", lambda r: sum(r["cpu_seconds_per_step"])),
                )
            }
    return table


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        system, vocab_size, steps, rank, port, out = sys.argv[2:]
        worker(system, int(vocab_size), int(steps), int(rank), int(port), out)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[32_768, 131_072])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--before", type=Path, metavar="DIR", help="a checkout of an earlier commit"
    )
    parser.add_argument("--json", type=Path, help="write everything measured as JSON")
    arguments = parser.parse_args()
    runs = []
    for vocab_size in arguments.vocab:
        for _ in range(arguments.rounds):
            for system in SYSTEMS:
                earlier = arguments.before if system != "torch" else None
                for checkout in filter(None, (HERE, earlier)):
                    runs.append(run(system, vocab_size, arguments.steps, checkout.resolve()))
                    print(json.dumps(runs[-1]), flush=True)
        losses = [r["first_loss"] for r in runs if r["vocab"] == vocab_size]
        if max(losses) - min(losses) > 1e-3:
            raise SystemExit(
                f"the systems disagree about the first loss at V={vocab_size}: {losses}"
            )
    result = provenance() | {
        "comparison": [compare(runs, vocab_size) for vocab_size in arguments.vocab],
        "runs": runs,
    }
    print(json.dumps(result["comparison"], indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
