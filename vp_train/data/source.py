"""Batches of a run: a pure function of the step.

A resumed run therefore sees the same batches as a run without interruption.
"""

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
from vp_train.data.corpus import Corpus, headline, prepare_all
from vp_train.data.indexed import Share, Windows, split_documents
from vp_train.data.order import SampleOrder, Turns, own_positions
from vp_train.data.synthetic import SyntheticText

_NO_LOSS = -100  # the output layer ignores this label


@dataclass(frozen=True, slots=True)
class Batch:
    """The data of one step on one replica: m microbatches of b sequences of length s.

    `tokens` and `labels` are int64 [m, b, s].  A label of -100 has no loss.  `segments` is int32
    [m, b, s] with data.packing=documents, else None.  Tokens of a sequence attend to each other
    only within a segment.  The tokens of a segment are contiguous.
    """

    tokens: Tensor
    labels: Tensor
    segments: Tensor | None = None


class Source(Protocol):
    """The source of a run's batches.

    Replica `dp_rank` of `dp_size` gets its own microbatches.  All replicas together get the same
    microbatches that a single replica would get with dp_size times as many.
    """

    description: str
    entropy: float | None  # the lowest loss any model can reach, in nats; None if unknown
    contents: tuple[str, ...]  # one hash per corpus, of text, tokenizer and settings
    tokenizer: Path | None  # the tokenizer.json of the text; None if nothing was tokenized

    def train_batch(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        """Return the num_microbatches microbatches of `step`, which counts from 1."""
        ...

    def validation_batch(self, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        """Return the validation microbatches, the same in every call.

        All replicas together have run.eval_microbatches of them.  If that does not divide evenly,
        some replicas get extra microbatches without loss (all labels are -100).
        """
        ...


def open_source(config: RunConfig) -> Source:
    """Open the source of a run, and prepare its corpora if necessary.

    Raises ConfigError for data that the user must change.
    """
    if config.data.name == "synthetic":
        return _Synthetic(config)
    return _Text(config, prepare_all(config.data, config.model.vocab_size, progress=False))


def _positions(config: RunConfig, step: int, dp_rank: int, dp_size: int) -> range:
    """Return a replica's positions in the order of training samples."""
    return own_positions(step, config.num_microbatches * config.micro_batch_size, dp_rank, dp_size)


def _share(
    samples: Callable[[range], Batch], config: RunConfig, dp_rank: int, dp_size: int
) -> Batch:
    """Return a replica's share of the validation samples.  Its extra microbatches have no loss."""
    num_own = config.run.eval_microbatches_of(dp_size)
    batch = samples(own_positions(1, num_own * config.micro_batch_size, dp_rank, dp_size))
    num_counted = max(0, max(1, config.run.eval_microbatches) - dp_rank * num_own)
    is_extra = torch.arange(num_own) >= num_counted
    return replace(batch, labels=batch.labels.masked_fill(is_extra[:, None, None], _NO_LOSS))


def _batch(samples: list[np.ndarray], config: RunConfig) -> Tensor:
    """Stack samples of seq_length + 1 values to [m, b, s + 1]."""
    return torch.from_numpy(np.stack(samples)).view(
        -1, config.micro_batch_size, config.model.seq_length + 1
    )


def _tokens_and_labels(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Split samples [m, b, s + 1] into tokens [m, b, s] and labels [m, b, s], the next tokens.

    The results are clones that share no memory with each other or with `samples`.  `contiguous`
    would return a view if m = b = 1.
    """
    tokens, labels = samples[..., :-1], samples[..., 1:]
    return tokens.clone(memory_format=torch.contiguous_format), labels.clone(
        memory_format=torch.contiguous_format
    )


class _Synthetic:
    """A source of synthetic text, whose entropy is known."""

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
    """The training samples or the validation samples of all corpora, in their order."""

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
    """A source of tokenized text from one corpus or a blend."""

    entropy: float | None = None

    def __init__(self, config: RunConfig, corpora: tuple[Corpus, ...]) -> None:
        self._config = config
        self.contents = tuple(corpus.manifest.content_hash for corpus in corpora)
        self.tokenizer: Path | None = corpora[0].tokenizer
        turns = Turns.of(config.data.weights)
        lines = [headline(corpus) for corpus in corpora]
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
                f"{corpus.path}: {purpose} gets {len(share.documents)} of "
                f"{corpus.manifest.num_documents} documents with {share.num_tokens:,} tokens, "
                f"too short for one sample of {seq_length + 1:,}; give more documents (they are "
                "not split), lower model.seq_length, or change "
                f"data.validation_fraction={fraction} "
                "(0 with run.eval_every=0 trains on everything)"
            )
        return Windows.of(corpus.prefix, share, seq_length)

    def train_batch(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        return self._train.batch(_positions(self._config, step, dp_rank, dp_size))

    def validation_batch(self, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        assert self._validation is not None
        return _share(self._validation.batch, self._config, dp_rank, dp_size)
