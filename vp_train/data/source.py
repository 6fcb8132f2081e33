"""Batches of a run: a pure function of the step, so that a resumed run sees what the uninterrupted one would have seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vp_train.config import ConfigError, RunConfig
from vp_train.data.corpus import Corpus, describe, prepare
from vp_train.data.indexed import EndOnly, Share, build_samples, split_documents
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
        entropy = self._text.entropy()
        self.entropy: float | None = entropy
        self.description = f"synthetic text over {config.model.vocab_size:,} tokens, entropy {entropy:.4f} nats"

    def _samples(self, stream: int, start: int, count: int) -> Batch:
        length = self._config.model.seq_length + 1
        return _batch([self._text.sample(stream, start + i, length) for i in range(count)], self._config)

    def train_batch(self, step: int) -> Batch:
        count = self._config.num_microbatches * self._config.micro_batch_size
        return self._samples(0, (step - 1) * count, count)

    def validation_batch(self) -> Batch:
        return self._samples(1, 0, max(1, self._config.run.eval_microbatches) * self._config.micro_batch_size)


class _Text:
    entropy: float | None = None

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self._config, self._corpus = config, corpus
        self._train_size = config.num_microbatches * config.micro_batch_size
        self._validation_size = max(1, config.run.eval_microbatches) * config.micro_batch_size
        self.description = describe(corpus).splitlines()[0]
        training, validation = split_documents(corpus.prefix, config.data.validation_fraction, config.data.seed)
        self._train = self._samples(training, self._train_size * config.run.steps, training=True)
        self._validation = None
        if config.run.eval_every:
            self._validation = self._samples(validation, self._validation_size, training=False)

    def _samples(self, share: Share, count: int, *, training: bool) -> Any:
        manifest, seq_length, data = self._corpus.manifest, self._config.model.seq_length, self._config.data
        if share.num_tokens <= seq_length:
            what = "training" if training else "validation"
            raise ConfigError(
                f"{what} gets {len(share.documents)} of {manifest.num_documents} documents with {share.num_tokens:,} tokens, "
                f"too short for one sample of {seq_length + 1:,}; give more documents (they are not split), lower "
                f"model.seq_length, or change data.validation_fraction={data.validation_fraction} "
                "(0 with run.eval_every=0 trains on everything)"
            )
        tokens = EndOnly(manifest.end_token, manifest.vocab_size)
        return build_samples(self._corpus.prefix, share, count, seq_length, data.seed, tokens, training=training)

    def _read(self, dataset: Any, start: int, count: int) -> Batch:
        records = [dataset[start + i] for i in range(count)]
        shape = (-1, self._config.micro_batch_size, self._config.model.seq_length)
        tokens, labels = (torch.stack([record[name] for record in records]).view(shape) for name in ("tokens", "labels"))
        return Batch(tokens, labels)

    def train_batch(self, step: int) -> Batch:
        assert 1 <= step <= self._config.run.steps, step
        return self._read(self._train, (step - 1) * self._train_size, self._train_size)

    def validation_batch(self) -> Batch:
        assert self._validation is not None
        return self._read(self._validation, 0, self._validation_size)
