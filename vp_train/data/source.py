"""Batches of a run: a pure function of the tokens that were used before.

A resumed run therefore sees the same batches as a run without interruption.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vp_train.config import ConfigError, RunConfig
from vp_train.data.corpus import (
    Corpus,
    corpus_names,
    headline,
    prepare_validation,
    spare_rows,
    text_warnings,
    trained_on,
)
from vp_train.data.indexed import Share, Windows, hold_out, split_documents
from vp_train.data.left_out import words_of
from vp_train.data.order import SampleOrder, Turns, own_starts, pieces_of
from vp_train.data.origin import begin_warnings, prepare_run
from vp_train.data.synthetic import SyntheticText
from vp_train.data.tokenizer import byte_lengths, load_tokenizer
from vp_train.units import count_words

_NO_LOSS = -100  # the output layer ignores this label
_TRAINING = "training"  # the purpose of the samples that are trained on


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
    end_token: int | None  # the id that ends every document; None if nothing was tokenized
    begin_token: int | None  # the id in front of every document; None if there is none
    tokens_of_pass: int | None  # of all training samples; None of a blend and of synthetic text

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return what is doubtful about the data, one sentence each."""
        ...

    @property
    def validation_sets(self) -> tuple[str, ...]:
        """The names of the validation sets; that of the text that is held out is ""."""
        ...

    @property
    def byte_lengths(self) -> Tensor | None:
        """The bytes of text that each token stands for, int64 [ids]; None if that is unknown."""
        ...

    def train_batch(
        self, start: int, num_microbatches: int, dp_rank: int = ..., dp_size: int = ...
    ) -> Batch:
        """Return the `num_microbatches` microbatches of this replica in a step.

        The step begins at token `start` of the stream of training samples; see `data.order`.
        """
        ...

    def validation_batch(self, dp_rank: int = ..., dp_size: int = ..., name: str = ...) -> Batch:
        """Return the validation microbatches of one set, the same in every call.

        All replicas together have the sequences of `RunConfig.eval_sequences`, of a named set at
        most all that it has.  The rest of their microbatches has no loss (all labels are -100).
        """
        ...


def open_source(config: RunConfig, *, progress: bool = False) -> Source:
    """Open the source of a run, and prepare its corpora if necessary; `progress` prints how far.

    What a corpus that is built now leaves out is said on stderr.  Raises ConfigError for data that
    the user must change.
    """
    if config.data.name == "synthetic":
        return _Synthetic(config)
    corpora, named = prepare_run(config, progress), {}
    if config.run.eval_every:
        named = prepare_validation(config.data, config.model.vocab_size, corpora, progress)
    for corpus in (*corpora, *named.values()):
        for line in words_of(corpus.manifest.left_out) if corpus.fresh else ():
            print(line, file=sys.stderr, flush=True)
    return _Text(config, corpora, named)


@dataclass(frozen=True, slots=True)
class _Stream:
    """A stream of samples, of which sequences are cut.

    `read` returns the tokens [sample_length + 1] and the document numbers [sample_length + 1] of
    the sample at a position.  The last token of a sample is only a label.
    """

    config: RunConfig
    read: Callable[[int], tuple[np.ndarray, np.ndarray | None]]
    num_samples: int | None = None  # after which they repeat; None: that does not matter

    def first_batch(self, dp_rank: int, dp_size: int) -> Batch:
        """Return a replica's share of the first sequences, whose number is config.eval_sequences.

        Sequences beyond, and those of a repeated sample, have no loss.
        """
        batch = self.batch(0, self.config.eval_microbatches_of(dp_size), dp_rank, dp_size)
        num_own = batch.labels.shape[:2].numel()
        is_extra = torch.arange(dp_rank * num_own, (dp_rank + 1) * num_own) >= self._num_first
        is_extra = is_extra.view(*batch.labels.shape[:2], 1)
        return replace(batch, labels=batch.labels.masked_fill(is_extra, _NO_LOSS))

    def has_label(self) -> bool:
        """Return whether one of the first sequences has a loss; reads no more than it must."""
        length = self.config.model.seq_length
        sequences = (self._sequence(number * length) for number in range(self._num_first))
        return any((labels != _NO_LOSS).any() for _, labels, _ in sequences)

    @property
    def _num_first(self) -> int:
        """The sequences of `first_batch` that have a loss, over all replicas."""
        config = self.config
        if self.num_samples is None:
            return config.eval_sequences
        num_whole = self.num_samples * config.sample_length // config.model.seq_length
        return min(config.eval_sequences, max(1, num_whole))

    def batch(self, start: int, num_microbatches: int, dp_rank: int, dp_size: int) -> Batch:
        """Return a replica's share of the sequences from token `start` on."""
        size, length = self.config.micro_batch_size, self.config.model.seq_length
        starts = own_starts(start, num_microbatches * size, length, dp_rank, dp_size)
        parts = zip(*map(self._sequence, starts), strict=True)
        tokens, labels, segments = (
            torch.from_numpy(np.stack(part)).view(num_microbatches, size, length) for part in parts
        )
        return Batch(tokens, labels, None if self.config.data.packing == "none" else segments)

    def _sequence(self, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens and labels, int64 [s], and segments, int32 [s], from token `start` on."""
        tokens, labels, segments = [], [], []
        num_documents = 0
        length = self.config.model.seq_length
        for position, piece in pieces_of(start, length, self.config.sample_length):
            sample, documents = self.read(position)
            own, following = slice(piece.start, piece.stop), slice(piece.start + 1, piece.stop + 1)
            tokens.append(sample[own])
            labels.append(sample[following])
            if documents is not None and self.config.data.packing != "none":
                ends = documents[own] != documents[following]
                labels[-1] = np.where(ends, _NO_LOSS, labels[-1])
                segments.append(num_documents + documents[own])
                num_documents += int(documents[-1]) + 1
        nothing = np.zeros(length, dtype=np.int32)
        joined = np.concatenate(segments).astype(np.int32) if segments else nothing
        return np.concatenate(tokens), np.concatenate(labels), joined


class _Synthetic:
    """A source of synthetic text, whose entropy is known."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._text = SyntheticText(config.model.vocab_size, config.data.seed)
        entropy = self._text.entropy()
        self.entropy: float | None = entropy
        self.contents: tuple[str, ...] = ()
        self.tokenizer: Path | None = None
        self.end_token: int | None = None
        self.begin_token: int | None = None
        self.tokens_of_pass: int | None = None
        self.validation_sets: tuple[str, ...] = ("",)
        self.byte_lengths: Tensor | None = None
        self.warnings: tuple[str, ...] = ()
        self.description = (
            f"synthetic text over {config.model.vocab_size:,} tokens, entropy {entropy:.4f} nats"
        )

    def _stream(self, number: int) -> _Stream:
        length = self._config.sample_length + 1
        return _Stream(
            self._config, lambda position: (self._text.sample(number, position, length), None)
        )

    def train_batch(
        self, start: int, num_microbatches: int, dp_rank: int = 0, dp_size: int = 1
    ) -> Batch:
        return self._stream(0).batch(start, num_microbatches, dp_rank, dp_size)

    def validation_batch(self, dp_rank: int = 0, dp_size: int = 1, name: str = "") -> Batch:
        return self._stream(1).first_batch(dp_rank, dp_size)


def _stream_of(config: RunConfig, windows: list[Windows], turns: Turns, purpose: str) -> _Stream:
    """Return the training samples or the validation samples of all corpora, in their order."""
    seed = config.data.seed if purpose == _TRAINING else config.data.validation_seed
    order = SampleOrder(tuple(map(len, windows)), turns, seed, purpose)

    def read(position: int) -> tuple[np.ndarray, np.ndarray]:
        corpus, sample = order[position]
        return windows[corpus].read(sample)

    return _Stream(config, read)


def _split_words(training: Share, validation: Share) -> str:
    """Say how many tokens are trained on and held out; nothing if all are trained on."""
    if not validation.num_tokens:
        return ""
    held_out = f"{validation.num_tokens:,} of {count_words(len(validation.documents), 'document')}"
    if validation.start:
        held_out = (
            f"the last {validation.num_tokens:,} (there are too few documents to hold whole ones "
            "out)"
        )
    return f": {training.num_tokens:,} to train on, held out {held_out}"


class _Text:
    """A source of tokenized text from one corpus or a blend."""

    entropy: float | None = None

    def __init__(
        self,
        config: RunConfig,
        corpora: tuple[Corpus, ...],
        named: Mapping[str, Corpus],
    ) -> None:
        self._config, self._corpora, self._named = config, corpora, named
        self.contents = tuple(corpus.manifest.content_hash for corpus in corpora)
        self.tokenizer: Path | None = corpora[0].tokenizer
        self.end_token: int | None = corpora[0].manifest.end_token
        self.begin_token = corpora[0].manifest.begin_token
        turns = Turns.of(config.data.weights)
        data, length = config.data, config.sample_length
        split = [
            hold_out(corpus.prefix, data.validation_fraction, data.validation_seed, length)
            for corpus in corpora
        ]
        names = [""]
        if data.blend is not None:
            names = [
                f"{weight / sum(turns.weights):.1%} {entry.path or entry.name}"
                for weight, entry in zip(turns.weights, data.blend, strict=True)
            ]
        self.description = "; ".join(
            headline(corpus, name) + _split_words(own, held_out)
            for corpus, name, (own, held_out) in zip(corpora, names, split, strict=True)
        )
        places = list(zip(corpora, corpus_names(data), strict=True))
        training = [
            self._windows(corpus, place, share, _TRAINING)
            for (corpus, place), (share, _) in zip(places, split, strict=True)
        ]
        self._train = _stream_of(config, training, turns, _TRAINING)
        self.tokens_of_pass: int | None = None
        if len(training) == 1:
            self.tokens_of_pass = len(training[0]) * length
        self._validation: dict[str, _Stream] = {}
        # Without a fraction nothing is held out: an error, unless there are named sets.
        if config.run.eval_every and (config.data.validation_fraction > 0 or not named):
            held_out = [
                self._windows(corpus, place, share, "validation")
                for (corpus, place), (_, share) in zip(places, split, strict=True)
            ]
            self._validation[""] = _stream_of(config, held_out, turns, "validation")
        paths = {entry.name: entry.path for entry in data.validation or ()}
        for name, corpus in named.items():
            self._validation[name] = self._named_stream(name, corpus, paths[name])
        for name, stream in self._validation.items():
            if not stream.has_label():
                raise ConfigError(
                    f"{f'data.validation, {name}' if name else 'the text that is held out'}: each "
                    "token that is validated is the last of its document, so there is no label; "
                    "raise model.seq_length or run.eval_sequences, or set data.packing=none"
                )

    def _named_stream(self, name: str, corpus: Corpus, path: str | None) -> _Stream:
        """Return the samples of all documents of a named set, whose text is at `path`."""
        everything, _ = split_documents(corpus.prefix, 0.0, self._config.data.validation_seed)
        length = self._config.sample_length
        if everything.num_tokens <= length:
            raise ConfigError(
                f"data.validation, {name}: {path} has {everything.num_tokens:,} tokens, too "
                f"few for one sample of {length + 1:,}; give more text, or lower model.seq_length"
            )
        purpose = f"validation {name}"
        windows = [Windows.of(corpus.prefix, everything, length)]
        stream = _stream_of(self._config, windows, Turns.of([1]), purpose)
        return replace(stream, num_samples=len(windows[0]))

    @property
    def validation_sets(self) -> tuple[str, ...]:
        return tuple(self._validation)

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        names = set(self._validation) - {""}
        found = trained_on(self._config.data, self._corpora) if names else []
        much = text_warnings(self._config.data, self._corpora, self._named)
        begin = begin_warnings(self._config, self._corpora)
        return (*spare_rows(self._config, self._corpora), *begin, *much, *found)

    @cached_property
    def byte_lengths(self) -> Tensor | None:
        assert self.tokenizer is not None
        return torch.tensor(byte_lengths(load_tokenizer(self.tokenizer, None)))

    def _windows(self, corpus: Corpus, place: str, share: Share, purpose: str) -> Windows:
        length = self._config.sample_length
        if share.num_tokens <= length:
            setting = "model.seq_length"
            if self._config.data.sample_length is not None:
                setting = "data.sample_length"
            fraction = self._config.data.validation_fraction
            if purpose == "validation" and not fraction:
                raise ConfigError(
                    f"{place}: data.validation_fraction=0 leaves no document to validate "
                    "with; write for example data.validation_fraction=0.1, or run.eval_every=0, "
                    "which trains on everything"
                )
            raise ConfigError(
                f"{place}: {purpose} gets {len(share.documents)} of "
                f"{count_words(corpus.manifest.num_documents, 'document')} "
                f"with {share.num_tokens:,} tokens, too short for one sample of {length + 1:,}; "
                f"give more text, lower {setting}, or change "
                f"data.validation_fraction={fraction} "
                "(0 with run.eval_every=0 trains on everything)"
            )
        return Windows.of(corpus.prefix, share, length)

    def train_batch(
        self, start: int, num_microbatches: int, dp_rank: int = 0, dp_size: int = 1
    ) -> Batch:
        return self._train.batch(start, num_microbatches, dp_rank, dp_size)

    def validation_batch(self, dp_rank: int = 0, dp_size: int = 1, name: str = "") -> Batch:
        return self._validation[name].first_batch(dp_rank, dp_size)
