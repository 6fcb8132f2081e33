"""A corpus is what was prepared: anything else is refused, by file and offset, before step 1."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.cases import VOCAB_SIZE, text_config, write_letters
from vp_train.config import ConfigError, DataConfig
from vp_train.data import corpus, indexed, prepare, progress
from vp_train.data.integrity import BLOCK, DIGITS, block_hashes, check_blocks, check_once
from vp_train.data.manifest import _OWN_HASH, _hash_of, _misfit
from vp_train.durable import read_json


@pytest.fixture
def stored(tmp_path: Path) -> DataConfig:
    """Return settings of a stored corpus that this machine has checked."""
    write_letters(tmp_path / "text", [60] * 6)
    built = prepare(text_config(tmp_path), VOCAB_SIZE, progress=False)
    config = text_config(tmp_path, path=str(built.path))
    prepare(config, VOCAB_SIZE, progress=False)
    return config


def change(path: Path, offset: int, content: bytes) -> None:
    """Overwrite bytes of a file, and give it the time that it had."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def refused(config: DataConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(config, VOCAB_SIZE, progress=False)
    assert str(caught.value).endswith(f"delete {config.path}, and prepare it again")


def test_a_changed_token_is_found_though_size_and_time_are_kept(stored: DataConfig) -> None:
    path = Path(str(stored.path)) / "tokens.bin"
    token = np.fromfile(path, dtype=np.uint16)[7]
    change(path, 14, np.uint16(token ^ 1).tobytes())
    refused(stored, rf"^{path}: bytes from offset 0 to 4,194,304 are not what was prepared; ")


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (0, b"X", r"the header .* is \(b'XMIDIDX', 1, 8, 6, 7\) instead of"),
        (17, b"\x04", r"the header .* is \(b'MMIDIDX', 1, 4, 6, 7\) instead of"),
        (18, b"\xff" * 8, "the header"),
        (34 + 8, b"\xff" * 4, r"document 2 has -1 tokens from byte .*entry at offset 42\)"),
        (34 + 24 + 8, b"\xff" * 8, "document 1 has .* tokens from byte -1, which"),
        (34 + 24 + 8, b"\x00\x00\x00\x10", "document 1 has .* from byte 268,435,456, which"),
        (34 + 72 + 8, b"\x05", "document 1 has"),
        (34 + 72 + 8 * 5, b"\x04", "document 5 has"),
        (34 + 72 + 8 * 6, b"\x05", "has documents of"),
        (34 + 4 * 5, b"\x01", "has documents of"),
    ],
)
def test_a_garbage_index_is_named_with_its_entry(
    stored: DataConfig,
    offset: int,
    content: bytes,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(indexed, "_ENTRIES", 2)
    path = Path(str(stored.path)) / "tokens.idx"
    change(path, offset, content)
    refused(stored, rf"^{path}:? {message}")


@pytest.mark.parametrize("name", ["tokens.bin", "tokens.idx", "tokenizer.json", "manifest.json"])
def test_links_and_pipes_are_not_followed(stored: DataConfig, tmp_path: Path, name: str) -> None:
    path = Path(str(stored.path)) / name
    outside = tmp_path / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)
    refused(stored, f"^{path} is a symbolic link; ")
    path.unlink()
    os.mkfifo(path)
    refused(stored, f"^{path} is a device, a pipe or a socket, not a file; ")


def test_tokens_of_another_corpus_do_not_fit(stored: DataConfig, tmp_path: Path) -> None:
    write_letters(tmp_path / "other", [60] * 5 + [50])
    other = prepare(text_config(tmp_path, path=str(tmp_path / "other")), VOCAB_SIZE, progress=False)
    path = Path(str(stored.path))
    for name in ("tokens.bin", "tokens.idx"):
        shutil.copy(other.path / name, path / name)
    refused(stored, f"^{path}/tokens")


def test_a_second_start_reads_nothing_and_a_touched_file_is_read(
    stored: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[Path] = []
    monkeypatch.setattr(corpus, "_check_contents", lambda found: checked.append(found.path))
    prepare(stored, VOCAB_SIZE, progress=False)
    assert not checked
    os.utime(Path(str(stored.path)) / "tokens.bin")
    prepare(stored, VOCAB_SIZE, progress=False)
    prepare(stored, VOCAB_SIZE, progress=False)
    assert len(checked) == 1


def test_of_several_processes_one_checks(tmp_path: Path) -> None:
    file, checks = tmp_path / "a", []
    file.write_text("a")

    def check() -> None:
        checks.append(threading.get_ident())

    def start() -> None:
        check_once(tmp_path / "memory", [file], check)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks) == 1


def test_who_waits_long_for_a_check_says_so_once_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, said = tmp_path / "a", []
    file.write_text("a")
    monkeypatch.setattr(progress, "_PLAIN_SECONDS", (0.01, 60.0))
    monkeypatch.setattr(progress, "_say", said.append)

    def check() -> None:
        until = time.monotonic() + 30
        while not said and time.monotonic() < until:
            time.sleep(0.001)

    check_once(tmp_path / "memory", [file], check, progress=True)
    assert len(said) == 1
    assert said[0].startswith(f"checking {tmp_path}, or waiting for who does: ")
    check_once(tmp_path / "memory", [file], check, progress=True)
    assert len(said) == 1


def test_what_failed_is_checked_again_and_without_memory_always(tmp_path: Path) -> None:
    file, memory, checks = tmp_path / "a", tmp_path / "memory", []
    file.write_text("a")

    def fail() -> None:
        checks.append(1)
        raise ConfigError("no")

    for _ in range(2):
        with pytest.raises(ConfigError):
            check_once(memory, [file], fail)
    assert len(checks) == 2
    check_once(file / "nowhere", [file], lambda: checks.append(2))
    check_once(file / "nowhere", [file], lambda: checks.append(2))
    assert len(checks) == 4
    check_once(tmp_path / "a new" / "memory", [file], lambda: checks.append(3))
    check_once(tmp_path / "a new" / "memory", [file], lambda: checks.append(3))
    assert len(checks) == 5


def test_a_check_of_files_that_change_meanwhile_is_not_remembered(tmp_path: Path) -> None:
    file, checks = tmp_path / "a", []
    file.write_bytes(b"aaaa")

    def check() -> None:
        checks.append(file.read_bytes())
        if len(checks) == 1:
            change(file, 2, b"b")  # of a part that is hashed already

    for _ in range(3):
        check_once(tmp_path / "memory", [file], check)
    assert checks == [b"aaaa", b"aaba"]


def test_a_corpus_of_an_earlier_version_is_built_anew_from_its_text(tmp_path: Path) -> None:
    write_letters(tmp_path / "text", [60] * 6)
    built = prepare(text_config(tmp_path), VOCAB_SIZE, progress=False)
    manifest = built.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"blocks"', '"checked_ns"'))
    with pytest.raises(ConfigError, match=f"^{built.path} is from an earlier version"):
        prepare(text_config(tmp_path, path=str(built.path)), VOCAB_SIZE, progress=False)
    again = prepare(text_config(tmp_path), VOCAB_SIZE, progress=False)
    assert again.fresh
    assert again.path == built.path


def test_blocks_are_hashed_on_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vp_train.data.integrity.BLOCK", 4)
    (tmp_path / "a").write_bytes(b"abcdabcdef")
    first, second, third = block_hashes(tmp_path / "a")
    assert first == second != third
    check_blocks(tmp_path / "a", [first, first, third], "out")
    for hashes, words in (
        ([first, first], "has 3 blocks instead of 2; out"),
        ([first, third, third], "bytes from offset 4 to 8 are not what was prepared; out"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_blocks(tmp_path / "a", hashes, "out")


UNSPELLED = {"lost": 2, "total": 2, "first": "a"}
ENTRIES = {  # values of a manifest that are taken, and others that are not
    "num_files": ((0, 2**63 - 1), (-1, 2**63, True, 1.0, "1", None)),
    "name": (("a_B1", "a" * 64), ("", "a/b", "a" * 65, 1, None)),
    "seconds": ((0, 0.5), ("1", True, None)),
    "largest_token": ((None, 0, 2**31 - 1), (-1, 2**31, True, 1.0, "1")),
    "begin_token": ((None, 0, VOCAB_SIZE - 1), (VOCAB_SIZE, -1, True, 1.0, "1")),
    "left_out": (
        ({}, {"a": [1, "b"]}, {"a": [1, "b", 2]}),
        ([], {"a": 1}, {"a": [1]}, {"a": ["b", 1]}, {"a": [1, "b", "c"]}),
    ),
    "unspelled": (
        ({}, UNSPELLED, UNSPELLED | {"token": "b"}),
        ([], {"lost": 1}, UNSPELLED | {"lost": 0}, UNSPELLED | {"total": 1}, UNSPELLED | {"b": 1}),
    ),
    "num_documents": ((1, 2), (0,)),
    "num_tokens": ((6, 7), (5,)),
    "end_token": ((0, VOCAB_SIZE - 1), (VOCAB_SIZE,)),
    "file_bytes": ((), ({}, [], {"tokens.bin": 1}, None)),
    "blocks": ((), ({}, [], {"tokens.bin": []}, None)),
}


def test_an_entry_of_a_manifest_is_refused_outside_its_bounds(stored: DataConfig) -> None:
    values = read_json(Path(str(stored.path)) / "manifest.json") | {"vocab_size": VOCAB_SIZE}

    def fits(**changes: object) -> bool:
        own = {name: value for name, value in (values | changes).items() if name != _OWN_HASH}
        return _misfit(own | {_OWN_HASH: _hash_of(own)}) is None

    for name, (good, bad) in ENTRIES.items():
        assert all(fits(**{name: value}) for value in good), name
        assert not any(fits(**{name: value}) for value in bad), name
    blocks = values["blocks"] | {"tokens.bin": []}
    for size in (0, -1, 1.0, True):
        sizes = values["file_bytes"] | {"tokens.bin": size}
        assert fits(file_bytes=sizes, blocks=blocks) == (size == 0)


def test_every_block_of_a_manifest_needs_its_hash(stored: DataConfig) -> None:
    values = read_json(Path(str(stored.path)) / "manifest.json")
    assert _misfit(values) is None
    good = "0" * DIGITS
    for hashes, reason in (
        ([good], "tokens.bin does not have a hash for every block"),
        ([good, "short"], "the hashes of tokens.bin are not hashes"),
        ([good, good], None),
    ):
        values["file_bytes"]["tokens.bin"], values["blocks"]["tokens.bin"] = BLOCK + 1, hashes
        own = {name: value for name, value in values.items() if name != _OWN_HASH}
        assert _misfit(own | {_OWN_HASH: _hash_of(own)}) == reason
