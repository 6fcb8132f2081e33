"""Corpora that Megatron-LM's preprocess_data.py has tokenized: pairs of a .bin and an .idx.

A .bin holds tokens.  Its .idx cuts them into sequences, and these into documents.  An index is
checked as a whole before megatron-core opens it, since that trusts what it finds there.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vp_train.config import ConfigError
from vp_train.data.documents import Reading
from vp_train.data.encoding import Encoded
from vp_train.data.files import TOKENS, refused
from vp_train.data.indexed import (
    HEADER,
    MAGIC,
    VERSION,
    index_bytes,
    index_entries,
    open_dataset,
)
from vp_train.durable import UnreadableError, open_regular

_BLOCK = 1 << 20  # tokens that are read together
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # by Megatron's numbers
_AGAIN = "copy both files again, or make them again with Megatron-LM"


def stored_documents(
    indexes: Sequence[Path], vocab_size: int, end: int, special: Mapping[int, str], reading: Reading
) -> Generator[Encoded, None, None]:
    """Yield the tokens of every document in order, without the token `end` where it is the last.

    vocab_size: above every token that the tokenizer has.
    special: tokens that end documents elsewhere, and their texts; none if the user has set `end`.

    A long document comes in pieces.  Raises ConfigError like `check_pair` before any document, for
    a token that the tokenizer does not have, and where the first document ends with another special
    token than `end`.
    """
    is_first = True
    checked = [check_pair(index) for index in indexes]
    for index, (bounds, itemsize) in zip(indexes, checked, strict=True):
        before, data = reading.num_bytes, index.with_suffix(TOKENS)
        # Nothing can be mapped of an empty file.
        dataset: Any = open_dataset(index.with_suffix("")) if bounds[-1] else None
        for number in range(len(bounds) - 1):
            start, stop = int(bounds[number]), int(bounds[number + 1])
            origin = f"{index}: document {number}"
            if start == stop:
                yield Encoded(origin, np.empty(0, dtype=np.uint32), is_last=True)
            for first in range(start, stop, _BLOCK):
                after = min(first + _BLOCK, stop)
                # Sequences follow each other without gaps: tokens count from the first of all.
                ids = dataset.get(0, first, after - first)
                if int(ids.max()) >= vocab_size or int(ids.min()) < 0:
                    place = int(np.argmax((ids >= vocab_size) | (ids < 0)))
                    raise ConfigError(
                        f"{data}: token {ids[place]} at offset {first + place} (document {number}) "
                        f"is not in data.tokenizer, which has [0, {vocab_size}); give the "
                        "tokenizer.json that made these tokens"
                    )
                is_last = after == stop
                if is_first and is_last:
                    if (last := int(ids[-1])) in special.keys() - {end}:
                        raise ConfigError(
                            f"{origin} ends with {special[last]!r}, but documents of text end with "
                            f"{special.get(end, end)!r} here; set data.end_token to the one that "
                            "is meant"
                        )
                    is_first = False
                kept = ids[:-1] if is_last and ids[-1] == end else ids
                yield Encoded(origin, kept.astype(np.uint32), is_last)
                reading.num_bytes = before + after * itemsize
        reading.num_bytes = before + data.stat().st_size + index.stat().st_size


def check_pair(index: Path) -> tuple[np.ndarray, int]:
    """Read every entry of an index, and compare it with the size of its .bin.

    Returns the token at which every document ends, int64 [documents + 1] and 0 at first, and the
    bytes of a token.  Raises ConfigError for what is damaged, cut off or no index, and for an index
    that has modes: its sequences are not all text.
    """
    data = index.with_suffix(TOKENS)
    size, num_bytes = _size_of(index), _size_of(data)
    if size < HEADER.itemsize:
        raise ConfigError(f"{index} has {size} bytes and is cut off; {_AGAIN}")
    magic, version, code, num_sequences, num_ends = np.memmap(
        index, dtype=HEADER, mode="r", shape=(1,)
    )[0].tolist()
    if magic != MAGIC or version != VERSION:
        raise ConfigError(
            f"{index} begins with {magic!r}, version {version}, not with {MAGIC!r}, version "
            f"{VERSION}, so it is no index of Megatron-LM; make it with its preprocess_data.py"
        )
    if code not in _DTYPES:
        raise ConfigError(f"{index} has tokens of dtype {code}, which are no integers; {_AGAIN}")
    expected = index_bytes(num_sequences, num_ends)
    if num_sequences and size == expected + num_sequences:
        raise ConfigError(
            f"{index} has a mode for each sequence: it is multimodal, and only text can be used"
        )
    if size != expected or num_ends == 0:
        raise ConfigError(
            f"{index} has {size:,} bytes, but its {num_sequences:,} sequences and {num_ends:,} "
            f"ends of documents take {expected:,}: it is cut off or damaged; {_AGAIN}"
        )
    lengths, starts, ends = index_entries(str(index), num_sequences, num_ends)
    if ends[0] != 0 or ends[-1] != num_sequences or (ends[1:] < ends[:-1]).any():
        raise ConfigError(f"{index}: documents do not follow each other; {_AGAIN}")
    itemsize = np.dtype(_DTYPES[code]).itemsize
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    wrong = (lengths < 0) | (starts != offsets[:-1] * itemsize)
    if wrong.any():
        number = int(np.argmax(wrong))
        raise ConfigError(
            f"{index}: sequence {number} has {int(lengths[number]):,} tokens from byte "
            f"{int(starts[number]):,} of {num_bytes:,}, but the one before it ends at byte "
            f"{int(offsets[number]) * itemsize:,}; {_AGAIN}"
        )
    if (described := int(offsets[-1]) * itemsize) != num_bytes:
        state = "it is cut off" if num_bytes < described else "the two do not belong together"
        raise ConfigError(
            f"{data} has {num_bytes:,} bytes, but its index points at {described:,}: {state}; "
            f"{_AGAIN}"
        )
    return offsets[ends], itemsize


def _size_of(path: Path) -> int:
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size
    except UnreadableError as error:
        raise refused(error) from None
