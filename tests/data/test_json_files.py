"""A file named .json is its documents where it holds lines, and is not trained on raw elsewhere."""

from __future__ import annotations

import gzip
import importlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.cases import VOCAB_SIZE, text_config
from vp_train.commands.score import documents_of
from vp_train.config import ConfigError, DataConfig
from vp_train.data import describe, prepare, prepare_all
from vp_train.data.corpus import text_warnings
from vp_train.data.documents import read_documents
from vp_train.data.files import find_files
from vp_train.data.left_out import (
    ABOUT,
    JSON_RECORDS,
    JSON_TEXTS,
    NO_FIELD,
    NO_LINES,
    NO_OBJECT,
    NOT_JSON,
    OTHER_ENDING,
    LeftOut,
)

RECORDS = [{"id": number, "text": f"document {number} " * 20} for number in range(30)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def one(path: Path, **changes: object) -> DataConfig:
    return text_config(path.parent, path=str(path), **changes)


def texts(config: DataConfig) -> list[str]:
    files = find_files(config)
    return [document.text for document in read_documents(files, config.jsonl_field)]


@pytest.mark.parametrize("before", ["", "\ufeff", "\n\r\n", "\ufeff\n"])
def test_lines_named_json_are_the_lines(tmp_path: Path, before: str) -> None:
    for name in ("x.json", "x.jsonl"):
        (tmp_path / name).write_text(before + LINES)
    assert texts(one(tmp_path / "x.json")) == texts(one(tmp_path / "x.jsonl"))
    assert len(texts(one(tmp_path / "x.json"))) == 30


def test_a_corpus_of_lines_is_not_that_of_the_same_bytes_as_text(tmp_path: Path) -> None:
    """Earlier versions kept raw JSON in the cache, under a hash of the same file and settings."""
    (tmp_path / "x.json").write_text(LINES)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("vp_train.data.files.kind_to_read", lambda path, field: "text")
        patched.setattr("vp_train.data.corpus.kind_to_read", lambda path, field: "text")
        patched.setattr("vp_train.data.documents.kind_to_read", lambda path, field: "text")
        raw = prepare(one(tmp_path / "x.json"), VOCAB_SIZE, progress=False)
    lines = prepare(one(tmp_path / "x.json"), VOCAB_SIZE, progress=False)
    assert (raw.manifest.num_documents, lines.manifest.num_documents) == (1, 30)
    old = prepare(one(raw.path), VOCAB_SIZE, progress=False)
    assert old.manifest == raw.manifest, "a run on raw JSON goes on with its corpus"


def test_lines_without_the_field_name_the_fields_they_have(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(LINES)
    config = one(tmp_path / "x.json", jsonl_field="content")
    with pytest.raises(ConfigError, match=r"no 'content', but id, text.*data\.jsonl_field"):
        prepare(config, VOCAB_SIZE, progress=False)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (json.dumps(RECORDS), "array"),
        (json.dumps(RECORDS, indent=1), "array"),
        ("[]", "array"),
        (json.dumps({"data": RECORDS}), "object"),
        ("\n".join(json.dumps(record, indent=1) for record in RECORDS), "object"),
        (json.dumps({"version": 1}), "object"),
        ('{"text": "one"},\n{"text": "two"}\n', "object"),
        ('["one"]', "array of strings"),
        ('["one",\n"two"]', "array of strings"),
        ('["one", 1]\n["two", 2]\n', "lines of JSON arrays"),
        ('"one"', "a JSON string"),
        ('"one"\n\n"two"\n', "a JSON string"),
    ],
)
def test_one_json_value_is_refused_before_anything_is_made_of_it(
    tmp_path: Path, content: str, kind: str
) -> None:
    (tmp_path / "x.json").write_text(content)
    kind = kind if "JSON" in kind else f"one JSON {kind}"
    with pytest.raises(ConfigError, match=rf"{tmp_path}/x\.json holds {kind}, .*jq -c "):
        prepare_all(one(tmp_path / "x.json"), VOCAB_SIZE, progress=False)
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("is_array", [True, False])
def test_the_command_of_the_message_makes_lines(
    tmp_path: Path, indent: int | None, is_array: bool
) -> None:
    values = [RECORDS] if is_array else RECORDS[:1] if indent is None else RECORDS
    content = "\n".join(json.dumps(value, indent=indent) for value in values)
    (tmp_path / "x.json").write_text(content if is_array else "\n{\n" + content.strip()[1:])
    with pytest.raises(ConfigError) as refused:
        find_files(one(tmp_path / "x.json"))
    command = re.search(r"jq -c .*? > \S+\.jsonl", str(refused.value))
    assert command
    subprocess.run(["sh", "-c", command[0]], check=True)
    expected = [record["text"] for record in RECORDS]
    found = texts(one(tmp_path / "x.jsonl"))
    assert found == (expected if is_array or indent is not None else expected[:1])


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
@pytest.mark.parametrize("field", ["text", "a 'b"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('"one \\u00e9"', ["one \u00e9"]),
        ('"one"\n"two"', ["one", "two"]),
        ('["one", 1]\n["two", 2]\n', ["one", "two"]),
        ('["one", "two"]', ["one", "two"]),
        ('[\n"one",\n"two"\n]', ["one", "two"]),
    ],
)
def test_texts_without_names_become_lines_by_the_command_of_the_message(
    tmp_path: Path, name: str, field: str, content: str, expected: list[str]
) -> None:
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(ConfigError) as refused:
        prepare(one(tmp_path / name, jsonl_field=field), VOCAB_SIZE, progress=False)
    assert "data.jsonl_field" not in str(refused.value)
    command = re.search(r"(gzip -dc|jq -c) .*? > \S+\.jsonl", str(refused.value))
    assert command
    subprocess.run(["sh", "-c", command[0]], check=True)
    assert texts(one(tmp_path / "x.jsonl", jsonl_field=field)) == expected


def test_a_packed_array_is_left_out_as_one_and_its_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name, content in (("a", json.dumps(RECORDS, indent=1)), ("b", LINES), ("c", '"x"\n{}\n')):
        (tmp_path / f"text/{name}.json.gz").write_bytes(gzip.compress(content.encode()))
    (tmp_path / "text/d.json").write_text('"one"')
    corpus = prepare(text_config(tmp_path), VOCAB_SIZE, progress=False)
    assert corpus.manifest.num_documents == 30
    counts = {kind: entry[0] for kind, entry in corpus.manifest.left_out.items()}
    assert counts == {JSON_TEXTS: 1, NO_LINES: 1, NO_OBJECT: 1, NO_FIELD: 1}
    found = str(corpus.manifest.left_out[NO_LINES][1])
    assert found == (
        f"{tmp_path}/text/a.json.gz (one JSON array; give each document a line: gzip -dc "
        f"{tmp_path}/text/a.json.gz | jq -c '.[]' > {tmp_path}/text/a.jsonl)"
    )


LONG = 'a long [ text " { \\ ' * 5_000


@pytest.mark.parametrize("name", ["x.json", "x.json.gz"])
@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ([["a", LONG], ["b", LONG]], "lines of JSON arrays"),
        ([["a", LONG], ["b", "short"]], "lines of JSON arrays"),
        ([["a", "short"], ["b", LONG]], "lines of JSON arrays"),
        ([["a", LONG]], "one JSON array of strings"),
        ([[LONG, {"a": ["b"]}, [1]], [1]], "lines of JSON arrays"),
        ([[[LONG]] * 3], "one JSON array"),
    ],
)
def test_lines_of_long_arrays_are_lines(
    tmp_path: Path, name: str, content: list[object], kind: str
) -> None:
    data = "\n".join(map(json.dumps, content)).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(ConfigError, match=rf"({name} holds |\(){kind}[,;]"):
        prepare(one(tmp_path / name), VOCAB_SIZE, progress=False)


@pytest.mark.parametrize("is_indented", [False, True])
def test_a_long_array_on_several_lines_is_one(tmp_path: Path, is_indented: bool) -> None:
    rows = [[LONG, "a"], [LONG, "b"]]
    content = f"[{json.dumps(rows[0])}\n,{json.dumps(rows[1])}]"
    (tmp_path / "x.json").write_text(json.dumps(rows, indent=1) if is_indented else content)
    with pytest.raises(ConfigError, match="holds one JSON array, "):
        find_files(one(tmp_path / "x.json"))


@pytest.mark.parametrize(
    ("name", "first"),
    [
        *((name, '["id", "text"]') for name in ("x.json", "x.json.gz", "x.jsonl")),
        *((name, json.dumps(["id", LONG])) for name in ("x.json", "x.json.gz", "x.jsonl")),
        *((name, '{"text": "brok') for name in ("x.json.gz", "x.jsonl")),
    ],
)
def test_a_first_line_that_is_no_object_does_not_hide_those_behind_it(
    tmp_path: Path, name: str, first: str
) -> None:
    data = f"{first}\n{LINES}".encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    manifest = prepare(one(tmp_path / name), VOCAB_SIZE, progress=False).manifest
    assert manifest.num_documents == 30
    ((kind, entry),) = manifest.left_out.items()
    assert (kind, entry[0]) == (NOT_JSON if "brok" in first else NO_OBJECT, 1)
    assert str(entry[1]).startswith(f"{tmp_path / name}:1 (")


@pytest.mark.parametrize("field", ["text", "words"])
def test_vp_score_reads_lines_by_its_own_field(tmp_path: Path, field: str) -> None:
    (tmp_path / "x.json").write_text(json.dumps({field: "one"}) + "\n")
    (tmp_path / "y.json").write_text("first\nsecond\n")
    found = documents_of(tmp_path, field, by_line=True, warn=False)
    assert [document.text for document in found] == ["one"]
    found = documents_of(tmp_path / "y.json", field, by_line=True, warn=False)
    assert [document.text for document in found] == ["first", "second"]


@pytest.mark.parametrize(
    "content", ["some words", "1\n2\n", '"text": "x"', '"one"\ntwo', '"one" two']
)
def test_what_is_no_json_stays_a_text(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    assert texts(one(tmp_path / "x.json")) == [content]


@pytest.mark.parametrize("name", ["json", "jsonl", "parquet"])
def test_a_cloned_data_set_is_its_tables_without_its_readme(tmp_path: Path, name: str) -> None:
    root = tmp_path / "text"
    (root / "data").mkdir(parents=True)
    for about in ("README.md", "README_zh-CN.md", "LICENSE.txt"):
        (root / about).write_text("about the data\n")
    (root / "dataset_infos.json").write_text(
        json.dumps({"default": {"features": {"text": {"dtype": "string"}}}})
    )
    for number in range(5):
        file = root / "data" / f"{number}.{name}"
        if name == "parquet":
            parquet = pytest.importorskip("pyarrow.parquet", reason="pip install 'vp_train[data]'")
            table = importlib.import_module("pyarrow").table
            parquet.write_table(table({"text": [record["text"] for record in RECORDS]}), file)
        else:
            file.write_text(LINES)
    left_out = LeftOut()
    files = find_files(text_config(tmp_path), left_out)
    assert [file.parent.name for file in files] == ["data"] * 5
    assert left_out.counts == {ABOUT: 3, OTHER_ENDING: 1}
    corpus = prepare(text_config(tmp_path), VOCAB_SIZE, progress=False)
    assert (corpus.manifest.num_files, corpus.manifest.num_documents) == (5, 150)
    assert f"left out, {ABOUT}: 3; first {root}/LICENSE.txt" in describe(corpus)


def test_a_readme_is_text_where_no_table_lies_in_its_folder_or_below(tmp_path: Path) -> None:
    for name in ("code/README.md", "docs/readme.txt", "data/tables/x.jsonl", "licensed.md"):
        (tmp_path / "text" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text" / name).write_text(LINES)
    left_out = LeftOut()
    (tmp_path / "text/data/security.py").write_text("code")
    assert len(find_files(text_config(tmp_path), left_out)) == 5
    (tmp_path / "text/data/README.md").write_text("about")
    assert len(find_files(text_config(tmp_path), left_out)) == 5
    assert left_out.first == {ABOUT: str(tmp_path / "text/data/README.md")}


def test_records_that_are_not_on_lines_are_named_and_their_readme_is_not_trained_on(
    tmp_path: Path,
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/README.md").write_text("about the data\n")
    for number, content in enumerate((RECORDS, {"text": ["a"]}, {"text": {"0": "a"}})):
        (tmp_path / f"text/{number}.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"holds no text file .*: 3; first .*text/0\.json"):
        find_files(text_config(tmp_path))


def test_left_out_files_that_outweigh_the_others_are_a_warning(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text(LINES * 2)
    (tmp_path / "text/b.json").write_text(json.dumps(RECORDS))
    config = text_config(tmp_path)
    for size, is_warned in ((100, False), (1_000_000, True)):
        (tmp_path / "text/c.bmp").write_bytes(bytes(size))
        data = replace(config, cache_dir=str(tmp_path / f"cache{size}"))
        found = text_warnings(data, prepare_all(data, VOCAB_SIZE, progress=False), {})
        assert len(found) == is_warned
    assert found[0].startswith(f"data.path={config.path}: files that were left out ")
    assert JSON_RECORDS in found[0]
    assert OTHER_ENDING in found[0]
