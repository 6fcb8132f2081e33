"""Named validation sets: samples that no layout changes, bytes that add up, and clear errors."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import vp_train
from tests.data.cases import VOCAB_SIZE, run_config, text_config, write_letters
from tests.training import run_command
from vp_train.config import ConfigError, DataConfig, RunConfig, ValidationEntry
from vp_train.data import open_source, prepare, prepare_all
from vp_train.data.corpus import trained_on
from vp_train.data.tokenizer import byte_lengths, train_tokenizer
from vp_train.settings import load_config


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A run with two named sets of 60 and 200 tokens, cut into samples of 8."""
    write_letters(tmp_path / "text", [90] * 10)
    for name, lengths in (("wiki", [30, 30]), ("code", [50] * 4)):
        write_letters(tmp_path / name, lengths)
    entries = tuple(ValidationEntry(name, str(tmp_path / name)) for name in ("wiki", "code"))
    return run_config(text_config(tmp_path, validation=entries, validation_fraction=0.2))


def counted(config: RunConfig, name: str, dp: int = 1) -> list[list[int]]:
    """Return the labels of all sequences with a loss, in the order of the replicas."""
    source = open_source(config)
    batches = [source.validation_batch(rank, dp, name=name) for rank in range(dp)]
    rows = torch.cat([batch.labels.flatten(0, 1) for batch in batches])
    assert all((row == -100).all() or (row >= 0).all() for row in rows)
    return [row.tolist() for row in rows if row[0] >= 0]


@pytest.mark.parametrize("name", ["", "wiki", "code"])
def test_validation_has_the_same_samples_on_every_layout(config: RunConfig, name: str) -> None:
    expected = counted(config, name)
    assert len(expected) == (4 if name == "wiki" else 3 * 2)  # all that wiki has
    for dp in (2, 4):
        assert counted(config, name, dp) == expected
    of_sequences = replace(config, run=replace(config.run, eval_sequences=5))
    for size in (1, 2, 3):
        for dp in (1, 2):
            assert counted(replace(of_sequences, micro_batch_size=size), name, dp) == expected[:5]


def test_a_named_set_counts_each_of_its_samples_once(config: RunConfig) -> None:
    many = replace(config, run=replace(config.run, eval_sequences=50))
    found = counted(many, "wiki", 2)
    num_tokens = 60 + 2  # with the ends of two documents, at most: pairs of letters may be merged
    assert len(found) == len(set(map(tuple, found)))
    assert 1 < len(found) <= (num_tokens - 1) // 8
    assert len(counted(many, "")) == 50, "what is held out repeats"


def test_without_a_fraction_only_the_named_sets_are_validated(config: RunConfig) -> None:
    assert open_source(config).validation_sets == ("", "wiki", "code")
    data = replace(config.data, validation_fraction=0.0)
    assert open_source(replace(config, data=data)).validation_sets == ("wiki", "code")
    off = replace(config, run=replace(config.run, eval_every=0))
    assert open_source(off).validation_sets == ()


TEXTS = ["the cat sat", " \u00fcber \U0001f600 na\u00efve\n\ttabs  twice", "x" * 40, "\u65e5\u672c"]


def sentencepiece_like() -> Tokenizer:
    """Return a tokenizer with a sign for spaces, and bytes for characters it does not know."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["\u2581", *"thecatsxonbd", "\u2581the", "\u00fc"]
    scores = [(piece, -1.0 - number / 1000) for number, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *scores], unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_the_bytes_of_tokens_add_up_to_those_of_the_text(kind: str) -> None:
    tokenizer = train_tokenizer(TEXTS * 3, 300) if kind == "byte-level" else sentencepiece_like()
    tokenizer.add_tokens(["cat"])
    lengths = byte_lengths(tokenizer)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert sum(lengths[number] for number in ids) == len(text.encode())
    if kind == "byte-level":
        assert lengths[tokenizer.token_to_id("<|endoftext|>")] == 0


def test_text_that_is_trained_on_is_warned_of(config: RunConfig, tmp_path: Path) -> None:
    corpora = prepare_all(config.data, VOCAB_SIZE, progress=False)
    assert trained_on(config.data, corpora) == []
    (tmp_path / "code" / "copy.md").write_text((tmp_path / "text" / "b.txt").read_text())
    same = ValidationEntry("same", str(tmp_path / "text"))
    stored = ValidationEntry("stored", str(corpora[0].path))
    data = replace(config.data, validation=(*config.data.validation, same, stored))
    said = trained_on(data, corpora)
    assert [words.split(":")[0] for words in said] == [
        f"data.validation, {name}" for name in ("code", "same", "stored")
    ]
    assert "is trained on too" in said[0]
    assert open_source(replace(config, data=data)).warnings == tuple(said)


def test_a_set_that_cannot_be_used_is_named(config: RunConfig, tmp_path: Path) -> None:
    write_letters(tmp_path / "short", [4])
    write_letters(tmp_path / "empty", [0])
    other = prepare(text_config(tmp_path, path=str(tmp_path / "code")), VOCAB_SIZE, progress=False)
    for path, message in (
        ("nowhere", r"data\.validation, bad: path=.*nowhere does not exist"),
        ("short", rf"data\.validation, bad: {tmp_path}/short has .* too few for one sample of 9; "),
        (other.path, r"data\.validation, bad \(.*\) has another tokenizer than data\.path="),
        ("empty", r"data\.validation, bad: .* holds no text .*; set its path to some that do"),
    ):
        entry = ValidationEntry("bad", str(tmp_path / path))
        data = replace(config.data, validation=(entry,))
        with pytest.raises(ConfigError, match=message):
            open_source(replace(config, data=data))


def test_a_set_without_a_label_is_refused(config: RunConfig, tmp_path: Path) -> None:
    """Of a letter and the end of its document, only the first has a label."""
    write_letters(tmp_path / "letters", [1] * 20)
    entry = ValidationEntry("letters", str(tmp_path / "letters"))
    data = replace(config.data, packing="documents", validation=(entry,), validation_fraction=0.0)
    config = replace(config, data=data, model=replace(config.model, seq_length=1))
    refused = []
    for seed in range(6):
        config = replace(config, data=replace(config.data, seed=seed))
        labels = open_source(config).validation_batch(name="letters").labels
        one = replace(config, run=replace(config.run, eval_sequences=1))
        refused.append(bool(labels.flatten()[0] < 0))
        if refused[-1]:
            with pytest.raises(ConfigError, match=r"data\.validation, letters: .* no label"):
                open_source(one)
        else:
            open_source(one)
    assert len(set(refused)) == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[{name:a}]", "every set needs a name and a path"),
        ("[{path:a}]", "every set needs a name and a path"),
        ("[{name:a/b,path:c}]", "name=a/b is not a name"),
        ("[{name:a,path:c},{name:a,path:d}]", "name=a occurs 2 times"),
        ("[{name:a,where:c}]", "where"),
        ("3", "write 'data.validation=[{name:wiki,path:DIR},{name:code,path:FILE}]'"),
    ],
)
def test_a_wrong_list_of_sets_is_refused(value: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(["data=text", "data.path=text", f"data.validation={value}"])
    assert message in str(refused.value)


def test_synthetic_text_has_no_named_sets() -> None:
    with pytest.raises(ConfigError, match=r"data\.validation needs text with a tokenizer"):
        DataConfig(name="synthetic", validation=(ValidationEntry("a", "b"),))


def test_a_run_records_loss_and_bits_per_byte_of_every_set(tmp_path: Path) -> None:
    """Two pipeline ranks record what one process finds over the same samples."""
    for name, sentence in (
        ("text", "the cat sat on the mat. "),
        ("wiki", "a dog, \u00fcber alles. "),
        ("code", "def f(x): return x\n"),
    ):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.txt").write_text(sentence * (60 + number))
    words = ["model=nano", "model.num_layers=2", "model.vocab_size=300", "model.seq_length=32"]
    words += ["run.steps=2", "run.eval_every=2", "run.eval_microbatches=3", "data=text"]
    words += ["data.path=text", "data.validation_fraction=0.3", "parallel.pp=2"]
    words += ["data.validation=[{name:wiki,path:wiki},{name:code,path:code}]"]
    run_command(words, tmp_path)
    metrics = (tmp_path / "runs/default/metrics.jsonl").read_text().splitlines()
    record = json.loads(metrics[-1])
    run = vp_train.open_run(tmp_path / "runs/default", dtype="float32")
    data = run.config.data
    entries = tuple(replace(each, path=str(tmp_path / each.path)) for each in data.validation)
    data = replace(
        data, path=str(tmp_path / "text"), cache_dir=str(tmp_path / "cache"), validation=entries
    )
    settings = replace(run.config.run, eval_every=1, eval_microbatches=3)
    source = open_source(replace(run.config, data=data, run=settings))
    for name, key in (
        ("", "validation_"),
        ("wiki", "validation/wiki/"),
        ("code", "validation/code/"),
    ):
        batch = source.validation_batch(name=name)
        rows = zip(batch.tokens.flatten(0, 1), batch.labels.flatten(0, 1), strict=True)
        scores = [
            vp_train.score(run, [torch.cat([tokens, labels[-1:]])])[0] for tokens, labels in rows
        ]
        loss = -torch.cat(scores).double().mean().item()
        assert record[f"{key}loss"] == pytest.approx(loss, abs=1e-5)
        text = run.tokenizer.decode_batch(batch.labels.flatten(0, 1).tolist())
        num_bytes = len("".join(text).encode())
        assert num_bytes >= batch.labels.numel()
        bits = loss * batch.labels.numel() / math.log(2) / num_bytes
        assert record[f"{key}bits_per_byte"] == pytest.approx(bits, rel=0.01)  # cut characters
