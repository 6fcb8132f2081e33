"""What a tokenizer cannot spell is counted, whether it vanishes or is unknown, and said once."""

from __future__ import annotations

import random
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from tests.data.cases import VOCAB_SIZE, run_config, text_config
from vp_train.config import ConfigError, ValidationEntry
from vp_train.data import encoding, open_source, prepare, prepare_validation
from vp_train.data.corpus import left_out_warnings
from vp_train.data.documents import Document
from vp_train.data.encoding import Piece, encoded
from vp_train.data.tokenizer import train_tokenizer
from vp_train.data.unspelled import tally_of
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


def test_what_is_stripped_at_an_end_is_lost_between_letters(tmp_path: Path) -> None:
    tokenizer = bpe("abc")
    tokenizer.normalizer = normalizers.Strip()
    assert counted(tokenizer, tmp_path, ["\tabc\t"]) == {}
    assert counted(tokenizer, tmp_path, ["\tabc\t", "a\tb"])["lost"] == 1


def test_a_tokenizer_of_bytes_is_not_counted_if_it_has_all(tmp_path: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    for tokens, lacks in ((letters, "Ã"), (_BYTES, "<0xC3>")):  # the first byte of é and É
        for left_out in ((), (lacks,)):
            kept = (token for token in tokens if token not in left_out)
            vocab = {token: number for number, token in enumerate(kept)}
            model = models.BPE(vocab=vocab, merges=[], byte_fallback=tokens is _BYTES)
            tokenizer = Tokenizer(model)
            if tokens is letters:
                tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            assert (tally_of(tokenizer) is None) == (not left_out)
            found = counted(tokenizer, tmp_path, some_texts())
            lost = sum(text.count("é") + text.count("É") for text in some_texts())
            assert found.get("lost", 0) == (lost if left_out else 0)
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
        (found,) = left_out_warnings(data, (one,), {})
        assert found.startswith(words)
    (found,) = (line for line in open_source(run_config(data)).warnings if "spell" in line)
    assert found.startswith(words)
    named = replace(data, validation=(ValidationEntry("own", f"{data.path}/c.txt"),))
    sets = prepare_validation(named, VOCAB_SIZE, (corpus,), progress=False)
    found = left_out_warnings(named, (corpus,), sets)[-1]
    assert found.startswith("data.validation, own: 200 of 400 characters vanish (50 %)")
    for letters in ("abc", "é"):
        (tmp_path / f"text/{letters}.txt").write_text(letters * 100)
    spelled = replace(data, path=f"{data.path}/abc.txt")
    assert not left_out_warnings(spelled, (prepare(spelled, VOCAB_SIZE, progress=False),), {})
    with pytest.raises(ConfigError, match="no text"):
        prepare(replace(data, path=f"{data.path}/é.txt"), VOCAB_SIZE, progress=False)
