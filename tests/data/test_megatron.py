"""Corpora of Megatron-LM come in token for token, and damaged ones end with one clear error."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from tests.data.cases import run_config, text_config, train_batch, write_letters
from vp_train.commands import prepare as command
from vp_train.config import BlendEntry, ConfigError, DataConfig, ValidationEntry
from vp_train.data import Corpus, megatron, open_source, prepare, prepare_all, prepare_validation
from vp_train.data.corpus import trained_on
from vp_train.data.documents import Reading, read_documents
from vp_train.data.files import find_files
from vp_train.data.indexed import open_dataset
from vp_train.data.left_out import EMPTY, LeftOut
from vp_train.data.megatron import stored_documents
from vp_train.failures import EXIT_CONFIG, EXIT_OK
from vp_train.quiet import quiet_megatron

VOCAB_SIZE = 300
END, OTHER_END = 0, 1
Documents = Sequence[Sequence[Sequence[int]]]  # each has sequences of tokens
PLAIN: Documents = [[[5, 6, 7, END]], [[8, END]], [[9, 10, 11, 12, END]]]


def write_tokenizer(path: Path, size: int = VOCAB_SIZE) -> Path:
    """Write a tokenizer whose token i is `wi`, but for two special ones that end documents."""
    words = {"<|endoftext|>": END, "</s>": OTHER_END} | {f"w{i}": i for i in range(2, size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.add_special_tokens(["<|endoftext|>", "</s>"])
    tokenizer.save(str(path))
    return path


def write_pair(
    prefix: Path, documents: Documents, dtype: type = np.int32, multimodal: bool = False
) -> Path:
    """Write documents with Megatron's own builder, and return the index."""
    with quiet_megatron():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype, multimodal=multimodal)
    for sequences in documents:
        lengths = [len(sequence) for sequence in sequences]
        modes = [0] * len(lengths) if multimodal else None
        builder.add_document(list(chain.from_iterable(sequences)), lengths, modes)
    builder.finalize(f"{prefix}.idx")
    return Path(f"{prefix}.idx")


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Return settings for `tmp_path`/text with a tokenizer of 300 tokens."""
    (tmp_path / "text").mkdir()
    return text_config(tmp_path, tokenizer=str(write_tokenizer(tmp_path / "tokenizer.json")))


def documents_of(corpus: Corpus) -> list[list[int]]:
    dataset = open_dataset(corpus.prefix)
    return [dataset.get(number).tolist() for number in range(len(dataset))]


def in_our_form(documents: Documents) -> list[list[int]]:
    """Return the documents that have text, each with one end token behind it."""
    flat = [list(chain.from_iterable(sequences)) for sequences in documents]
    texts = [tokens[:-1] if tokens[-1:] == [END] else tokens for tokens in flat]
    return [[*tokens, END] for tokens in texts if tokens]


def random_documents(coin: random.Random) -> Documents:
    """Return documents of no, one or several sequences, some without tokens or an end token."""
    tokens = [END, OTHER_END, *range(2, VOCAB_SIZE)]

    def sequence() -> list[int]:
        return coin.choices(tokens, k=coin.choice((0, 1, 2, 9, 40)))

    documents = []
    for _ in range(30):
        sequences = [sequence() for _ in range(coin.choice((0, 1, 1, 3)))]
        if sequences and coin.random() < 0.6:
            sequences[coin.randrange(len(sequences))].append(END)
        documents.append(sequences)
    return [[[2, 3, END]], *documents]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("seed", range(4))
def test_documents_come_back_token_for_token(
    tmp_path: Path, data: DataConfig, dtype: type, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "_BLOCK", 1 + 7 * seed)  # long documents come in pieces
    documents = random_documents(random.Random(seed))
    index = write_pair(tmp_path / "text/my.corpus_text_document", documents, dtype)
    corpus = prepare(replace(data, path=str(index)), VOCAB_SIZE, progress=False)
    expected = in_our_form(documents)
    assert documents_of(corpus) == expected
    manifest, num_empty = corpus.manifest, len(documents) - len(expected)
    assert num_empty > 0
    assert manifest.left_out[EMPTY][0] == num_empty
    assert (manifest.num_files, manifest.end_token, manifest.vocab_size) == (2, END, VOCAB_SIZE)
    assert manifest.num_documents == len(expected)
    assert manifest.num_tokens == sum(map(len, expected))
    assert manifest.largest_token == max(map(max, expected))


def test_a_corpus_of_our_form_comes_back_byte_for_byte(tmp_path: Path, data: DataConfig) -> None:
    index = write_pair(tmp_path / "text/a", PLAIN, np.uint16)
    corpus = prepare(data, VOCAB_SIZE, progress=False)
    for name in (".bin", ".idx"):
        assert Path(f"{corpus.prefix}{name}").read_bytes() == index.with_suffix(name).read_bytes()


def test_every_way_to_name_a_pair_gives_the_same_documents(
    tmp_path: Path, data: DataConfig
) -> None:
    write_pair(tmp_path / "text/a", PLAIN)
    for name in ("text", "text/a", "text/a.bin", "text/a.idx"):
        corpus = prepare(replace(data, path=str(tmp_path / name)), VOCAB_SIZE, progress=False)
        assert documents_of(corpus) == in_our_form(PLAIN)


def test_pairs_of_a_directory_follow_each_other_by_name(tmp_path: Path, data: DataConfig) -> None:
    (tmp_path / "text/a").mkdir()
    parts = {"b": [[[20, END]]], "a/z": [[[21]]], "a.b": [[]], "c": PLAIN}
    for name, documents in parts.items():
        write_pair(tmp_path / "text" / name, documents)
    (tmp_path / "text/notes.bak").write_text("left out")
    corpus = prepare(data, VOCAB_SIZE, progress=False)
    ordered = [parts[name] for name in ("a/z", "a.b", "b", "c")]
    assert documents_of(corpus) == in_our_form(list(chain.from_iterable(ordered)))
    assert corpus.manifest.num_files == 8


def test_training_sees_the_batches_of_the_same_text(tmp_path: Path) -> None:
    write_letters(tmp_path / "text", [30, 1, 64, 17, 90, 45, 28, 33, 70, 12])
    letters = {chr(number): number - 31 for number in range(32, 127)}
    words = Tokenizer(models.WordLevel({"<|endoftext|>": 0} | letters, unk_token=" "))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(tmp_path / "tokenizer.json"))
    ours = text_config(tmp_path, tokenizer=str(tmp_path / "tokenizer.json"), packing="documents")
    texts = [document.text for document in read_documents(find_files(ours), "text")]
    documents = [[[*words.encode(text).ids, END]] for text in texts]
    index = write_pair(tmp_path / "pair", documents, np.uint16)
    sources = [open_source(run_config(data)) for data in (ours, replace(ours, path=str(index)))]
    batches = [
        [*(train_batch(source, step) for step in (1, 2, 3, 9)), source.validation_batch()]
        for source in sources
    ]
    for text, pair in zip(*batches, strict=True):
        assert torch.equal(text.tokens, pair.tokens)
        assert torch.equal(text.labels, pair.labels)
        assert text.segments is not None
        assert pair.segments is not None
        assert torch.equal(text.segments, pair.segments)


def _cut(name: str, size: int) -> Callable[[Path], None]:
    def damage(index: Path) -> None:
        file = index.with_suffix(name)
        file.write_bytes(file.read_bytes()[:size])

    return damage


def _patch(offset: int, kind: str, value: float | bytes) -> Callable[[Path], None]:
    def damage(index: Path) -> None:
        content = bytearray(index.read_bytes())
        struct.pack_into(kind, content, offset, value)
        index.write_bytes(content)

    return damage


# PLAIN: the header has 34 bytes, then come 3 lengths, 3 starts and 4 ends.
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda index: index.with_suffix(".bin").unlink(), "a.idx needs a.bin beside it"),
        (_cut(".idx", 0), "a.idx has 0 bytes and is cut off"),
        (_cut(".idx", 33), "a.idx has 33 bytes and is cut off"),
        (_cut(".idx", 101), "a.idx has 101 bytes, but its 3 sequences and 4 ends .* take 102"),
        (_cut(".bin", 43), "a.bin has 43 bytes, but its index points at 44: it is cut off"),
        (_cut(".bin", 0), "a.bin has 0 bytes, but its index points at 44: it is cut off"),
        (lambda index: index.with_suffix(".bin").open("ab").write(b"0"), "do not belong together"),
        (_patch(0, "6s", b"TNTIDX"), "a.idx begins with b'TNTIDXX', version 1, not"),
        (_patch(9, "<Q", 2), "a.idx begins with b'MMIDIDX', version 2, not"),
        (_patch(17, "B", 6), "dtype 6, which are no integers"),
        (_patch(17, "B", 8), "sequence 1 has 2 tokens from byte 16 of 44, .* ends at byte 8"),
        (_patch(18, "<Q", 2**63), "sequences and 4 ends of documents take"),
        (_patch(26, "<Q", 0), "sequences and 0 ends of documents take"),
        (_patch(34, "<i", -1), "sequence 0 has -1 tokens"),
        (_patch(38, "<i", 1), "sequence 2 has 5 tokens from byte 24 of 44, .* ends at byte 20"),
        (_patch(54, "<q", 1_000), "sequence 1 has 2 tokens from byte 1,000 of 44"),
        (_patch(42, "<i", 6), "a.bin has 44 bytes, but its index points at 48: it is cut off"),
        (_patch(70, "<q", 1), "documents do not follow each other"),
        (_patch(78, "<q", 3), "documents do not follow each other"),
        (_patch(94, "<q", 2), "documents do not follow each other"),
        (_patch(94, "<q", 4), "documents do not follow each other"),
    ],
)
def test_what_is_damaged_is_named(
    tmp_path: Path, data: DataConfig, damage: Callable[[Path], None], words: str
) -> None:
    index = write_pair(tmp_path / "text/a", PLAIN)
    damage(index)
    with pytest.raises(ConfigError, match=words):
        prepare(replace(data, path=str(index)), VOCAB_SIZE, progress=False)
    assert not list((tmp_path / "cache").glob("text-*"))


def test_no_damage_of_an_index_gives_other_tokens(tmp_path: Path) -> None:
    coin = random.Random(0)
    index = write_pair(tmp_path / "a", random_documents(coin)[:12], np.uint16)
    whole, messages = index.read_bytes(), set()

    def tokens() -> list[int]:
        found = stored_documents([index], VOCAB_SIZE, OTHER_END, {}, Reading(LeftOut()))
        return [int(token) for document in found for token in document.ids]

    def outcome(content: bytes) -> list[int] | None:
        index.write_bytes(content)
        try:
            return tokens()
        except ConfigError as error:
            messages.add(str(error))
            return None

    for size in range(len(whole)):
        assert outcome(whole[:size]) is None
    expected = np.fromfile(index.with_suffix(".bin"), np.uint16).tolist()
    refused = 0
    for offset in range(len(whole)):
        for _ in range(3):
            byte = bytes([whole[offset] ^ coin.randrange(1, 256)])
            found = outcome(whole[:offset] + byte + whole[offset + 1 :])
            refused += found is None
            # No hash protects where a document ends, so its last token may be dropped or not.
            if found is not None:
                kept = iter(expected)
                assert all(token in kept for token in found)
                assert sum(token != OTHER_END for token in found) == sum(
                    token != OTHER_END for token in expected
                )
    assert refused > 2.5 * len(whole)
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize(
    ("documents", "dtype", "words"),
    [
        (
            [[[2, 3]], [[4, 300]]],
            np.uint16,
            r"token 300 at offset 3 \(document 1\) is not in",
        ),
        (
            [[[2, 3]], [[4, -1, END]]],
            np.int32,
            r"token -1 at offset 3 \(document 1\) is not in",
        ),
        ([], np.int32, r"1 file after it hold no tokens \(no documents\)"),
        ([[], [[]], [[END]]], np.int32, r"hold no tokens \(left out, empty documents: 3; first "),
        (
            [[], [[4], [5, OTHER_END]]],
            np.int32,
            "document 1 ends with '</s>', .* data.end_token",
        ),
    ],
)
def test_tokens_that_do_not_fit_are_named(
    tmp_path: Path, data: DataConfig, documents: Documents, dtype: type, words: str
) -> None:
    write_pair(tmp_path / "text/a", documents, dtype)
    with pytest.raises(ConfigError, match=words):
        prepare(data, VOCAB_SIZE, progress=False)


def test_the_end_token_that_is_set_counts(tmp_path: Path, data: DataConfig) -> None:
    write_pair(tmp_path / "text/a", [[[4, OTHER_END]], [[5, END]]])
    corpus = prepare(replace(data, end_token="</s>"), VOCAB_SIZE, progress=False)
    assert documents_of(corpus) == [[4, OTHER_END], [5, END, OTHER_END]]


def test_multimodal_sequences_are_refused(tmp_path: Path, data: DataConfig) -> None:
    write_pair(tmp_path / "text/a", PLAIN, multimodal=True)
    with pytest.raises(ConfigError, match=r"a\.idx has a mode for each sequence: it is multimodal"):
        prepare(data, VOCAB_SIZE, progress=False)


def test_tokens_that_spell_a_text_are_never_read_as_one(tmp_path: Path, data: DataConfig) -> None:
    index = write_pair(tmp_path / "text/a", [[[65, 66]]], np.uint8)
    assert index.with_suffix(".bin").read_text() == "AB"
    corpus = prepare(replace(data, path=str(tmp_path / "text/a.bin")), VOCAB_SIZE, progress=False)
    assert documents_of(corpus) == [[65, 66, END]]
    with pytest.raises(ConfigError, match="text is needed here"):
        list(read_documents([index.with_suffix(".bin")], "text"))
    index.unlink()
    with pytest.raises(ConfigError, match=r"a\.bin needs a\.idx beside it"):
        prepare(replace(data, path=str(tmp_path / "text/a.bin")), VOCAB_SIZE, progress=False)


def test_a_directory_holds_whole_pairs_or_text(tmp_path: Path, data: DataConfig) -> None:
    index = write_pair(tmp_path / "text/a", PLAIN)
    (tmp_path / "text/b.idx").write_bytes(index.read_bytes())
    with pytest.raises(ConfigError, match=r"b\.idx needs b\.bin beside it"):
        prepare(data, VOCAB_SIZE, progress=False)
    (tmp_path / "text/b.idx").rename(tmp_path / "text/c.txt")
    with pytest.raises(ConfigError, match=r"holds text \(.*c\.txt\) and tokens of Meg.*a\.bin"):
        prepare(data, VOCAB_SIZE, progress=False)
    index.unlink()  # what is left has nothing to do with Megatron-LM
    (tmp_path / "text/c.txt").write_text("w5")
    left_out = LeftOut()
    assert find_files(data, left_out) == (tmp_path / "text/c.txt",)
    assert left_out.first == {"files with other endings": str(tmp_path / "text/a.bin")}


def test_a_corpus_of_vp_prepare_below_the_text_stays_left_out(
    tmp_path: Path, data: DataConfig
) -> None:
    (tmp_path / "text/a.txt").write_text("w5")
    inside = replace(data, cache_dir=str(tmp_path / "text/cache"))
    corpus = prepare(inside, VOCAB_SIZE, progress=False)
    again = prepare(inside, VOCAB_SIZE, progress=False)
    assert (again.path, again.fresh) == (corpus.path, False)


def test_the_tokenizer_of_tokens_must_be_given(tmp_path: Path, data: DataConfig) -> None:
    index = write_pair(tmp_path / "text/a", PLAIN)
    (tmp_path / "b.txt").write_text("some text to train a tokenizer on")
    text, pair = str(tmp_path / "b.txt"), str(index)
    blend = (BlendEntry(path=text), BlendEntry(path=pair))
    validation = (ValidationEntry(name="pair", path=pair),)
    for config in (
        replace(data, tokenizer=None),
        replace(data, tokenizer=None, name="blend", path=None, blend=blend),
        replace(data, tokenizer=None, path=text, validation=validation),
    ):
        with pytest.raises(ConfigError, match=r"a\.\w+ holds tokens of Megatron-LM; set data"):
            prepare_all(config, VOCAB_SIZE, progress=False)


def test_text_and_tokens_share_a_blend_and_a_validation_set(
    tmp_path: Path, data: DataConfig
) -> None:
    index = write_pair(tmp_path / "text/a", PLAIN)
    (tmp_path / "b.txt").write_text("w5")
    entries = (BlendEntry(path=str(tmp_path / "b.txt")), BlendEntry(path=str(index)))
    sets = (ValidationEntry(name="pair", path=str(index)),)
    blend = replace(data, name="blend", path=None, blend=entries, validation=sets)
    corpora = prepare_all(blend, VOCAB_SIZE, progress=False)
    named = prepare_validation(blend, VOCAB_SIZE, corpora, progress=False)
    assert [documents_of(corpus) for corpus in (*corpora, *named.values())] == [
        [[5, END]],
        in_our_form(PLAIN),
        in_our_form(PLAIN),
    ]


def test_equal_indexes_of_other_tokens_are_no_warning(tmp_path: Path, data: DataConfig) -> None:
    def warned(tokens: Sequence[int]) -> bool:
        write_pair(tmp_path / "other", [[[*tokens, END]]])
        sets = (ValidationEntry(name="other", path=str(tmp_path / "other.idx")),)
        return bool(trained_on(replace(data, validation=sets), ()))

    write_pair(tmp_path / "text/a", [[[5, 6, END]]])
    assert warned([5, 6])
    assert not warned([5, 7])


def test_vp_prepare_says_what_is_wrong_in_one_line(
    tmp_path: Path,
    data: DataConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def ending() -> tuple[object, str, list[str]]:
        with pytest.raises(SystemExit) as caught:
            command.main()
        out, err = capsys.readouterr()
        return caught.value.code, out, err.splitlines()

    index = write_pair(tmp_path / "text/a", PLAIN)
    settings = {"path": index, "tokenizer": data.tokenizer, "cache_dir": data.cache_dir}
    words = [f"data.{name}={value}" for name, value in settings.items()]
    monkeypatch.setattr(sys, "argv", ["vp-prepare", "data=text", *words])
    code, out, _ = ending()
    assert code == EXIT_OK
    assert "2 files, 3 documents, 11 tokens" in out
    index.with_suffix(".bin").write_bytes(b"")
    code, out, lines = ending()
    assert (code, out) == (EXIT_CONFIG, "")
    assert [line.startswith("vp-prepare: ") for line in lines] == [False, True]
