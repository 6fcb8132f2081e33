"""Packed files and tables hold the documents that plain files hold, and broken ones are named."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.cases import text_config
from vp_train.config import ConfigError, DataConfig
from vp_train.data.documents import Reading, read_documents
from vp_train.data.files import find_files
from vp_train.data.left_out import LeftOut

pyarrow = pytest.importorskip("pyarrow", reason="pip install 'vp_train[data]'")
zstandard = pytest.importorskip("zstandard", reason="pip install 'vp_train[data]'")

TEXTS = ["one", "zwei\r\n中文 🙂", "x" * 5_000]
LINES = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in TEXTS).encode()


def zstd(content: bytes) -> bytes:
    """Pack `content` as two frames, as tools do that work with several threads."""
    pack = zstandard.ZstdCompressor().compress
    return bytes(pack(content[:40]) + pack(content[40:]))


def two_members(content: bytes) -> bytes:
    return gzip.compress(content[:40], mtime=0) + gzip.compress(content[40:], mtime=0)


def table(texts: list[Any], kind: Any = None) -> Any:
    return pyarrow.table({"id": range(len(texts)), "text": pyarrow.array(texts, kind)})


def parquet(found: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    importlib.import_module("pyarrow.parquet").write_table(found, sink, **options)
    return sink.getvalue()


def arrow(found: Any, opened: Callable[..., Any]) -> bytes:
    sink = io.BytesIO()
    with opened(sink, found.schema) as writer:
        writer.write_table(found, max_chunksize=2)
    return sink.getvalue()


def stream(found: Any) -> bytes:
    return arrow(found, pyarrow.ipc.new_stream)


def stream_at_once(found: Any) -> bytes:
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, found.schema) as writer:
        writer.write_table(found)
    return sink.getvalue()


def read(path: Path, field: str = "text") -> tuple[list[str], LeftOut]:
    reading = Reading(LeftOut())
    texts = [document.text for document in read_documents([path], field, reading=reading)]
    assert reading.num_bytes == path.stat().st_size
    return texts, reading.left_out


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl.gz", two_members(LINES)),
        ("a.JSONL.ZST", zstd(LINES)),
        ("a.json.gz", gzip.compress(LINES, mtime=0)),
        ("a.ndjson.zst", zstd(LINES)),
        ("a.parquet", parquet(table(TEXTS))),
        ("a.parquet", parquet(table(TEXTS), row_group_size=2, compression="zstd")),
        ("a.parquet", parquet(table(TEXTS, pyarrow.large_string()))),
        ("a.parquet", parquet(table(TEXTS, pyarrow.dictionary(pyarrow.int32(), pyarrow.string())))),
        ("a.arrow", stream(table(TEXTS))),
        ("a.arrow", arrow(table(TEXTS), pyarrow.ipc.new_file)),
        ("a.arrow", stream(table(TEXTS, pyarrow.string_view()))),
        ("a.arrow", stream(table(TEXTS, pyarrow.dictionary(pyarrow.int8(), pyarrow.string())))),
    ],
)
def test_every_format_holds_the_same_documents(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == (TEXTS, LeftOut())


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_file_without_a_byte_is_an_empty_document(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.txt{suffix}").touch()
    assert read(tmp_path / f"a.txt{suffix}")[1].counts == {"empty documents": 1}


@pytest.mark.parametrize("pack", [two_members, zstd])
def test_packed_texts_are_the_texts(
    tmp_path: Path, pack: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix = ".gz" if pack is two_members else ".zst"
    file, content = tmp_path / f"a.txt{suffix}", "\ufeff" + "née 中文\r\n" * 500
    file.write_bytes(pack(content.encode()))
    for chunk in (1 << 22, 64):
        monkeypatch.setattr("vp_train.data.documents._CHUNK", chunk)
        parts = [part for document in read_documents([file], "text") for part in document.parts]
        assert "".join(parts) == content.removeprefix("\ufeff")


@pytest.mark.parametrize("kind", [stream, parquet])
def test_rows_without_text_are_left_out_and_named(
    tmp_path: Path, kind: Callable[[Any], bytes]
) -> None:
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, *pyarrow.array([b"x", b"\xff"]).buffers()[1:]]
    )
    column = pyarrow.chunked_array([pyarrow.array(["one", None, ""]), broken])
    file = tmp_path / ("a.parquet" if kind is parquet else "a.arrow")
    file.write_bytes(kind(pyarrow.table({"text": column})))
    texts, left_out = read(file)
    assert texts == ["one", "x"]
    assert left_out.first == {
        "null texts": f"{file}:2",
        "empty documents": f"{file}:3",
        "texts that are not UTF-8": f"{file}:5",
    }


KINDS = {"arrow": stream, "parquet": parquet}
TWICE = pyarrow.table([["x"], ["y"]], names=["text", "text"])


def int64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def named(indices: list[int | None], words: list[str | None]) -> Any:
    """Return a table whose texts are `words` by number."""
    of = pyarrow.DictionaryArray.from_arrays
    return pyarrow.table(
        {"text": of(pyarrow.array(indices, pyarrow.int32()), pyarrow.array(words), safe=False)}
    )


def test_a_text_that_a_dictionary_names_often_is_not_written_out(tmp_path: Path) -> None:
    file = tmp_path / "a.arrow"
    file.write_bytes(stream_at_once(named([0] * 100_000, ["x" * 50_000])))  # 5 GB
    documents = read_documents([file], "text")
    assert [next(documents).text for _ in range(2)] == ["x" * 50_000] * 2


def test_a_dictionary_has_no_text_for_a_null(tmp_path: Path) -> None:
    file = tmp_path / "a.arrow"
    file.write_bytes(stream(named([1, None, 0], [None, "x"])))
    texts, left_out = read(file)
    assert texts == ["x"]
    assert left_out.counts == {"null texts": 2}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt.gz", gzip.compress(LINES, mtime=0)[:-9], "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], "is not a whole gzip file"),
        ("a.jsonl.gz", LINES, "is not a whole gzip file"),
        ("a.jsonl.zst", zstd(LINES)[:-1], "is not a whole zstd file"),
        ("a.txt.zst", LINES, "is not a whole zstd file"),
        ("a.parquet", parquet(table(TEXTS))[:-9], "cannot be read as parquet after row 0"),
        ("a.arrow", stream(table(TEXTS))[:-90], "cannot be read as arrow after row 2"),
        ("a.arrow", LINES, "cannot be read as arrow after row 0"),
        ("a.arrow", stream(table([1, 2])), "holds int64, not text; set data.jsonl_field"),
        ("a.parquet", parquet(pyarrow.table({"body": ["x"]})), r"no column 'text' \(found: body\)"),
        (
            "a.arrow",
            stream(named([2], ["x"])),
            "after row 0 .*in a dictionary of 1",
        ),
        (
            "a.arrow",
            stream_at_once(named([0] * 1_001, ["x"])).replace(*map(int64, (1_001, 1 << 16))),
            "after row 0 .*too small",
        ),
        *((f"a.{kind}", made(TWICE), "has several columns 'text'") for kind, made in KINDS.items()),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"^{file}[: ].*{words}"):
        read(file)


def test_a_window_of_gigabytes_is_refused(tmp_path: Path) -> None:
    settings = zstandard.ZstdCompressionParameters(window_log=30)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(packer.compress(LINES) + packer.flush())
    with pytest.raises(ConfigError, match="window above 128 MiB; unpack it: unzstd --long=31"):
        read(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_what_unpacks_to_much_more_is_read_in_small_parts(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    from vp_train.data.files import open_unpacked

    file = tmp_path / f"a.txt.{'gz' if pack is gzip.compress else 'zst'}"
    file.write_bytes(pack(bytes(50_000_000)))
    assert file.stat().st_size < 60_000
    with open_unpacked(file) as (opened, raw):
        assert opened.read(100) == bytes(100)
        if pack is gzip.compress:
            assert raw.tell() < file.stat().st_size
        assert sum(map(len, iter(lambda: opened.read(1 << 20), b""))) == 50_000_000 - 100


@pytest.mark.parametrize(
    ("name", "package"),
    [("a.txt.zst", "zstandard"), ("a.parquet", "pyarrow"), ("a.arrow", "pyarrow")],
)
def test_a_missing_package_is_one_line_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    words = rf"{name} needs the package {package}: pip install 'vp_train\[data\]'"
    with pytest.raises(ConfigError, match=words):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_what_git_keeps_of_a_large_file_is_no_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    with pytest.raises(ConfigError, match=f"{name} is a git-LFS pointer.* run git lfs pull there$"):
        read(tmp_path / name)


def saved(folder: Path, shards: list[list[str]], **state: object) -> None:
    """Write a data set as `datasets.save_to_disk` does."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{len(shards):05}.arrow" for number in range(len(shards))]
    for name, texts in zip(names, shards, strict=True):
        (folder / name).write_bytes(stream(table(texts)))
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names], **state})
    )


def test_a_data_set_saved_on_disk_is_its_shards(tmp_path: Path) -> None:
    saved(tmp_path / "text", [["one", "two"], ["three"]])
    (tmp_path / "text" / "cache-0123.arrow").write_bytes(stream(table(["of a map"])))
    left_out = LeftOut()
    files = find_files(text_config(tmp_path), left_out)
    assert [d.text for d in read_documents(files, "text")] == ["one", "two", "three"]
    assert left_out == LeftOut()
    (tmp_path / "text" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ConfigError, match=r"data-00001-of-00002.arrow is not there, but .*state"):
        find_files(text_config(tmp_path))


def test_splits_and_choices_of_rows_are_not_mixed_in(tmp_path: Path) -> None:
    chosen = [{"filename": "indices.arrow"}]
    saved(tmp_path / "text" / "train", [["one"]], _indices_data_files=chosen)
    with pytest.raises(
        ConfigError, match=r"state.json names a choice of rows.*flatten_indices\(\)"
    ):
        find_files(text_config(tmp_path))
    for content, names, example in (
        ('{"splits": ["test", "train"]}', "test, train", "test"),
        ("{}", "see its folders", "train"),
        ("[", "see its folders", "train"),
    ):
        (tmp_path / "text" / "dataset_dict.json").write_text(content)
        with pytest.raises(
            ConfigError, match=rf"splits of a data set \({names}\); .* data.path=.*text/{example}$"
        ):
            find_files(text_config(tmp_path))


def test_a_link_is_its_file_and_other_links_are_left_out(tmp_path: Path) -> None:
    """The cache of a hub keeps blobs without endings, and links to them whose names have one."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    (blobs / "more").mkdir(parents=True)
    (blobs / "abc").write_text('{"text": "one"}\n{"text": "two"}\n')
    (blobs / "more" / "c.txt").write_text("three")
    snapshot.mkdir()
    (snapshot / "train.jsonl").symlink_to(blobs / "abc")
    (snapshot / "folder").symlink_to(blobs / "more")
    (snapshot / "gone.txt").symlink_to(blobs / "nothing")
    left_out = LeftOut()
    for path in (snapshot / "train.jsonl", snapshot):
        files = find_files(DataConfig(name="text", path=str(path)), left_out)
        assert [document.text for document in read_documents(files, "text")] == ["one", "two"]
    assert {*left_out.first.values()} == {
        str(snapshot / "folder"),
        str(snapshot / "gone.txt"),
    }
