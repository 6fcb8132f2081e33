"""A corpus belongs to its tokenizer: it serves every model that has its tokens, and no other."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from tests.data.cases import text_config
from vp_train.config import ConfigError, ModelConfig, RunConfig, RunSettings
from vp_train.data import corpus, describe, manifest, prepare
from vp_train.data.corpus import spare_rows
from vp_train.data.tokenizer import train_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").mkdir()
    for number in range(4):
        words = f"document {number} has few words and no more pairs than these\n"
        (tmp_path / "text" / f"{number}.txt").write_text(words * 20)
    return tmp_path


def with_added(path: Path, name: str) -> None:
    """Add a token behind the last one of a tokenizer.json."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_tokens([AddedToken(name, normalized=False)])
    tokenizer.save(str(path))


def test_one_corpus_serves_every_vocabulary_that_has_its_tokens(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(text_config(text), 4_096, progress=False)
    assert first.manifest.vocab_size == first.manifest.num_token_ids < 1_000
    monkeypatch.delattr(corpus, "train_tokenizer")  # nothing is trained or tokenized anew
    monkeypatch.delattr(corpus, "write_dataset")
    stored = text_config(text, path=str(first.path))
    for vocab_size in (8_192, 200_000, first.manifest.vocab_size):
        assert prepare(stored, vocab_size, progress=False).path == first.path
        assert prepare(text_config(text), vocab_size, progress=False).path == first.path
    with pytest.raises(ConfigError, match=r"token ids up to \d+, but model.vocab_size=257; set it"):
        prepare(stored, 257, progress=False)


def test_a_vocabulary_that_is_too_small_is_refused_before_any_text_is_read(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = text / "tokenizer.json"
    train_tokenizer(["few words"], 300).save(str(path))
    for name in ("content_hash", "read_documents"):
        monkeypatch.delattr(corpus, name)
    with pytest.raises(ConfigError, match=r"vocab_size=256 is too small .* at least 257"):
        prepare(text_config(text), 256, progress=False)
    with pytest.raises(ConfigError, match=r"token ids up to \d+, but model.vocab_size=257; set it"):
        prepare(text_config(text, tokenizer=str(path)), 257, progress=False)


def test_added_tokens_that_no_text_has_may_lie_beyond_the_vocabulary(text: Path) -> None:
    path = text / "tokenizer.json"
    train_tokenizer(["few words"], 270).save(str(path))
    own = Tokenizer.from_file(str(path)).get_vocab_size()
    with_added(path, "<pad>")
    config = text_config(text, tokenizer=str(path))
    built = prepare(config, own, progress=False)
    assert built.manifest.vocab_size == own + 1
    assert built.manifest.largest_token is not None
    assert built.manifest.largest_token < own
    way_out = f"set it to {own + 1} or more, or, where run.init_from fixes it, data.tokenizer"
    with pytest.raises(
        ConfigError, match=f"data.end_token=<pad> is token {own}, but model.vocab_size.*{way_out}"
    ):
        prepare(replace(config, end_token="<pad>"), own, progress=False)
    with_added(path, "pairs")  # which the text has
    with pytest.raises(
        ConfigError, match=rf"text/0.txt has a token of {path} but model.vocab_size={own + 1}; set"
    ):
        prepare(config, own + 1, progress=False)
    larger = prepare(config, own + 2, progress=False)
    for corpus_again in (config, text_config(text, path=str(larger.path))):
        with pytest.raises(
            ConfigError,
            match=rf"^data\.path={corpus_again.path} has token {own + 1} \(pairs\), but "
            f"model.vocab_size={own + 1}; ",
        ):
            prepare(corpus_again, own + 1, progress=False)


def test_another_tokenizer_makes_another_corpus(text: Path) -> None:
    path = text / "tokenizer.json"
    train_tokenizer(["few words"], 270).save(str(path))
    config = text_config(text, tokenizer=str(path))
    first = prepare(config, 300, progress=False)
    moved = replace(config, tokenizer=str(path.rename(text / "moved.json")))
    assert prepare(moved, 300, progress=False).path == first.path
    train_tokenizer(["few other words"], 270).save(moved.tokenizer or "")
    assert prepare(moved, 300, progress=False).path != first.path


def test_the_token_that_ends_a_document_is_said(text: Path) -> None:
    built = prepare(text_config(text), 300, progress=False)
    assert "documents end with '<|endoftext|>', token 0" in describe(built)


def test_a_corpus_without_the_later_entries_is_read(text: Path) -> None:
    """Version 0.1 wrote no largest token, and the model's vocabulary in the place of its own."""
    built = prepare(text_config(text), 300, progress=False)
    values = asdict(built.manifest) | {"vocab_size": 4_096}
    del values["largest_token"], values["left_out"]
    written = values | {"manifest_hash": manifest._hash_of(values)}
    (built.path / "manifest.json").write_text(json.dumps(written))
    stored = text_config(text, path=str(built.path))
    for vocab_size in (4_096, 8_192, built.manifest.vocab_size):
        assert prepare(stored, vocab_size, progress=False).manifest == manifest.Manifest(**values)
    with pytest.raises(ConfigError, match=r"but model.vocab_size=260; set it"):
        prepare(stored, 260, progress=False)


def test_a_tokenizer_far_below_the_vocabulary_is_said(text: Path) -> None:
    """Far below: an eighth of the rows, and 128 of them."""
    path = text / "tokenizer.json"
    train_tokenizer(["few words"], 260).save(str(path))
    data = text_config(text, tokenizer=str(path))
    built = prepare(data, 4_096, progress=False)
    used = built.manifest.num_token_ids

    def said(vocab_size: int, used: int = used, **run: str) -> list[str]:
        config = RunConfig(
            model=ModelConfig(vocab_size=vocab_size), data=data, run=RunSettings(**run)
        )
        return spare_rows(
            config, (replace(built, manifest=replace(built.manifest, num_token_ids=used)),)
        )

    for rows, least in ((512, 128), (1_024, 128), (1_032, 129), (4_096, 512)):
        assert said(rows, rows - least)
        assert not said(rows, rows - least + 1)
    assert f"has {used} tokens, so {4_096 - used:,} of the 4,096 rows" in said(4_096)[0]
    assert said(-(-used // 64) * 64) == said(4_096, init_from="elsewhere") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "/ is a directory; give .*text/tokenizer.json$"),
        ("none", "is not there; give the"),
        ("link.json", "link.json is a device, a pipe or a socket; give the"),
    ],
)
def test_what_is_no_tokenizer_is_said(text: Path, name: str, message: str) -> None:
    given = f"{text}/text/{name}"
    if name.startswith("link"):
        Path(given).symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(text_config(text, tokenizer=given), 300, progress=False)
    assert "//" not in str(caught.value)
