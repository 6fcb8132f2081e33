"""Compare pipelines with FSDP: the same batch, the same H100 cluster.

    python benchmarks/plan_fsdp.py [--json FILE]
    python benchmarks/plan_fsdp.py --read FILE

Both are planned, from the same physics; nothing is measured.  The batch is 4 M tokens.  FSDP is the
fastest of all micro-batch sizes, recomputations and tensor-parallel degrees of a node
(`planning.fsdp`), once with host memory for activations and the optimizer, and once without.
Pipelines are those that `vp-plan --search` finds with pp of at least 2 and its default effort: the
fastest with vocabulary parallelism, and the fastest without.  Neither need leave memory free.  Both
may use host memory.  A pipeline that uses none is compared with FSDP that uses none.

The table also says whether FSDP wins, as `vp-plan` does (`planning.rivals`): `loses` even at best,
`ties` at best, `wins` even at what published runs of it reached, or `open`.  --read prints that of
a stored result.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from provenance import provenance

from vp_train.commands.command import collect_rarely
from vp_train.config import RunConfig
from vp_train.config.parallel import recompute_words
from vp_train.planning.batch import with_batch_of
from vp_train.planning.degrees import Degrees
from vp_train.planning.found import Found, Limits, SearchResult
from vp_train.planning.fsdp import ON_GPUS, ON_HOSTS, FsdpReport, Means, best_fsdp
from vp_train.planning.rivals import PublishedRuns, outcome_of, runs_like
from vp_train.planning.search import search
from vp_train.planning.space import Space, space_of
from vp_train.planning.workload import Workload
from vp_train.settings import load_config

TOKENS = 1 << 22
MODELS = {"8B": "llama3_8b", "30B": "gpt_30b", "70B": "llama3_70b"}
# GPUs, and ports of a node that its eight GPUs share: all of 8 x 400 Gb/s, or one
CASES = ((8, 8), (64, 8), (512, 8), (64, 1), (512, 1))


@dataclass(frozen=True)
class Pipeline:
    """The fastest pipeline found: seconds, MFU, GiB of the worst rank, and how to get it.

    uses_hosts: whether activations or the optimizer are in host memory.
    num_open: the choices that might be faster and that the effort left.
    """

    seconds: float
    mfu: float
    gib: float
    words: str
    overrides: str
    uses_hosts: bool
    num_open: int


def config_of(model: str, num_gpus: int, rails: int) -> RunConfig:
    words = [
        f"model={model}",
        "cluster=h100_80g_node",
        f"cluster.num_nodes={num_gpus // 8}",
        f"cluster.rails={rails}",
        "optim.name=zero1",
    ]
    return with_batch_of(load_config(words), TOKENS)


def best_pipeline(config: RunConfig, *, splits_vocabulary: bool) -> Pipeline | None:
    """Return the fastest pipeline found with or without vocabulary parallelism."""
    choices = tuple(
        choice
        for choice in space_of(config).choices
        if choice.degrees.pp > 1 and choice.splits_vocabulary is splits_vocabulary
    )
    limits, space = Limits(top=1, margin=0.0), Space(choices, Counter())
    result = search(config, limits, lambda: True, lambda words: None, space)
    return pipeline_of(config, result.best[0], result) if result.best else None


def pipeline_of(config: RunConfig, found: Found, result: SearchResult) -> Pipeline:
    choice, report = found.choice, found.report
    chunks = f" of {choice.num_chunks} chunks" if choice.num_chunks is not None else ""
    recompute = recompute_words(choice.recompute_of_stages)
    hosts = f", {choice.offload:.0%} of activations on the host" if choice.offload else ""
    if choice.optimizer is not None and choice.optimizer.offload:
        hosts += ", offload"
    return Pipeline(
        report.step_seconds,
        report.mfu,
        report.ranks[report.worst].memory.total / 2**30,
        f"{report.degrees}, {choice.num_microbatches} x {choice.micro_batch_size}, "
        f"{report.schedule}{chunks}, {report.vocab}, recompute {recompute}{hosts}",
        choice.overrides(config),
        report.host.total > 0,
        result.num_open,
    )


def fsdp_of(config: RunConfig, means: Means) -> FsdpReport | None:
    sequences = config.num_microbatches
    work = Workload.of(config, Degrees(config.cluster.num_gpus, 1, 1))
    report = best_fsdp(
        work,
        config.cluster,
        config.cost,
        config.optim,
        num_sequences=sequences,
        means=means,
    )
    return report if report is not None and report.fits else None


def row_of(name: str, num_gpus: int, rails: int) -> dict[str, Any]:
    """Return the comparison of one model on one number of GPUs."""
    config = config_of(MODELS[name], num_gpus, rails)
    fsdp, alone = (fsdp_of(config, means) for means in (ON_HOSTS, ON_GPUS))
    pipelines = {
        "with_vocabulary_parallelism": best_pipeline(config, splits_vocabulary=True),
        "without_vocabulary_parallelism": best_pipeline(config, splits_vocabulary=False),
    }
    row: dict[str, Any] = {"model": name, "gpus": num_gpus, "rails": rails}
    for key, step in (("fsdp", fsdp), ("fsdp_without_hosts", alone)):
        row[key] = None if step is None else asdict(step) | {"seconds": step.seconds}
    for key, pipeline in pipelines.items():
        row[key] = None
        if pipeline is not None:
            rival = fsdp if pipeline.uses_hosts else alone
            slower = None if rival is None else 100 * (rival.seconds / pipeline.seconds - 1)
            row[key] = asdict(pipeline) | {"fsdp_slower_pct": slower}
    return row


def words_of(fsdp: dict[str, Any]) -> str:
    """Return how FSDP runs, in words."""
    words = [f"tp={fsdp['degrees']['tp']}, micro-batch {fsdp['micro_batch_size']}"]
    words.append(f"recompute {fsdp['recompute']}")
    number, num_layers = fsdp["num_recomputed"], fsdp["num_layers"]
    if 0 < number < num_layers:
        words[-1] += f" in {number} of {num_layers} layers"
    if fsdp["num_offloaded"]:
        words.append(f"{fsdp['num_offloaded']} of {num_layers} layers on the host")
    if fsdp["offloads_optimizer"]:
        words.append("offload")
    words.append(f"exposed {100 * fsdp['exposed'] / fsdp['seconds']:.0f} %")
    return ", ".join(words)


@functools.cache
def published() -> PublishedRuns:
    """Return the published runs of FSDP on the card of these plans."""
    return runs_like(load_config(["cluster=h100_80g_node"]).cluster)


def verdict_of(row: dict[str, Any], pipeline: dict[str, Any]) -> str:
    """Return how much longer FSDP takes at best than a pipeline of the row, and whether it wins."""
    rival = row["fsdp"] if pipeline["uses_hosts"] else row["fsdp_without_hosts"]
    if rival is None:
        return ""
    outcome = outcome_of(rival["seconds"], pipeline["seconds"], published())
    mark = "" if pipeline["uses_hosts"] else " *"
    return f"{round(pipeline['fsdp_slower_pct']):+d} %{mark}, {outcome}"


def show(row: dict[str, Any]) -> None:
    cells, fsdp = [row["model"], str(row["gpus"]), str(row["rails"])], row["fsdp"]
    if fsdp is None:
        cells += ["does not fit", "", ""]
    else:
        cells += [f"{fsdp['seconds']:.2f}", f"{fsdp['num_bytes'] / 2**30:.1f}", words_of(fsdp)]
    alone = row["fsdp_without_hosts"]
    cells.append("does not fit" if alone is None else f"{alone['seconds']:.2f}")
    for key in ("with_vocabulary_parallelism", "without_vocabulary_parallelism"):
        found = row[key]
        if found is None:
            cells += ["none found that fits", "", "", ""]
            continue
        cells += [f"{found['seconds']:.2f}", f"{found['gib']:.1f}", found["words"]]
        cells.append(verdict_of(row, found))
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    collect_rarely()  # as the command does
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    parser.add_argument("--read", type=Path, help="print the table of that JSON, and plan nothing")
    arguments = parser.parse_args()
    pipeline = "GiB | how | FSDP takes longer by, and whether it wins"
    print(
        "| model | GPUs | ports | FSDP s | GiB | how | without hosts s "
        f"| with vocabulary parallelism s | {pipeline} | without s | {pipeline} |"
    )
    print("|---" * 15 + "|")
    if arguments.read:
        for row in json.loads(arguments.read.read_text())["rows"]:
            show(row)
        return
    rows = []
    for name, (num_gpus, rails) in itertools.product(MODELS, CASES):
        rows.append(row_of(name, num_gpus, rails))
        show(rows[-1])
    if arguments.json:
        result = provenance() | {"tokens": TOKENS, "effort": Limits().effort} | {"rows": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
