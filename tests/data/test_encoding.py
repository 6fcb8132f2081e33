"""Tokens do not depend on who tokenizes, nor on how a text is read; who fails is named."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data.cases import VOCAB_SIZE, text_config
from vp_train.config import ConfigError
from vp_train.data import encoding, prepare
from vp_train.data.documents import Document
from vp_train.data.encoding import Piece, encoded
from vp_train.data.indexed import check_index, token_dtype, write_dataset
from vp_train.data.tokenizer import train_tokenizer

WORDS = ["one", "two ", "中文", "\r\n", "<|endoftext|>", "x" * 40, "🙂"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    train_tokenizer(WORDS * 3, VOCAB_SIZE).save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_BATCH", 50)
    monkeypatch.setattr(encoding, "_ALONE", 2)


def documents() -> Iterator[Document]:
    coin = random.Random(0)
    for number in range(60):
        words = [coin.choice(WORDS) for _ in range(coin.randrange(40))]
        yield Document(f"document {number}", iter(words) if number % 2 else ("".join(words),))


def ids_of(tokenizer: Path, workers: int) -> list[tuple[str, list[int], bool]]:
    found = encoded(documents(), tokenizer, longest_run=30, longest_piece=70, workers=workers)
    return [(piece.origin, piece.ids.tolist(), piece.is_last) for piece in found]


def test_a_batch_ends_as_soon_as_it_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_BATCH", 10)
    monkeypatch.setattr(encoding, "_MOST_PIECES", 4)
    coin = random.Random(0)
    pieces = [Piece("", "x" * coin.choice((0, 1, 2, 5, 20)), True) for _ in range(200)]
    batches = list(encoding._batches(iter(pieces)))
    assert [piece for batch in batches for piece in batch] == pieces
    for batch in batches:
        sizes = [len(piece.text) for piece in batch]
        assert batch is batches[-1] or sum(sizes) >= 10 or len(batch) == 4
        assert sum(sizes[:-1]) < 10
        assert 0 < len(batch) <= 4


@pytest.mark.usefixtures("many_batches")
def test_tokens_do_not_depend_on_the_number_of_processes(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.delattr(encoding, "_processes")  # which one worker does not need
        alone = ids_of(tokenizer, 1)
    assert sum(is_last for _, _, is_last in alone) == 60
    for workers in (2, 3):
        assert ids_of(tokenizer, workers) == alone


def test_corpora_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").mkdir()
    for number, document in enumerate(documents()):
        (tmp_path / "text" / f"{number:02}.txt").write_text(document.text, newline="")
    first = prepare(text_config(tmp_path, workers=1), VOCAB_SIZE, progress=False)
    monkeypatch.setattr(encoding, "_BATCH", 100)
    monkeypatch.setattr(encoding, "_ALONE", 0)
    other = text_config(tmp_path, workers=2, cache_dir=str(tmp_path / "other"))
    second = prepare(other, VOCAB_SIZE, progress=False)
    assert first.path.name == second.path.name
    for name in ("tokens.bin", "tokens.idx", "tokenizer.json"):
        assert (first.path / name).read_bytes() == (second.path / name).read_bytes()


@pytest.mark.usefixtures("many_batches")
def test_a_process_that_is_killed_is_named_and_none_is_left(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []
    popen = encoding.subprocess.Popen

    def start(*arguments: object, **options: object) -> object:
        started.append(popen(*arguments, **options))  # type: ignore[call-overload]
        os.kill(started[0].pid, signal.SIGKILL)
        return started[-1]

    monkeypatch.setattr(encoding.subprocess, "Popen", start)
    with pytest.raises(ConfigError, match=r"tokenizes ended with code -9 .*set data.workers"):
        ids_of(tokenizer, 2)
    assert [process.poll() for process in started] == [-signal.SIGKILL] * 2


@pytest.mark.usefixtures("many_batches")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_tokenizer_that_cannot_encode_is_named(tmp_path: Path, workers: int) -> None:
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"one": 0}, unk_token="[UNK]")).save(str(path))
    words = "the tokenizer cannot encode a text from document .*WordLevel error"
    with pytest.raises(ConfigError, match=words):
        ids_of(path, workers)


@pytest.mark.parametrize("vocab_size", [10, 100_000])
def test_a_document_beyond_what_the_format_counts_goes_on_as_another(
    tmp_path: Path, vocab_size: int
) -> None:
    pieces = [
        (np.arange(4), False),
        (np.arange(4), False),
        (np.arange(1), True),
        (np.arange(2), True),
        (np.arange(0), True),
    ]
    counts = write_dataset(tmp_path / "tokens", pieces, end=9, vocab_size=vocab_size, longest=6)
    assert counts == (4, 14)
    check_index(tmp_path / "tokens", *counts, vocab_size)
    tokens = np.fromfile(tmp_path / "tokens.bin", dtype=token_dtype(vocab_size))
    assert tokens.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 9, 0, 1, 9, 9]
