"""Megatron-core's indexed datasets: written, checked and sampled here, and nowhere else."""

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
    """Write `prefix`.bin and .idx, one sequence per document; how many documents and tokens there were."""
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
    """The smallest type megatron reads that holds every token."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def check_tokens(prefix: Path, vocab_size: int) -> None:
    """Read every token.  Raises ConfigError with file, offset (in tokens) and token for the first outside [0, vocab_size)."""
    tokens = np.memmap(f"{prefix}.bin", dtype=token_dtype(vocab_size), mode="r")
    for start in range(0, len(tokens), 1 << 24):
        block = tokens[start : start + (1 << 24)]
        if int(block.max()) >= vocab_size or int(block.min()) < 0:
            offset = start + int(np.argmax((block >= vocab_size) | (block < 0)))
            raise ConfigError(
                f"{prefix}.bin: token {int(tokens[offset])} at offset {offset} is outside [0, {vocab_size}); "
                f"delete {prefix.parent}, and prepare it again"
            )


@dataclass(frozen=True, slots=True)
class Share:
    """Some documents of a corpus: their numbers, int32 and ascending, and how many tokens they hold."""

    documents: np.ndarray
    num_tokens: int


def split_documents(prefix: Path, validation_fraction: float, seed: int) -> tuple[Share, Share]:
    """The documents for training and those for validation.

    Validation takes documents at random up to its fraction of the tokens, at least one and never the last.  Documents larger
    than the whole fraction come last, the smallest first.
    """
    dataset = _open_dataset(prefix)  # owns the memory that its lengths are a view of
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
    """Samples of seq_length + 1 tokens from documents that stand one after another; sample i begins at token i * seq_length.

    So neighbours share a token, and each token is a label once, but for the first one and less than seq_length at the end.
    Which tokens make a sample depends on nothing else: the order of samples is `order.SampleOrder`'s.  `ends[i]` is where
    document i ends.
    """

    dataset: Any
    documents: np.ndarray
    ends: np.ndarray
    seq_length: int

    @classmethod
    def of(cls, prefix: Path, share: Share, seq_length: int) -> Windows:
        dataset = _open_dataset(prefix)
        lengths = np.asarray(dataset.sequence_lengths)[share.documents]
        return cls(dataset, share.documents, np.cumsum(lengths, dtype=np.int64), seq_length)

    def __len__(self) -> int:
        return (int(self.ends[-1]) - 1) // self.seq_length

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of sample `index`, int64 [seq_length + 1], and which of the sample's documents each is of, int32."""
        start = index * self.seq_length
        stop = start + self.seq_length + 1
        first, last = (
            int(np.searchsorted(self.ends, start, "right")),
            int(np.searchsorted(self.ends, stop, "left")),
        )
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
