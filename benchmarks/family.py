"""Bubble and peak memory of every schedule with every vocabulary algorithm, simulated with one cost model.

    python benchmarks/family.py [--ranks 8] [--head 2.4] [--json FILE]

Each rank has two layers with F = I = W = 1 (B = 2); the output layer costs `head` layers, three equal matrix products split
over the ranks; collectives take 0.3 and hops 0.05.  Peak in microbatches of a rank's two layers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from provenance import provenance

from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.problem import Problem
from schedules.simulate import simulate
from schedules.vocab import VOCAB_ALGORITHMS

S_SHARE = {"none": 2 / 3, "naive": 1 / 3, "two_barrier": 1 / 3, "one_barrier": 2 / 3}  # of the three products


def measure(name: str, algorithm: str, num_ranks: int, num_microbatches: int, head: float) -> dict[str, Any]:
    """One schedule with one algorithm."""
    family = GENERATORS[name]
    layout = family.layout_of(num_ranks)
    rules = VOCAB_ALGORITHMS[algorithm]
    problem = Problem(layout, num_microbatches, rules, family.split_backward)
    each = 2 / layout.num_chunks
    output = 3 * head / (num_ranks if rules.sharded else 1)
    share = S_SHARE[algorithm]
    cost = CostModel.uniform(
        layout.num_stages,
        num_ranks,
        F=each,
        B=2 * each,
        I=each,
        W=each,
        S=share * output,
        T=(1 - share) * output,
        hop=0.05,
        barrier=0.3 if rules.sharded else 0.0,
    )
    timeline = simulate(generate(name, problem, cost), problem, cost)
    return {
        "schedule": name,
        "vocab": algorithm,
        "ranks": num_ranks,
        "microbatches": num_microbatches,
        "head_in_layers": head,
        "bubble_pct": 100 * timeline.mean_bubble,
        "peak_microbatches": max(timeline.peak_in_flight) / layout.num_chunks,
        "makespan": timeline.makespan,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--head", type=float, default=2.4, help="cost of the output layer in transformer layers")
    parser.add_argument("--json", type=Path, help="write the table as JSON")
    arguments = parser.parse_args()
    rows = []
    counts = arguments.microbatches
    print("| schedule | vocab | peak | " + " | ".join(f"m={m}" for m in counts) + " |")
    print("|---" * (3 + len(counts)) + "|")
    for name in GENERATORS:
        for algorithm in VOCAB_ALGORITHMS:
            line = [measure(name, algorithm, arguments.ranks, m, arguments.head) for m in counts]
            rows += line
            peak = line[0]["peak_microbatches"] if name != "gpipe" else "m"
            cells = " | ".join(f"{row['bubble_pct']:.1f} %" for row in line)
            print(f"| `{name}` | `{algorithm}` | {peak} | {cells} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(provenance() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
