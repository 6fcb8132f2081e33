"""Simulate every schedule with every vocabulary algorithm, and `auto` under memory caps.

    python benchmarks/family.py [--ranks 4 8 16] [--head 2.4 5] [--microbatches-per-rank 2 8]
        [--unequal] [--json FILE]

The tables show the bubble, the gap to the lower bound, and the peak memory.  Every rank has two
layers with F = I = W = 1 (B = 2).  The output layer costs as much as `head` layers: three equal
matrix products, divided over the ranks.  A collective takes 0.3 and a hop 0.05.  The unit of memory
is one microbatch of a rank's two layers.  What a shard holds from S to T counts 0.15.  With
`--unequal`, only `auto` is simulated, on ranks of different speed.  All rows take about 13 minutes
of an x86-64 core.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from provenance import provenance

from schedules.cost import CostModel
from schedules.generators import GENERATORS, BaseSchedule, generate
from schedules.generators.auto import CapError, Option, solve
from schedules.ir import Kind
from schedules.layout import Layout
from schedules.problem import Problem
from schedules.simulate import simulate
from schedules.timeline import Timeline
from schedules.vocab import VOCAB_ALGORITHMS, VocabAlgorithm
from vp_train.commands.command import collect_rarely

# The fraction of the three matrix products that S computes.  T computes the rest.
S_SHARE = {
    "none": 2 / 3,
    "naive": 1 / 3,
    "two_barrier": 1 / 3,
    "one_barrier": 2 / 3,
}
HELD_SHARD = 0.15  # in microbatches


def cost_of(
    layout: Layout, rules: VocabAlgorithm, head: float, slowness: Sequence[float]
) -> CostModel:
    """Return the cost model.  `slowness[r]` multiplies the time of every pass of rank r."""
    forward, num_ranks = 2 / layout.num_chunks, layout.num_ranks
    output = 3 * head / (num_ranks if rules.sharded else 1)
    share = S_SHARE[rules.name]
    stage = {Kind.F: forward, Kind.B: 2 * forward, Kind.I: forward, Kind.W: forward}
    shard = {Kind.S: share * output, Kind.T: (1 - share) * output}
    return CostModel(
        {
            kind: tuple(seconds * slowness[layout.rank_of(s)] for s in range(layout.num_stages))
            for kind, seconds in stage.items()
        }
        | {kind: tuple(seconds * slow for slow in slowness) for kind, seconds in shard.items()},
        hop_seconds=0.05,
        barrier_seconds=dict.fromkeys(
            ("CE", "C0", "C1", "C1b", "C2", "CG"), 0.3 if rules.sharded else 0.0
        ),
        stage_bytes=(1 / layout.num_chunks,) * layout.num_stages,
        shard_bytes=(HELD_SHARD if rules.sharded else 0.0,) * num_ranks,
    )


def option(
    name: str, rules: VocabAlgorithm, num_microbatches: int, head: float, slowness: Sequence[float]
) -> Option:
    """Return the problem and the cost of a schedule with a vocabulary algorithm."""
    family: BaseSchedule = GENERATORS[name]
    layout = family.layout_of(len(slowness))
    problem = Problem(layout, num_microbatches, rules, family.split_backward)
    return Option(name, problem, cost_of(layout, rules, head, slowness))


def named(
    name: str, rules: VocabAlgorithm, num_microbatches: int, head: float, num_ranks: int
) -> dict[str, Any]:
    """Simulate the schedule called `name`, and return its row."""
    choice = option(name, rules, num_microbatches, head, (1.0,) * num_ranks)
    started = time.process_time()
    timeline = simulate(generate(name, choice.problem, choice.cost), choice.problem, choice.cost)
    return row(name, choice, head, timeline, started)


def automatic(
    rules: VocabAlgorithm, num_microbatches: int, head: float, cap: float, slowness: Sequence[float]
) -> dict[str, Any] | None:
    """Search with `auto` from all base schedules, under a memory cap in microbatches.

    Returns None if no schedule meets the cap.
    """
    started = time.process_time()
    try:
        found = solve(
            [option(name, rules, num_microbatches, head, slowness) for name in GENERATORS],
            [cap] * len(slowness),
        )
    except CapError:
        return None
    timeline = simulate(found.schedule, found.option.problem, found.option.cost)
    return row("auto", found.option, head, timeline, started) | {
        "cap": cap,
        "found_as": found.schedule.name,
    }


def row(
    name: str, choice: Option, head: float, timeline: Timeline, started: float
) -> dict[str, Any]:
    """Return the figures of one schedule for the tables and the JSON file."""
    return {
        "schedule": name,
        "vocab": choice.problem.algorithm.name,
        "ranks": choice.problem.layout.num_ranks,
        "microbatches": choice.problem.num_microbatches,
        "head_in_layers": head,
        "bubble_pct": 100 * timeline.mean_bubble,
        "gap_pct": 100 * (timeline.gap or 0.0),
        "peak_microbatches": max(timeline.peak_bytes),
        "makespan": timeline.makespan,
        "planned_in_cpu_seconds": time.process_time() - started,
    }


def caps_of(num_ranks: int) -> dict[str, float]:
    """Return the memory caps in microbatches, by name.

    They are the memory of V-Min and of V-Half with one barrier, one microbatch per rank, and the
    latter plus two held shards.
    """
    return {
        "as `v_min`": (num_ranks + 2) // 3 + 1 + HELD_SHARD,
        "as `v_half`": (num_ranks + 2) // 2 + 1 + HELD_SHARD,
        "p": float(num_ranks),
        "p + 0.3": num_ranks + 2 * HELD_SHARD,
    }


def cell(found: dict[str, Any] | None) -> str:
    """Format bubble, gap and peak as one table cell."""
    if found is None:
        return "-"
    gap = max(0.0, found["gap_pct"])
    return f"{found['bubble_pct']:.1f} / {gap:.1f} / {found['peak_microbatches']:.4g}"


def family_table(sizes: Sequence[tuple[int, int]], head: float) -> list[dict[str, Any]]:
    """Print and return the rows of every schedule with every vocabulary algorithm.

    `sizes` are pairs (number of ranks, number of microbatches).
    """
    print(f"\nOutput layer worth {head:g} layers: bubble % / gap % / peak in microbatches\n")
    print(
        "| schedule | vocab | "
        + " | ".join(f"p={p}, m={m}" for p, m in sizes)
        + " |\n"
        + "|---" * (2 + len(sizes))
        + "|"
    )
    rows = []
    for name in GENERATORS:
        for algorithm in ("none", "naive", "two_barrier", "one_barrier"):
            line = [named(name, VOCAB_ALGORITHMS[algorithm], m, head, p) for p, m in sizes]
            rows += line
            print(f"| `{name}` | `{algorithm}` | " + " | ".join(map(cell, line)) + " |", flush=True)
    for words in caps_of(4):
        solved = [
            automatic(VOCAB_ALGORITHMS["one_barrier"], m, head, caps_of(p)[words], (1.0,) * p)
            for p, m in sizes
        ]
        rows += [found for found in solved if found is not None]
        print(
            f"| `auto`, at most {words} | `one_barrier` | " + " | ".join(map(cell, solved)) + " |",
            flush=True,
        )
    return rows


def unequal_table(sizes: Sequence[tuple[int, int]], head: float) -> list[dict[str, Any]]:
    """Print and return the rows of `auto` with `one_barrier` on ranks of different speed.

    The memory cap is p microbatches.
    """
    print(
        f"\n`auto`, `one_barrier`, at most p microbatches, output layer worth {head:g} layers: "
        "bubble % / gap % / peak\n"
    )
    print(
        "| ranks | "
        + " | ".join(f"p={p}, m={m}" for p, m in sizes)
        + " |\n"
        + "|---" * (1 + len(sizes))
        + "|"
    )
    rows: list[dict[str, Any]] = []
    for words in (
        "all equal",
        "the middle one 25 % slow",
        "each 20 % off at most",
        "rising to 1.5 times the first",
    ):
        line = [
            automatic(VOCAB_ALGORITHMS["one_barrier"], m, head, float(p), slowness(words, p))
            for p, m in sizes
        ]
        rows += [found | {"ranks_are": words} for found in line if found is not None]
        print(f"| {words} | " + " | ".join(map(cell, line)) + " |", flush=True)
    return rows


def slowness(words: str, num_ranks: int) -> tuple[float, ...]:
    """Return the factors by which the ranks are slower than usual."""
    drawn = random.Random(7)
    match words:
        case "the middle one 25 % slow":
            return tuple(1.25 if rank == num_ranks // 2 else 1.0 for rank in range(num_ranks))
        case "each 20 % off at most":
            return tuple(drawn.uniform(0.8, 1.2) for _ in range(num_ranks))
        case "rising to 1.5 times the first":
            return tuple(1 + 0.5 * rank / (num_ranks - 1) for rank in range(num_ranks))
        case _:
            return (1.0,) * num_ranks


def sizes_of(ranks: Iterable[int], per_rank: Iterable[int]) -> list[tuple[int, int]]:
    """Return all pairs (number of ranks, number of microbatches)."""
    counts = list(per_rank)
    return [(p, k * p) for p in ranks for k in counts]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--microbatches-per-rank", type=int, nargs="+", default=[2, 8])
    parser.add_argument(
        "--head",
        type=float,
        nargs="+",
        default=[2.4, 5.0],
        help="cost of the output layer in layers",
    )
    parser.add_argument(
        "--unequal", action="store_true", help="only auto, on ranks of different speed"
    )
    parser.add_argument("--json", type=Path, help="write the rows as JSON")
    arguments = parser.parse_args()
    collect_rarely()  # as the commands do
    table = unequal_table if arguments.unequal else family_table
    sizes = sizes_of(arguments.ranks, arguments.microbatches_per_rank)
    rows = [found for head in arguments.head for found in table(sizes, head)]
    if arguments.json:
        arguments.json.write_text(json.dumps(provenance() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
