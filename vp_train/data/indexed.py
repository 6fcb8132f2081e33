"""Megatron-core's indexed datasets.  No other module writes or samples them.

`megatron` checks and reads those that Megatron-LM has written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vp_train.config import ConfigError
from vp_train.config.data import exact
from vp_train.quiet import quiet_megatron

_BLOCK = 1 << 24  # tokens that are looked at together
LONGEST_DOCUMENT = 1 << 30  # tokens; the format counts them in int32


def write_dataset(
    prefix: Path,
    pieces: Iterable[tuple[np.ndarray, bool]],
    end: int,
    vocab_size: int,
    longest: int = LONGEST_DOCUMENT,
) -> tuple[int, int]:
    """Write `prefix`.bin and `prefix`.idx with one sequence per document.

    pieces: token ids, and whether a document ends with them; then the token `end` follows.
    longest: a document that has so many tokens goes on as another document.

    Returns the number of documents and the number of tokens.
    """
    with quiet_megatron():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    dtype = token_dtype(vocab_size)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    last, length = np.array([end], dtype=dtype).tobytes(), 0
    for ids, is_last in pieces:
        # A document may be larger than memory, so it is not given to the builder as a whole.
        builder.data_file.write(ids.astype(dtype).tobytes())
        length += len(ids)
        if is_last or length >= longest:
            if is_last:
                builder.data_file.write(last)
            builder.sequence_lengths.append(length + is_last)
            builder.end_document()
            length = 0
    builder.finalize(f"{prefix}.idx")
    return len(builder.sequence_lengths), sum(builder.sequence_lengths)


def largest_token(prefix: Path, vocab_size: int) -> int:
    """Return the largest token in `prefix`.bin."""
    tokens = np.memmap(f"{prefix}.bin", dtype=token_dtype(vocab_size), mode="r")
    return max(int(tokens[start : start + _BLOCK].max()) for start in range(0, len(tokens), _BLOCK))


def token_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """Return the smallest dtype that Megatron reads and that holds every token id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def check_tokens(prefix: Path, vocab_size: int) -> None:
    """Read every token of `prefix`.bin.

    Raises ConfigError for the first token outside [0, vocab_size), with file, offset in tokens and
    value.
    """
    tokens = np.memmap(f"{prefix}.bin", dtype=token_dtype(vocab_size), mode="r")
    for start in range(0, len(tokens), _BLOCK):
        block = tokens[start : start + _BLOCK]
        if int(block.max()) >= vocab_size or int(block.min()) < 0:
            offset = start + int(np.argmax((block >= vocab_size) | (block < 0)))
            raise ConfigError(
                f"{prefix}.bin: token {int(tokens[offset])} at offset {offset} is outside "
                f"[0, {vocab_size}); delete {prefix.parent}, and prepare it again"
            )


HEADER = np.dtype(  # of an index
    [("magic", "S9"), ("version", "<u8"), ("code", "u1"), ("sequences", "<u8"), ("ends", "<u8")]
)
MAGIC, VERSION = b"MMIDIDX", 1
_CODES = {np.uint16: 8, np.int32: 4}  # Megatron's numbers of the dtypes
_ENTRIES = 1 << 20  # of an index, checked together


def index_bytes(num_sequences: int, num_ends: int) -> int:
    """Return the size of an index.  Documents are one fewer than their ends: the first is 0."""
    return HEADER.itemsize + 12 * num_sequences + 8 * num_ends


def index_entries(
    name: str, num_sequences: int, num_ends: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map the entries of an index that has `index_bytes`.

    Returns the length of every sequence in tokens, int32, the byte at which it begins in the .bin,
    int64, and the sequence at which every document ends, int64 [num_ends], from 0 on.
    """
    offsets = (HEADER.itemsize + bytes_ * num_sequences for bytes_ in (0, 4, 12))
    sizes = (num_sequences, num_sequences, num_ends)
    lengths, starts, ends = (
        np.memmap(name, dtype=kind, mode="r", offset=offset, shape=(size,))
        for kind, offset, size in zip(("<i4", "<i8", "<i8"), offsets, sizes, strict=True)
    )
    return lengths, starts, ends


def check_index(prefix: Path, num_documents: int, num_tokens: int, vocab_size: int) -> None:
    """Read every entry of `prefix`.idx.

    Documents must follow each other without gaps in `prefix`.bin, each as one sequence of at least
    one token, and have `num_tokens` tokens together.  Raises ConfigError with file and offset.
    """
    name, dtype = f"{prefix}.idx", token_dtype(vocab_size)
    way_out = f"delete {prefix.parent}, and prepare it again"
    size, expected = os.path.getsize(name), index_bytes(num_documents, num_documents + 1)
    if size != expected:
        raise ConfigError(
            f"{name} has {size:,} bytes, but {num_documents:,} documents take {expected:,}; "
            f"{way_out}"
        )
    header = np.memmap(name, dtype=HEADER, mode="r", shape=(1,))[0]
    wanted = (MAGIC, VERSION, _CODES[dtype], num_documents, num_documents + 1)
    if (found := tuple(header.tolist())) != wanted:
        raise ConfigError(
            f"{name}: the header (magic, version, dtype, sequences, ends) is {found} "
            f"instead of {wanted}; {way_out}"
        )
    lengths, starts, ends = index_entries(name, num_documents, num_documents + 1)
    itemsize, start = np.dtype(dtype).itemsize, 0
    for first in range(0, num_documents, _ENTRIES):
        block = np.asarray(lengths[first : first + _ENTRIES], dtype=np.int64)
        after = start + np.cumsum(np.maximum(block, 0)) * itemsize
        before = np.concatenate([[start], after[:-1]])
        numbers = np.arange(first, first + len(block))
        wrong = (block < 1) | (starts[first : first + _ENTRIES] != before)
        wrong |= ends[first : first + len(block)] != numbers
        if wrong.any():
            number = first + int(np.argmax(wrong))
            raise ConfigError(
                f"{name}: document {number} has {int(lengths[number]):,} tokens from byte "
                f"{int(starts[number]):,}, which is not where the one before it ends "
                f"(entry at offset {HEADER.itemsize + 4 * number:,}); {way_out}"
            )
        start = int(after[-1])
    if start != num_tokens * itemsize or int(ends[num_documents]) != num_documents:
        raise ConfigError(
            f"{name} has documents of {start // itemsize:,} tokens instead of {num_tokens:,}; "
            f"{way_out}"
        )


@dataclass(frozen=True, slots=True)
class Share:
    """Some text of a corpus: `num_tokens` tokens of some documents, from token `start` on.

    documents: their indices, int32 and ascending.
    start: counts from the first token of the first document; 0 where all documents are whole.
    """

    documents: np.ndarray
    num_tokens: int
    start: int = 0


def split_documents(prefix: Path, validation_fraction: float, seed: int) -> tuple[Share, Share]:
    """Return the documents for training and the documents for validation.

    Validation takes random documents, up to `validation_fraction` of the tokens.  It takes at least
    one document, unless the fraction is 0, and never all of them.  Documents that are larger than
    the whole fraction come last in the random order, smallest first.
    """
    dataset = open_dataset(prefix)  # owns the memory: its lengths are a view
    lengths = np.array(dataset.sequence_lengths, dtype=np.int64)
    target = int(exact(validation_fraction) * int(lengths.sum()))
    order = np.random.default_rng(seed).permutation(len(lengths)).astype(np.int32)
    order = order[np.argsort(np.maximum(lengths[order], target), kind="stable")]
    num_validation = int(np.searchsorted(np.cumsum(lengths[order]), target, side="right"))
    if validation_fraction > 0:
        num_validation = min(max(num_validation, 1), len(lengths) - 1)
    validation, training = np.sort(order[:num_validation]), np.sort(order[num_validation:])
    return Share(training, int(lengths[training].sum())), Share(
        validation, int(lengths[validation].sum())
    )


def hold_out(
    prefix: Path, validation_fraction: float, seed: int, length: int
) -> tuple[Share, Share]:
    """Return the text for training and the text for validation.

    They are whole documents, as in `split_documents`.  Where these are too few to give validation a
    sample of length + 1 tokens, such as a single one, it gets the end of the corpus instead:
    `validation_fraction` of all tokens, and at least one sample.  Where training would get none,
    the documents stay whole.
    """
    training, validation = split_documents(prefix, validation_fraction, seed)
    total = training.num_tokens + validation.num_tokens
    num_held_out = max(int(exact(validation_fraction) * total), length + 1)
    is_enough = validation.num_tokens > length or validation_fraction == 0
    if is_enough or total - num_held_out <= length:
        return training, validation
    everything = np.sort(np.concatenate([training.documents, validation.documents]))
    start = total - num_held_out
    return Share(everything, start), Share(everything, num_held_out, start)


@dataclass(frozen=True, slots=True)
class Windows:
    """Samples of length + 1 tokens, cut from the concatenation of some documents.

    Sample i begins at token start + i * length, so the last token of a sample is the first token of
    the next.  Every token is a label exactly once, except the first token and an incomplete sample
    at the end.  Samples depend on nothing else; their order is up to `order.SampleOrder`.

    `documents` are indices into `dataset`.  `ends[i]` is the position at which document i ends.
    The samples are cut of the tokens `start` to `stop`.
    """

    dataset: Any
    documents: np.ndarray
    ends: np.ndarray
    length: int
    start: int
    stop: int

    @classmethod
    def of(cls, prefix: Path, share: Share, length: int) -> Windows:
        """Open the dataset at `prefix` and cut the text of `share` into samples."""
        dataset = open_dataset(prefix)
        lengths = np.asarray(dataset.sequence_lengths)[share.documents]
        ends, start = np.cumsum(lengths, dtype=np.int64), share.start
        return cls(dataset, share.documents, ends, length, start, start + share.num_tokens)

    def __len__(self) -> int:
        return (self.stop - self.start - 1) // self.length

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the tokens and the document numbers of sample `index`.

        Tokens are int64 [length + 1].  Document numbers are int32 [length + 1]; they count
        the documents within the sample, from 0.
        """
        start = self.start + index * self.length
        stop = start + self.length + 1
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


def open_dataset(prefix: Path) -> Any:
    """Open the dataset at `prefix`.  Arrays that it returns do not outlive it."""
    with quiet_megatron():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix))
