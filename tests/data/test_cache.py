"""A cached corpus holds its text, is complete or absent, and is built once."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.data.cases import VOCAB_SIZE, text_config, write_letters
from tests.programs import Program, finished
from vp_train.config import BlendEntry, ConfigError
from vp_train.data import Corpus, corpus, describe, locks, prepare
from vp_train.data.tokenizer import END_OF_TEXT, train_tokenizer


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    write_letters(tmp_path / "text", [60] * 6)
    return tmp_path


def read_back(built: Corpus) -> list[str]:
    tokens = np.fromfile(f"{built.prefix}.bin", dtype=np.uint16).astype(np.int64)
    ends = np.flatnonzero(tokens == built.manifest.end_token)
    tokenizer = Tokenizer.from_file(str(built.tokenizer))
    return [
        tokenizer.decode(document[:-1].tolist()) for document in np.split(tokens, ends + 1)[:-1]
    ]


def test_tokens_spell_the_documents(letters: Path) -> None:
    built = prepare(text_config(letters), VOCAB_SIZE, progress=False)
    documents = [file.read_text() for file in sorted((letters / "text").iterdir())]
    assert read_back(built) == documents
    assert built.manifest.num_documents == len(documents)
    assert built.manifest.num_tokens * 2 == Path(f"{built.prefix}.bin").stat().st_size
    assert f"6 files, 6 documents, {built.manifest.num_tokens:,} tokens" in describe(built)


def test_text_that_spells_the_end_token_stays_text(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(f"one {END_OF_TEXT} two")
    assert read_back(prepare(text_config(tmp_path), VOCAB_SIZE, progress=False)) == [
        f"one {END_OF_TEXT} two"
    ]


def test_tokenizer_of_the_user_is_kept(letters: Path) -> None:
    path = letters / "tokenizer.json"
    train_tokenizer(["bcdefg"], 262).save(str(path))
    built = prepare(text_config(letters, tokenizer=str(path)), VOCAB_SIZE, progress=False)
    assert json.loads(built.tokenizer.read_text()) == json.loads(path.read_text())
    assert read_back(built) == [file.read_text() for file in sorted((letters / "text").iterdir())]
    with pytest.raises(ConfigError, match=r"data\.tokenizer=nowhere is not there"):
        prepare(text_config(letters, tokenizer="nowhere"), VOCAB_SIZE, progress=False)


def test_second_prepare_reads_no_contents(letters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare(text_config(letters), VOCAB_SIZE, progress=False)
    for name in ("content_hash", "read_documents", "check_tokens"):
        monkeypatch.delattr(corpus, name)
    second = prepare(text_config(letters), VOCAB_SIZE, progress=False)
    assert (first.fresh, second.fresh) == (True, False)
    assert (first.path, first.manifest) == (second.path, second.manifest)


@pytest.mark.parametrize(
    "name", ["_LONGEST_WORD", "_LONGEST_TRAINED_WORD", "LONGEST_PIECE", "LONGEST_LINE"]
)
def test_text_that_is_cut_elsewhere_is_another_corpus(
    letters: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    first = prepare(text_config(letters), VOCAB_SIZE, progress=False)
    monkeypatch.setattr(corpus, name, 50)
    second = prepare(text_config(letters), VOCAB_SIZE, progress=False)
    assert second.manifest.content_hash != first.manifest.content_hash


def test_a_tokenizer_is_trained_on_as_much_text_of_every_corpus(
    letters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two corpora gives documents of 60 characters until it has more than its half."""
    seen: list[int] = []

    def train(texts: Iterator[str], vocab_size: int) -> Tokenizer:
        texts = list(texts)
        seen.append(sum(map(len, texts)))
        return train_tokenizer(texts, vocab_size)

    monkeypatch.setattr(corpus, "train_tokenizer", train)
    write_letters(letters / "other", [60] * 6)
    blend = tuple(BlendEntry(path=str(letters / name)) for name in ("text", "other"))
    config = text_config(letters, name="blend", path=None, blend=blend)
    for limit, documents in ((240, 3), (238, 2), (100_000, 6)):
        monkeypatch.setattr(corpus, "_TRAINING_CHARACTERS", limit)
        corpus.prepare_all(config, VOCAB_SIZE, progress=False)
        assert seen[-1] == 2 * 60 * documents


def test_corpus_is_named_by_contents_and_settings(letters: Path) -> None:
    config = text_config(letters)
    first = prepare(config, VOCAB_SIZE, progress=False)
    changed = letters / "text" / "a.txt"
    os.utime(changed, (0, 0))
    assert prepare(config, VOCAB_SIZE, progress=False).path == first.path
    assert prepare(config, VOCAB_SIZE + 1, progress=False).path != first.path
    changed.write_text(changed.read_text().replace("a", "z"))
    other = prepare(config, VOCAB_SIZE, progress=False)
    assert other.fresh
    assert other.path != first.path


def test_interrupted_build_leaves_nothing(letters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(prefix: Path, vocab_size: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "check_tokens", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(text_config(letters), VOCAB_SIZE, progress=False)
    left = {path.name for path in (letters / "cache").iterdir()}
    (tokenizer,) = left - {"locks", "fingerprints"}  # it is complete and need not be trained anew
    assert tokenizer.startswith("tokenizer-")
    assert tokenizer.endswith(".json")


def prepare_letters() -> None:
    """Prepare the letters, and die while tokens are written if the last word says so."""

    def die(prefix: Path, *_: object) -> None:
        Path(f"{prefix}.bin").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    place, end = sys.argv[1:]
    if end == "die":
        corpus.write_dataset = die
    built = corpus.prepare(text_config(Path(place)), VOCAB_SIZE, progress=True)
    print(built.path.name, built.fresh)


def test_killed_process_does_not_matter_and_two_at_once_build_once(letters: Path) -> None:
    killed = finished(prepare_letters, str(letters), "die")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not list((letters / "cache").glob("text-*"))
    both = [Program(prepare_letters, [letters, "live"]) for _ in range(2)]
    done = [program.finish(60) for program in both]
    outputs, errors = zip(*((each.stdout, each.stderr) for each in done), strict=True)
    assert sorted(output.split()[1] for output in outputs) == ["False", "True"], errors
    assert {path.name for path in (letters / "cache").glob("text-*")} == {outputs[0].split()[0]}
    tokenizing = f"tokenizing {letters / 'text'}"
    assert killed.stderr.splitlines() == [
        "training a tokenizer of 300 tokens on 360 B",
        tokenizing,
    ]
    # The tokenizer is there already.  On a slow machine one also says how far it is, or waits.
    said = {line.partition(":")[0] for line in "".join(errors).splitlines()}
    assert {words for words in said if not words.startswith("waiting for ")} == {tokenizing}
    assert not list((letters / "cache").glob("building*"))


def test_a_long_build_keeps_no_other_corpus_waiting(
    letters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one corpus is built, one that is complete is opened and another one is built."""
    write_letters(letters / "found" / "text", [60] * 3)
    write_letters(letters / "built" / "text", [60] * 4)
    cache = letters / "cache"
    for name in ("found", "built"):
        (letters / name / "cache").symlink_to(cache)
    cache.mkdir()
    prepare(text_config(letters / "found"), VOCAB_SIZE, progress=False)
    write, said = corpus.write_dataset, []

    def write_slowly(*arguments: Any) -> tuple[int, int]:
        for name in ("found", "built"):
            done = Program(prepare_letters, [letters / name, "live"]).finish(60)
            said.append(done.stdout.split()[1])
        return write(*arguments)

    monkeypatch.setattr(corpus, "write_dataset", write_slowly)
    assert prepare(text_config(letters), VOCAB_SIZE, progress=False).fresh
    assert said == ["False", "True"]
    assert len(list(cache.glob("text-*"))) == 3
    assert not list(cache.glob("building*"))


def test_who_waits_says_for_whom_and_then_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(locks, "_POLITE_SECONDS", 0.0)
    worked = threading.Event()

    def wait() -> None:
        with locks.alone(tmp_path, "corpus", progress=True):
            worked.set()

    waiting, said = threading.Thread(target=wait, daemon=True), ""
    until = time.monotonic() + 30
    with locks.alone(tmp_path, "corpus", progress=True):
        waiting.start()
        while not said and time.monotonic() < until:
            said = capsys.readouterr().err
        assert not worked.is_set()
    waiting.join(30)
    assert worked.is_set()
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    assert said.startswith(f"waiting for {holder}, which makes {tmp_path / 'corpus'} (")


def test_what_killed_builds_have_left_is_removed(tmp_path: Path) -> None:
    """Only that whose lock nobody holds: the others are being built."""
    places = [locks.building_place(tmp_path / name) for name in ("dead", "alive")]
    for place in places:
        place.mkdir()
        (place / "tokens.bin").write_bytes(b"half")
    with locks.alone(tmp_path, "alive", progress=False):
        locks.remove_left(tmp_path)
    assert [place.exists() for place in places] == [False, True]


def test_what_a_killed_build_of_an_older_version_has_left_is_removed(tmp_path: Path) -> None:
    """It lies in `building`, whose lock is `.lock`."""
    place = tmp_path / "building"
    place.mkdir()
    (place / "tokens.bin").write_bytes(b"half")
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        locks.remove_left(tmp_path)
        assert place.exists()
    locks.remove_left(tmp_path)
    assert not place.exists()


@pytest.mark.parametrize("content", ["", "[]", "[", "{}"])
def test_corpus_with_a_damaged_manifest_is_refused(letters: Path, content: str) -> None:
    built = prepare(text_config(letters), VOCAB_SIZE, progress=False)
    (built.path / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match=f"^{built.path}/manifest.json.*; delete {built.path}, "):
        prepare(text_config(letters), VOCAB_SIZE, progress=False)


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "tokenizer.json"])
def test_corpus_with_a_damaged_file_is_refused(letters: Path, name: str) -> None:
    built = prepare(text_config(letters), VOCAB_SIZE, progress=False)
    size = (built.path / name).stat().st_size
    os.truncate(built.path / name, size - 2)
    with pytest.raises(
        ConfigError, match=rf"{name} has {size - 2} bytes instead of {size}; delete {built.path}, "
    ):
        prepare(text_config(letters), VOCAB_SIZE, progress=False)
    (built.path / name).unlink()
    with pytest.raises(
        ConfigError, match=rf"^{built.path / name} is not there; delete {built.path}, "
    ):
        prepare(text_config(letters), VOCAB_SIZE, progress=False)
