"""A run whose files are read otherwise now, or are gone, is told how it goes on with its tokens."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.cases import VOCAB_SIZE, text_config, write_letters
from vp_train.checkpoint.text import _contents_of, advising_kept_text, kept_corpora, kept_words
from vp_train.config import BlendEntry, ConfigError, DataConfig, RunConfig, RunSettings
from vp_train.data import prepare, prepare_all


def wanted(words: str) -> str:
    """Return the path that the words about a single corpus give."""
    found = re.search(r"data\.path=.*", " ".join(shlex.split(words)))
    assert found
    return found[0].removeprefix("data.path=")


def test_the_words_lead_to_the_same_tokens(tmp_path: Path) -> None:
    write_letters(tmp_path / "text", [200] * 10)
    data = text_config(tmp_path)
    corpus = prepare(data, VOCAB_SIZE, progress=False)
    contents = (corpus.manifest.content_hash,)
    (tmp_path / "text/more.txt").write_text("another document")
    kept = kept_corpora(data, contents)
    again = prepare(replace(data, path=wanted(kept_words(data, kept))), VOCAB_SIZE, progress=False)
    assert again.manifest == corpus.manifest
    assert kept_words(DataConfig(name="pystdlib"), kept).count("data=text data.path=") == 1


def test_the_corpora_of_a_blend_are_named_in_its_order(tmp_path: Path) -> None:
    entries = []
    for name, length in (("one", 200), ("two", 300)):
        write_letters(tmp_path / name, [length] * 10)
        entries.append(BlendEntry(path=str(tmp_path / name)))
    data = text_config(tmp_path, name="blend", path=None, blend=tuple(entries))
    corpora = prepare_all(data, VOCAB_SIZE, progress=False)
    hashes = [corpus.manifest.content_hash for corpus in corpora]
    kept = kept_corpora(data, hashes[::-1])
    assert kept == (corpora[1].path, corpora[0].path)
    assert kept_words(data, kept).endswith(f"data.blend {kept[0]}, {kept[1]}")


@pytest.mark.parametrize("contents", [(), ("0" * 16,), ("*",), ("",)])
def test_what_the_cache_does_not_have_is_not_promised(
    tmp_path: Path, contents: tuple[str, ...]
) -> None:
    write_letters(tmp_path / "text", [200] * 10)
    data = text_config(tmp_path)
    own = prepare(data, VOCAB_SIZE, progress=False).manifest.content_hash
    assert kept_corpora(data, (own,))
    assert kept_corpora(data, contents) == ()
    assert kept_corpora(data, (own, "0" * 16)) == ()


def test_only_an_error_of_a_run_that_goes_on_is_told_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_letters(tmp_path / "text", [200] * 10)
    data = text_config(tmp_path)
    corpus = prepare(data, VOCAB_SIZE, progress=False)
    config = RunConfig(data=data, run=RunSettings(resume=True, root=str(tmp_path / "runs")))
    assert _contents_of(config) == ()

    def said(message: str) -> str:
        with pytest.raises(ConfigError) as caught, advising_kept_text(config):
            raise ConfigError(message)
        return str(caught.value)

    assert said("data.path is gone") == "data.path is gone"
    monkeypatch.setattr(
        "vp_train.checkpoint.text._contents_of", lambda _: [corpus.manifest.content_hash]
    )
    assert wanted(said("data.path is gone")) == str(corpus.path)
    for message in (f"{corpus.path}/tokens.bin is damaged", "data.validation, web: it is empty"):
        assert said(message) == message


def test_a_run_on_a_file_that_is_refused_now_finds_its_tokens(tmp_path: Path) -> None:
    """Law of the way out: what the error names has the hash that the checkpoint has."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text/x.json").write_text(json.dumps([{"text": "words " * 400}] * 4))
    data = text_config(tmp_path, path=str(tmp_path / "text/x.json"))
    with pytest.MonkeyPatch.context() as patched:
        for module in ("files", "corpus", "documents"):
            patched.setattr(f"vp_train.data.{module}.kind_to_read", lambda path, field: "text")
        raw = prepare(data, VOCAB_SIZE, progress=False)
    with pytest.raises(ConfigError, match="holds one JSON array"):
        prepare(data, VOCAB_SIZE, progress=False)
    (kept,) = kept_corpora(data, (raw.manifest.content_hash,))
    assert prepare(replace(data, path=str(kept)), VOCAB_SIZE, progress=False).path == raw.path
