"""What a tokenizer cannot spell is counted, whether it vanishes or is unknown, and said once."""

from __future__ import annotations

import random
import string
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from tests.data.cases import VOCAB_SIZE, run_config, text_config
from vp_train.config import ConfigError, ValidationEntry
from vp_train.data import encoding, open_source, prepare, prepare_validation
from vp_train.data.corpus import text_warnings
from vp_train.data.documents import Document
from vp_train.data.encoding import Piece, encoded
from vp_train.data.left_out import EMPTY
from vp_train.data.tokenizer import train_tokenizer
from vp_train.data.unspelled import tally_of, unspelled_words
from vp_train.data.worker import encode, open_tokenizer

END = "<|endoftext|>"
LETTERS = "abcde \n"
OTHERS = "éÉ漢🙂\0\u0301"
_BYTES = [f"<0x{number:02X}>" for number in range(256)]


def bpe(letters: str = LETTERS, **settings: object) -> Tokenizer:
    """Return a BPE of these letters, the pair `ab`, and the end of a document."""
    tokens = [END, *dict.fromkeys(letters), "ab"]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = [("a", "b")] if {"a", "b"} <= set(letters) else []
    return Tokenizer(models.BPE(vocab=vocab, merges=merges, **settings))


def counted(tokenizer: Tokenizer, path: Path, texts: list[str]) -> dict[str, int | str]:
    """Return the count of texts that are encoded one by one."""
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(path / "tokenizer.json"))
    tally = tally_of(open_tokenizer(str(path / "tokenizer.json")))
    if tally is None:
        return {}
    for number, text in enumerate(texts):
        ids = encode(open_tokenizer(str(path / "tokenizer.json")), [text])
        tally.add([Piece(f"text {number}", text, True)], ids)
    return tally.as_dict()


def some_texts(letters: str = LETTERS + OTHERS, seed: int = 0) -> list[str]:
    coin = random.Random(seed)
    return ["".join(coin.choices(letters, k=coin.randrange(30))) for _ in range(20)]


NORMALIZERS = {
    "none": (None, lambda text: text),
    "lower case": (normalizers.Lowercase(), str.lower),
    "composed": (normalizers.NFC(), lambda text: unicodedata.normalize("NFC", text)),
    "without zeros": (normalizers.Replace("\0", ""), lambda text: text.replace("\0", "")),
}


@pytest.mark.parametrize("name", NORMALIZERS)
@pytest.mark.parametrize("letters", [LETTERS, LETTERS + "é"])
def test_characters_that_vanish_are_those_that_no_token_has(
    tmp_path: Path, name: str, letters: str
) -> None:
    tokenizer = bpe(letters)
    tokenizer.normalizer, normal = NORMALIZERS[name]
    texts = some_texts()
    vanished = [
        [character for character in normal(text) if character not in letters] for text in texts
    ]
    found = counted(tokenizer, tmp_path, texts)
    assert found["lost"] == sum(map(len, vanished)) > 0
    assert found["total"] == sum(map(len, texts))
    number = next(number for number, lost in enumerate(vanished) if lost)
    assert str(found["first"]).endswith(f"in text {number}")
    assert "token" not in found


@pytest.mark.parametrize(
    ("normalizer", "splitter", "texts"),
    [
        (normalizers.Lowercase(), None, ["aBCDe"]),
        (
            normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
            None,
            ["ábc\u0301"],
        ),
        (normalizers.NFC(), None, ["e\u0301 \u1100\u1161"]),
        (normalizers.Strip(), None, ["\t abc \t"]),
        (normalizers.Replace(Regex("[0-9]"), ""), None, ["a1b2"]),
        (None, pre_tokenizers.WhitespaceSplit(), ["a\tb\u2003c"]),
        (None, pre_tokenizers.Metaspace(replacement="e"), ["a b"]),
    ],
)
def test_what_a_tokenizer_changes_or_removes_is_not_lost(
    tmp_path: Path, normalizer: object, splitter: object, texts: list[str]
) -> None:
    tokenizer = bpe(LETTERS + "é가" if isinstance(normalizer, normalizers.NFC) else "abcde")
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    assert counted(tokenizer, tmp_path, texts) == {}
    found = counted(tokenizer, tmp_path, [*texts, "ab漢"])
    assert (found["lost"], found["first"]) == (1, f"'漢' in text {len(texts)}")


ENGLISH = "The quick brown fox jumps over the lazy dog, and it's 10 past 9. " * 20
HTML = "<p>a <b>b</b></p>\n" * 5
NO_TAGS, NO_LINES = (Regex(pattern) for pattern in ("<[^>]*>", r"\r\n"))


def with_words(tokenizer: Tokenizer, *words: str | AddedToken) -> Tokenizer:
    tokenizer.add_tokens(list(words))
    return tokenizer


def with_step(tokenizer: Tokenizer, step: object) -> Tokenizer:
    name = "pre_tokenizer" if isinstance(step, pre_tokenizers.PreTokenizer) else "normalizer"
    setattr(tokenizer, name, step)
    return tokenizer


def trained_with_marks() -> Tokenizer:
    tokenizer = with_step(Tokenizer(models.BPE()), pre_tokenizers.Whitespace())
    trainer = trainers.BpeTrainer(
        vocab_size=200, continuing_subword_prefix="##", show_progress=False
    )
    tokenizer.train_from_iterator([ENGLISH], trainer)
    return tokenizer


def whole_words() -> Tokenizer:
    vocab = {token: number for number, token in enumerate([END, "a", " ", "été"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    return with_step(tokenizer, pre_tokenizers.Split(" ", "isolated"))


WHOLE = {  # tokenizers that spell a text, though not each of its characters by itself
    "marks inside words": (trained_with_marks, ENGLISH),
    "added tokens": (
        lambda: with_words(bpe("abc "), "<|user|>", "[SEP]"),
        "<|user|>a b[SEP]<|user|>c[SEP]",
    ),
    "added tokens and an id beyond": (
        lambda: with_words(with_words(bpe("abc "), "x1"), "x2", "x3", "x4"),
        "x1x2x3x4",
    ),
    "tags": (lambda: with_step(bpe("ab \n"), normalizers.Replace(NO_TAGS, "")), HTML),
    "composed": (lambda: with_step(bpe("abcガギ "), normalizers.NFKC()), "ｶﾞｷﾞ abc"),
    "composed, beside its mark": (
        lambda: with_step(bpe("ガギ\u3099 "), normalizers.NFKC()),
        "ｶﾞｷﾞ",
    ),
    "quotes": (lambda: with_step(bpe('ab "'), normalizers.Replace("``", '"')), "``ab`` a"),
    "ends of lines": (
        lambda: with_step(bpe("ab "), pre_tokenizers.Split(NO_LINES, "removed")),
        "ab\r\na\r\n",
    ),
    "single words": (
        lambda: with_words(bpe("ab "), AddedToken("é", single_word=True)),
        "a é b",
    ),
    "whole words": (whole_words, "a été a"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_text_that_is_spelled_as_a_whole_loses_nothing(tmp_path: Path, name: str) -> None:
    make, text = WHOLE[name]
    assert counted(make(), tmp_path, [text]) == {}
    found = counted(make(), tmp_path, [text, text + " 漢", text])
    total = 3 * len(text) + 2
    assert found == {"lost": 1, "total": total, "first": "'漢' in text 1"}


def test_a_letter_at_which_the_library_panics_harms_no_text_without_it(tmp_path: Path) -> None:
    """Here an added token is normalized to nothing, which the library finds inside of letters."""
    tokenizer = with_step(bpe("é. "), normalizers.Replace(NO_TAGS, ""))
    tokenizer.add_tokens(["<|user|>"])
    assert counted(tokenizer, tmp_path, [". ."]) == {}


def test_a_mark_that_is_joined_to_a_letter_which_is_not_there_is_lost(tmp_path: Path) -> None:
    """Each of the two characters is spelled beside others."""
    tokenizer = with_step(bpe(LETTERS + "á\u0301"), normalizers.NFC())
    assert counted(tokenizer, tmp_path, ["a\u0301b\u0301"]) == {}
    assert counted(tokenizer, tmp_path, ["e\u0301"])["lost"] == 1


@pytest.mark.parametrize("kind", ["continuing_subword_prefix", "end_of_word_suffix"])
def test_letters_without_a_token_for_their_place_in_a_word_are_lost(
    tmp_path: Path, kind: str
) -> None:
    mark, other = ("</w>", "a</w>") if "end" in kind else ("##", "##b")
    vocab = {token: number for number, token in enumerate([END, "a", "b", other])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], **{kind: mark}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = counted(tokenizer, tmp_path, ["b a", "ab ab ab", "aba"])
    if "end" in kind:  # no b ends a word
        assert found == {"lost": 4, "total": 14, "first": "'b' in text 0"}
    else:  # no a goes on
        assert found == {"lost": 1, "total": 14, "first": "'a' in text 2"}


@pytest.mark.parametrize("normalizer", [normalizers.NFD(), normalizers.NFKD()])
def test_what_a_normalizer_makes_several_of_counts_once(
    tmp_path: Path, normalizer: normalizers.Normalizer
) -> None:
    text = "abc\n한국어말글…\n" * 30
    found = counted(with_step(bpe("abcde ."), normalizer), tmp_path, [text])
    spelled = "abc…" if isinstance(normalizer, normalizers.NFKD) else "abc"  # … becomes three dots
    lost = sum(letter not in spelled for letter in text)
    assert found == {"lost": lost, "total": len(text), "first": "'\\n' in text 0"}


def test_a_corpus_whose_characters_a_normalizer_takes_apart_is_taken(tmp_path: Path) -> None:
    tokenizer = with_step(bpe(string.ascii_lowercase + " "), normalizers.NFD())
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(tmp_path / "own.json"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("abc\n한국어말글…\n" * 30)
    data = text_config(tmp_path, tokenizer=str(tmp_path / "own.json"))
    for _ in range(2):
        manifest = prepare(data, VOCAB_SIZE, progress=False).manifest
        assert manifest.unspelled == {
            "lost": 8 * 30,
            "total": 11 * 30,
            "first": f"'\\n' in {data.path}/a.txt",
        }


def test_what_is_stripped_at_an_end_is_lost_between_letters(tmp_path: Path) -> None:
    tokenizer = bpe("abc")
    tokenizer.normalizer = normalizers.Strip()
    assert counted(tokenizer, tmp_path, ["\tabc\t"]) == {}
    assert counted(tokenizer, tmp_path, ["\tabc\t", "a\tb"])["lost"] == 1


def test_a_tokenizer_of_bytes_is_not_counted_if_it_has_all(tmp_path: Path) -> None:
    """Nor one with bytes as a fallback: the library says wrongly where its unknown token stands."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    for tokens, lacks in ((letters, "Ã"), (_BYTES, "<0xC3>")):  # the first byte of é and É
        for left_out in ((), (lacks,)):
            kept = (token for token in tokens if token not in left_out)
            vocab = {token: number for number, token in enumerate(kept)}
            model = models.BPE(vocab=vocab, merges=[], byte_fallback=tokens is _BYTES)
            tokenizer = Tokenizer(model)
            if tokens is letters:
                tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            is_counted = bool(left_out) and tokens is letters
            assert (tally_of(tokenizer) is not None) == is_counted
            found = counted(tokenizer, tmp_path, some_texts())
            lost = sum(text.count("é") + text.count("É") for text in some_texts())
            assert found.get("lost", 0) == (lost if is_counted else 0)
    assert tally_of(train_tokenizer(["abc"], VOCAB_SIZE)) is None


_PIECES = [("<unk>", 0.0), *((letter, -1.0) for letter in LETTERS)]
_WORDS = {"<unk>": 0, "ab": 1, "c": 2, "##c": 3}
UNKNOWN = {
    "bpe": bpe("?" + LETTERS, unk_token="?"),
    "bpe, fused": bpe("?" + LETTERS, unk_token="?", fuse_unk=True),
    "unigram": Tokenizer(models.Unigram(_PIECES, unk_id=0)),
    "word pieces": Tokenizer(models.WordPiece(_WORDS, unk_token="<unk>")),
    "words": Tokenizer(models.WordLevel(_WORDS, unk_token="<unk>")),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_tokens_are_counted_with_an_example(tmp_path: Path, name: str) -> None:
    tokenizer, texts = UNKNOWN[name], ["ab c", "", "ab éé c", "é", "ab ab"]
    if "word" in name:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unknown = "?" if "bpe" in name else "<unk>"
    found = counted(tokenizer, tmp_path, texts)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    lost = sum(own.count(tokenizer.token_to_id(unknown)) for own in ids)
    assert lost == (3 if name == "bpe" else 2)
    first = "'é' in text 2" if name == "bpe" else "'éé' in text 2"
    total = sum(map(len, ids))
    assert found == {"lost": lost, "total": total, "first": first, "token": unknown}


WIKI = "a <unk> b <unk> <unk> a . "


@pytest.mark.parametrize("text", [WIKI, WIKI.upper()])
@pytest.mark.parametrize("others", ["", "x ", "x y "])
@pytest.mark.parametrize("kind", ["words", "unigram"])
def test_the_unknown_token_of_a_text_itself_is_not_lost(
    tmp_path: Path, kind: str, others: str, text: str
) -> None:
    if kind == "words":
        tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False)
        tokenizer.train_from_iterator([WIKI], trainer)
    else:
        pieces = [("<unk>", 0.0), *((letter, -1.0) for letter in "ab. ")]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Lowercase()
    found = counted(tokenizer, tmp_path, [text, text + others, text])
    lost = len(others.split())
    assert found.get("lost", 0) == lost
    assert not lost or found["first"] == "'x' in text 1"


@pytest.mark.parametrize(
    ("lost", "total", "share"),
    [
        (4, 4, "100 %"),
        (3_999, 4_000, "100 %"),
        (99, 100, "99 %"),
        (1, 16, "6.2 %"),
        (1, 10_000, "0.01 %"),
        (9, 100_000, "below 0.01 %"),
        (1, 100_000, "below 0.01 %"),
        (1, 100_001, None),
    ],
)
def test_the_share_is_said_from_one_in_a_hundred_thousand_on(
    lost: int, total: int, share: str | None
) -> None:
    words = unspelled_words({"lost": lost, "total": total, "first": "'é' in a"})
    if share is None:
        assert not words
    else:
        assert words.startswith(f"{lost:,} of {total:,} characters vanish ({share}), since the tok")


@pytest.mark.parametrize("texts", [["漢漢漢"], ["漢漢漢", "é"]])
def test_texts_that_vanish_as_a_whole_are_not_called_empty(
    tmp_path: Path, texts: list[str]
) -> None:
    tokenizer = bpe(string.ascii_lowercase)
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(tmp_path / "own.json"))
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / f"text/{number}.txt").write_text(text)
    data = text_config(tmp_path, tokenizer=str(tmp_path / "own.json"))
    after = " and the 1 file after it hold" if len(texts) > 1 else " holds"
    number = len("".join(texts))
    with pytest.raises(ConfigError) as refused:
        prepare(data, VOCAB_SIZE, progress=False)
    place = f"{data.path}/0.txt"
    assert str(refused.value).startswith(
        f"{place}{after} no text that the tokenizer can spell: {number} of {number} characters "
        "vanish (100 %), since the tokenizer cannot spell what stands there: first '漢' in "
        f"{place}; give a data.tokenizer that can"
    )
    (tmp_path / "text/2.txt").write_text("abc")
    left_out = prepare(data, VOCAB_SIZE, progress=False).manifest.left_out
    assert left_out[EMPTY][:2] == [len(texts), f"{place} (the tokenizer makes no token of it)"]


@pytest.mark.parametrize("workers", [1, 3])
def test_the_count_does_not_depend_on_who_tokenizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(encoding, "_BATCH", 50)
    monkeypatch.setattr(encoding, "_ALONE", 2)
    bpe().save(str(tmp_path / "tokenizer.json"))
    tally = tally_of(open_tokenizer(str(tmp_path / "tokenizer.json")))
    assert tally is not None
    texts = some_texts() * 3
    documents = [Document(str(number), (text,)) for number, text in enumerate(texts)]
    found = encoded(
        documents,
        tmp_path / "tokenizer.json",
        longest_run=20,
        longest_piece=25,
        workers=workers,
        tally=tally,
    )
    assert sum(piece.is_last for piece in found) == len(texts)
    assert tally.as_dict()["lost"] == sum(letter in OTHERS for text in texts for letter in text)


def test_it_is_one_warning_of_the_corpus_and_of_each_run(tmp_path: Path) -> None:
    tokenizer = bpe()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(tmp_path / "own.json"))
    (tmp_path / "text").mkdir()
    for name, letters in (("a", "abc"), ("b", "abcé"), ("c", "dé")):
        (tmp_path / f"text/{name}.txt").write_text(letters * 200)
    data = text_config(tmp_path, tokenizer=str(tmp_path / "own.json"))
    corpus = prepare(data, VOCAB_SIZE, progress=False)
    words = (
        f"data.path={data.path}: 400 of 1,800 characters vanish (22 %), since the tokenizer cannot "
        f"spell what stands there: first 'é' in {data.path}/b.txt; give a data.tokenizer that can"
    )
    for one in (corpus, prepare(data, VOCAB_SIZE, progress=False)):
        (found,) = text_warnings(data, (one,), {})
        assert found.startswith(words)
    (found,) = (line for line in open_source(run_config(data)).warnings if "spell" in line)
    assert found.startswith(words)
    named = replace(data, validation=(ValidationEntry("own", f"{data.path}/c.txt"),))
    sets = prepare_validation(named, VOCAB_SIZE, (corpus,), progress=False)
    found = text_warnings(named, (corpus,), sets)[-1]
    assert found.startswith("data.validation, own: 200 of 400 characters vanish (50 %)")
    for letters in ("abc", "é"):
        (tmp_path / f"text/{letters}.txt").write_text(letters * 100)
    spelled = replace(data, path=f"{data.path}/abc.txt")
    assert not text_warnings(spelled, (prepare(spelled, VOCAB_SIZE, progress=False),), {})
    with pytest.raises(ConfigError, match="no text"):
        prepare(replace(data, path=f"{data.path}/é.txt"), VOCAB_SIZE, progress=False)
