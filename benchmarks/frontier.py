"""Bubble against memory: the fastest schedule that `auto` finds under every cap, and its picture.

    python benchmarks/frontier.py [--ranks 8] [--microbatches 64] [--vocab one_barrier none]
        [--caps 4.15 4.65 ...] [--json FILE] [--picture FILE.png]

Costs are those of family.py, with an output layer of 2.4 layers.  A cap counts microbatches of a
rank's layers, where a shard held from S to T counts 0.15.  The seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from family import HELD_SHARD, named, option
from provenance import provenance

from schedules.generators import GENERATORS, searched_schedules
from schedules.generators.auto import CapError, Solution, solve
from schedules.simulate import simulate
from schedules.vocab import VOCAB_ALGORITHMS
from vp_train.commands.plot import Frontier, Marker, frontier_figure

HEAD = 2.4  # layers that the output layer costs


def curve(vocab: str, num_ranks: int, num_microbatches: int, caps: list[float]) -> list[dict]:
    """Return a row for every cap, from the lowest: more memory never makes a step slower."""
    rules = VOCAB_ALGORITHMS[vocab]
    options = [
        option(name, rules, num_microbatches, HEAD, (1.0,) * num_ranks) for name in GENERATORS
    ]
    rows: list[dict[str, Any]] = []
    known: list[Solution] = []
    for cap in sorted(caps):
        started = time.process_time()
        try:
            solution = solve(options, [cap] * num_ranks, known=known)
        except CapError:
            continue
        taken = time.process_time() - started
        timeline = simulate(solution.schedule, solution.option.problem, solution.option.cost)
        known = [solution]
        rows.append(
            {
                "vocab": vocab,
                "cap": cap,
                "bubble_pct": 100 * timeline.mean_bubble,
                "gap_pct": 100 * (timeline.gap or 0.0),
                "peak_microbatches": max(timeline.peak_bytes),
                "makespan": timeline.makespan,
                "found_as": solution.schedule.name,
                "processor_seconds": taken,
            }
        )
        print(
            f"| `{vocab}` | {cap:g} | {100 * timeline.mean_bubble:.2f} % | "
            f"{100 * (timeline.gap or 0.0):.2f} % | {taken:.1f} s |",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--vocab", nargs="+", default=["one_barrier", "none"])
    parser.add_argument("--caps", type=float, nargs="+", help="in microbatches")
    parser.add_argument("--json", type=Path, help="write the rows as JSON")
    parser.add_argument("--picture", type=Path, help="draw them")
    arguments = parser.parse_args()
    p, m = arguments.ranks, arguments.microbatches
    caps = arguments.caps or [half / 2 + HELD_SHARD for half in range(5, 2 * p + 3)]
    print("| vocab | cap | bubble | gap | processor |\n|---|---|---|---|---|", flush=True)
    rows = [row for vocab in arguments.vocab for row in curve(vocab, p, m, caps)]
    points = [
        named(name, VOCAB_ALGORITHMS[vocab], m, HEAD, p)
        for vocab in arguments.vocab
        for name in searched_schedules()
    ]
    if arguments.json:
        table = {"ranks": p, "microbatches": m, "frontier": rows, "named": points}
        arguments.json.write_text(json.dumps(provenance() | table, indent=1) + "\n")
    if arguments.picture:
        lines = [
            Frontier(
                vocab,
                [(row["cap"], row["bubble_pct"] / 100) for row in rows if row["vocab"] == vocab],
            )
            for vocab in arguments.vocab
        ]
        marks = [
            Marker(row["schedule"], row["vocab"], row["bubble_pct"] / 100, row["peak_microbatches"])
            for row in points
        ]
        title = f"{p} ranks, {m} microbatches: bubble against memory, simulated"
        frontier_figure(lines, marks, title, unit=1.0).savefig(arguments.picture)


if __name__ == "__main__":
    main()
