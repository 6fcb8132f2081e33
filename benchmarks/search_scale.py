"""Time `vp-plan --search` for models of 8B to 405B on 8 to 8,192 GPUs, and show what it finds.

    python benchmarks/search_scale.py [--models llama3_8b llama3_70b llama3_405b]
        [--gpus 8 64 512 8192] [--effort THOUSANDS] [--seconds 60] [--json FILE]

Nodes have eight H100.  A step has 512 sequences of 8,192 tokens for 8B, 1,024 for 70B, 2,048 for
405B.  `cpu` are the seconds of one core, which do not count what else the machine does.  Rows of a
FILE that are not searched again stay in it.  `other` is the time of the best plan with vocabulary
parallelism if the best of all has none, else of the best one without it.  Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from provenance import provenance

from vp_train.commands.command import collect_rarely
from vp_train.commands.plan import search_record
from vp_train.commands.plan_words import short_words
from vp_train.commands.search_beside import compared_with
from vp_train.config import ConfigError
from vp_train.planning.found import Limits
from vp_train.planning.search import search
from vp_train.settings import load_config

SEQUENCES = {"llama3_8b": 512, "llama3_70b": 1024, "llama3_405b": 2048}
GPUS_PER_NODE = 8


def row_of(model: str, num_gpus: int, limits: Limits, seconds: float) -> dict[str, Any]:
    """Search once; return what it took and what it found."""
    config = load_config(
        [
            *(f"model={model}", "cluster=h100_80g_node"),
            *(f"cluster.num_nodes={num_gpus // GPUS_PER_NODE}",),
            f"num_microbatches={SEQUENCES[model]}",
        ]
    )
    wall, cpu = time.monotonic(), time.process_time()
    row: dict[str, Any] = {"model": model, "gpus": num_gpus, "sequences": SEQUENCES[model]}
    try:
        result = search(
            config, limits, lambda: time.monotonic() < wall + seconds, lambda words: None
        )
    except ConfigError as error:
        return row | {"error": str(error), "cpu_seconds": time.process_time() - cpu}
    took = {"wall_seconds": time.monotonic() - wall, "cpu_seconds": time.process_time() - cpu}
    record = search_record(config, limits, result, None, compared_with(config, limits, result))
    for plan in record["best"]:
        plan["worst_bytes"] = max(rank["total_bytes"] for rank in plan.pop("ranks"))
    record["excluded"] = dict(result.excluded.most_common(4))
    words = short_words(result.best[0].choice) if result.best else "nothing fits"
    return row | took | record | {"words": words, "refused": record["refused"][:3]}


def shown(row: dict[str, Any]) -> str:
    """Return one row of the table."""
    head = f"{row['model']:>12} {row['gpus']:>6,} {row['cpu_seconds']:>6.1f}"
    if not row.get("best"):
        words = row.get("error") or next(iter(row["excluded"]), "")
        return f"{head}  nothing: {words}"
    best, kind = row["best"][0], "with" if row["best"][0]["vocab"] == "none" else "without"
    found = row[f"{kind}_vocabulary_parallelism"]
    other = "-" if found is None else f"{found['step_seconds'] / best['step_seconds'] - 1:+.1%}"
    return (
        f"{head} {row['choices']:>8,} {row['estimates']:>5} {row['planned']:>3} {row['open']:>6,} "
        f"{best['step_seconds']:>8.2f} {best['mfu']:>6.1%} {best['worst_bytes'] / 2**30:>6.1f} "
        f"{other:>7}  dp={best['dp']} pp={best['pp']} tp={best['tp']} "
        f"{best['num_microbatches']} x {best['micro_batch_size']} {row['words']}, {best['vocab']}"
    )


def main() -> None:
    """Search for every model and number of GPUs; print a table and write the JSON."""
    collect_rarely()  # as the command does
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SEQUENCES))
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 512, 8192])
    parser.add_argument("--effort", type=int, default=Limits().effort // 1000)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    limits = Limits(effort=1000 * options.effort)
    print(
        f"{'model':>12} {'GPUs':>6} {'cpu s':>6} {'choices':>8} {'short':>5} {'all':>3} "
        f"{'open':>6} {'step s':>8} {'MFU':>6} {'GiB':>6} {'other':>7}  best"
    )
    rows: list[dict[str, Any]] = []
    for model in options.models:
        for num_gpus in options.gpus:
            rows.append(row_of(model, num_gpus, limits, options.seconds))
            print(shown(rows[-1]), flush=True)
            if options.json is not None:
                record = {"provenance": provenance(), "rows": _with_others(options.json, rows)}
                options.json.write_text(json.dumps(record, indent=1) + "\n")


def _with_others(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `rows` and those of other models and clusters that the file has already."""
    old = json.loads(path.read_text())["rows"] if path.is_file() else []
    ours = {(row["model"], row["gpus"]) for row in rows}
    rows = [*rows, *(row for row in old if (row["model"], row["gpus"]) not in ours)]
    return sorted(rows, key=lambda row: (row["sequences"], row["gpus"]))


if __name__ == "__main__":
    main()
