"""Blends take samples of every corpus by weight, share a tokenizer, and name corpora in errors."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.cases import VOCAB_SIZE, run_config, train_batch, write_letters
from tests.programs import finished
from vp_train.commands import prepare, train
from vp_train.config import BlendEntry, ConfigError, DataConfig, ValidationEntry
from vp_train.data import Corpus, open_source, prepare_all
from vp_train.data.tokenizer import train_tokenizer
from vp_train.settings import load_config

WEIGHTS = (0.7, 0.2, 0.1)


@pytest.fixture
def blend(tmp_path: Path) -> DataConfig:
    """Return a blend of three corpora with different letters: a and A, b and B, c and C.

    The second one is a .jsonl file, the others are text files.
    """
    coin = random.Random(0)
    for number, letter in enumerate("abc"):
        texts = [
            "".join(coin.choice((letter, letter.upper())) for _ in range(90)) for _ in range(30)
        ]
        (tmp_path / letter).mkdir()
        if letter == "b":
            (tmp_path / letter / "all.jsonl").write_text(
                "".join(json.dumps({"body": text}) + "\n" for text in texts)
            )
        else:
            for index, text in enumerate(texts):
                (tmp_path / letter / f"{number}{index:02}.txt").write_text(text)
    entries = tuple(
        BlendEntry(
            path=str(tmp_path / letter),
            weight=weight,
            jsonl_field="body" if letter == "b" else None,
        )
        for letter, weight in zip("abc", WEIGHTS, strict=True)
    )
    return DataConfig(name="blend", blend=entries, cache_dir=str(tmp_path / "cache"))


def corpus_of(tokens: np.ndarray, corpora: tuple[Corpus, ...]) -> str:
    """Return the letter of the corpus that `tokens` come from."""
    from tokenizers import Tokenizer

    (letter,) = set(Tokenizer.from_file(str(corpora[0].tokenizer)).decode(tokens.tolist()).lower())
    return letter


def test_samples_come_by_weight_at_every_prefix(blend: DataConfig) -> None:
    corpora, source = prepare_all(blend, VOCAB_SIZE, progress=False), open_source(run_config(blend))
    drawn = [
        corpus_of(row, corpora)
        for step in range(1, 6)
        for row in train_batch(source, step).tokens.reshape(-1, 8).numpy()
    ]
    for length in range(1, len(drawn) + 1):
        counts = Counter(drawn[:length])
        for letter, weight in zip("abc", WEIGHTS, strict=True):
            assert abs(counts[letter] - weight * length) < 1 + 1e-9
    held_out = [
        corpus_of(row, corpora) for row in source.validation_batch().tokens.reshape(-1, 8).numpy()
    ]
    assert set(held_out) == set("ab")  # six samples: too few for the corpus with a share of 10 %
    assert blend.blend is not None
    paths = [entry.path for entry in blend.blend]
    assert source.description.startswith(f"70.0% {paths[0]}: 30 files, 30 documents")
    assert f"; 20.0% {paths[1]}: 1 file, 30 documents" in source.description


def test_all_corpora_have_one_tokenizer_trained_on_all_of_them(blend: DataConfig) -> None:
    corpora = prepare_all(blend, VOCAB_SIZE, progress=False)
    assert len({corpus.tokenizer.read_bytes() for corpus in corpora}) == 1
    vocabulary = json.loads(corpora[0].tokenizer.read_text())["model"]["vocab"]
    for letter in "abc":
        merged = [
            token for token in vocabulary if len(token) > 1 and set(token.lower()) == {letter}
        ]
        assert merged, "the tokenizer was not trained on this corpus"
    again = prepare_all(blend, VOCAB_SIZE, progress=False)
    assert [corpus.path for corpus in again] == [corpus.path for corpus in corpora]
    assert not any(corpus.fresh for corpus in again)


def test_a_stored_corpus_can_be_part_and_gives_its_tokenizer(blend: DataConfig) -> None:
    assert blend.blend is not None
    whole = prepare_all(blend, VOCAB_SIZE, progress=False)
    stored = replace(blend.blend[1], path=str(whole[1].path))
    mixed = replace(
        blend, blend=(blend.blend[0], stored, blend.blend[2]), cache_dir=f"{blend.cache_dir}-other"
    )
    corpora = prepare_all(mixed, VOCAB_SIZE, progress=False)
    assert corpora[1].path == whole[1].path
    assert len({corpus.tokenizer.read_bytes() for corpus in (*corpora, *whole)}) == 1
    same, other = (
        train_batch(open_source(run_config(blend)), 3),
        train_batch(open_source(run_config(mixed)), 3),
    )
    assert same.tokens.equal(other.tokens)


def test_vocabularies_that_differ_are_refused(blend: DataConfig, tmp_path: Path) -> None:
    assert blend.blend is not None
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer(["xyz" * 20], 262).save(str(tokenizer))
    other = replace(blend, blend=blend.blend[2:], tokenizer=str(tokenizer))
    first, second = (
        prepare_all(blend, VOCAB_SIZE, progress=False)[0],
        prepare_all(other, VOCAB_SIZE, progress=False)[0],
    )
    mixed = replace(
        blend, blend=(BlendEntry(path=str(first.path)), BlendEntry(path=str(second.path)))
    )
    with pytest.raises(
        ConfigError,
        match=rf"data\.blend\[1\] \({second.path}\) has another tokenizer than data\.blend\[0\]",
    ):
        prepare_all(mixed, VOCAB_SIZE, progress=False)
    alike = replace(mixed, blend=(BlendEntry(path=str(first.path)),) * 2)
    with pytest.raises(
        ConfigError, match=rf"data\.blend\[0\]: {first.path}/.* but model\.vocab_size=258; set it"
    ):
        prepare_all(alike, 258, progress=False)


def test_another_tokenizer_is_refused_before_anything_is_tokenized(
    blend: DataConfig, tmp_path: Path
) -> None:
    """A stored corpus has it, or a validation set, or documents have another end."""
    assert blend.blend is not None
    train_tokenizer(["xyz" * 20], 262).save(str(tmp_path / "tokenizer.json"))
    other = replace(blend, blend=blend.blend[2:], tokenizer=str(tmp_path / "tokenizer.json"))
    (stored,) = prepare_all(other, VOCAB_SIZE, progress=False)
    text = replace(blend, cache_dir=str(tmp_path / "new"))
    single = replace(text, name="text", path=blend.blend[0].path, blend=None)
    sets = (ValidationEntry("own", str(stored.path)),)
    end = replace(text, tokenizer=str(stored.tokenizer), end_token="x")
    own = BlendEntry(path=str(stored.path))
    for data, message in (
        (replace(single, validation=sets), r"data\.validation, own \(.*\) has another tokenizer"),
        (replace(single, tokenizer=str(stored.tokenizer), end_token="x", validation=sets), "end"),
        (replace(end, blend=(blend.blend[0], own)), r"data\.blend\[1\]: documents of .* end with"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_all(data, VOCAB_SIZE, progress=False)
        assert not list((tmp_path / "new").glob("text-*"))


def test_a_corpus_that_is_missing_empty_or_too_short_is_named(
    blend: DataConfig, tmp_path: Path
) -> None:
    assert blend.blend is not None
    missing = replace(blend, blend=(*blend.blend[:2], BlendEntry(path=f"{tmp_path}/nowhere")))
    with pytest.raises(ConfigError, match=r"data\.blend\[2\]: path=.*nowhere does not exist; give"):
        open_source(run_config(missing))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    empty = replace(blend, blend=(BlendEntry(path=f"{tmp_path}/empty"), *blend.blend))
    with pytest.raises(
        ConfigError, match=r"data\.blend\[0\]: .*a\.txt holds no text .*set its path to"
    ):
        open_source(run_config(empty))
    write_letters(tmp_path / "short", [5, 5])
    short = replace(blend, blend=(*blend.blend, BlendEntry(path=f"{tmp_path}/short")))
    with pytest.raises(
        ConfigError,
        match=rf"data\.blend\[3\] \({tmp_path}/short\): training gets 1 of 2 documents .* too "
        "short for one sample of 65",
    ):
        open_source(run_config(short, seq_length=64))


def command_line(blend: DataConfig) -> list[str]:
    entries = ",".join(
        f"{{path:'{entry.path}',weight:{entry.weight}}}"
        for entry in blend.blend or ()
        if "/b" not in entry.path
    )
    return [
        "data=blend",
        f"data.blend=[{entries}]",
        f"data.cache_dir='{blend.cache_dir}'",
        f"model.vocab_size={VOCAB_SIZE}",
    ]


def test_a_blend_is_an_override_away(blend: DataConfig) -> None:
    config = load_config(command_line(blend))
    assert config.data.blend is not None
    assert blend.blend is not None
    assert config.data.blend == tuple(
        replace(entry, jsonl_field=None) for entry in (blend.blend[0], blend.blend[2])
    )
    example = r"\[{path:DIR,weight:3},{name:pystdlib,weight:1}\]"
    with pytest.raises(
        ConfigError, match=rf"data=blend needs its corpora; .* 'data.blend={example}'"
    ):
        load_config(["data=blend"])
    with pytest.raises(
        ConfigError, match=r"data\.blend: weight=0\.0 of /x; weights must be above 0"
    ):
        load_config(["data=blend", "data.blend=[{path:/x,weight:0}]"])
    for value, word in (
        ("{path:/x,wieght:1}", "wieght"),
        ("{path:/x,weight:much}", "much"),
        ("/x", "/x"),
    ):
        with pytest.raises(
            ConfigError,
            match=rf"^data\.blend.*{word}.*; write 'data\.blend=\[\{{path:DIR,weight:3",
        ):
            load_config(["data=blend", f"data.blend=[{value}]"])


def test_vp_prepare_prepares_every_corpus_and_data_errors_end_with_78(blend: DataConfig) -> None:
    done = finished(prepare.main, *command_line(blend))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("30 files, 30 documents") == 2
    words = ("data.blend=[{path:/nowhere,weight:1}]", f"run.root='{blend.cache_dir}'")
    failed = finished(train.main, *command_line(blend), *words)
    assert failed.returncode == 78
    assert failed.stderr.startswith(
        "vp-train: data.blend[0]: path=/nowhere does not exist; give a directory of text"
    )
    assert len(failed.stderr.splitlines()) == 1


def test_a_missing_corpus_is_named_before_any_is_prepared(blend: DataConfig, tmp_path) -> None:
    whole = prepare_all(replace(blend, cache_dir=str(tmp_path / "first")), VOCAB_SIZE, False)
    assert blend.blend is not None
    *others, last = blend.blend
    entries = (*others, replace(last, path=str(tmp_path / "nowhere")))
    tokenizer, empty = str(whole[0].tokenizer), tmp_path / "second"
    wrong = replace(blend, blend=entries, tokenizer=tokenizer, cache_dir=str(empty))
    with pytest.raises(ConfigError, match=r"^data\.blend\[2\]: path=\S+nowhere does not exist"):
        prepare_all(wrong, VOCAB_SIZE, False)
    assert not empty.exists()
