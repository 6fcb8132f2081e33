"""Compare training with linear layers in float8 with training in bfloat16.

    python benchmarks/float8.py [--seeds 1,2,3] [--steps 400] [--json FILE]

A small model learns synthetic text of known entropy on two ranks, once for every seed in bfloat16
and in float8 with scales of rows and of tensors: the same initial weights, the same data.  What
counts is the loss of the validation after the last step, in nats per token.  On a CPU torch
computes the products of the same rounded matrices in fp32, so this shows the error of the rounding,
and no speed.  The exit code is 1 if float8 ends more than 0.05 nats above bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

from provenance import provenance

MOST_NATS = 0.05
VARIANTS = {
    "bfloat16": [],
    "float8 by row": ["run.linear_dtype=float8", "run.float8_scales=row"],
    "float8 by tensor": ["run.linear_dtype=float8", "run.float8_scales=tensor"],
}
MODEL = ["model=nano", "model.vocab_size=101", "data=synthetic"]
TRAINING = ["optim.lr=1e-2", "micro_batch_size=4", "num_microbatches=4", "run.dtype=bfloat16"]


def losses_of(words: list[str], steps: int, root: str) -> dict[str, Any]:
    """Train with the settings `words`; return the validation loss and some training losses."""
    command = [
        *(sys.executable, "-m", "vp_train", *MODEL, *TRAINING, *words),
        *("parallel.pp=2", f"run.steps={steps}", f"run.eval_every={steps}"),
        *("run.checkpoint_every=0", "run.trace_step=0", "run.report=false", f"run.root={root}"),
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (Path(root) / "default" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    every = max(1, steps // 10)
    return {
        "validation_loss": records[-1]["validation_loss"],
        "losses": [round(record["loss"], 4) for record in records[every - 1 :: every]],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=lambda text: [int(word) for word in text.split(",")])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--json", type=Path, help="file of the results")
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    seeds = arguments.seeds or [1, 2, 3]
    for seed in seeds:
        for name, words in VARIANTS.items():
            with tempfile.TemporaryDirectory() as root:
                result = losses_of([*words, f"run.seed={seed}"], arguments.steps, root)
            found[name].append({"seed": seed} | result)
            print(f"seed {seed} {name:16} {result['validation_loss']:.4f}", flush=True)
    ends = {name: [run["validation_loss"] for run in runs] for name, runs in found.items()}
    above = {
        name: [mine - base for mine, base in zip(values, ends["bfloat16"], strict=True)]
        for name, values in ends.items()
    }
    for name, values in above.items():
        print(
            f"{name:16} {mean(ends[name]):.4f} nats; above bfloat16 by {mean(values):+.4f} on "
            f"average, {max(values):+.4f} at most"
        )
    if arguments.json is not None:
        result = {"steps": arguments.steps, "above_bfloat16": above, "runs": found}
        arguments.json.write_text(json.dumps(provenance() | result, indent=1) + "\n")
    return int(max(map(max, above.values())) > MOST_NATS)


if __name__ == "__main__":
    sys.exit(main())
