"""Compare what `vp-plan --search` finds with plans that experts have published.

    python benchmarks/expert_plans.py [--only NAME ...] [--json FILE]

Each published plan is typed with its degrees, batch and schedule.  It is planned with the physics
of the search.  What was not published is given to the expert: of all chunks, both placements, and
the micro-batches named here the fastest that fits counts, each with as little recomputation as
fits.  The search has its default effort, and keeps the default margin of 5 % of the memory free,
which the expert need not.  No expert offloads activations, so a second search does not either.
Plans of FSDP are those of `planning.fsdp` with the published degrees and micro-batch, and as little
recomputation as fits; the search has no such plan.  The first search may use host memory, and is
compared with FSDP that may too.  `slower` above 0 is a row that the search loses.  Nothing is
measured.  Rows of a FILE that are not searched again stay in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plan_published import LLAMA, gpt_words
from provenance import provenance

from vp_train.commands.command import collect_rarely
from vp_train.config import ConfigError
from vp_train.planning.degrees import Degrees
from vp_train.planning.found import Limits
from vp_train.planning.fsdp import ON_GPUS, ON_HOSTS, Means, best_step
from vp_train.planning.kept import Kept
from vp_train.planning.report import PlanReport, make_report
from vp_train.planning.search import search
from vp_train.planning.space import space_of
from vp_train.planning.workload import Workload
from vp_train.settings import load_config

DATA = Path(__file__).parent / "data/h100_megatron_s4096.json"
TITAN = "fsdp_llama.json"
RECOMPUTE = ("none", "selective", "full")
GIB = 2**30
ON_DEVICE = Kept({"parallel.offload_activations": 0.0})  # no activations go to the hosts


@dataclass(frozen=True)
class Expert:
    """A published plan: the model with its cluster and batch, the plan, and what was left open.

    is_fsdp: whether it is fully sharded data parallelism.
    """

    name: str
    source: str
    sequences: int
    job: tuple[str, ...]
    plan: tuple[str, ...]
    open: tuple[tuple[str, ...], ...]
    is_fsdp: bool = False

    @property
    def plans(self) -> list[str]:
        """All that the plan may be, but for what is recomputed."""
        return [" ".join((*self.plan, *more)) for more in itertools.product(*self.open)]


def looped(num_layers: int, pp: int) -> tuple[str, ...]:
    """Return 1F1B and interleaved 1F1B of all chunks, with equal stages and a shorter last one.

    Two stages more than layers will do, since one at each end may have none.
    """
    counts = range(2, (num_layers + 2) // pp + 1)
    schedules = [f"interleaved schedule.num_chunks={count}" for count in counts]
    return tuple(
        f"schedule={schedule} parallel.placement={placement}"
        for schedule in ("1f1b", *(schedules if pp > 1 else ()))
        for placement in ("balanced", "redistribute")
    )


def megatron(row: dict[str, Any], data: dict[str, Any]) -> Expert:
    """Return a row of Megatron-Core's weak scaling."""
    per_replica = row["batch"] // data["dp"]
    sizes = tuple(
        f"micro_batch_size={size} num_microbatches={per_replica // size}"
        for size in (1, 2, 4)
        if per_replica % size == 0
    )
    return Expert(
        row["name"],
        "Megatron-Core r0.8",
        row["batch"],
        (
            *gpt_words(row["hidden"], row["layers"], row["heads"], data["seq"]),
            "cluster=h100_80g_node",
            f"cluster.num_nodes={row['gpus'] // 8}",
            f"model.vocab_size={data['vocab']}",
        ),
        (
            *(f"parallel.tp={row['tp']}", f"parallel.pp={row['pp']}", f"parallel.dp={data['dp']}"),
            *(
                f"parallel.sequence_parallel={row['tp'] > 1}".lower(),
                "optim.name=zero1",
                "vocab=none",
            ),
        ),
        (looped(row["layers"], row["pp"]), sizes),
    )


def llama(num_gpus: int, dp: int) -> Expert:
    """Return the plan of Llama 3 405B for 8,192 tokens (arXiv 2407.21783, table 4)."""
    return Expert(
        f"405B, {num_gpus:,} GPUs",
        "Llama 3, arXiv 2407.21783",
        2048,
        ("model=llama3_405b", "cluster=h100_80g_node", f"cluster.num_nodes={num_gpus // 8}"),
        (
            *("parallel.tp=8", "parallel.pp=16", f"parallel.dp={dp}"),
            *("parallel.sequence_parallel=true", "optim.name=zero1", "vocab=none"),
            *("micro_batch_size=1", f"num_microbatches={2048 // dp}"),
        ),
        (looped(126, 16),),
    )


def torchtitan(row: dict[str, Any]) -> Expert:
    """Return a run of torchtitan, which is FSDP without a pipeline."""
    size, card = row["micro_batch_size"], row["gpu"]
    return Expert(
        f"{row['model']}, {row['gpus']} {card.upper()}, {row['seq']:,} tokens",
        "torchtitan, FSDP2",
        row["gpus"] * size,
        (
            *(*LLAMA[row["model"]], f"model.seq_length={row['seq']}"),
            *(f"cluster={card}_80g_node", f"cluster.num_nodes={row['gpus'] // 8}"),
        ),
        (f"micro_batch_size={size}", "num_microbatches=1"),
        (),
        is_fsdp=True,
    )


def experts() -> list[Expert]:
    data, titan = (json.loads((DATA.parent / name).read_text()) for name in (DATA.name, TITAN))
    paper = Expert(
        "4B, 8 A100",
        "arXiv 2411.05288, vocab-2",
        128,
        ("model=gpt_4b", "cluster=a100_80g_node", "model.vocab_size=256000"),
        ("schedule=1f1b", "vocab=one_barrier", "parallel.pp=8", "num_microbatches=128"),
        (),
    )
    rows = [megatron(row, data) for row in data["rows"]]
    sharded = map(torchtitan, titan["rows"])
    return [paper, *rows, llama(8_192, 64), llama(16_384, 128), *sharded]


def best_of_expert(expert: Expert) -> dict[str, Any] | None:
    """Return the fastest plan of the expert that fits."""
    if expert.is_fsdp:
        return fully_sharded(expert, ON_GPUS)
    found = []
    for words, recompute in itertools.product(expert.plans, RECOMPUTE):
        if found and found[-1][0].startswith(f"{words} "):
            continue  # it fits with less recomputation
        plan = f"{words} parallel.recompute={recompute}"
        try:
            report = make_report(load_config([*expert.job, *plan.split()]))
        except ConfigError:
            continue
        if report.fits:
            found.append((plan, report))
    best = min(found, key=lambda one: one[1].step_seconds, default=None)
    return None if best is None else described(*best)


def fully_sharded(expert: Expert, means: Means) -> dict[str, Any] | None:
    """Return the step of an FSDP plan, None if it does not fit."""
    config = load_config([*expert.job, *expert.plan])
    work = Workload.of(config, Degrees(config.cluster.num_gpus, 1, 1))
    settings = work, config.cluster, config.cost, config.optim
    step = best_step(*settings, means)
    if step is None or not step.fits:
        return None
    how = step.memory_words.removeprefix("recomputation ")
    return {
        "overrides": " ".join(expert.plan),
        "step_seconds": step.seconds,
        "mfu": step.mfu,
        "gib": step.num_bytes / GIB,
        "words": f"dp={step.degrees.dp}, 1 x {step.micro_batch_size}, FSDP, {how}",
    }


def row_of(expert: Expert) -> dict[str, Any]:
    """Plan as the expert did, search, and compare."""
    row: dict[str, Any] = {
        "name": expert.name,
        "source": expert.source,
        "job": " ".join(expert.job),
        "sequences": expert.sequences,
        "commit": provenance()["commit"],
    }
    best = best_of_expert(expert)
    row["expert"] = best
    rivals = {"search": best, "on_device": best}
    if expert.is_fsdp:
        rivals["search"] = row["expert_on_hosts"] = fully_sharded(expert, ON_HOSTS)
    config = load_config([*expert.job, f"num_microbatches={expert.sequences}"])
    for name, kept in (("search", Kept()), ("on_device", ON_DEVICE)):
        started, space = time.process_time(), space_of(config, kept)
        result = search(config, Limits(top=1), lambda: True, lambda words: None, space)
        row[name] = None
        if result.best:
            first = result.best[0]
            row[name] = described(first.choice.overrides(config), first.report) | {
                "cpu_seconds": time.process_time() - started,
                "open": result.num_open,
            }
            if (rival := rivals[name]) is not None:
                row[name]["slower"] = first.report.step_seconds / rival["step_seconds"] - 1
    return row


def described(overrides: str, report: PlanReport) -> dict[str, Any]:
    """Return a plan for the table, in seconds and GiB."""
    recompute = report.recompute
    if report.offloading is not None:
        recompute += ", activations on the hosts"
    return {
        "overrides": overrides,
        "step_seconds": report.step_seconds,
        "mfu": report.mfu,
        "gib": report.ranks[report.worst].memory.total / GIB,
        "words": f"{report.degrees}, {report.work.num_microbatches} x "
        f"{report.work.micro_batch_size}, {report.schedule}, {report.vocab}, {recompute}",
    }


def shown(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    cells = [row["name"]]
    for key in ("expert", "search", "on_device"):
        plan = row[key]
        if plan is None:
            cells += ["nothing fits", "", ""]
            continue
        slower = f" ({100 * plan['slower']:+.1f} %)" if "slower" in plan else ""
        words, hosts = plan["words"], row.get("expert_on_hosts") if key == "expert" else None
        if hosts is not None and hosts["words"] != words:
            words += f"; with host memory {hosts['step_seconds']:.2f} s"
        cells += [f"{plan['step_seconds']:.2f}{slower}", f"{plan['gib']:.1f}", words]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    collect_rarely()  # as the command does
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="names of the rows to plan")
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    options = parser.parse_args()
    everyone = experts()
    columns = [f"{name} | GiB | how" for name in ("expert s", "search s", "no offloading s")]
    print(f"| plan | {' | '.join(columns)} |")
    print("|---" * 10 + "|")
    rows: list[dict[str, Any]] = []
    for expert in everyone:
        if options.only and expert.name not in options.only:
            continue
        rows.append(row_of(expert))
        print(shown(rows[-1]), flush=True)
        if options.json is not None:
            old = json.loads(options.json.read_text())["rows"] if options.json.is_file() else []
            known = {row["name"]: row for row in (*old, *rows)}
            table = [known[one.name] for one in everyone if one.name in known]
            record = {"provenance": provenance(), "rows": table}
            options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
