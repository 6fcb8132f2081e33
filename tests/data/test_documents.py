"""Files are found in a fixed order, hashed by name and contents, and read as documents."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.cases import text_config
from vp_train.config import ConfigError, DataConfig
from vp_train.data.documents import Reading, read_documents
from vp_train.data.files import content_hash, find_files
from vp_train.data.left_out import LeftOut


def texts(*paths: Path) -> list[str]:
    return [document.text for document in read_documents(paths, "text")]


def test_standard_library_comes_without_its_tests() -> None:
    files = find_files(DataConfig(name="pystdlib"))
    assert "dataclasses.py" in {file.name for file in files}
    assert not {"test", "tests", "site-packages"} & {part for file in files for part in file.parts}
    assert list(files) == sorted(files)


def test_what_is_installed_beside_the_standard_library_is_not_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.py", "email/b.py", "site-packages/lib/c.py", "email/test/d.py", "e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    seen, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (seen.append(str(path)), scandir(path))[1])
    files = find_files(DataConfig(name="pystdlib"))
    assert files == (tmp_path / "a.py", tmp_path / "email/b.py")
    assert seen == [str(tmp_path), str(tmp_path / "email")]


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
    ("line", "words"),
    [
        (b'{"text": ', "lines that are not JSON in UTF-8: 1; first {}:2 (Expecting value"),
        (b'{"text": "\xff"}', "lines that are not JSON in UTF-8: 1; first {}:2 ('utf-8' codec"),
        (b"[" * 100_000, "lines that are not JSON in UTF-8: 1; first {}:2 (maximum recursion"),
        (
            b'{"body": "x", "title": "y"}',
            "documents without the text field: 1; first {}:2 (no 'text', but body, title)",
        ),
        (b"7", "lines that hold no JSON object: 1; first {0}:2 (a number, not an object such as"),
        (b'["a"]', "lines that hold no JSON object: 1; first {0}:2 (an array, not an object"),
        (b'{"text": 3}', "text fields that hold no text: 1; first {}:2 (3)"),
        (b'{"text": null}', "null texts: 1; first {}:2"),
        (b'{"text": ""}', "empty documents: 1; first {}:2"),
        (b"[" * 200_000, "lines or values that are too long: 1; first {}:2 (above 150,000"),
    ],
)
def test_what_holds_no_text_is_left_out_and_named_with_its_line(
    tmp_path: Path,
    line: bytes,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("vp_train.data.documents.LONGEST_LINE", 150_000)
    file = tmp_path / "lines.jsonl"
    file.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    assert [document.text for document in read_documents([file], "text", warn=True)] == [
        "one",
        "three",
    ]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"left out, {words.format(file)}")


def test_a_line_is_too_long_beyond_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [b'{"text": "one"}\n', b'{"text": "three"}\n', b'{"text": "two"}']
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    for limit, kept in ((18, ["one", "three", "two"]), (17, ["one", "two"]), (15, ["two"])):
        monkeypatch.setattr("vp_train.data.documents.LONGEST_LINE", limit)
        state = Reading(LeftOut())
        found = list(read_documents([tmp_path / "a.jsonl"], "text", reading=state))
        assert [document.text for document in found] == kept
        left = 3 - len(kept)
        assert state.left_out.counts == (
            {"lines or values that are too long": left} if left else {}
        )


def test_progress_of_reading_goes_on_from_file_to_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vp_train.data.documents._CHUNK", 8)
    files = [tmp_path / name for name in ("a.txt", "b.jsonl", "c.txt")]
    for file in files:
        file.write_text('{"text": "one"}\n' * 4)
    state, seen = Reading(LeftOut()), [0]
    for document in read_documents(files, "text", reading=state):
        seen += [state.num_bytes for _ in document.parts]
    assert seen == sorted(seen)
    assert len(set(seen)) > 9
    assert state.num_bytes == seen[-1] == sum(file.stat().st_size for file in files)


def test_every_kind_is_counted_and_its_first_place_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('{"text": null}\nno\n{"text": null}\n')
    assert not list(read_documents([file], "text", warn=True))
    assert capsys.readouterr().err.splitlines() == [
        f"left out, null texts: 2; first {file}:1",
        "left out, lines that are not JSON in UTF-8: 1; "
        f"first {file}:2 (Expecting value: line 1 column 1 (char 0)), 3 B in all",
    ]


def test_a_text_is_what_its_file_has_without_the_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\xef\xbb\xbf")
    assert texts(tmp_path / "a.txt") == ["one\r\ntwo\rthree\n\ufeff"]
    lines = b'\xef\xbb\xbf{"text": "one\\r\\n"}\r\n\r\n{"text": "two"}\r\n'
    (tmp_path / "a.jsonl").write_bytes(lines)
    assert texts(tmp_path / "a.jsonl") == ["one\r\n", "two"]


@pytest.mark.parametrize("at", range(5))
def test_a_long_text_is_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr("vp_train.data.documents._CHUNK", 8)
    text = "\ufeff" + "x" * at + "née 中文 🙂\r\n" * 5
    (tmp_path / "a.txt").write_text(text, newline="")
    state = Reading(LeftOut())
    (document,) = read_documents([tmp_path / "a.txt"], "text", reading=state)
    assert not isinstance(document.parts, tuple)
    # The generator of documents stands at this one, so its parts can be read.
    found = [
        part
        for document in read_documents([tmp_path / "a.txt"], "text", reading=state)
        for part in document.parts
    ]
    assert "".join(found) == text.removeprefix("\ufeff")
    assert max(map(len, found)) <= 8
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff")
    assert not list(read_documents([tmp_path / "a.txt"], "text", reading=state))
    assert state.left_out.counts == {"texts that are not UTF-8": 1}


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps({"text": "a\ud800b"}))
    assert texts(file) == ["a?b"]


def test_file_that_is_not_utf8_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("bad.txt", "good.txt", "worse.txt")]
    for file, content in zip(files, (b"\xff", b"good", b"\x80"), strict=True):
        file.write_bytes(content)
    assert [document.text for document in read_documents(files, "text", warn=True)] == ["good"]
    assert (
        f"texts that are not UTF-8: 2; first {files[0]} (line 1), 2 B in all\n"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_utf16_is_named_with_what_makes_it_utf8(tmp_path: Path, encoding: str, name: str) -> None:
    """The command of the message makes a text that is read."""
    file = tmp_path / name
    file.write_bytes('\ufeff{"text": "née"}\n'.encode(encoding))
    state = Reading(LeftOut())
    assert not list(read_documents([file], "text", reading=state))
    (words,) = [place for place in state.left_out.first.values() if "UTF-16" in place]
    assert words.startswith(str(file))
    found = re.search(r"looks like UTF-16: (iconv \S+ \S+ \S+ \S+) makes it UTF-8", words)
    assert found
    done = subprocess.run([*found[1].split(), file], capture_output=True, check=True)
    file.write_bytes(done.stdout)
    assert "née" in texts(file)[0]


@pytest.mark.parametrize("chunk", [1, 3, 1 << 22])
@pytest.mark.parametrize("wrong", [b"\xff", b"a\xc3", b"\xe4\xb8"])
@pytest.mark.parametrize("behind", [b"", b"\n", b"\ngood\n"])
def test_the_first_line_that_is_not_utf8_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, wrong: bytes, behind: bytes
) -> None:
    monkeypatch.setattr("vp_train.data.documents._CHUNK", chunk)
    (tmp_path / "a.txt").write_bytes("\ufeff1\r\n\n中文\n".encode() + wrong + behind)
    state = Reading(LeftOut())
    assert not list(read_documents([tmp_path / "a.txt"], "text", reading=state))
    first = f"{tmp_path / 'a.txt'} (line 4)"
    assert state.left_out.first == {"texts that are not UTF-8": first}


def test_a_directory_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text/below").mkdir(parents=True)
    (tmp_path / "text/a.txt").write_text("x")
    (tmp_path / "text/below/b.txt").write_text("x")
    listed = os.scandir

    def denied(path: str) -> Iterator[os.DirEntry[str]]:  # root may read all of them
        if str(path).endswith("below"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="text/below"):
        find_files(text_config(tmp_path))


def test_files_of_a_directory_that_are_not_read_are_counted(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name in ("a.txt", "b.png", "c", "d.json", ".hidden", "e.parquet.gz"):
        (tmp_path / "text" / name).write_text("x")
    (tmp_path / "text" / "folder.txt").mkdir()
    for name in (".git", ".ipynb_checkpoints"):
        (tmp_path / "text" / name).mkdir()
        (tmp_path / "text" / name / "a.txt").write_text("x")
    os.mkfifo(tmp_path / "text" / "pipe.txt")
    (tmp_path / "text" / "link.txt").symlink_to("pipe.txt")
    left_out = LeftOut()
    assert [file.name for file in find_files(text_config(tmp_path), left_out)] == ["a.txt"]
    assert left_out.counts == {
        "hidden files and directories": 3,
        "files with other endings": 4,
        "pipes, sockets and devices": 2,
    }
    assert left_out.first["hidden files and directories"] == str(tmp_path / "text" / ".git")
    assert left_out.first["files with other endings"] == str(tmp_path / "text" / "b.png")
