"""Random layouts of whole runs: losses, norms and validations are those of one process.

A case draws a model, a loss, a batch and a layout.  `vp-train` runs it in float64 on the layout,
and as one process that splits nothing.  Then the run of one process goes on from its first
checkpoint on the layout.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.programs import finished
from vp_train.commands.train import main
from vp_train.durable import checkpoints_in

STEPS, SAVED = 6, 3
MOST_RANKS = 6
TOLERANCE = 1e-9
ALONE = "parallel.pp=1 parallel.tp=1 parallel.dp=1 schedule=1f1b vocab=none"
ALWAYS = (
    "data=synthetic model=nano model.hidden_size=32 model.num_heads=4 model.ffn_hidden_size=48 "
    "optim.lr=0.01 optim.warmup_steps=2 run.dtype=float64 run.report=false run.trace_step=2 "
    f"run.steps={STEPS} run.eval_every={SAVED} run.checkpoint_every={SAVED} "
    "run.eval_microbatches=6"
)
MODELS = (  # each with a probability of a fifth
    "model.tied_embeddings=true",
    "model.linear_bias=true",
    "model.post_norms=true",
    "model.positions=learned",
    "model.attention_softcap=4.0",
    "model.sliding_window=5 model.full_attention_every=2",
    "model.logit_divisor=2.0",
    "loss.z_loss=0.01",
    "loss.normalisation=sequence",
    "optim.clip_grad_norm=0.3",
)
LAYOUTS = (
    "parallel.recompute=full",
    "parallel.recompute=selective",
    "parallel.offload_activations=0.5",
    "vocab.backend=recompute",
    "vocab.balance=true",
    "optim.bucket_mib=1",
    "optim.overlap_sums=false",
    "optim.name=zero1",
    "optim.name=zero1",
    "optim.name=zero1 optim.offload=true",
)


def drawn(chance: random.Random) -> tuple[str, str, int]:
    """Return the settings of a case, its layout, and the microbatches of a step as one process."""
    pp, tp, dp = (chance.choice(degrees) for degrees in ((1, 2, 2, 3), (1, 1, 1, 2), (1, 2, 2, 3)))
    while pp * tp * dp > MOST_RANKS:
        dp -= 1
    schedule = chance.choice(["1f1b", "gpipe", "interleaved", "v_half", "zb_h1", "zb_v", "auto"])
    vocab = chance.choice(["none", "naive", "one_barrier", "two_barrier"])
    count = chance.choice([1, 2, 3, 4])
    model = [
        *(f"model.{name}={chance.choice(values)}" for name, values in _SIZES.items()),
        *(words for words in MODELS if chance.random() < 0.2),
        chance.choice(["model.qk_norm=true", "model.normalisation=layernorm", ""]),
        chance.choice(["loss.label_smoothing=0.1", "model.logit_softcap=5.0", ""]),
        f"micro_batch_size={chance.choice([1, 1, 2])}",
    ]
    layout = [
        f"parallel.pp={pp} parallel.tp={tp} parallel.dp={dp} schedule={schedule} vocab={vocab}",
        f"num_microbatches={count} parallel.placement=balanced",
    ]
    for words in LAYOUTS:
        name = words.partition("=")[0]
        is_refused = vocab == "none" and name == "vocab.balance"
        if chance.random() < 0.2 and not is_refused and not any(name in one for one in layout):
            layout.append(words)
    return " ".join([ALWAYS, *model]), " ".join(layout), count * dp


_SIZES = {
    "num_layers": (8, 9, 12),
    "num_query_groups": (2, 4),
    "vocab_size": (2, 3, 17, 101, 130),
    "seq_length": (8, 16, 24),
    "activation": ("swiglu", "geglu", "gelu"),
}


def _trained(root: Path, name: str, words: str) -> dict[tuple[int, str], float]:
    """Train, and return the figures of all steps by step and name."""
    done = finished(main, *words.split(), f"run.name={name}", directory=root, seconds=300)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-300:]!r}")
    return {
        (record["step"], figure): record[figure]
        for record in map(json.loads, (root / f"runs/{name}/metrics.jsonl").open())
        for figure in ("loss", "grad_norm", "validation_loss")
        if figure in record
    }


def _differences(root: Path, settings: str, layout: str, count: int) -> Iterator[str]:
    """Yield where a case differs from one process."""
    alone = _trained(root, "alone", f"{settings} {ALONE} num_microbatches={count}")
    split = _trained(root, "split", f"{settings} {layout}")
    shutil.copytree(root / "runs/alone", root / "runs/resumed")
    for step, path in checkpoints_in(root / "runs/resumed/checkpoints"):
        if step > SAVED:
            shutil.rmtree(path)
    resumed = _trained(root, "resumed", f"{layout} run.resume=true")
    for name, figures in (("split", split), ("resumed", resumed)):
        if figures.keys() != alone.keys():
            yield f"{name} has other figures: {sorted(figures.keys() ^ alone.keys())}"
        for key in sorted(figures.keys() & alone.keys()):
            if not math.isclose(figures[key], alone[key], rel_tol=TOLERANCE, abs_tol=1e-12):
                yield f"{name}, step {key[0]}: {key[1]} {figures[key]!r}, not {alone[key]!r}"


def campaign(seed: int, count: int) -> list[str]:
    """Try `count` random layouts; return a text for each that differs from one process."""
    chance, failures = random.Random(seed), []
    for number in range(count):
        case = drawn(chance)
        with tempfile.TemporaryDirectory() as root:
            try:
                wrong = next(_differences(Path(root), *case), None)
            except RuntimeError as error:
                wrong = str(error)
        if wrong is not None:
            failures.append(f"case {number}: {wrong}; {case[0]} {case[1]}")
    return failures
