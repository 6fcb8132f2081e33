"""Small corpora for tests."""

from __future__ import annotations

import random
import string
from dataclasses import replace
from pathlib import Path

from vp_train.config import DataConfig, ModelConfig, RunConfig, RunSettings
from vp_train.data import Batch, Source

VOCAB_SIZE = 300


def write_letters(directory: Path, lengths: list[int]) -> None:
    """Write document i with `lengths[i]` characters: the i-th letter, small or capital at random.

    Every token thus shows which document it comes from.
    """
    directory.mkdir(parents=True, exist_ok=True)
    coin = random.Random(0)
    for letter, length in zip(string.ascii_lowercase, lengths, strict=False):
        text = "".join(coin.choice((letter, letter.upper())) for _ in range(length))
        (directory / f"{letter}.txt").write_text(text)


def text_config(tmp_path: Path, **changes: object) -> DataConfig:
    """Return settings with `tmp_path`/text as data and `tmp_path`/cache as cache."""
    return replace(
        DataConfig(name="text", path=str(tmp_path / "text"), cache_dir=str(tmp_path / "cache")),
        **changes,  # type: ignore[arg-type]
    )


def run_config(
    data: DataConfig, steps: int = 4, seq_length: int = 8, eval_every: int = 1
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(vocab_size=VOCAB_SIZE, seq_length=seq_length),
        data=data,
        run=RunSettings(steps=steps, eval_microbatches=3, eval_every=eval_every),
        num_microbatches=4,
        micro_batch_size=2,
    )


def train_batch(source: Source, step: int, length: int = 8) -> Batch:
    """Return the batch of `step` in a run of `run_config` with sequences of `length` tokens."""
    return source.train_batch((step - 1) * 4 * 2 * length, 4)
