"""A corpus is complete or absent, names what is wrong with its input, and is deterministic."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.disk import largest_file
from vp_train.config import BlendEntry, ConfigError, DataConfig, ModelConfig, RunConfig, RunSettings
from vp_train.data import corpus as corpus_module
from vp_train.data import describe, indexed, open_source, prepare, prepare_all
from vp_train.data.corpus import _Work
from vp_train.data.encoding import Encoded
from vp_train.data.indexed import check_tokens, largest_token, token_dtype
from vp_train.data.left_out import EMPTY, LeftOut
from vp_train.data.tokenizer import train_tokenizer

VOCAB = 300


@pytest.fixture
def text(tmp_path):
    """Return a directory of twenty small documents."""
    directory = tmp_path / "text"
    directory.mkdir()
    for number in range(20):
        (directory / f"{number:02}.txt").write_text(
            f"Document {number}: " + "one two three four five six seven " * 20
        )
    return directory


def config(tmp_path, path, **changes):
    return DataConfig(name="text", path=str(path), cache_dir=str(tmp_path / "cache"), **changes)


def run_config(data, seq_length=16, steps=5):
    return RunConfig(
        data=data,
        model=ModelConfig(vocab_size=VOCAB, seq_length=seq_length),
        run=RunSettings(steps=steps, eval_microbatches=2),
        num_microbatches=2,
        micro_batch_size=3,
    )


def train_batch(source, step):
    """Return the batch of `step` in a run of `run_config`."""
    return source.train_batch((step - 1) * 2 * 3 * 16, 2)


def test_a_second_prepare_finds_the_first_and_changed_text_does_not(tmp_path, text):
    data = config(tmp_path, text)
    first = prepare(data, VOCAB, progress=False)
    again = prepare(data, VOCAB, progress=False)
    assert first.fresh
    assert not again.fresh
    assert again.path == first.path
    (text / "00.txt").write_text("something else entirely")
    assert prepare(data, VOCAB, progress=False).path != first.path


def test_a_build_takes_no_longer_than_the_call_that_builds(tmp_path, text):
    before = time.perf_counter()
    corpus = prepare(config(tmp_path, text), VOCAB, progress=False)
    assert 0 < corpus.manifest.seconds < time.perf_counter() - before


def test_a_stored_corpus_takes_no_other_tokenizer_or_end(tmp_path, text, monkeypatch):
    corpus = prepare(config(tmp_path, text), VOCAB, progress=False)
    stored = config(tmp_path, corpus.path)
    same = replace(stored, tokenizer=str(corpus.tokenizer), end_token="<|endoftext|>")
    assert prepare(same, VOCAB, progress=False) == replace(corpus, fresh=False)
    monkeypatch.setenv("HOME", str(corpus.path))
    at_home = replace(stored, tokenizer="~/tokenizer.json")
    assert prepare(at_home, VOCAB, progress=False).path == corpus.path
    other = tmp_path / "other.json"
    for size in (VOCAB, VOCAB + 100):
        train_tokenizer([" ".join(map(str, range(1000)))], size).save(str(other))
        with pytest.raises(
            ConfigError,
            match=r"was prepared with another tokenizer than data.tokenizer=.*other.json; drop",
        ):
            prepare(replace(stored, tokenizer=str(other)), VOCAB + 100, progress=False)
    with pytest.raises(
        ConfigError, match=r"end with '<\|endoftext\|>', not with data.end_token=a; drop that"
    ):
        prepare(replace(stored, end_token="a"), VOCAB, progress=False)


def test_a_cache_where_nothing_can_be_written_is_told_with_the_way_out(tmp_path, text):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match=r"; set data.cache_dir to a directory where you may write"):
        prepare(config(tmp_path, text), VOCAB, progress=False)


@pytest.mark.parametrize("most", [10, 100, 10_000])
def test_a_full_disk_is_told_with_its_place_and_the_way_out(tmp_path, text, most):
    (text / "long.txt").write_text(" ".join(map(str, range(5_000))))
    with largest_file(most), pytest.raises(OSError, match="File too large; make room") as caught:
        prepare(config(tmp_path, text), VOCAB, progress=False)
    assert str(caught.value.filename).startswith(str(tmp_path / "cache"))
    assert "set data.cache_dir to another place" in str(caught.value)
    assert prepare(config(tmp_path, text), VOCAB, progress=False).fresh


def test_a_stored_tokenizer_has_the_bytes_that_its_library_writes(tmp_path, text):
    corpus = prepare(config(tmp_path, text), VOCAB, progress=False)
    Tokenizer.from_file(str(corpus.tokenizer)).save(str(tmp_path / "again.json"))
    assert (tmp_path / "again.json").read_bytes() == corpus.tokenizer.read_bytes()


def test_an_interrupted_build_is_not_mistaken_for_a_corpus(tmp_path, text):
    data = config(tmp_path, text)
    corpus = prepare(data, VOCAB, progress=False)
    (corpus.path / "manifest.json").unlink()  # as a kill just before the end would leave it
    assert prepare(data, VOCAB, progress=False).fresh


def test_batches_are_a_function_of_the_step_and_labels_follow_tokens(tmp_path, text):
    run = run_config(config(tmp_path, text))
    source, other = open_source(run), open_source(run)
    train_batch(other, 1)
    for step in (2, 1, 5):
        batch, same = train_batch(source, step), train_batch(other, step)
        assert batch.tokens.shape == batch.labels.shape == (2, 3, 16)
        assert torch.equal(batch.tokens, same.tokens)
        assert torch.equal(batch.tokens[..., 1:], batch.labels[..., :-1])
    assert not torch.equal(train_batch(source, 1).tokens, train_batch(source, 2).tokens)
    assert torch.equal(source.validation_batch().tokens, other.validation_batch().tokens)


def test_jsonl_and_a_given_tokenizer(tmp_path, text):
    lines = [json.dumps({"body": path.read_text()}) for path in sorted(text.iterdir())]
    (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n")
    tokenizer = train_tokenizer([path.read_text() for path in text.iterdir()], VOCAB)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    data = config(
        tmp_path,
        tmp_path / "all.jsonl",
        jsonl_field="body",
        tokenizer=str(tmp_path / "tokenizer.json"),
    )
    corpus = prepare(data, VOCAB, progress=False)
    assert corpus.manifest.num_documents == 20
    with pytest.raises(
        ConfigError, match=r"token ids up to \d+, but model.vocab_size=260; set it to"
    ):
        prepare(data, 260, progress=False)
    with pytest.raises(ConfigError, match=r"has no token <end>; set data.end_token"):
        prepare(replace(data, end_token="<end>"), VOCAB, progress=False)


@pytest.mark.parametrize(
    ("line", "words", "is_of_field"),
    [
        ("{broken", r"lines that are not JSON in UTF-8: 1; first .*all.jsonl:1 ", False),
        ('["one"]', r"lines that hold no JSON object: 1; first .*all.jsonl:1 ", False),
        (
            '{"content": 3}',
            r"documents without the text field: 1; first .*:1 \(no 'text', but con",
            True,
        ),
        ('{"text": null}', r"null texts: 1; first .*all.jsonl:1", True),
    ],
)
def test_what_is_left_out_is_said_and_a_corpus_of_nothing_else_is_refused(
    tmp_path, line, words, is_of_field, capsys
):
    lines = tmp_path / "all.jsonl"
    lines.write_text(line + "\n")
    with pytest.raises(ConfigError, match=f"holds? no text .left out, {words}") as refused:
        prepare(config(tmp_path, lines), VOCAB, progress=False)
    assert ("data.jsonl_field" in str(refused.value)) == is_of_field
    assert not list((tmp_path / "cache").glob("building*"))
    lines.write_text(line + '\n{"text": "good"}\n')
    capsys.readouterr()
    corpus = prepare(config(tmp_path, lines), VOCAB, progress=False)
    assert capsys.readouterr().err == ""
    again = prepare(config(tmp_path, lines), VOCAB, progress=False)
    assert again.manifest == corpus.manifest
    for found in (corpus, again):
        assert re.search(f"\nleft out, {words}", describe(found))


def test_a_run_says_once_what_is_left_out_and_warns_each_time_of_much(tmp_path, capsys):
    """A tenth is much.  A run that finds its corpus, or is given it, warns too."""
    lines = tmp_path / "all.jsonl"
    for kept, is_much in ((9, True), (10, False)):
        text = json.dumps({"text": "one two three four " * 20}) + "\n"
        lines.write_text(text * kept + '{"content": "one"}\n')
        data = config(tmp_path, lines, validation_fraction=0.2)
        stored = prepare(data, VOCAB, progress=False).path
        for each in (data, replace(data, path=str(stored))):
            warnings = open_source(run_config(each)).warnings
            assert len(warnings) == is_much
            if is_much:
                (words,) = warnings
                assert words == (
                    f"data.path={each.path}: 1 of 10 documents were left out, 19 B in all: "
                    f"documents without the text field, first {lines}:10 (no 'text', but content)"
                    "; data.jsonl_field names the field that has the text"
                )
    assert capsys.readouterr().err == ""
    lines.write_text(text * 3 + '{"content": "one"}\n')
    for said in (1, 0):
        open_source(run_config(config(tmp_path, lines, validation_fraction=0.3)))
        assert capsys.readouterr().err.count("left out, documents without the text field") == said


@pytest.mark.parametrize("is_blend", [False, True])
def test_no_tokenizer_is_trained_where_there_is_no_text(tmp_path, text, monkeypatch, is_blend):
    lines = tmp_path / "all.jsonl"
    lines.write_text('{"content": "one two"}\n' * 3)
    monkeypatch.delattr(corpus_module, "train_tokenizer")
    data, name = config(tmp_path, lines), ""
    if is_blend:
        entries = (BlendEntry(path=str(text)), BlendEntry(path=str(lines)))
        data, name = replace(data, name="blend", path=None, blend=entries), r"data.blend\[1\]: "
    words = (
        "left out, documents without the text field: 3; "
        "first .* \\(no 'text', but content\\), 69 B in all"
    )
    with pytest.raises(ConfigError, match=rf"^{name}{lines} holds no text \({words}\); set "):
        prepare_all(data, VOCAB, progress=False)


def test_a_directory_without_text_is_refused_with_the_files_of_other_kinds(tmp_path, text):
    for file in text.iterdir():
        file.write_text("")
    (text / "a.docx").write_text("x")
    kinds = "files with other endings: 1; first .*; left out, empty documents: 20; first"
    with pytest.raises(ConfigError, match=f"hold no text .left out, {kinds}"):
        prepare(config(tmp_path, text), VOCAB, progress=False)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=3), max_size=5))
def test_a_document_without_a_token_is_left_out_wherever_it_stands(documents):
    """A document is given as the numbers of tokens of its pieces."""
    pieces = [
        Encoded(f"document {number}", np.zeros(size, np.uint32), place == len(sizes) - 1)
        for number, sizes in enumerate(documents)
        for place, size in enumerate(sizes)
    ]
    work = _Work(DataConfig(), (), Path(), VOCAB, LeftOut(), False)
    kept, ids = [], 0
    for found, is_last in work._checked(iter(pieces)):
        ids += len(found)
        if is_last:
            kept, ids = [*kept, ids], 0
    assert kept == [sum(sizes) for sizes in documents if sum(sizes)]
    without = [number for number, sizes in enumerate(documents) if not sum(sizes)]
    assert work.left_out.counts == ({EMPTY: len(without)} if without else {})
    places = [f"document {number} (the tokenizer makes no token of it)" for number in without]
    assert work.left_out.first == ({EMPTY: places[0]} if without else {})


def test_missing_and_empty_inputs_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        prepare(config(tmp_path, tmp_path / "nowhere"), VOCAB, progress=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no text file"):
        prepare(config(tmp_path, tmp_path / "empty"), VOCAB, progress=False)
    for name, words in (("a", "a.txt holds"), ("b", "a.txt and the 1 file after it hold")):
        (tmp_path / "empty" / f"{name}.txt").write_text("")
        with pytest.raises(ConfigError, match=f"{words} no text"):
            prepare(config(tmp_path, tmp_path / "empty"), VOCAB, progress=False)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not a tokenizer\.json"):
        prepare(
            config(tmp_path, tmp_path / "empty", tokenizer=str(tmp_path / "broken.json")),
            VOCAB,
            progress=False,
        )
    with pytest.raises(ConfigError, match="vocab_size=100 is too small"):
        prepare(config(tmp_path, tmp_path / "empty"), 100, progress=False)


def test_files_that_are_not_utf8_are_left_out_and_named(tmp_path, text):
    (text / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    corpus = prepare(config(tmp_path, text), VOCAB, progress=False)
    assert corpus.manifest.num_documents == 20
    assert "latin.txt" in describe(corpus)


def test_a_token_out_of_range_is_named_with_file_and_offset(tmp_path, text):
    data = config(tmp_path, text)
    corpus = prepare(data, VOCAB, progress=False)
    tokens = np.memmap(f"{corpus.prefix}.bin", dtype=np.uint16, mode="r+")
    tokens[123] = VOCAB
    tokens.flush()
    with pytest.raises(
        ConfigError, match=rf"tokens.bin: token {VOCAB} at offset 123 is outside \[0, {VOCAB}\)"
    ):
        prepare(data, VOCAB, progress=False)


@pytest.mark.parametrize("wrong", [-5, 100_000])
def test_the_first_token_outside_is_named_and_the_largest_one_found(tmp_path, monkeypatch, wrong):
    """Tokens stand anywhere in blocks of three; 0 and the last token are no mistake."""
    monkeypatch.setattr(indexed, "_BLOCK", 3)
    prefix = tmp_path / "tokens"
    for place in range(8):
        tokens = np.array([0, 1, 2, 99_998, 3, 0, 1, 2], dtype=np.int32)
        tokens[place] = 99_999
        tokens.tofile(f"{prefix}.bin")
        check_tokens(prefix, 100_000)
        assert largest_token(prefix, 100_000) == 99_999
        tokens[place:] = wrong
        tokens.tofile(f"{prefix}.bin")
        with pytest.raises(ConfigError, match=f"token {wrong} at offset {place} is outside"):
            check_tokens(prefix, 100_000)


@pytest.mark.parametrize("vocab_size", [1, 2**16, 2**16 + 1, 2**31 - 1])
def test_a_token_takes_two_bytes_where_they_hold_every_id(vocab_size):
    dtype = np.dtype(token_dtype(vocab_size))
    assert np.iinfo(dtype).max >= vocab_size - 1
    assert dtype.itemsize == (2 if vocab_size - 1 <= np.iinfo(np.uint16).max else 4)


def test_what_a_corpus_is_renamed_to_was_synchronized_before(tmp_path, text, monkeypatch):
    """Each file is on disk before it gets its name, and then the name itself."""
    steps, rename = [], Path.rename
    monkeypatch.setattr(corpus_module, "sync", lambda path: steps.append(path.name))

    def renamed(path, target):
        steps.append(f"{path.name} renamed")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    prepare(config(tmp_path, text), VOCAB, progress=False)
    assert steps[0].startswith("tokenizer-")
    *before, name, place = steps[1:]
    files = {"tokens.bin", "tokens.idx", "tokenizer.json", "manifest.json"}
    assert {*before} - files == {name.removesuffix(" renamed")}
    assert name.startswith("building-text-")
    assert place == "cache"


def test_a_truncated_corpus_is_refused(tmp_path, text):
    data = config(tmp_path, text)
    corpus = prepare(data, VOCAB, progress=False)
    with (corpus.path / "tokens.bin").open("r+b") as file:
        file.truncate(10)
    with pytest.raises(ConfigError, match="has 10 bytes instead of"):
        prepare(data, VOCAB, progress=False)


def test_text_too_short_for_a_sequence_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match=r"too short|leave nothing"):
        open_source(run_config(config(tmp_path, text), seq_length=100_000))
