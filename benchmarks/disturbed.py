"""Simulate steps that do not go as planned: passes that vary, and one slow rank.

    python benchmarks/disturbed.py [--jitter 0.1] [--straggler 0.1] [--samples 56] [--json FILE]

Eight ranks and 64 microbatches of gpt_4b with one_barrier, with published pass times
(cost=a100_4b).  The same as `vp-simulate --jitter X` and `--straggler X`, in one table.  The number
of samples is rounded up to a multiple of the ranks, so that each is the slow one equally often.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from provenance import provenance

from schedules.jitter import Disturbance
from vp_train.commands.disturbed import Draws, record
from vp_train.commands.simulate import Outcome, simulate_each
from vp_train.settings import load_config

RANKS = 8
SCHEDULES = ("1f1b", "interleaved", "zb_h1", "zb_v", "v_half", "v_min")
JOB = [
    *("cost=a100_4b", "run.dtype=float16", "vocab=one_barrier"),
    *(f"parallel.pp={RANKS}", "num_microbatches=64"),
]


def rows_of(draws: dict[str, Draws]) -> list[dict[str, Any]]:
    """Return the planned step of every schedule, and how it varies with each of the draws."""
    return [
        {"schedule": item.schedule, "planned_seconds": item.timeline.makespan}
        | {name: record(one.steps(item.plan)) for name, one in draws.items()}
        for item in simulate_each(load_config(JOB), SCHEDULES, ("one_barrier",))
        if isinstance(item, Outcome)
    ]


def shown(row: dict[str, Any]) -> str:
    """Return a line of the table."""
    cells = [f"`{row['schedule']}`", f"{row['planned_seconds']:.2f} s"]
    for name in ("jitter", "straggler"):
        found = row[name]
        cells += [
            f"{found['mean_seconds']:.2f} s",
            f"{found['quantiles_seconds']['0.95']:.2f} s",
            f"+{100 * found['longer']:.1f} %",
        ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jitter", type=float, default=0.1)
    parser.add_argument("--straggler", type=float, default=0.1)
    parser.add_argument("--samples", type=int, default=56)
    parser.add_argument("--json", type=Path, help="also write the table as JSON")
    options = parser.parse_args()
    draws = {
        "jitter": Draws(Disturbance(jitter=options.jitter), options.samples, 0),
        "straggler": Draws(Disturbance(straggler=options.straggler), options.samples, 0).on(RANKS),
    }
    found = "mean | 95 % | longer"
    print(f"| schedule | planned | jitter: {found} | straggler: {found} |")
    print("|---" * 8 + "|")
    rows = rows_of(draws)
    print("\n".join(map(shown, rows)))
    if options.json is not None:
        result = {
            "provenance": provenance(),
            "job": " ".join(JOB),
            "samples": {name: one.samples for name, one in draws.items()},
            "jitter": options.jitter,
            "straggler": options.straggler,
            "rows": rows,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
