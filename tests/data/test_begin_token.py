"""With data.begin_token each document is what it is without, behind one more token."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from tests.data.cases import VOCAB_SIZE, run_config, text_config, write_letters
from tests.data.test_megatron import END, OTHER_END, write_pair, write_tokenizer
from vp_train.config import BlendEntry, ConfigError, DataConfig, RunSettings, ValidationEntry
from vp_train.data import Corpus, describe, open_source, prepare, prepare_all
from vp_train.data.corpus import tokenizer_warnings
from vp_train.data.indexed import open_dataset
from vp_train.data.left_out import EMPTY
from vp_train.data.origin import begin_warnings
from vp_train.data.pieces import LONGEST_PIECE
from vp_train.data.tokenizer import (
    begin_by_files,
    front_token,
    tokenizer_config,
    with_front_token,
)

BEGIN = "<|endoftext|>"


def documents(corpus: Corpus) -> Iterator[list[int]]:
    dataset = open_dataset(corpus.prefix)
    for number in range(corpus.manifest.num_documents):
        yield dataset.get(number).tolist()


def build(data: DataConfig, begin: str | None = BEGIN) -> Corpus:
    return prepare(replace(data, begin_token=begin), VOCAB_SIZE, progress=False)


def test_each_document_begins_with_the_token_and_is_the_same_behind_it(tmp_path: Path) -> None:
    """Also one of many pieces, and none of an empty file."""
    (tmp_path / "text").mkdir()
    lengths = [1, 30, 0, 400, 2 * LONGEST_PIECE + 5]
    for number, length in enumerate(lengths):
        (tmp_path / f"text/{number}.txt").write_text("ab " * (length // 3) + "c" * (length % 3))
    data = text_config(tmp_path)
    without, begun = build(data, None), build(data)
    assert without.path != begun.path
    assert without.tokenizer.read_bytes() == begun.tokenizer.read_bytes()
    begin = begun.manifest.begin_token
    assert begin is not None
    assert without.manifest.begin_token is None
    assert list(documents(begun)) == [[begin, *ids] for ids in documents(without)]
    assert begun.manifest.num_tokens == without.manifest.num_tokens + 4
    assert begun.manifest.left_out[EMPTY][0] == 1
    assert f"documents begin with '{BEGIN}', token {begin}, and end with" in describe(begun)


def test_settings_without_the_token_find_the_corpora_that_were_built_before(tmp_path: Path) -> None:
    """Its entry is the only one of a manifest that a corpus without it may lack."""
    write_letters(tmp_path / "text", [200] * 4)
    old = build(text_config(tmp_path), None)
    values = json.loads((old.path / "manifest.json").read_text())
    from vp_train.data.manifest import _OWN_HASH, _hash_of

    del values["begin_token"], values[_OWN_HASH]
    (old.path / "manifest.json").write_text(json.dumps(values | {_OWN_HASH: _hash_of(values)}))
    assert build(text_config(tmp_path), None) == replace(old, fresh=False)


def test_tokens_of_megatron_get_it_once(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "own.json")
    index = write_pair(tmp_path / "a", [[[5, 6, END]], [[OTHER_END, 7], [8, END]], [[9]]])
    data = text_config(tmp_path, path=str(index), tokenizer=str(tokenizer), end_token=BEGIN)
    begin = OTHER_END
    expected = [[begin, 5, 6, END], [begin, 7, 8, END], [begin, 9, END]]
    assert list(documents(build(data, "</s>"))) == expected


@pytest.mark.parametrize("name", ["<s>", "<bos>"])
def test_a_token_that_the_tokenizer_lacks_is_refused(tmp_path: Path, name: str) -> None:
    write_letters(tmp_path / "text", [200] * 4)
    with pytest.raises(
        ConfigError, match=rf"no token data\.begin_token={name}; its special tokens are <\|endof"
    ):
        build(text_config(tmp_path), name)


def test_a_stored_corpus_keeps_its_own(tmp_path: Path) -> None:
    write_letters(tmp_path / "text", [200] * 4)
    data = text_config(tmp_path)
    without, begun = build(data, None), build(data)
    for begin in (None, BEGIN):
        assert build(replace(data, path=str(begun.path)), begin) == replace(begun, fresh=False)
    with pytest.raises(ConfigError, match=r"begin with no token, not with data\.begin_token=<\|"):
        build(replace(data, path=str(without.path)))
    with pytest.raises(ConfigError, match=r"begin with '<\|.*not with data\.begin_token=a; drop"):
        build(replace(data, path=str(begun.path)), "a")


def test_corpora_of_a_run_begin_alike(tmp_path: Path) -> None:
    for name in ("text", "other"):
        write_letters(tmp_path / name, [200] * 4)
    data = text_config(tmp_path)
    begun = build(data)
    shared = replace(data, tokenizer=str(begun.tokenizer))
    entries = (BlendEntry(path=str(begun.path)), BlendEntry(path=str(tmp_path / "other")))
    blend = replace(shared, name="blend", path=None, blend=entries)
    with pytest.raises(ConfigError, match=r"data\.begin_token"):
        prepare_all(blend, VOCAB_SIZE, progress=False)
    both = prepare_all(replace(blend, begin_token=BEGIN), VOCAB_SIZE, progress=False)
    assert [one.manifest.begin_token for one in both] == [begun.manifest.begin_token] * 2
    named = replace(
        shared, path=str(begun.path), validation=(ValidationEntry("own", str(tmp_path / "other")),)
    )
    with pytest.raises(ConfigError, match=r"data\.validation, own .* same .* data\.begin_token"):
        prepare_all(named, VOCAB_SIZE, progress=False)


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_a_run_is_trained_to_predict_the_first_token_from_it(tmp_path: Path, packing: str) -> None:
    write_letters(tmp_path / "text", [200] * 20)
    data = text_config(tmp_path, begin_token=BEGIN, end_token="a", packing=packing)
    source = open_source(run_config(data))
    begin = source.begin_token
    assert begin is not None
    batch = source.train_batch(0, 40)
    is_begin = np.asarray(batch.tokens == begin)
    assert is_begin.any()
    assert (np.asarray(batch.labels)[is_begin] >= 0).all(), "its label is in its own document"
    assert batch.segments is None or (np.diff(batch.segments)[is_begin[..., 1:]] == 1).all()


def test_the_words_beside_an_export_name_it(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path / "own.json")
    words = tokenizer_config(tokenizer, END, begin=OTHER_END, longest=8, after_end=True)
    assert (words["bos_token"], words["add_bos_token"], words["eos_token"]) == ("</s>", True, BEGIN)
    assert "add_bos_token" not in tokenizer_config(tokenizer, END, longest=8, after_end=True)


_AROUND = {
    "nothing": None,
    "bytes": processors.ByteLevel(trim_offsets=False),
    "another": processors.BertProcessing(("</s>", 1), (BEGIN, 0)),
    "after bytes": processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)]),
        ]
    ),
}


@pytest.mark.parametrize("around", _AROUND)
def test_a_tokenizer_puts_the_token_in_front_of_each_text(tmp_path: Path, around: str) -> None:
    tokenizer = Tokenizer.from_file(str(write_tokenizer(tmp_path / "own.json")))
    tokenizer.post_processor = _AROUND[around]
    made = Tokenizer.from_str(with_front_token(tokenizer.to_str(), "</s>"))
    assert front_token(made) == "</s>"
    bare = tokenizer.encode("ab", add_special_tokens=False).ids
    assert made.encode("ab").ids == [OTHER_END, *bare]
    assert made.encode("ab", add_special_tokens=False).ids == bare
    assert with_front_token(made.to_str(), "</s>") == made.to_str()


def test_a_tokenizer_that_begins_texts_otherwise_than_the_corpus_is_said(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path / "own.json")
    data = text_config(tmp_path, tokenizer=str(path))
    write_letters(tmp_path / "text", [5, 6])
    assert not tokenizer_warnings(data, [build(data, None)]), "it begins texts with nothing"
    path.write_text(with_front_token(path.read_text(), "</s>"))
    (words,) = tokenizer_warnings(data, [build(data, None)])
    assert "puts </s> in front of a text" in words
    assert "data.begin_token=" in words
    assert not tokenizer_warnings(data, [build(data, "</s>")])
    index = write_pair(tmp_path / "a", [[[OTHER_END, 7, END]]])
    stored = replace(data, path=str(index), end_token=BEGIN)
    assert not tokenizer_warnings(stored, [build(stored, None)]), "the tokens have it"


def test_a_token_that_texts_have_too_is_said(tmp_path: Path) -> None:
    write_letters(tmp_path / "text", [200] * 4)
    data = text_config(tmp_path)
    for begin, is_special in ((BEGIN, True), ("a", False)):
        config = run_config(replace(data, begin_token=begin))
        found = [line for line in open_source(config).warnings if "begin" in line]
        assert found == begin_warnings(config, [build(data, begin)])
        assert len(found) == (not is_special)
    assert found[0].startswith("documents begin with 'a', which is no special token of the token")
    assert found[0].endswith(f"its special tokens are {BEGIN}")


@pytest.mark.parametrize("is_import", [False, True])
@pytest.mark.parametrize("was", [None, "</s>", BEGIN])
@pytest.mark.parametrize("now", [None, "</s>", BEGIN])
def test_documents_that_begin_otherwise_than_those_of_the_weights_are_said(
    tmp_path: Path, is_import: bool, was: str | None, now: str | None
) -> None:
    """An import whose files put nothing in front of a text does not say how it was trained."""
    write_letters(tmp_path / "text", [200] * 4)
    (tmp_path / "origin").mkdir()
    tokenizer = write_tokenizer(tmp_path / "origin/tokenizer.json")
    begin = {None: None, BEGIN: END, "</s>": OTHER_END}[was]
    words = tokenizer_config(tokenizer, END, begin=begin, longest=8, after_end=True)
    (tokenizer.parent / "tokenizer_config.json").write_text(json.dumps(words))
    (tokenizer.parent / ("model.yaml" if is_import else "config.yaml")).touch()
    (tokenizer.parent / "step-00000001").mkdir()
    data = text_config(tmp_path, tokenizer=str(tokenizer), end_token=BEGIN, begin_token=now)
    corpora = [build(data, now)]
    for place in (tokenizer.parent, tokenizer.parent / "step-00000001"):
        run = RunSettings(init_from=str(place), root=str(tmp_path / "runs"))
        found = begin_warnings(replace(run_config(data), run=run), corpora)
        assert len(found) == (was != now and not (is_import and was is None))
        theirs = f", those of the weights of run.init_from={place} with {was or 'none'}; where"
        if is_import:
            theirs = (
                f"; the tokenizer of run.init_from={place} puts {was} in front of a text; where"
            )
        expected = f"documents begin with {now or 'no token'}{theirs} the model expects that, add"
        assert all(line.startswith(expected) for line in found)
        assert all(line.rstrip('"').endswith(f"data.begin_token={was or 'null'}") for line in found)
        other = replace(data, other_tokenizer=True)
        assert not begin_warnings(replace(run_config(other), run=run), corpora)


def test_a_run_that_begins_documents_as_its_weights_hears_nothing_of_the_tokenizer(
    tmp_path: Path,
) -> None:
    write_letters(tmp_path / "text", [200] * 4)
    (tmp_path / "origin").mkdir()
    path = write_tokenizer(tmp_path / "origin/tokenizer.json")
    path.write_text(with_front_token(path.read_text(), "</s>"))
    data = text_config(tmp_path, tokenizer=str(path), end_token=BEGIN)
    run = RunSettings(init_from=str(path.parent), root=str(tmp_path / "runs"))
    for config, is_said in ((run_config(data), True), (replace(run_config(data), run=run), False)):
        assert bool(begin_warnings(config, [build(data, None)])) == is_said


@pytest.mark.parametrize("says", [None, False, True])
@pytest.mark.parametrize("front", [None, "</s>"])
@pytest.mark.parametrize("bos", [None, "</s>", {"content": "</s>"}, "<none>"])
def test_the_files_of_a_tokenizer_say_what_texts_begin_with(
    tmp_path: Path, says: bool | None, front: str | None, bos: object
) -> None:
    path = write_tokenizer(tmp_path / "tokenizer.json")
    if front is not None:
        path.write_text(with_front_token(path.read_text(), front))
    words = {"bos_token": bos} | ({} if says is None else {"add_bos_token": says})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
    is_named = says is True and bos in ("</s>", {"content": "</s>"})
    expected = "</s>" if says is not False and (front or is_named) else None
    assert begin_by_files(tmp_path) == expected
