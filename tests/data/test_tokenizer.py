"""Tokenizers spell any text, fit the model, and have a token for the end of a document."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from vp_train.config import ConfigError
from vp_train.data.tokenizer import (
    END_OF_TEXT,
    byte_lengths,
    end_token_id,
    load_tokenizer,
    num_ids,
    tokenizer_hash,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat\n" * 5, "def f(x):\n    return x\n" * 5]


@pytest.mark.parametrize("text", ["the cat", "  spaces\t\n\n ", "naïve 中文 🙂", "\x00\x7f"])
def test_byte_level_tokens_spell_any_text(text: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 280)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_vocabulary_is_as_large_as_asked_or_as_the_text_allows() -> None:
    assert train_tokenizer(TEXTS, 270).get_vocab_size() == 270
    assert 270 < train_tokenizer(TEXTS, 5000).get_vocab_size() < 400


def test_vocabulary_must_hold_every_byte() -> None:
    assert train_tokenizer(TEXTS, 257).get_vocab_size() == 257
    with pytest.raises(ConfigError, match=r"vocab_size=256 is too small .* at least 257"):
        train_tokenizer(TEXTS, 256)


def test_loaded_tokenizer_must_fit_the_model(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    train_tokenizer(TEXTS, 270).save(str(path))
    assert load_tokenizer(path, 270).get_vocab_size() == 270
    with pytest.raises(
        ConfigError, match=r"ids up to 269, but model.vocab_size=269; set it to 270 or more"
    ):
        load_tokenizer(path, 269)


def test_loaded_tokenizer_reads_texts_of_any_length(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    limited = train_tokenizer(TEXTS, 270)
    limited.enable_truncation(3)
    limited.enable_padding(length=3)
    limited.save(str(path))
    tokenizer = load_tokenizer(path, 270)
    assert tokenizer.decode(tokenizer.encode(TEXTS[0]).ids) == TEXTS[0]
    assert len(tokenizer.encode("t").ids) == 1


@pytest.mark.parametrize("content", ["", "{}", '{"model": {"type": "none"}}', "not json"])
def test_broken_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not a tokenizer\.json: "):
        load_tokenizer(path, 1000)


def test_what_git_keeps_of_a_large_file_is_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ConfigError, match=r"^data.tokenizer=.* run git lfs pull there$"):
        load_tokenizer(path, 1000)


def test_end_of_document_has_a_token() -> None:
    assert end_token_id(train_tokenizer(TEXTS, 270), None) == end_token_id(
        train_tokenizer(TEXTS, 270), END_OF_TEXT
    )
    without = Tokenizer(models.WordLevel({"a": 0, "stop": 1}, unk_token="a"))
    assert end_token_id(without, "stop") == 1
    with pytest.raises(ConfigError, match=r"no token <\|endoftext\|> or .*; set data.end_token"):
        end_token_id(without, None)


@pytest.mark.parametrize("vocabulary", [{}, {"a": 0}, {"a": 0, "b": 7}])
def test_a_vocabulary_reaches_to_its_largest_id(vocabulary: dict[str, int]) -> None:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    assert num_ids(tokenizer) == len(byte_lengths(tokenizer)) == max([-1, *vocabulary.values()]) + 1


def test_a_hash_is_that_of_the_tokenizer_however_it_is_written(tmp_path: Path) -> None:
    """A file that holds none has the hash of its bytes."""
    path = tmp_path / "tokenizer.json"
    kinds = [[train_tokenizer(texts, 270) for _ in range(2)] for texts in (TEXTS, TEXTS[:1])]
    found = []
    for plain, limited in kinds:
        plain.save(str(path))
        found.append(tokenizer_hash(path))
        limited.enable_truncation(3)
        limited.enable_padding(length=3)
        limited.save(str(path), pretty=False)
        assert tokenizer_hash(path) == found[-1]
    for content in ("{}", "{ }"):
        path.write_text(content)
        found.append(tokenizer_hash(path))
    assert len(set(found)) == 4
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in found)
