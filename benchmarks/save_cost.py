"""Measure what a checkpoint costs the steps of a run: gloo ranks on CPUs, the model `small`.

    python benchmarks/save_cost.py [--ranks 4] [--every 6] [--saves 10] [--json FILE]

Every `every`-th step saves.  Three kinds of steps are compared: those that end with a save, those
beside which the ranks write, and all others.  A step is timed on every rank, from its begin to its
end with all that it waits for, and the slowest rank counts.  On a machine with other work the
paired cost says more: the median over the saves of each kind's mean, in relation to the other
steps from this save to the next.  The CPU seconds of all threads of all ranks say most there: they
do not count the time in which others run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from job import result_of_job
from provenance import provenance

WARMUP = 3  # steps, and the first save, which allocates the copy


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def rank_main(directory: str, every: int, saves: int) -> None:
    """Train as one rank, and print the kind and the seconds of every step as JSON."""
    import torch
    import torch.distributed as dist

    from vp_train.assembly import build_rank
    from vp_train.data import open_source
    from vp_train.mesh import build_mesh
    from vp_train.planning.plan import make_plan
    from vp_train.settings import load_config
    from vp_train.train import Run

    torch.set_num_threads(1)
    num_ranks = int(os.environ["WORLD_SIZE"])
    steps = WARMUP + every * (saves + 1) - 1
    config = load_config(
        [
            "model=small",
            "data=synthetic",
            f"parallel.pp={num_ranks}",
            f"run.root={directory}",
            f"run.steps={steps + 1}",
            f"run.checkpoint_every={every}",
            "run.eval_every=0",
            "run.trace_step=0",
        ]
    )
    dist.init_process_group("gloo")
    plan = make_plan(config, num_ranks)
    mesh = build_mesh(plan.degrees, plan.problem, config.run)
    run = Run(config, plan, mesh, open_source(config), build_rank(config, plan, mesh))
    rows: list[tuple[str, float, float]] = []
    blocked: list[float] = []
    saver = run._checkpoints._saver
    begin = saver.begin

    def timed(*arguments: Any) -> None:
        started = time.perf_counter()
        begin(*arguments)
        blocked.append(time.perf_counter() - started)

    saver.begin = timed  # type: ignore[method-assign]
    before = copied = 0
    for step in range(1, steps + 1):
        saving = saver._save is not None
        is_due = step % every == 0
        before = resident_bytes() if step == every else before
        mesh.steps.barrier()
        started, used = time.perf_counter(), time.process_time()
        run.train_step(step)
        seconds, used = time.perf_counter() - started, time.process_time() - used
        copied = resident_bytes() - before if step == every else copied
        kind = "save" if is_due else "beside" if saving else "plain"
        rows.append((kind if step > max(WARMUP, every) else "warm-up", seconds, used))
    run.finish_save()
    image = saver._copy.image.nbytes
    gathered = mesh.world.all_gather_json((rows, blocked, image, copied))
    if mesh.rank == 0:
        print(json.dumps(gathered))
    dist.destroy_process_group()


def measure(num_ranks: int, every: int, saves: int) -> dict[str, Any]:
    """Run the ranks, and return the medians in seconds and the bytes of the copies."""
    words = ["--every", str(every), "--saves", str(saves)]
    found = result_of_job(__file__, num_ranks, 29617, words)
    rows, blocked, images, copied = zip(*found, strict=True)
    by_kind: dict[str, list[float]] = {}
    used_by_kind: dict[str, list[float]] = {}
    paired: dict[str, list[float]] = {"save": [], "beside": []}
    cycle: dict[str, list[float]] = {}
    for of_step in zip(*rows, strict=True):
        kind = max((row[0] for row in of_step), key=("plain", "warm-up", "beside", "save").index)
        used_by_kind.setdefault(kind, []).append(sum(used for *_, used in of_step))
        if kind == "save":
            cycle = {}
        for kinds in (by_kind, cycle):
            kinds.setdefault(kind, []).append(max(seconds for _, seconds, _ in of_step))
        if sum(map(len, cycle.values())) == every and "plain" in cycle:
            for name, costs in paired.items():
                if name in cycle:
                    costs.append(statistics.mean(cycle[name]) / statistics.mean(cycle["plain"]))
    if "plain" not in by_kind:
        raise SystemExit(
            f"--every {every}: every step saves or has a save written beside it, so none is left "
            f"to compare with; take more steps from save to save, for example --every {2 * every}"
        )
    plain = statistics.median(by_kind["plain"])
    return {
        "ranks": num_ranks,
        "save_every": every,
        "steps": {kind: len(found) for kind, found in by_kind.items()},
        "median_seconds": {kind: statistics.median(found) for kind, found in by_kind.items()},
        "cost": {
            kind: statistics.median(by_kind[kind]) / plain - 1.0
            for kind in ("save", "beside")
            if kind in by_kind
        },
        "median_cpu_seconds": {
            kind: statistics.median(found) for kind, found in used_by_kind.items()
        },
        "paired_cost": {name: statistics.median(costs) - 1.0 for name, costs in paired.items()},
        "seconds_that_a_save_blocks": statistics.median(
            max(times) for times in zip(*blocked, strict=True)
        ),
        "host_copy_bytes_of_ranks": images,
        "resident_growth_at_the_first_save_bytes": copied,
    }


def main() -> None:
    """Measure, and print or write the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--as-rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        rank_main(options.as_rank, options.every, options.saves)
        return
    result = provenance() | measure(options.ranks, options.every, options.saves)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
