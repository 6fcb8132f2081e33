"""A process that tokenizes: it reads batches of texts from stdin, and writes their ids to stdout.

It is started as a file, so that it imports nothing but the tokenizer.  It ends with its input, so
it cannot outlive who started it.  Numbers are uint32, little endian.  A batch is the number of
texts, their sizes in bytes, and the texts in UTF-8.  The answer is 0, how many ids each text has,
and the ids; or 1, and the size and text of an error.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer

_NUMBER = np.dtype("<u4")


class EncodingError(Exception):
    """The tokenizer cannot encode a text."""


def open_tokenizer(path: str) -> Tokenizer:
    """Return the tokenizer of a corpus: what spells a special token in a text is ordinary text."""
    tokenizer = Tokenizer.from_file(path)
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the ids of every text, uint32.  Raises EncodingError."""
    try:
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the library is no Exception
        raise EncodingError(" ".join(str(error).split())) from None
    return [np.array(encoding.ids, dtype=_NUMBER) for encoding in encodings]


def send_texts(stream: BinaryIO, texts: Sequence[str]) -> None:
    """Write a batch."""
    encoded = [text.encode() for text in texts]
    head = np.array([len(encoded), *map(len, encoded)], dtype=_NUMBER)
    stream.write(b"".join([head.tobytes(), *encoded]))
    stream.flush()


def receive_ids(stream: BinaryIO, num_texts: int) -> list[np.ndarray]:
    """Read the answer to a batch.  Raises EOFError if it has no end, and EncodingError."""
    (failed,) = _numbers(stream, 1)
    if failed:
        raise EncodingError(_read(stream, int(_numbers(stream, 1)[0])).decode())
    counts = _numbers(stream, num_texts)
    ids = _numbers(stream, int(counts.sum(dtype=np.int64)))
    return np.split(ids, np.cumsum(counts, dtype=np.int64)[:-1])


def _numbers(stream: BinaryIO, count: int) -> np.ndarray:
    return np.frombuffer(_read(stream, count * _NUMBER.itemsize), dtype=_NUMBER)


def _read(stream: BinaryIO, size: int) -> bytes:
    content = stream.read(size)
    if len(content) < size:
        raise EOFError
    return content


def _serve(tokenizer: Tokenizer, source: BinaryIO, target: BinaryIO) -> None:
    while True:
        try:
            (num_texts,) = _numbers(source, 1)
            sizes = _numbers(source, int(num_texts))
            texts = [_read(source, int(size)).decode() for size in sizes]
        except EOFError:
            return
        try:
            ids = encode(tokenizer, texts)
            head = np.array([0, *map(len, ids)], dtype=_NUMBER)
            answer = b"".join([head.tobytes(), *(part.tobytes() for part in ids)])
        except EncodingError as error:
            words = str(error).encode("utf-8", "replace")
            answer = np.array([1, len(words)], dtype=_NUMBER).tobytes() + words
        target.write(answer)
        target.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this one ends its input
    _serve(open_tokenizer(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
