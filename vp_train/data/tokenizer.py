"""Tokenizers: read from a tokenizer.json, or a byte-level BPE trained on the corpus."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from vp_train.config import ConfigError
from vp_train.durable import PointerError, UnreadableError, read_bytes, read_json, read_text

END_OF_TEXT = "<|endoftext|>"
_USUAL_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "<eos>", "</s>", "<|im_end|>", "[SEP]")
LARGEST_TOKENIZER = 1 << 28  # bytes of a tokenizer.json; those of 256 thousand tokens have 35 MB
_SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # and a byte of a character that it does not know
_SMALLEST = 257  # 256 bytes and the end of a document


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens.

    It has fewer tokens if the text runs out of pairs to merge.  Raises ConfigError like
    `require_bytes`.
    """
    require_bytes(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def require_bytes(vocab_size: int) -> None:
    """Raise ConfigError if a vocabulary is too small to hold every byte."""
    if vocab_size < _SMALLEST:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is too small for a byte-level tokenizer; "
            f"use at least {_SMALLEST}"
        )


def load_tokenizer(path: Path, vocab_size: int | None) -> Tokenizer:
    """Read a tokenizer.json.

    Raises ConfigError if it is broken, or if its own vocabulary has ids of `vocab_size` or above.
    Tokens that were added to it may have such ids, since a text may have none of them.
    """
    tokenizer = _read(path)
    size = num_ids(tokenizer, added=False)
    if vocab_size is not None and size > vocab_size:
        raise ConfigError(beyond(f"{path} has token ids up to {size - 1},", size - 1, vocab_size))
    return tokenizer


def _read(path: Path) -> Tokenizer:
    """Read a tokenizer.json, without its limits of length.  Raises ConfigError if it is broken."""
    try:
        tokenizer = Tokenizer.from_str(read_text(path, LARGEST_TOKENIZER))
    except PointerError as error:
        raise ConfigError(f"data.tokenizer={error}") from None
    except UnreadableError as error:
        raise ConfigError(f"data.tokenizer={error}; give the path of a tokenizer.json") from None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in the library is no Exception
        raise ConfigError(f"data.tokenizer={path} is not a tokenizer.json: {error}") from None
    tokenizer.no_truncation()  # the file may hold limits of the model it was made for
    tokenizer.no_padding()
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write what `Tokenizer.save` writes.  Raises OSError for a full disk, which that does not."""
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def tokenizer_hash(path: Path) -> str:
    """Return 16 hexadecimal digits that are equal for files of the same tokenizer.

    Limits of length and the layout of the file do not count, nor what is put around a text, which
    is not asked for here.  A file that holds no tokenizer has the hash of its bytes.  Raises
    UnreadableError for a file that cannot be read.
    """
    try:
        tokenizer = _read(path)
        tokenizer.post_processor = None
        content = tokenizer.to_str().encode()
    except ConfigError:
        content = read_bytes(path, LARGEST_TOKENIZER)
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def end_of(path: Path, name: str | None) -> int | None:
    """Return the token that ends a document, as `end_token_id`; None for a broken file or none."""
    try:
        return end_token_id(_read(path), name)
    except ConfigError:
        return None


def begin_of(path: Path, name: str | None) -> int | None:
    """Return the id of the token `name`, None for a broken file or no such token."""
    try:
        return None if name is None else begin_token_id(_read(path), name)
    except ConfigError:
        return None


def front_of(path: Path) -> str | None:
    """Return the token that a tokenizer puts in front of a text, None for a broken file or none."""
    try:
        return front_token(_read(path))
    except ConfigError:
        return None


def token_of(path: Path, token_id: int) -> str | None:
    """Return the text of a token, None for an id or a file that has none."""
    try:
        token: str | None = _read(path).id_to_token(token_id)
    except ConfigError:
        return None
    return token


def begin_of_run(directory: Path) -> str | None:
    """Return the token that a run has put in front of its documents, None if there is none."""
    words = tokenizer_config_in(directory)
    return token_in(words, "bos_token") if words.get("add_bos_token") is True else None


def begin_by_files(directory: Path) -> str | None:
    """Return the token that the files of a tokenizer put in front of a text, None if there is none.

    add_bos_token of tokenizer_config.json counts where tokenizer.json puts none there, or if it is
    false.
    """
    words = tokenizer_config_in(directory)
    is_added = words.get("add_bos_token")
    if is_added is False:
        return None
    path = directory / "tokenizer.json"
    found = front_of(path)
    if found is None and is_added is True:
        found = token_in(words, "bos_token")
        return None if begin_of(path, found) is None else found
    return found


def tokenizer_config_in(directory: Path) -> Mapping[str, object]:
    """Return the tokenizer_config.json of a directory, nothing if it cannot be read."""
    with suppress(UnreadableError):
        values = read_json(directory / "tokenizer_config.json", LARGEST_TOKENIZER)
        return values if isinstance(values, dict) else {}
    return {}


def token_in(words: Mapping[str, object], name: str) -> str | None:
    """Return a token that a tokenizer_config.json names, None if it names none."""
    token = words.get(name)
    if isinstance(token, dict):  # as versions before 5 of transformers wrote it
        token = token.get("content")
    return token if isinstance(token, str) else None


def tokenizer_config(
    path: Path, end: int, *, begin: int | None = None, longest: int, after_end: bool
) -> dict[str, object]:
    """Return what transformers needs beside a tokenizer.json, for its tokenizer_config.json.

    end: the id of the token that ends every document of the training text; it pads too.
    begin: that of the token that was put in front of every document, None if there was none.
    longest: tokens of a sequence.
    after_end: whether documents were trained with the end of the one before in sight; then that
        token also begins a text.
    """
    tokenizer = _read(path)
    token = tokenizer.id_to_token(end)
    first = None if begin is None else tokenizer.id_to_token(begin)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": first or (token if after_end else None),
        **({"add_bos_token": True} if first else {}),
        "eos_token": token,
        "pad_token": token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }


def byte_lengths(tokenizer: Tokenizer) -> list[int]:
    """Return how many bytes of UTF-8 each token stands for in a text, by id.

    Special tokens stand for none.  Of a byte-level tokenizer, and one with bytes as a fallback, the
    lengths add up to those of the text.
    """
    described = json.loads(tokenizer.to_str())
    is_byte_level = '"ByteLevel"' in json.dumps(described.get("decoder"))
    lengths = [0] * num_ids(tokenizer)
    for token, number in tokenizer.get_vocab(with_added_tokens=True).items():
        if is_byte_level:
            lengths[number] = len(token)  # a letter for each byte
        else:
            spelled = token.replace(_SPACE, " ")
            lengths[number] = 1 if _BYTE.fullmatch(token) else len(spelled.encode())
    for number, added in tokenizer.get_added_tokens_decoder().items():
        lengths[number] = 0 if added.special else len(added.content.encode())
    return lengths


def spells_bytes(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer has a token for every byte, and takes it: it spells any text."""
    described = json.loads(tokenizer.to_str())
    model, vocab = described["model"], tokenizer.get_vocab(with_added_tokens=False).keys()
    if model.get("byte_fallback"):
        return {f"<0x{number:02X}>" for number in range(256)} <= vocab
    steps = json.dumps([described.get("normalizer"), described.get("pre_tokenizer")])
    is_letters = model["type"] in ("BPE", "Unigram") and '"ByteLevel"' in steps
    has_all = set(pre_tokenizers.ByteLevel.alphabet()) <= vocab
    return is_letters and has_all and not _marks_words(model)


def marks_words(tokenizer: Tokenizer) -> bool:
    """Return whether tokens inside a word, or at its end, are written with a mark of their own."""
    return _marks_words(json.loads(tokenizer.to_str())["model"])


def _marks_words(model: Mapping[str, object]) -> bool:
    return bool(model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"))


def unknown_token(tokenizer: Tokenizer) -> str | None:
    """Return the token that stands for what a tokenizer cannot spell, None if it has none."""
    model = json.loads(tokenizer.to_str())["model"]
    token = model.get("unk_token")
    if model.get("unk_id") is not None:  # of a Unigram
        token, _ = model["vocab"][model["unk_id"]]
    return token if token is not None and tokenizer.token_to_id(token) is not None else None


def with_unknown(tokenizer: Tokenizer, token: str) -> Tokenizer | None:
    """Return a BPE with the new token `token` for each character that it cannot spell.

    Of another kind of tokenizer, which raises an error without an unknown token, return None; and
    of one with bytes as a fallback, as the library gives wrong places to the unknown token there.
    """
    described = json.loads(tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        return None
    # Added tokens get new numbers as the vocabulary grows; none may get that of the new token.
    vocab = model["vocab"] | {token: num_ids(tokenizer) + len(described["added_tokens"]) + 1}
    model |= {"vocab": vocab, "unk_token": token, "fuse_unk": False}
    made = Tokenizer.from_str(json.dumps(described))
    made.encode_special_tokens = True
    return made


def num_ids(tokenizer: Tokenizer, *, added: bool = True) -> int:
    """Return the size of a vocabulary that holds every id of the tokenizer.

    added: with the tokens that were added to its own vocabulary.
    """
    numbers = tokenizer.get_vocab(with_added_tokens=added).values()
    return max((number + 1 for number in numbers), default=0)


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the special tokens and their texts."""
    added = tokenizer.get_added_tokens_decoder()
    return {number: token.content for number, token in added.items() if token.special}


def front_token(tokenizer: Tokenizer) -> str | None:
    """Return the token that a tokenizer puts in front of a text by itself, None if it puts none.

    transformers asks for it, corpora do not: they have `data.begin_token`.
    """
    whole, bare = (tokenizer.encode("a", add_special_tokens=added).ids for added in (True, False))
    if not whole or whole[:1] == bare[:1]:
        return None
    token: str | None = tokenizer.id_to_token(whole[0])
    return None if token is None or tokenizer.token_to_id(token) in bare else token


def with_front_token(content: str, token: str) -> str:
    """Return the text of a tokenizer.json that puts `token`, which it has, in front of each text.

    A tokenizer that does so already stays as it is.
    """
    tokenizer = Tokenizer.from_str(content)
    if front_token(tokenizer) == token:
        return content
    values = json.loads(content)
    before = values.get("post_processor") or {}
    steps = before.get("processors", [before])
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    text, other = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    number = tokenizer.token_to_id(token)
    template = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, other],
        "special_tokens": {token: {"id": token, "ids": [number], "tokens": [token]}},
    }
    kept = [step for step in steps if step.get("type") == "ByteLevel"]  # it adds no token
    values["post_processor"] = {"type": "Sequence", "processors": [*kept, template]}
    return json.dumps(values, indent=2, ensure_ascii=False)


def begin_token_id(tokenizer: Tokenizer, name: str, vocab_size: int | None = None) -> int:
    """Return the id of the token `name`, which begins a document.

    Raises ConfigError if the tokenizer has none, and if its id is `vocab_size` or above.
    """
    found = tokenizer.token_to_id(name)
    if found is None:
        known = ", ".join(list(special_tokens(tokenizer).values())[:8])
        raise ConfigError(
            f"the tokenizer has no token data.begin_token={name}; its special tokens are "
            f"{known or 'none'}; set one of its tokens, or data.begin_token=null"
        )
    if vocab_size is not None and found >= vocab_size:
        raise ConfigError(beyond(f"data.begin_token={name} is token {found},", found, vocab_size))
    return int(found)


def beyond(words: str, largest: int, vocab_size: int) -> str:
    """Return the message about a token that a model does not have.

    Weights from elsewhere have the rows that they have, so there the tokenizer must change.
    """
    return (
        f"{words} but model.vocab_size={vocab_size}; set it to {largest + 1} or more, or, where "
        "run.init_from fixes it, data.tokenizer to the tokenizer of those weights"
    )


def end_token_id(tokenizer: Tokenizer, name: str | None, vocab_size: int | None = None) -> int:
    """Return the id of the token that ends a document.

    It is the token `name`, or the first usual one that the tokenizer has if `name` is None.  Raises
    ConfigError if there is none, and if its id is `vocab_size` or above.
    """
    names = _USUAL_END_TOKENS if name is None else (name,)
    for candidate in names:
        found = tokenizer.token_to_id(candidate)
        if found is not None and (vocab_size is None or found < vocab_size):
            return int(found)
    if len(names) == 1 and found is not None:
        words = f"data.end_token={name} is token {found},"
        raise ConfigError(beyond(words, found, vocab_size or 0))
    raise ConfigError(
        f"the tokenizer has no token {' or '.join(names)}; "
        "set data.end_token to the one that ends a document"
    )
