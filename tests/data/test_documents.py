"""Files are found in a fixed order, hashed by name and contents, and read as documents."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.data.cases import text_config
from vp_train.config import ConfigError, DataConfig
from vp_train.data.documents import content_hash, find_files, read_documents


def texts(*paths: Path) -> list[str]:
    return [document.text for document in read_documents(paths, "text")]


def test_standard_library_comes_without_its_tests() -> None:
    files = find_files(DataConfig(name="pystdlib"))
    assert "dataclasses.py" in {file.name for file in files}
    assert not {"test", "tests", "site-packages"} & {part for file in files for part in file.parts}
    assert list(files) == sorted(files)


def test_directory_yields_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "text" / "deep").mkdir(parents=True)
    for name in ("b.md", "a.TXT", "deep/c.py", "image.png"):
        (tmp_path / "text" / name).write_text(name)
    assert texts(*find_files(text_config(tmp_path))) == ["a.TXT", "b.md", "deep/c.py"]


def test_nothing_to_read_is_an_error_that_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"text does not exist"):
        find_files(text_config(tmp_path))
    (tmp_path / "text").mkdir()
    with pytest.raises(ConfigError, match=r"text holds no text file"):
        find_files(text_config(tmp_path))


def test_hash_sees_names_and_contents_but_no_times(tmp_path: Path) -> None:
    one, two = tmp_path / "1.txt", tmp_path / "2.txt"
    one.write_text("ab")
    two.write_text("c")
    before = content_hash([one, two], tmp_path)
    os.utime(one, (0, 0))
    assert content_hash([one, two], tmp_path) == before
    one.write_text("a")
    two.write_text("bc")
    moved = content_hash([one, two], tmp_path)
    renamed = content_hash([one, two.rename(tmp_path / "3.txt")], tmp_path)
    assert len({before, moved, renamed}) == 3


def test_jsonl_gives_one_document_per_line(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": "tw\\no"}\n')
    assert texts(file) == ["one", "tw\no"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', r"lines\.jsonl:2 is not JSON"),
        (b'{"text": "\xff"}', r"lines\.jsonl:2 is not JSON in UTF-8"),
        (b"[" * 100_000, r"lines\.jsonl:2 is not JSON"),
        (
            b'{"body": "x", "title": "y"}',
            r"lines\.jsonl:2 has no text field 'text' \(found: body, title\); set data.jsonl_field",
        ),
        (b'{"text": 3}', r"lines\.jsonl:2 has no text field"),
        (b"7", r"lines\.jsonl:2 has no text field 'text' \(found: int\)"),
    ],
)
def test_bad_jsonl_line_is_an_error_that_names_it(
    tmp_path: Path, line: bytes, message: str
) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=message):
        texts(file)


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"text": "a\ud800b"}))
    assert texts(file) == ["a?b"]


def test_file_that_is_not_utf8_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("bad.txt", "good.txt", "worse.txt")]
    for file, content in zip(files, (b"\xff\xfe", b"good", b"\x80"), strict=True):
        file.write_bytes(content)
    assert [document.text for document in read_documents(files, "text", warn=True)] == ["good"]
    assert f"{files[0]} and 1 more" in capsys.readouterr().err
