"""Megatron-core's indexed datasets.  No other module writes, checks or samples them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vp_train.config import ConfigError
from vp_train.quiet import quiet_megatron


def write_dataset(prefix: Path, documents: Iterable[list[int]], vocab_size: int) -> tuple[int, int]:
    """Write `prefix`.bin and `prefix`.idx with one sequence per document.

    Returns the number of documents and the number of tokens.
    """
    with quiet_megatron():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=token_dtype(vocab_size))
    num_documents = num_tokens = 0
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
        num_documents += 1
        num_tokens += len(tokens)
    builder.finalize(f"{prefix}.idx")
    return num_documents, num_tokens


def token_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """Return the smallest dtype that Megatron reads and that holds every token id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def check_tokens(prefix: Path, vocab_size: int) -> None:
    """Read every token of `prefix`.bin.

    Raises ConfigError for the first token outside [0, vocab_size), with file, offset in tokens and
    value.
    """
    tokens = np.memmap(f"{prefix}.bin", dtype=token_dtype(vocab_size), mode="r")
    for start in range(0, len(tokens), 1 << 24):
        block = tokens[start : start + (1 << 24)]
        if int(block.max()) >= vocab_size or int(block.min()) < 0:
            offset = start + int(np.argmax((block >= vocab_size) | (block < 0)))
            raise ConfigError(
                f"{prefix}.bin: token {int(tokens[offset])} at offset {offset} is outside "
                f"[0, {vocab_size}); delete {prefix.parent}, and prepare it again"
            )


@dataclass(frozen=True, slots=True)
class Share:
    """Some documents of a corpus: their indices, int32 and ascending, and their token count."""

    documents: np.ndarray
    num_tokens: int


def split_documents(prefix: Path, validation_fraction: float, seed: int) -> tuple[Share, Share]:
    """Return the documents for training and the documents for validation.

    Validation takes random documents, up to `validation_fraction` of the tokens.  It takes at least
    one document, unless the fraction is 0, and never all of them.  Documents that are larger than
    the whole fraction come last in the random order, smallest first.
    """
    dataset = _open_dataset(prefix)  # owns the memory: its lengths are a view
    lengths = np.array(dataset.sequence_lengths, dtype=np.int64)
    target = validation_fraction * lengths.sum()
    order = np.random.default_rng(seed).permutation(len(lengths)).astype(np.int32)
    order = order[np.argsort(np.maximum(lengths[order], target), kind="stable")]
    num_validation = int(np.searchsorted(np.cumsum(lengths[order]), target, side="right"))
    if validation_fraction > 0:
        num_validation = min(max(num_validation, 1), len(lengths) - 1)
    validation, training = np.sort(order[:num_validation]), np.sort(order[num_validation:])
    return Share(training, int(lengths[training].sum())), Share(
        validation, int(lengths[validation].sum())
    )


@dataclass(frozen=True, slots=True)
class Windows:
    """Samples of seq_length + 1 tokens, cut from the concatenation of some documents.

    Sample i begins at token i * seq_length, so the last token of a sample is the first token of the
    next.  Every token is a label exactly once, except the first token and an incomplete sample at
    the end.  Samples depend on nothing else; their order is up to `order.SampleOrder`.

    `documents` are indices into `dataset`.  `ends[i]` is the position at which document i ends.
    """

    dataset: Any
    documents: np.ndarray
    ends: np.ndarray
    seq_length: int

    @classmethod
    def of(cls, prefix: Path, share: Share, seq_length: int) -> Windows:
        """Open the dataset at `prefix` and cut the documents of `share` into samples."""
        dataset = _open_dataset(prefix)
        lengths = np.asarray(dataset.sequence_lengths)[share.documents]
        return cls(dataset, share.documents, np.cumsum(lengths, dtype=np.int64), seq_length)

    def __len__(self) -> int:
        return (int(self.ends[-1]) - 1) // self.seq_length

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and the document numbers of sample `index`.

        Tokens are int64 [seq_length + 1].  Document numbers are int32 [seq_length + 1]; they count
        the documents within the sample, from 0.
        """
        start = index * self.seq_length
        stop = start + self.seq_length + 1
        first, last = (
            int(np.searchsorted(self.ends, start, "right")),
            int(np.searchsorted(self.ends, stop, "left")),
        )
        # Documents first to last overlap the sample.  Their boundaries cut it into pieces.
        pieces = []
        for number, (low, high) in enumerate(
            pairwise([start, *self.ends[first:last].tolist(), stop]), start=first
        ):
            begin = int(self.ends[number - 1]) if number else 0
            pieces.append(self.dataset.get(int(self.documents[number]), low - begin, high - low))
        lengths = [len(piece) for piece in pieces]
        return np.concatenate(pieces).astype(np.int64), np.repeat(
            np.arange(len(pieces), dtype=np.int32), lengths
        )


def _open_dataset(prefix: Path) -> Any:
    with quiet_megatron():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix))
