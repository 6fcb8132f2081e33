"""Simulate the published pass times of arXiv 2411.05288 (8 x A100), and compare iteration times.

    python benchmarks/published.py [--json FILE]

The measurements give T(i-1) + S(i) as one number per rank.  It is divided between S and T by their
number of GEMMs.  For `baseline` and `redis` the vocabulary layers are inside F and B of the first
and last stage.  Times of barriers were not published and count as 0.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from provenance import provenance

from schedules.cost import CostModel
from schedules.generators import generate
from schedules.ir import Kind
from schedules.layout import Layout
from schedules.problem import Problem
from schedules.simulate import simulate
from schedules.vocab import VOCAB_ALGORITHMS

DATA = Path(__file__).parent / "data" / "a100_8gpu_s2048.json"
METHODS = {
    "baseline": ("1f1b", "none"),
    "redis": ("1f1b", "none"),
    "vocab-1": ("1f1b", "two_barrier"),
    "vocab-2": ("1f1b", "one_barrier"),
    "interlaced": ("interlaced", "two_barrier"),
}
# The fraction of the three GEMMs that S computes.  T computes the rest.
S_SHARE = {"none": 2 / 3, "two_barrier": 1 / 3, "one_barrier": 2 / 3}


@dataclass(frozen=True)
class Row:
    """The measured and simulated times of one published run."""

    method: str
    vocab: int
    measured_ms: float
    simulated_ms: float
    error_pct: float
    bubble_pct: float


def simulated(row: dict) -> Row:
    """Simulate one published run."""
    schedule, vocab = METHODS[row["method"]]
    algorithm = VOCAB_ALGORITHMS[vocab]
    times = {
        kind: tuple(us * 1e-6 for us in values) for kind, values in row["pass_times_us"].items()
    }
    share = S_SHARE[algorithm.name]
    cost = CostModel(
        {
            Kind.F: times["F"],
            Kind.B: times["B"],
            Kind.S: tuple(share * ts for ts in times["TS"]),
            Kind.T: tuple((1 - share) * ts for ts in times["TS"]),
            Kind.E: times["IF"],
            Kind.G: times["IB"],
        },
        hop_seconds=times["P2P"][0],
    )
    problem = Problem(Layout("linear", row["pp"]), row["microbatches"], algorithm)
    timeline = simulate(generate(schedule, problem, cost), problem, cost)
    measured, makespan = row["iteration_ms"], timeline.makespan * 1e3
    return Row(
        row["method"],
        row["vocab"],
        measured,
        makespan,
        100 * (makespan / measured - 1),
        100 * timeline.mean_bubble,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    arguments = parser.parse_args()
    rows = [simulated(row) for row in json.loads(DATA.read_text())["rows"]]
    print(
        f"{'method':<10} {'vocab':>7} {'measured ms':>12} {'simulated ms':>13} "
        f"{'error %':>8} {'bubble %':>9}"
    )
    for row in rows:
        print(
            f"{row.method:<10} {row.vocab:>7} {row.measured_ms:>12.1f} {row.simulated_ms:>13.1f} "
            f"{row.error_pct:>+8.2f} {row.bubble_pct:>9.2f}"
        )
    errors = [abs(row.error_pct) for row in rows]
    print(f"{len(rows)} runs: median error {median(errors):.2f} %, largest {max(errors):.2f} %")
    if arguments.json:
        result = provenance() | {"rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
