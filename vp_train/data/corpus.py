"""Prepared corpora: tokenized text in a directory named by a hash, complete or absent.

The hash covers the contents of the files, the tokenizer, and the settings that decide the tokens.
It does not cover the vocabulary of a model: a corpus serves every model that has its tokens.  The
directory holds the tokens (Megatron's indexed dataset), the tokenizer and a manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vp_train.config import (
    BlendEntry,
    ConfigError,
    DataConfig,
    RunConfig,
    ValidationEntry,
    printable,
)
from vp_train.config.typed import shell_word
from vp_train.data.documents import Reading, read_documents
from vp_train.data.encoding import Encoded, encoded
from vp_train.data.files import INDEX, content_hash, find_files, hash_of_file, kind_of, kind_to_read
from vp_train.data.indexed import (
    check_index,
    check_tokens,
    largest_token,
    open_dataset,
    write_dataset,
)
from vp_train.data.integrity import block_hashes, check_blocks, check_once
from vp_train.data.json_lines import LONGEST_LINE
from vp_train.data.left_out import EMPTY, OF_FIELDS, LeftOut, much_left_out, outweighed, words_of
from vp_train.data.locks import alone, building_place, remove_left
from vp_train.data.manifest import (
    FILES,
    MANIFEST,
    Manifest,
    is_outdated,
    manifest_text,
    read_manifest,
    size_of,
)
from vp_train.data.megatron import stored_documents
from vp_train.data.pieces import LONGEST_PIECE, pieces
from vp_train.data.progress import far, reported
from vp_train.data.tokenizer import (
    begin_token_id,
    beyond,
    end_token_id,
    front_token,
    load_tokenizer,
    num_ids,
    require_bytes,
    save_tokenizer,
    special_tokens,
    train_tokenizer,
)
from vp_train.data.unspelled import tally_of, unspelled_words
from vp_train.data.worker import open_tokenizer
from vp_train.durable import UnreadableError, read_text, sync
from vp_train.units import count_words, human_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_FORMAT = 2
_LONGEST_WORD = 100_000  # characters, for which a tokenizer takes 0.1 s
_LONGEST_TRAINED_WORD = 1_000
_TRAINED_PIECE = 1 << 18  # characters; the trainer keeps hundreds
_TRAINING_CHARACTERS = 200_000_000  # more text does not change a tokenizer's merges noticeably
_SOON_HASHED = 1 << 30  # bytes


@dataclass(frozen=True, slots=True)
class Corpus:
    """A complete corpus on disk.  `fresh` is True if this process has just built it."""

    path: Path
    manifest: Manifest
    fresh: bool

    @property
    def prefix(self) -> Path:
        """The path of the tokens without the suffix .bin or .idx."""
        return self.path / "tokens"

    @property
    def tokenizer(self) -> Path:
        """The path of its tokenizer.json."""
        return self.path / "tokenizer.json"


def headline(corpus: Corpus, name: str = "") -> str:
    """Describe a corpus in one line, which begins with `name` if one is given."""
    m = corpus.manifest
    documents, tokens = count_words(m.num_documents, "document"), count_words(m.num_tokens, "token")
    return f"{name or m.name}: {count_words(m.num_files, 'file')}, {documents}, {tokens}"


def spare_rows(config: RunConfig, corpora: Sequence[Corpus]) -> list[str]:
    """Return a line about rows of the vocabulary that the tokenizer of data.tokenizer never uses.

    There is none below an eighth of them or 128 rows, nor where other weights fix their number.
    """
    vocab_size = config.model.vocab_size
    used = max((corpus.manifest.num_token_ids for corpus in corpora), default=vocab_size)
    is_fixed = config.data.tokenizer is None or config.run.init_from is not None
    if is_fixed or vocab_size - used < max(128, vocab_size / 8):
        return []
    return [
        f"the tokenizer has {used:,} tokens, so {vocab_size - used:,} of the {vocab_size:,} rows "
        f"of the vocabulary are never used; model.vocab_size={used}, or the next multiple of 64, "
        "leaves them out"
    ]


def tokenizer_warnings(config: DataConfig, corpora: Sequence[Corpus]) -> list[str]:
    """Return a warning if data.tokenizer begins a text with a token that the documents lack."""
    if config.tokenizer is None or not corpora or corpora[0].manifest.begin_token is not None:
        return []
    token = front_token(load_tokenizer(corpora[0].tokenizer, None))
    if token is None or begin_with(corpora, token):
        return []
    return [
        f"the tokenizer puts {token} in front of a text, but the documents begin without it; "
        f"where the model expects it, add {shell_word('data.begin_token', token)}"
    ]


def ordinary_warnings(corpora: Sequence[Corpus]) -> list[str]:
    """Return a warning if documents begin with a token that a text may have too."""
    begin = corpora[0].manifest.begin_token if corpora else None
    if begin is None:
        return []
    tokenizer = load_tokenizer(corpora[0].tokenizer, None)
    special = special_tokens(tokenizer)
    if begin in special:
        return []
    return [
        f"documents begin with {printable(repr(tokenizer.id_to_token(begin)))}, which is no "
        "special token of the tokenizer, so a text may have it within; its special tokens are "
        f"{printable(', '.join(list(special.values())[:8])) or 'none'}"
    ]


def begin_with(corpora: Sequence[Corpus], token: str | None) -> bool:
    """Return whether documents begin with `token`, or with none.

    Tokens of Megatron-LM may have it from where they were made.
    """
    begin = corpora[0].manifest.begin_token
    number = (
        None if token is None else load_tokenizer(corpora[0].tokenizer, None).token_to_id(token)
    )
    if begin is not None or number is None:
        return bool(begin == number)
    return all(_first_token(corpus) == number for corpus in corpora)


def _first_token(corpus: Corpus) -> int:
    """Return the first token of a corpus."""
    dataset = open_dataset(corpus.prefix)  # what it returns is gone with it
    return int(dataset.get(0, 0, 1)[0])


def text_warnings(
    config: DataConfig, corpora: Sequence[Corpus], named: Mapping[str, Corpus]
) -> list[str]:
    """Return what each corpus, or named validation set, lacks of its text.

    That is what is left out, where it is much, and what the tokenizer cannot spell.
    """
    return [
        f"{name}: {words}"
        for name, corpus in with_names(config, corpora, named)
        for words in _much(corpus.manifest)
    ]


def _much(manifest: Manifest) -> list[str]:
    """Return a warning each for documents, for files, and for text that cannot be spelled."""
    left_out, size = manifest.left_out, manifest.text_bytes
    warnings = [
        much_left_out(left_out, manifest.num_documents),
        "" if size is None else outweighed(left_out, size),
        unspelled_words(manifest.unspelled),
    ]
    return [words for words in warnings if words]


def with_names(
    config: DataConfig, corpora: Sequence[Corpus], named: Mapping[str, Corpus]
) -> list[tuple[str, Corpus]]:
    """Return all corpora, those of validation last, with what the settings call them."""
    names = corpus_names(config) if corpora else []
    names += [f"data.validation, {name}" for name in named]
    return list(zip(names, (*corpora, *named.values()), strict=True))


def describe(corpus: Corpus, name: str = "") -> str:
    """Describe a corpus for people: three lines, and one for each kind of what was left out.

    The first line begins with `name` if one is given.
    """
    m = corpus.manifest
    tokenizer = load_tokenizer(corpus.tokenizer, m.vocab_size)
    ends = f"end with {tokenizer.id_to_token(m.end_token)!r}, token {m.end_token}"
    if m.begin_token is not None:
        begin = tokenizer.id_to_token(m.begin_token)
        ends = f"begin with {begin!r}, token {m.begin_token}, and {ends}"
    state = f"built in {m.seconds:.1f} s" if corpus.fresh else "already there"
    lines = [
        f"{headline(corpus, name)} ({state})",
        f"tokenizer: {m.num_token_ids:,} tokens; documents {ends}",
        f"stored in {corpus.path}",
    ]
    return printable_lines([*lines, *words_of(m.left_out)])


def printable_lines(lines: Sequence[str]) -> str:
    """Join lines that may hold names of files."""
    return "\n".join(map(printable, lines))


@dataclass(frozen=True, slots=True)
class _Member:
    """A corpus of a run.

    name: what the settings call it.
    prefix: how errors about it begin, "" for the only corpus.
    """

    config: DataConfig
    name: str
    prefix: str


def _trained_members(config: DataConfig) -> list[_Member]:
    """Return the corpora that are trained on."""
    if config.blend is None:
        return [_Member(config, corpus_names(config)[0], "")]
    return [
        _Member(_part(config, entry), name, f"data.blend[{number}]: ")
        for number, (entry, name) in enumerate(zip(config.blend, corpus_names(config), strict=True))
    ]


def _validation_members(config: DataConfig) -> list[_Member]:
    """Return the named validation sets."""
    return [
        _Member(_part(config, entry), f"{name} ({entry.path})", f"{name}: ")
        for entry in config.validation or ()
        for name in (f"data.validation, {entry.name}",)
    ]


def prepare_all(
    config: DataConfig,
    vocab_size: int,
    progress: bool,
    accept: Callable[[Path], None] = lambda tokenizer: None,
) -> tuple[Corpus, ...]:
    """Prepare every corpus of a blend with one common tokenizer, or the only corpus.

    Returns () for synthetic data.  The tokenizer is data.tokenizer, else that of the first corpus
    that is already prepared, else one that is trained on all of them.

    accept: is called with the tokenizer before anything is tokenized; it may raise ConfigError.

    Raises ConfigError like `prepare`, and, before anything is tokenized, if corpora or named
    validation sets have different tokenizers, or other tokens that begin and end documents.
    """
    if config.name == "synthetic":
        return ()
    members, sets = _trained_members(config), _validation_members(config)
    for member in sets:
        with _naming(member.prefix):
            if _stored(member.config) is None:
                files = find_files(member.config)
                if config.tokenizer is None:
                    _require_text(files)
    found = []
    for member in members:
        with _naming(member.prefix):
            found.append(_Found.of(member.config) if _stored(member.config) is None else None)
    tokenizer = _common_tokenizer(config, found, vocab_size, progress)
    accept(tokenizer)
    _require_alike([*members, *sets], tokenizer, vocab_size)
    corpora = []
    for member, own in zip(members, found, strict=True):
        with _naming(member.prefix):
            corpora.append(_prepared(member.config, own, tokenizer, vocab_size, progress))
    return tuple(corpora)


def _common_tokenizer(
    config: DataConfig, found: Sequence[_Found | None], vocab_size: int, progress: bool
) -> Path:
    """Return the tokenizer of all corpora.  It is trained if none is given or stored.

    found: None for a corpus that is already prepared.
    """
    if config.tokenizer is not None:
        return _given_tokenizer(config.tokenizer)
    stored = (_stored(member.config) for member in _trained_members(config))
    if (first := next(filter(None, stored), None)) is not None:
        return first / "tokenizer.json"
    texts = [own for own in found if own is not None]
    return _trained(Path(config.cache_dir).expanduser(), texts, vocab_size, progress)


def _require_alike(members: Sequence[_Member], tokenizer: Path, vocab_size: int) -> None:
    """Raise ConfigError unless all corpora have, or will get, the same kind of tokens."""
    if len(members) == 1 or not any(_stored(member.config) for member in members):
        return
    kinds = []
    for member in members:
        with _naming(member.prefix):
            kinds.append(_kind_of_tokens(member.config, tokenizer, vocab_size))
    for member, kind in zip(members, kinds, strict=True):
        if kind != kinds[0]:
            raise ConfigError(
                f"{member.name} has another tokenizer than {members[0].name}, or other tokens that "
                "begin and end its documents; give the text of one of them instead, or prepare "
                "both with the same data.tokenizer, data.begin_token and data.end_token"
            )


def _kind_of_tokens(
    config: DataConfig, tokenizer: Path, vocab_size: int
) -> tuple[str, int | None, int]:
    """Return the tokenizer of a corpus, and the tokens that begin and end each document.

    tokenizer: of a corpus that is not prepared yet.
    """
    if (stored := _stored(config)) is not None:
        corpus = _open(stored, config)
        manifest, own = corpus.manifest, load_tokenizer(corpus.tokenizer, None)
        return own.to_str(), manifest.begin_token, manifest.end_token
    own = load_tokenizer(tokenizer, None)
    return own.to_str(), *_ends(config, own, vocab_size)


def prepare_validation(
    config: DataConfig, vocab_size: int, corpora: Sequence[Corpus], progress: bool
) -> dict[str, Corpus]:
    """Prepare the named validation sets with the tokenizer of the training `corpora`.

    Raises ConfigError like `prepare`, and for a set that was prepared with another tokenizer.
    """
    found = {}
    for entry in config.validation or ():
        assert entry.name is not None
        own = replace(_part(config, entry), tokenizer=str(corpora[0].tokenizer))
        with _naming(f"data.validation, {entry.name}: "):
            found[entry.name] = prepare(own, vocab_size, progress)
    return found


def corpus_names(config: DataConfig) -> list[str]:
    """Return what the settings call each corpus that is trained on, for messages."""
    if config.blend is None:
        return [f"data.name={config.name}" if config.path is None else f"data.path={config.path}"]
    return [
        f"data.blend[{number}] ({entry.path or entry.name})"
        for number, entry in enumerate(config.blend)
    ]


def _part(config: DataConfig, entry: BlendEntry | ValidationEntry) -> DataConfig:
    """Return the settings of one corpus of a blend, or of a validation set."""
    return replace(
        config,
        name=entry.name if isinstance(entry, BlendEntry) else "text",
        path=entry.path,
        jsonl_field=entry.jsonl_field or config.jsonl_field,
        blend=None,
        validation=None,
    )


@contextmanager
def _naming(prefix: str) -> Iterator[None]:
    """Let every ConfigError raised inside begin with the prefix of an entry, if there is one."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{prefix}{_of_entry(error)}" if prefix else str(error)) from None


def _of_entry(error: ConfigError) -> str:
    """Return the message about an entry of a list, which has a path of its own."""
    words = str(error).replace("set data.path to", "set its path to")
    return words.replace("data.path=", "path=")


def trained_on(config: DataConfig, corpora: Sequence[Corpus]) -> list[str]:
    """Return a warning for each named validation set whose text is trained on too.

    It compares whole corpora and whole files; a document that occurs elsewhere is not found.
    """
    parts = [_part(config, entry) for entry in config.blend or ()] or [config]
    texts = [part for part in parts if _stored(part) is None]
    training = [path for part in texts for path in find_files(part)]
    by_size: dict[int, list[Path]] = {}
    for path in training:
        by_size.setdefault(path.stat().st_size, []).append(path)
    hashes = {corpus.manifest.content_hash for corpus in corpora}
    warnings = []
    for entry in config.validation or ():
        own = _part(config, entry)
        stored = _stored(own)
        same = None
        if stored is not None:
            same = stored if read_manifest(stored).content_hash in hashes else None
        else:
            files = [path for path in find_files(own) if path.suffix != INDEX]  # they may be equal
            same = next(filter(None, (_twin(path, by_size) for path in files)), None)
        if same is not None:
            warnings.append(
                f"data.validation, {entry.name}: {same} is trained on too, so its loss says little"
            )
    return warnings


def _twin(path: Path, by_size: Mapping[int, list[Path]]) -> Path | None:
    """Return the file of `by_size` that is `path` or has the same contents, None if none has."""
    for other in by_size.get(path.stat().st_size, ()):
        if other == path or hash_of_file(other) == hash_of_file(path):
            return other
    return None


def _stored(config: DataConfig) -> Path | None:
    """Return data.path if it is an already prepared corpus, else None."""
    path = None if config.path is None else Path(config.path).expanduser()
    return (
        path
        if path is not None and (path / MANIFEST).exists() and (path / "tokens.idx").exists()
        else None
    )


def prepare(config: DataConfig, vocab_size: int, progress: bool) -> Corpus:
    """Find the corpus in the cache, or build it there.

    A corpus that this machine has not seen as it is now is checked as a whole: hashes, index, and
    every token.  Raises ConfigError for data that the user must change: nothing to read, a broken
    file, a token out of range.
    """
    found = _Found.of(config) if _stored(config) is None else None
    return _prepared(config, found, None, vocab_size, progress)


def _prepared(
    config: DataConfig,
    found: _Found | None,
    tokenizer: Path | None,
    vocab_size: int,
    progress: bool,
) -> Corpus:
    """Prepare a corpus of these files, or the stored one if `found` is None.

    tokenizer: of text; None: data.tokenizer, or one that is trained on it.
    """
    if found is None:
        path = _stored(config)
        assert path is not None
        corpus = _open(path, config)
    else:
        tokenizer = tokenizer or _common_tokenizer(config, [found], vocab_size, progress)
        corpus = _find_or_build(found, tokenizer, vocab_size, progress)
    memory = Path(config.cache_dir).expanduser() / "checked"
    files = [corpus.path / name for name in (MANIFEST, *FILES)]
    check_once(memory, files, lambda: _check_contents(corpus), progress)
    _require_rows(corpus, config, vocab_size)
    return corpus


def _require_rows(corpus: Corpus, config: DataConfig, vocab_size: int) -> None:
    """Raise ConfigError if the corpus has a token that the model does not have."""
    manifest = corpus.manifest
    if manifest.vocab_size <= vocab_size:
        return
    tokenizer = load_tokenizer(corpus.tokenizer, vocab_size)
    largest = manifest.largest_token
    if largest is None:
        largest = largest_token(corpus.prefix, manifest.vocab_size)
    if largest >= vocab_size:
        (name,) = corpus_names(config)
        words = f"{name} has token {largest} ({tokenizer.id_to_token(largest)}),"
        raise ConfigError(beyond(words, largest, vocab_size))


def _check_contents(corpus: Corpus) -> None:
    """Raise ConfigError, which names file and offset, unless the corpus is as it was prepared."""
    manifest, prefix = corpus.manifest, corpus.prefix
    for name in FILES:
        _ = size_of(corpus.path / name)  # refuses links, pipes and devices before numpy opens them
    check_index(prefix, manifest.num_documents, manifest.num_tokens, manifest.vocab_size)
    check_tokens(prefix, manifest.vocab_size)
    for name, blocks in manifest.blocks.items():
        check_blocks(corpus.path / name, blocks, f"delete {corpus.path}, and prepare it again")


def _open(path: Path, config: DataConfig) -> Corpus:
    """Open a stored corpus.  Raises ConfigError for settings that would have made other tokens."""
    corpus = Corpus(path, read_manifest(path), fresh=False)
    if (config.tokenizer, config.end_token, config.begin_token) == (None, None, None):
        return corpus
    tokenizer = load_tokenizer(corpus.tokenizer, corpus.manifest.vocab_size)
    wanted = corpus.tokenizer if config.tokenizer is None else _given_tokenizer(config.tokenizer)
    if load_tokenizer(wanted, None).to_str() != tokenizer.to_str():
        raise ConfigError(
            f"{path} was prepared with another tokenizer than data.tokenizer={config.tokenizer}; "
            "drop that, or give the text instead"
        )
    if (
        config.end_token is not None
        and end_token_id(tokenizer, config.end_token) != corpus.manifest.end_token
    ):
        raise ConfigError(
            f"documents of {path} end with {tokenizer.id_to_token(corpus.manifest.end_token)!r}, "
            f"not with data.end_token={config.end_token}; drop that, or give the text instead"
        )
    begin = corpus.manifest.begin_token
    if config.begin_token is not None and begin_token_id(tokenizer, config.begin_token) != begin:
        words = "no token" if begin is None else repr(tokenizer.id_to_token(begin))
        raise ConfigError(
            f"documents of {path} begin with {words}, not with "
            f"data.begin_token={config.begin_token}; drop that, or give the text instead"
        )
    return corpus


@dataclass(frozen=True, slots=True)
class _Found:
    """The files of a corpus, and what of its directory was left out."""

    config: DataConfig
    files: tuple[Path, ...]
    left_out: LeftOut

    @classmethod
    def of(cls, config: DataConfig) -> _Found:
        """Find the files.  Raises ConfigError if there are none."""
        left_out = LeftOut()
        return cls(config, find_files(config, left_out), left_out)

    @property
    def num_bytes(self) -> int:
        return _bytes_of(self.files)


def _ends(config: DataConfig, tokenizer: Tokenizer, vocab_size: int) -> tuple[int | None, int]:
    """Return the tokens that will begin and end each document.  Raises ConfigError."""
    begin = None
    if config.begin_token is not None:
        begin = begin_token_id(tokenizer, config.begin_token, vocab_size)
    return begin, end_token_id(tokenizer, config.end_token, vocab_size)


def _find_or_build(found: _Found, tokenizer: Path, vocab_size: int, progress: bool) -> Corpus:
    """Find the corpus in the cache without a lock, or build it alone."""
    config = found.config
    settings = [_recipe(), config.name, config.end_token, *_reading(found)]
    if config.begin_token is not None:
        settings += ["begin_token", config.begin_token]
    cache_dir = Path(config.cache_dir).expanduser()
    key = _content_key(cache_dir, found.files, tokenizer, settings, progress, vocab_size)
    path = cache_dir / f"{config.name}-{key}"
    if not _is_complete(path):
        remove_left(cache_dir)
        with alone(cache_dir, path.name, progress):
            if not _is_complete(path):  # else another process has built it meanwhile
                work = _Work(config, found.files, tokenizer, vocab_size, found.left_out, progress)
                work.build(path, key)
                return Corpus(path, read_manifest(path), fresh=True)
    return Corpus(path, read_manifest(path), fresh=False)


def _is_complete(path: Path) -> bool:
    """Return whether `path` is a corpus that this version has built.  Its files may be damaged."""
    return (path / MANIFEST).exists() and not is_outdated(path)


def _given_tokenizer(name: str) -> Path:
    """Return the path of data.tokenizer.  Raises ConfigError for what is no file, by its name."""
    path = Path(os.path.realpath(os.path.expanduser(name)))
    if path.is_dir():
        inside = Path(name) / "tokenizer.json"
        raise ConfigError(f"data.tokenizer={name} is a directory; give {inside}")
    if not path.is_file():
        what = "a device, a pipe or a socket" if path.exists() else "not there"
        raise ConfigError(f"data.tokenizer={name} is {what}; give the path of a tokenizer.json")
    return path


def _require_text(files: Iterable[Path]) -> None:
    """Raise ConfigError for tokens of Megatron-LM, whose tokenizer must be given."""
    if stored := [path for path in files if kind_of(path) == "tokens"]:
        raise ConfigError(
            f"{stored[0]} holds tokens of Megatron-LM; set data.tokenizer to the tokenizer.json "
            "that made them"
        )


def _trained(cache_dir: Path, found: Sequence[_Found], vocab_size: int, progress: bool) -> Path:
    """Train a tokenizer on the files of all corpora, or find it in the cache.  Returns its path.

    Every corpus contributes at most the same number of characters.  Where the text has no more
    pairs to merge, the tokenizer is the same for every larger vocabulary.  Raises ConfigError
    before any text is read if `vocab_size` is too small for every tokenizer, and before anything is
    trained for a corpus without text.
    """
    _require_text(chain.from_iterable(each.files for each in found))
    require_bytes(vocab_size)
    keys = [_content_key(cache_dir, each.files, None, _reading(each), progress) for each in found]
    own, complete = (
        cache_dir / f"tokenizer-{_digest([_recipe(), size, keys])}.json"
        for size in (vocab_size, None)
    )

    def stored() -> Path | None:
        if own.exists():
            return own
        is_enough = complete.exists() and num_ids(load_tokenizer(complete, None)) <= vocab_size
        return complete if is_enough else None

    if (path := stored()) is not None:
        return path
    with alone(cache_dir, complete.name, progress):
        if (path := stored()) is not None:
            return path
        tokenizer = _train(found, vocab_size, progress)
        path = own if num_ids(tokenizer) == vocab_size else complete
        written = path.with_suffix(".new")
        save_tokenizer(tokenizer, written)
        sync(written)
        written.replace(path)  # complete or absent, whenever the process is killed
    return path


def _train(found: Sequence[_Found], vocab_size: int, progress: bool) -> Tokenizer:
    """Train a tokenizer on the files of all corpora.  Raises ConfigError for one without text."""
    limit = _TRAINING_CHARACTERS // len(found)
    readings = [Reading(deepcopy(each.left_out)) for each in found]
    texts = [
        _training_texts(each.files, each.config.jsonl_field, limit, reading)
        for each, reading in zip(found, readings, strict=True)
    ]
    for number, (each, reading) in enumerate(zip(found, readings, strict=True)):
        with _naming(f"data.blend[{number}]: " if len(found) > 1 else ""):
            texts[number] = _with_text(each, texts[number], reading, progress)
    num_bytes = sum(each.num_bytes for each in found)
    what = f"training a tokenizer of {vocab_size:,} tokens on {human_bytes(num_bytes)}"
    is_read = False

    def all_texts() -> Iterator[str]:
        nonlocal is_read
        yield from chain.from_iterable(texts)
        is_read = True

    def state(seconds: float) -> str:
        num_read = sum(reading.num_bytes for reading in readings)
        words = "merging pairs" if is_read else f"{human_bytes(num_read)} read"
        return f"{words}, {seconds:.0f} s"

    with reported(what, state, progress):
        return train_tokenizer(all_texts(), vocab_size)


def _with_text(
    found: _Found, texts: Iterator[str], reading: Reading, progress: bool
) -> Iterator[str]:
    """Return `texts` of a corpus.  Raises ConfigError if there are none."""
    num_bytes = found.num_bytes
    with reported(
        f"looking for text in {human_bytes(num_bytes)}",
        lambda seconds: far(reading.num_bytes, num_bytes, seconds),
        progress and num_bytes > _SOON_HASHED,
    ):
        first = next(texts, None)
    if first is None:
        raise ConfigError(_nothing_words(found.files, reading.left_out))
    return chain([first], texts)


def _digest(values: object) -> str:
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=8).hexdigest()


def _bytes_of(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _recipe() -> list[int]:
    """Return what decides the tokens of a text beside the settings."""
    longest = [_LONGEST_WORD, _LONGEST_TRAINED_WORD, LONGEST_PIECE, _TRAINED_PIECE, LONGEST_LINE]
    return [_FORMAT, *longest, _TRAINING_CHARACTERS]


def _reading(found: _Found) -> list[str]:
    """Return what decides how the files are read.  Earlier versions read lines of .json as text."""
    field = found.config.jsonl_field
    json_files = (path for path in found.files if kind_of(path) == "json")
    has_lines = any(kind_to_read(path, field) == "lines" for path in json_files)
    return [field, "lines of .json"] if has_lines else [field]


def _content_key(
    cache_dir: Path,
    files: tuple[Path, ...],
    tokenizer: Path | None,
    settings: Sequence[object],
    progress: bool,
    vocab_size: int | None = None,
) -> str:
    """Return the hash of contents and settings.

    The cache remembers the hash by the sizes and modification times of the files.  Contents are
    read again only if one of those has changed.  Raises ConfigError before that if the tokenizer
    has ids of `vocab_size` or above.
    """
    stats = [
        (str(path), stat.st_size, stat.st_mtime_ns)
        for path in (*files, *([] if tokenizer is None else [tokenizer]))
        for stat in (path.stat(),)
    ]
    fingerprint = hashlib.blake2b(
        json.dumps([list(settings), stats]).encode(), digest_size=12
    ).hexdigest()
    known = cache_dir / "fingerprints" / fingerprint
    if (key := _known_key(known)) is not None:
        return key
    if tokenizer is not None:
        load_tokenizer(tokenizer, vocab_size)
    with alone(cache_dir, f"fingerprint-{fingerprint}", progress):
        if (key := _known_key(known)) is not None:
            return key
        key = _digest([list(settings), _contents_of(files, tokenizer, progress)])
        known.parent.mkdir(exist_ok=True)
        written = known.with_suffix(".new")
        written.write_text(key)
        written.replace(known)  # complete or absent, whenever the process is killed
    return key


def _known_key(known: Path) -> str | None:
    """Return the key that the file `known` remembers, None if it is missing or broken."""
    with contextlib.suppress(UnreadableError):
        if re.fullmatch("[0-9a-f]{16}", key := read_text(known)):
            return key
    return None


def _contents_of(files: tuple[Path, ...], tokenizer: Path | None, progress: bool) -> list[str]:
    """Return hashes of the contents of the files, and of the tokenizer if there is one."""
    root = Path(os.path.commonpath([str(path.parent) for path in files]))
    num_bytes = _bytes_of(files)
    with reported(
        f"hashing {human_bytes(num_bytes)}",
        "{:.0f} s".format,
        progress and num_bytes > _SOON_HASHED,
    ):
        contents = [content_hash(files, root)]
    return contents if tokenizer is None else [*contents, hash_of_file(tokenizer).hex()]


@dataclass(frozen=True, slots=True)
class _Work:
    """What a corpus is built of.  The caller holds the lock of the corpus."""

    config: DataConfig
    files: tuple[Path, ...]
    tokenizer: Path
    vocab_size: int  # of the model
    left_out: LeftOut
    progress: bool

    def build(self, path: Path, key: str) -> None:
        """Build a corpus in a temporary directory and rename it: a kill leaves none half done.

        Raises ConfigError.
        """
        temporary = building_place(path)  # if it exists, a killed process left it
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        # A file system of a network may have hidden what another node has just completed.  The new
        # directory lets it look again.
        if _is_complete(path):
            temporary.rmdir()
            return
        try:
            manifest = self._write(temporary, key)
            (temporary / MANIFEST).write_text(manifest_text(manifest))
            for file in (*temporary.iterdir(), temporary):
                sync(file)
            if path.exists():
                shutil.rmtree(path)  # it has no manifest, so it is not complete
            temporary.rename(path)
            sync(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _write(self, directory: Path, key: str) -> Manifest:
        """Write the tokenizer and the tokens into `directory`, and return their manifest."""
        started, config = time.perf_counter(), self.config
        tokenizer = load_tokenizer(self.tokenizer, self.vocab_size)
        begin, end = _ends(config, tokenizer, self.vocab_size)
        save_tokenizer(tokenizer, directory / "tokenizer.json")
        size, reading, tally = num_ids(tokenizer), Reading(self.left_out), None
        indexes = [path for path in self.files if path.suffix == INDEX]
        if indexes:
            special = special_tokens(tokenizer) if config.end_token is None else {}
            found = stored_documents(indexes, size, end, special, reading)
        else:
            tally = tally_of(open_tokenizer(str(directory / "tokenizer.json")))
            found = encoded(
                read_documents(self.files, config.jsonl_field, reading=reading),
                directory / "tokenizer.json",
                longest_run=_LONGEST_WORD,
                longest_piece=LONGEST_PIECE,
                workers=config.num_workers,
                tally=tally,
            )
        total = _bytes_of(self.files)

        def state(seconds: float) -> str:
            return far(reading.num_bytes, total, seconds)

        verb, source = "copying" if indexes else "tokenizing", config.path or config.name
        what = f"{verb} {printable(source)}"
        with closing(found), reported(what, state, self.progress):
            num_documents, num_tokens = write_dataset(
                directory / "tokens", self._checked(found, begin), end, size
            )
        if num_documents == 0:
            entry = {} if tally is None else tally.as_dict()
            raise ConfigError(_nothing_words(self.files, self.left_out, entry))
        check_tokens(directory / "tokens", size)
        return Manifest(
            name=config.name,
            content_hash=key,
            num_files=len(self.files),
            num_documents=num_documents,
            num_tokens=num_tokens,
            vocab_size=size,
            num_token_ids=tokenizer.get_vocab_size(with_added_tokens=True),
            end_token=end,
            file_bytes={file.name: file.stat().st_size for file in sorted(directory.iterdir())},
            blocks={name: block_hashes(directory / name) for name in FILES},
            seconds=time.perf_counter() - started,
            largest_token=largest_token(directory / "tokens", size),
            left_out=self.left_out.as_dict(),
            text_bytes=total,
            begin_token=begin,
            unspelled={} if tally is None else tally.as_dict(),
        )

    def _checked(
        self, found: Iterator[Encoded], begin: int | None = None
    ) -> Iterator[tuple[np.ndarray, bool]]:
        """Yield ids and whether a document ends with them; what has no token is left out.

        The token `begin` comes first in each document, once where Megatron-LM has put it there.

        Raises ConfigError for the first token that the model does not have.
        """
        is_empty, is_stored = True, any(kind_of(path) == "tokens" for path in self.files[:1])
        for piece in found:
            ids = piece.ids
            if len(ids):
                if is_empty and begin is not None and not (is_stored and ids[0] == begin):
                    ids = np.concatenate([np.array([begin], dtype=ids.dtype), ids])
                is_empty = False
                if (largest := int(piece.ids.max())) >= self.vocab_size:
                    words = f"{piece.origin} has a token of {self.tokenizer}"
                    raise ConfigError(beyond(words, largest, self.vocab_size))
            if piece.is_last and is_empty:
                why = "" if is_stored else "the tokenizer makes no token of it"
                self.left_out.add(EMPTY, piece.origin, why)
                continue
            yield ids, piece.is_last
            is_empty = is_empty or piece.is_last


def _nothing_words(
    files: Sequence[Path], left_out: LeftOut, unspelled: Mapping[str, int | str] | None = None
) -> str:
    """Return the message for files without a document.

    unspelled: what the tokenizer could not spell; see `unspelled.Tally`.
    """
    after, others = "", len(files) - 1
    if others:
        after = f" and the {count_words(others, 'file')} after it"
    hold = f"{files[0]}{after} {'hold' if others else 'holds'}"
    if unspelled and (lost := unspelled_words(unspelled)):
        return f"{hold} no text that the tokenizer can spell: {lost}"
    is_text = kind_of(files[0]) != "tokens"
    words = "; ".join(words_of(left_out.as_dict())) or "no documents"
    is_field = any(kind in left_out.counts for kind in OF_FIELDS)
    field = ", or data.jsonl_field to the field that has it" if is_field else ""
    return (
        f"{hold} no {'text' if is_text else 'tokens'} ({words}); "
        f"set data.path to some that do{field}"
    )


def _training_texts(
    files: tuple[Path, ...], field: str, limit: int, reading: Reading
) -> Iterator[str]:
    """Yield text until it has more than `limit` characters together."""
    seen = 0
    for document in read_documents(files, field, reading=reading):
        for piece in pieces(document.parts, _LONGEST_TRAINED_WORD, _TRAINED_PIECE):
            yield piece
            seen += len(piece)
            if seen > limit:
                return
