"""Measure what activations in host memory cost and save on a CPU, all ranks in this process.

    python benchmarks/offload.py [--rounds 5] [--out FILE]

Steps with and without `parallel.offload_activations` alternate.  Printed are processor seconds of a
step of all ranks, and the highest peak of activations of a rank: as recorded, and as planned.  On a
CPU device and host are one memory, so the run as a whole saves nothing; the recorder counts what a
device would hold.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for the tests, which are not installed

from provenance import provenance

from tests.local import Together, run_locally
from vp_train.assembly import RankModel
from vp_train.config import ModelConfig, ParallelConfig, RunConfig, RunSettings, ScheduleConfig
from vp_train.pipeline.recorder import Recorder
from vp_train.pipeline.timers import HostTimer
from vp_train.planning.plan import RunPlan, make_plan

RANKS, MICROBATCHES = 4, 12
MODEL = ModelConfig(
    num_layers=8,
    hidden_size=256,
    num_heads=8,
    num_query_groups=4,
    ffn_hidden_size=704,
    vocab_size=2048,
    seq_length=256,
)
CASES = [
    ("1f1b", "none", 0.5),
    ("1f1b", "none", 1.0),
    ("1f1b", "full", 1.0),
    ("interleaved", "none", 1.0),
    ("v_half", "none", 1.0),
]


def config_of(schedule: str, recompute: str, part: float) -> RunConfig:
    """Return the settings of a run that offloads this part of the layers."""
    parallel = ParallelConfig(pp=RANKS, recompute=recompute, offload_activations=part)
    return RunConfig(
        model=MODEL,
        schedule=ScheduleConfig(schedule),
        parallel=parallel,
        run=RunSettings(dtype="float32"),
        num_microbatches=MICROBATCHES,
        micro_batch_size=1,
    )


def step(config: RunConfig, plan: RunPlan, *, records: bool = False) -> tuple[float, int, int]:
    """Return processor seconds of a step, the highest peak, and the bytes that were moved."""
    shape = (MICROBATCHES, 1, MODEL.seq_length)
    tokens = torch.randint(0, MODEL.vocab_size, shape)

    def work(rank: int, model: RankModel, together: Together) -> tuple[float, int, int]:
        recorder = Recorder(rank, HostTimer(), list(model.parameters.values()))
        seconds = 0.0
        for _ in range(2):  # the first one allocates
            model.gradients.zero()
            together.gather(rank, None)
            begin = time.process_time()
            if records:
                model.train_step(tokens, tokens, recorder)
            else:
                model.train_step(tokens, tokens)
            model.optimizer.reduce()
            together.gather(rank, None)
            seconds = time.process_time() - begin
        return seconds, recorder.peak_bytes, model.trainer.host_bytes

    found = run_locally(config, plan, work)
    return found[0][0], max(peak for _, peak, _ in found), max(host for *_, host in found)


def measure(schedule: str, recompute: str, part: float, rounds: int) -> dict[str, Any]:
    """Return the record of one case."""
    pairs = [config_of(schedule, recompute, p) for p in (0.0, part)]
    runs = [(config, make_plan(config, RANKS)) for config in pairs]
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for index, run in enumerate(runs):
            seconds[index].append(step(*run)[0])
    without, away = (step(*run, records=True) for run in runs)
    plans = [max(plan.timeline.peak_bytes) for _, plan in runs]
    ratios = [b / a for a, b in zip(*seconds, strict=True)]
    return {
        "schedule": schedule,
        "recompute": recompute,
        "part": part,
        "seconds": [median(values) for values in seconds],
        "ratio": median(ratios),
        "ratios": ratios,
        "peak_bytes": [without[1], away[1]],
        "planned_peak_bytes": plans,
        "host_bytes": away[2],
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    records = []
    print(
        "schedule     recompute  part  CPU s without  with        peak MiB without  with  (planned)"
    )
    for schedule, recompute, part in CASES:
        record = measure(schedule, recompute, part, options.rounds)
        records.append(record)
        (a, b), (peak, less) = record["seconds"], (v / 2**20 for v in record["peak_bytes"])
        planned, planned_less = (v / 2**20 for v in record["planned_peak_bytes"])
        print(
            f"{schedule:12} {recompute:9} {part:5.1f} {a:14.3f} {b:5.3f} x{record['ratio']:.3f}"
            f" {peak:16.2f} {less:5.2f}  ({planned:.2f} {planned_less:.2f})",
            flush=True,
        )
    if options.out is not None:
        options.out.write_text(json.dumps(provenance() | {"cases": records}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
