"""Tokenizing the pieces of documents in order, in this process or in several.

The ids of a piece depend on the piece alone, so the result does not depend on the number of
processes.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vp_train.config import ConfigError
from vp_train.data import worker
from vp_train.data.documents import Document
from vp_train.data.pieces import pieces

if TYPE_CHECKING:
    from vp_train.data.unspelled import Tally

_BATCH = 1 << 19  # characters, unless the last piece is longer
_MOST_PIECES = 4_096  # of a batch
_ALONE = 16  # batches that are tokenized before processes are worth their start


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a document.  `is_last` says that the document ends with it."""

    origin: str
    text: str
    is_last: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """The ids of a piece, uint32 [n]."""

    origin: str
    ids: np.ndarray
    is_last: bool


def encoded(
    documents: Iterable[Document],
    tokenizer: Path,
    *,
    longest_run: int,
    longest_piece: int,
    workers: int,
    tally: Tally | None = None,
) -> Generator[Encoded, None, None]:
    """Yield the ids of every piece of the documents, in order.

    tally: is given all pieces and their ids.

    A corpus of more than some 8 MB is tokenized by `workers` processes if these are several.
    Closing the generator ends them.  Raises ConfigError where the tokenizer cannot encode a text,
    or a process was killed.
    """
    cut = (
        piece for document in documents for piece in _pieces(document, longest_run, longest_piece)
    )
    batches = _batches(cut)
    here = worker.open_tokenizer(str(tokenizer))

    def alone(batch: list[Piece]) -> list[np.ndarray]:
        return worker.encode(here, [piece.text for piece in batch])

    for batch in islice(batches, _ALONE if workers > 1 else None):
        yield from _joined(batch, lambda batch=batch: alone(batch), tally)  # type: ignore[misc]
    if (more := next(batches, None)) is None:
        return
    with _processes(tokenizer, workers) as encode:
        waiting = deque([(more, encode(more))])
        for batch in batches:
            waiting.append((batch, encode(batch)))
            if len(waiting) >= 2 * workers:
                first, future = waiting.popleft()
                yield from _joined(first, future.result, tally)
        for first, future in waiting:
            yield from _joined(first, future.result, tally)


def _joined(
    batch: list[Piece], result: Callable[[], list[np.ndarray]], tally: Tally | None
) -> Iterator[Encoded]:
    try:
        found = result()
    except worker.EncodingError as error:
        raise ConfigError(
            f"the tokenizer cannot encode a text from {batch[0].origin} to {batch[-1].origin} "
            f"({error}); give another data.tokenizer"
        ) from None
    if tally is not None:
        tally.add(batch, found)
    for piece, ids in zip(batch, found, strict=True):
        yield Encoded(piece.origin, ids, piece.is_last)


def _pieces(document: Document, longest_run: int, longest_piece: int) -> Iterator[Piece]:
    before = None
    for text in pieces(document.parts, longest_run, longest_piece):
        if before is not None:
            yield Piece(document.origin, before, False)
        before = text
    yield Piece(document.origin, before or "", True)


def _batches(found: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in found:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH or len(batch) == _MOST_PIECES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _processes(
    tokenizer: Path, number: int
) -> Iterator[Callable[[list[Piece]], Future[list[np.ndarray]]]]:
    """Start processes, and return what gives one of them a batch.  They end with the block."""
    # "-P": the folder of the file is no place for imports.  Each process has one thread.
    command = [sys.executable, "-P", worker.__file__, str(tokenizer)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen[bytes]] = []
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def encode(batch: list[Piece]) -> list[np.ndarray]:
        process = idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            worker.send_texts(process.stdin, [piece.text for piece in batch])  # type: ignore[arg-type]
            found = worker.receive_ids(process.stdout, len(batch))  # type: ignore[arg-type]
        except (EOFError, OSError):
            raise ConfigError(
                f"a process that tokenizes ended with code {process.wait()} (somebody, or the "
                "kernel as memory ran out); start again, or set data.workers lower"
            ) from None
        finally:
            idle.put(process)
        return found

    threads = ThreadPoolExecutor(number)
    try:
        for _ in range(number):
            started.append(
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
                )
            )
            idle.put(started[-1])
        yield lambda batch: threads.submit(encode, batch)
    finally:
        for process in started:
            process.kill()  # what it still computes is not needed
        threads.shutdown(cancel_futures=True)
        for process in started:
            process.wait()
            for stream in (process.stdin, process.stdout):
                assert stream is not None
                with suppress(OSError):  # of what was not written yet
                    stream.close()
