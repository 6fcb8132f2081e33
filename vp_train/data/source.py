"""Batches of a run: a pure function of the step, so that a resumed run sees what the uninterrupted one would have seen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vp_train.config import ConfigError, RunConfig
from vp_train.data.corpus import Corpus, describe, exclusive, prepare
from vp_train.data.indexed import EndOnly, build_samples, split_documents
from vp_train.data.synthetic import SyntheticText


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` and `labels` [m, b, s] int64: m microbatches of b sequences; a label of -100 has no loss."""

    tokens: Tensor
    labels: Tensor


class Source(Protocol):
    """Where a run's batches come from."""

    description: str
    entropy: float | None  # the lowest loss any model can reach, in nats, where it is known

    def train_batch(self, step: int) -> Batch:
        """The batch of `step`, counted from 1."""
        ...

    def validation_batch(self) -> Batch:
        """The same batch of run.eval_microbatches microbatches every time."""
        ...


def open_source(config: RunConfig) -> Source:
    """The source a run asks for; prepares its corpus if need be.  Raises ConfigError for data a user must change."""
    if config.data.name == "synthetic":
        return _Synthetic(config)
    return _Text(config, prepare(config.data, config.model.vocab_size, progress=False))


def _batch(samples: list[np.ndarray], config: RunConfig) -> Batch:
    """Stack samples of seq_length + 1 tokens."""
    stacked = torch.from_numpy(np.stack(samples)).view(-1, config.micro_batch_size, config.model.seq_length + 1)
    return Batch(stacked[..., :-1].contiguous(), stacked[..., 1:].contiguous())


class _Synthetic:
    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._text = SyntheticText(config.model.vocab_size, config.data.seed)
        self.entropy = self._text.entropy()
        self.description = f"synthetic text over {config.model.vocab_size:,} tokens, entropy {self.entropy:.4f} nats"

    def _samples(self, stream: int, start: int, count: int) -> Batch:
        length = self._config.model.seq_length + 1
        return _batch([self._text.sample(stream, start + i, length) for i in range(count)], self._config)

    def train_batch(self, step: int) -> Batch:
        count = self._config.num_microbatches * self._config.micro_batch_size
        return self._samples(0, (step - 1) * count, count)

    def validation_batch(self) -> Batch:
        return self._samples(1, 0, max(1, self._config.run.eval_microbatches) * self._config.micro_batch_size)


class _Text:
    entropy = None

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self._config = config
        self._train_size = config.num_microbatches * config.micro_batch_size
        self._validation_size = max(1, config.run.eval_microbatches) * config.micro_batch_size
        self.description = describe(corpus).splitlines()[0]
        train, validation = split_documents(corpus.prefix, config.data.validation_fraction, config.data.seed)
        with exclusive(Path(config.data.cache_dir).expanduser()):
            self._train = self._build(corpus, train, self._train_size * config.run.steps, "training", training=True)
            self._validation = None
            if config.run.eval_every:
                self._validation = self._build(corpus, validation, self._validation_size, "validation", training=False)

    def _build(self, corpus: Corpus, documents: np.ndarray, count: int, what: str, *, training: bool) -> Any:
        lengths = corpus.manifest.num_tokens
        seq_length, seed = self._config.model.seq_length, self._config.data.seed
        if len(documents) == 0 or lengths <= seq_length:
            raise ConfigError(
                f"{corpus.manifest.num_documents} documents with {lengths} tokens leave nothing for {what}; give more text, "
                f"or change data.validation_fraction={self._config.data.validation_fraction} or model.seq_length={seq_length}"
            )
        tokens = EndOnly(corpus.manifest.end_token, corpus.manifest.vocab_size)
        samples = build_samples(corpus.prefix, documents, count, seq_length, seed, tokens, training=training)
        if len(samples) < count:
            raise ConfigError(f"the {what} documents are too short for model.seq_length={seq_length}; give more text")
        return samples

    def _read(self, dataset: Any, start: int, count: int) -> Batch:
        records = [dataset[start + i] for i in range(count)]
        tokens = torch.stack([record["tokens"] for record in records])
        labels = torch.stack([record["labels"] for record in records])
        shape = (-1, self._config.micro_batch_size, self._config.model.seq_length)
        return Batch(tokens.view(shape), labels.view(shape))

    def train_batch(self, step: int) -> Batch:
        return self._read(self._train, (step - 1) * self._train_size, self._train_size)

    def validation_batch(self) -> Batch:
        assert self._validation is not None
        return self._read(self._validation, 0, self._validation_size)
