"""Batches of a run: a pure function of the step, so that a resumed run sees what the uninterrupted one would have seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vp_train.config import ConfigError, RunConfig
from vp_train.data.corpus import Corpus, describe, prepare_all
from vp_train.data.indexed import Share, Windows, split_documents
from vp_train.data.order import SampleOrder, Turns, own_positions
from vp_train.data.synthetic import SyntheticText

_NO_LOSS = -100  # the label that the output layer ignores


@dataclass(frozen=True, slots=True)
class Batch:
    """`tokens` and `labels` [m, b, s] int64: m microbatches of b sequences; a label of -100 has no loss.

    `segments` [m, b, s] int32, with data.packing=documents: tokens of the same sequence see each other if they are of the same
    segment, all of whose tokens stand together.
    """

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None = None


class Source(Protocol):
    """Where a run's batches come from.

    Replica `dp_rank` of `dp_size` gets its own microbatches: all replicas together get what a single one would with dp_size
    times as many.
    """

    description: str
    entropy: float | None  # the lowest loss any model can reach, in nats, where it is known
    contents: tuple[str, ...]  # hashes of text, tokenizer and settings of each corpus
    tokenizer: Path | None  # the tokenizer.json of the text; None where nothing was tokenized

    def train_batch(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        """The num_microbatches microbatches of `step`, counted from 1."""
        ...

    def validation_batch(self, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        """The same microbatches every time, run.eval_microbatches over all replicas; those that fill up have no loss."""
        ...


def open_source(config: RunConfig) -> Source:
    """The source a run asks for; prepares its corpora if need be.  Raises ConfigError for data a user must change."""
    if config.data.name == "synthetic":
        return _Synthetic(config)
    return _Text(config, prepare_all(config.data, config.model.vocab_size, progress=False))


def _positions(config: RunConfig, step: int, dp_rank: int, dp_size: int) -> range:
    """The positions in the order of training samples of a replica's batch."""
    return own_positions(step, config.num_microbatches * config.micro_batch_size, dp_rank, dp_size)


def _share(
    samples: Callable[[range], Batch], config: RunConfig, dp_rank: int, dp_size: int
) -> Batch:
    """A replica's share of the samples for validation."""
    num_own = config.run.eval_microbatches_of(dp_size)
    batch = samples(own_positions(1, num_own * config.micro_batch_size, dp_rank, dp_size))
    counted = max(0, max(1, config.run.eval_microbatches) - dp_rank * num_own)
    fills_up = torch.arange(num_own) >= counted
    return replace(batch, labels=batch.labels.masked_fill(fills_up[:, None, None], _NO_LOSS))


def _batch(samples: list[np.ndarray], config: RunConfig) -> Tensor:
    """Stack samples of seq_length + 1 values to [m, b, s + 1]."""
    return torch.from_numpy(np.stack(samples)).view(
        -1, config.micro_batch_size, config.model.seq_length + 1
    )


def _tokens_and_labels(samples: Tensor) -> tuple[Tensor, Tensor]:
    """TensorSlice samples [m, b, s + 1] into tokens and the tokens that follow them, [m, b, s] each.

    They share no memory, with each other or with `samples`: `contiguous` would return a view where m = b = 1.
    """
    tokens, labels = samples[..., :-1], samples[..., 1:]
    return tokens.clone(memory_format=torch.contiguous_format), labels.clone(
        memory_format=torch.contiguous_format
    )


class _Synthetic:
    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._text = SyntheticText(config.model.vocab_size, config.data.seed)
        entropy = self._text.entropy()
        self.entropy: float | None = entropy
        self.contents: tuple[str, ...] = ()
        self.tokenizer: Path | None = None
        self.description = (
            f"synthetic text over {config.model.vocab_size:,} tokens, entropy {entropy:.4f} nats"
        )

    def _samples(self, stream: int, positions: range) -> Batch:
        length = self._config.model.seq_length + 1
        samples = [self._text.sample(stream, position, length) for position in positions]
        return Batch(*_tokens_and_labels(_batch(samples, self._config)))

    def train_batch(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        return self._samples(0, _positions(self._config, step, dp_rank, dp_size))

    def validation_batch(self, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        return _share(partial(self._samples, 1), self._config, dp_rank, dp_size)


class _Samples:
    """The training samples, or those for validation, of all corpora in their order."""

    def __init__(
        self, config: RunConfig, windows: list[Windows], turns: Turns, purpose: str
    ) -> None:
        self._config, self._windows = config, windows
        self._order = SampleOrder(tuple(map(len, windows)), turns, config.data.seed, purpose)

    def batch(self, positions: range) -> Batch:
        places = map(self._order.__getitem__, positions)
        tokens, documents = zip(
            *(self._windows[corpus].read(sample) for corpus, sample in places), strict=True
        )
        inputs, labels = _tokens_and_labels(_batch(list(tokens), self._config))
        if self._config.data.packing == "none":
            return Batch(inputs, labels)
        segments = _batch(list(documents), self._config)
        labels = labels.masked_fill(segments[..., 1:] != segments[..., :-1], _NO_LOSS)
        return Batch(inputs, labels, segments[..., :-1].contiguous())


class _Text:
    entropy: float | None = None

    def __init__(self, config: RunConfig, corpora: tuple[Corpus, ...]) -> None:
        self._config = config
        self.contents = tuple(corpus.manifest.content_hash for corpus in corpora)
        self.tokenizer: Path | None = corpora[0].tokenizer
        turns = Turns.of(config.data.weights)
        lines = [describe(corpus).splitlines()[0] for corpus in corpora]
        if len(lines) > 1:
            lines = [
                f"{w / sum(turns.weights):.1%} {line}"
                for w, line in zip(turns.weights, lines, strict=True)
            ]
        self.description = "; ".join(lines)
        split = [
            split_documents(corpus.prefix, config.data.validation_fraction, config.data.seed)
            for corpus in corpora
        ]
        training = [
            self._windows(corpus, share, "training")
            for corpus, (share, _) in zip(corpora, split, strict=True)
        ]
        self._train = _Samples(config, training, turns, "training")
        self._validation = None
        if config.run.eval_every:
            held_out = [
                self._windows(corpus, share, "validation")
                for corpus, (_, share) in zip(corpora, split, strict=True)
            ]
            self._validation = _Samples(config, held_out, turns, "validation")

    def _windows(self, corpus: Corpus, share: Share, purpose: str) -> Windows:
        seq_length = self._config.model.seq_length
        if share.num_tokens <= seq_length:
            fraction = self._config.data.validation_fraction
            raise ConfigError(
                f"{corpus.path}: {purpose} gets {len(share.documents)} of {corpus.manifest.num_documents} documents with "
                f"{share.num_tokens:,} tokens, too short for one sample of {seq_length + 1:,}; give more documents (they are "
                f"not split), lower model.seq_length, or change data.validation_fraction={fraction} "
                "(0 with run.eval_every=0 trains on everything)"
            )
        return Windows.of(corpus.prefix, share, seq_length)

    def train_batch(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        return self._train.batch(_positions(self._config, step, dp_rank, dp_size))

    def validation_batch(self, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        assert self._validation is not None
        return _share(self._validation.batch, self._config, dp_rank, dp_size)
