"""Prepared corpora: tokenized text in a directory named by a hash, complete or absent.

The hash covers the contents of the text files and the settings.  The directory holds the tokens
(Megatron's indexed dataset), the tokenizer and a manifest.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import get_type_hints

from tokenizers import Tokenizer

from vp_train.config import ConfigError, DataConfig
from vp_train.data.documents import (
    LONGEST_PIECE,
    Document,
    content_hash,
    find_files,
    pieces,
    read_documents,
)
from vp_train.data.indexed import check_index, check_tokens, write_dataset
from vp_train.data.integrity import BLOCK, DIGITS, block_hashes, check_blocks, check_once
from vp_train.data.tokenizer import (
    LARGEST_TOKENIZER,
    end_token_id,
    load_tokenizer,
    train_tokenizer,
)
from vp_train.durable import UnreadableError, open_regular, read_json, read_text, sync

_FORMAT = 1
_MANIFEST = "manifest.json"
_OWN_HASH = "manifest_hash"
_FILES = ("tokenizer.json", "tokens.bin", "tokens.idx")
_LARGEST_MANIFEST = 1 << 26  # bytes; the hashes of a terabyte take 9 MB
_LONGEST_WORD = 100_000  # characters, for which a tokenizer takes 0.1 s
_LONGEST_TRAINED_WORD = 1_000
_BATCH = 64  # documents encoded together
_TRAINING_CHARACTERS = 200_000_000  # more text does not change a tokenizer's merges noticeably


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of a corpus.  It is written last: a directory with a manifest is complete."""

    name: str
    content_hash: str  # of file names, contents and settings; the directory's name ends with it
    num_files: int
    num_documents: int
    num_tokens: int
    vocab_size: int
    num_token_ids: int  # of the tokenizer, at most vocab_size
    end_token: int
    file_bytes: dict[str, int]
    blocks: dict[str, list[str]]  # the hashes of every file; see `integrity`
    seconds: float  # that the build took


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


def describe(corpus: Corpus) -> str:
    """Describe a corpus in three lines for people."""
    m = corpus.manifest
    state = f"built in {m.seconds:.1f} s" if corpus.fresh else "already there"
    return (
        f"{m.name}: {m.num_files} files, {m.num_documents} documents, "
        f"{m.num_tokens:,} tokens ({state})\n"
        f"tokenizer: {m.num_token_ids:,} tokens of model.vocab_size={m.vocab_size:,}\n"
        f"stored in {corpus.path}"
    )


@contextmanager
def _exclusive(cache_dir: Path) -> Iterator[None]:
    """Let one process at a time work in the cache.  The lock ends when its process ends."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare_all(config: DataConfig, vocab_size: int, progress: bool) -> tuple[Corpus, ...]:
    """Prepare every corpus of a blend with one common tokenizer, or the only corpus.

    Returns () for synthetic data.  The tokenizer is data.tokenizer, else that of the first corpus
    that is already prepared, else one that is trained on all of them.  Raises ConfigError like
    `prepare`, and if the corpora have different tokenizers.
    """
    if config.name == "synthetic":
        return ()
    if config.blend is None:
        return (prepare(config, vocab_size, progress),)
    parts = [
        replace(
            config,
            name=entry.name,
            path=entry.path,
            jsonl_field=entry.jsonl_field or config.jsonl_field,
            blend=None,
        )
        for entry in config.blend
    ]
    if config.tokenizer is None:
        stored = [path / "tokenizer.json" for path in map(_stored, parts) if path is not None]
        tokenizer = stored[0] if stored else _shared_tokenizer(parts, vocab_size, progress)
        parts = [
            part if _stored(part) else replace(part, tokenizer=str(tokenizer)) for part in parts
        ]
    corpora = []
    for number, part in enumerate(parts):
        with _naming_corpus(number):
            corpora.append(prepare(part, vocab_size, progress))
    first = corpora[0]
    for number, corpus in enumerate(corpora):
        same = corpus.manifest.end_token == first.manifest.end_token
        if not same or corpus.tokenizer.read_bytes() != first.tokenizer.read_bytes():
            raise ConfigError(
                f"data.blend[{number}] ({corpus.path}) has another tokenizer than "
                f"data.blend[0] ({first.path}); give the text of one of them instead, "
                "or prepare both with the same data.tokenizer"
            )
    return tuple(corpora)


@contextmanager
def _naming_corpus(number: int) -> Iterator[None]:
    """Make every ConfigError raised inside name the corpus of the blend."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"data.blend[{number}]: {error}") from None


def _stored(config: DataConfig) -> Path | None:
    """Return data.path if it is an already prepared corpus, else None."""
    path = None if config.path is None else Path(config.path).expanduser()
    return (
        path
        if path is not None and (path / _MANIFEST).exists() and (path / "tokens.idx").exists()
        else None
    )


def prepare(config: DataConfig, vocab_size: int, progress: bool) -> Corpus:
    """Find the corpus in the cache, or build it there.

    A corpus that this machine has not seen as it is now is checked as a whole: hashes, index, and
    every token.  Raises ConfigError for data that the user must change: nothing to read, a broken
    file, a token out of range.
    """
    path = _stored(config)
    corpus = _find_or_build(config, vocab_size, progress) if path is None else _open(path, config)
    if corpus.manifest.vocab_size != vocab_size:
        raise ConfigError(
            f"{corpus.path} was prepared for model.vocab_size={corpus.manifest.vocab_size}, "
            f"this run has {vocab_size}; use the same, or give the text instead"
        )
    memory = Path(config.cache_dir).expanduser() / "checked"
    files = [corpus.path / name for name in (_MANIFEST, *_FILES)]
    check_once(memory, files, lambda: _check_contents(corpus))
    return corpus


def _check_contents(corpus: Corpus) -> None:
    """Raise ConfigError, which names file and offset, unless the corpus is as it was prepared."""
    manifest, prefix = corpus.manifest, corpus.prefix
    for name in _FILES:
        _ = _size(corpus.path / name)  # refuses links, pipes and devices before numpy opens them
    check_index(prefix, manifest.num_documents, manifest.num_tokens, manifest.vocab_size)
    check_tokens(prefix, manifest.vocab_size)
    for name, blocks in manifest.blocks.items():
        check_blocks(corpus.path / name, blocks, f"delete {corpus.path}, and prepare it again")


def _size(path: Path) -> int:
    """Return the size of a regular file of a corpus.  Raises UnreadableError for anything else."""
    with open_regular(path, follow=False) as file:
        return os.fstat(file.fileno()).st_size


def _open(path: Path, config: DataConfig) -> Corpus:
    """Open a stored corpus.  Raises ConfigError for settings that would have made other tokens."""
    corpus = Corpus(path, _read_manifest(path), fresh=False)
    if config.tokenizer is None and config.end_token is None:
        return corpus
    tokenizer = load_tokenizer(corpus.tokenizer, corpus.manifest.vocab_size)
    wanted = Path(config.tokenizer or corpus.tokenizer)
    if load_tokenizer(wanted, corpus.manifest.vocab_size).to_str() != tokenizer.to_str():
        raise ConfigError(
            f"{path} was prepared with another tokenizer than data.tokenizer={wanted}; "
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
    return corpus


def _find_or_build(config: DataConfig, vocab_size: int, progress: bool) -> Corpus:
    files = find_files(config)
    settings = [
        _recipe(),
        config.name,
        vocab_size,
        config.tokenizer is not None,
        config.end_token,
        config.jsonl_field,
    ]
    cache_dir = Path(config.cache_dir).expanduser()
    with _exclusive(cache_dir):
        key = _content_key(cache_dir, config, files, settings)
        path = cache_dir / f"{config.name}-{key}"
        fresh = not (path / _MANIFEST).exists() or _is_outdated(path)
        if fresh:
            _build(path, key, config, files, vocab_size, progress)
    return Corpus(path, _read_manifest(path), fresh)


def _shared_tokenizer(parts: list[DataConfig], vocab_size: int, progress: bool) -> Path:
    """Train a tokenizer on the text of all corpora, or find it in the cache.  Returns its path.

    Every corpus contributes at most the same number of characters.
    """
    found = []
    for number, part in enumerate(parts):
        with _naming_corpus(number):
            found.append(find_files(part))
    cache_dir = Path(parts[0].cache_dir).expanduser()
    with _exclusive(cache_dir):
        keys = [
            _content_key(cache_dir, part, files, [part.jsonl_field])
            for part, files in zip(parts, found, strict=True)
        ]
        key = hashlib.blake2b(
            json.dumps([_recipe(), vocab_size, keys]).encode(), digest_size=8
        ).hexdigest()
        path = cache_dir / f"tokenizer-{key}.json"
        if not path.exists():
            _say_training(progress, vocab_size, [file for files in found for file in files])
            limit = _TRAINING_CHARACTERS // len(parts)
            texts = (
                _training_texts(files, part, limit)
                for part, files in zip(parts, found, strict=True)
            )
            written = path.with_suffix(".new")
            train_tokenizer(chain.from_iterable(texts), vocab_size).save(str(written))
            written.replace(path)
    return path


def _recipe() -> list[int]:
    """Return what decides the tokens of a text beside the settings."""
    return [_FORMAT, _LONGEST_WORD, _LONGEST_TRAINED_WORD, LONGEST_PIECE, _TRAINING_CHARACTERS]


def _content_key(
    cache_dir: Path, config: DataConfig, files: tuple[Path, ...], settings: list[object]
) -> str:
    """Return the hash of contents and settings.

    The cache remembers the hash by the sizes and modification times of the files.  Contents are
    read again only if one of those has changed.
    """
    tokenizer = [Path(os.path.realpath(config.tokenizer))] if config.tokenizer else []
    for path in tokenizer:
        if not path.is_file() or path.stat().st_size > LARGEST_TOKENIZER:
            raise ConfigError(
                f"data.tokenizer={config.tokenizer} is not a file of at most "
                f"{LARGEST_TOKENIZER:,} bytes; give the path of a tokenizer.json"
            )
    stats = [
        (str(path), stat.st_size, stat.st_mtime_ns)
        for path in (*files, *tokenizer)
        for stat in (path.stat(),)
    ]
    fingerprint = hashlib.blake2b(
        json.dumps([settings, stats]).encode(), digest_size=12
    ).hexdigest()
    known = cache_dir / "fingerprints" / fingerprint
    with contextlib.suppress(UnreadableError):
        if re.fullmatch("[0-9a-f]{16}", key := read_text(known)):
            return key
    root = Path(os.path.commonpath([str(path.parent) for path in files]))
    contents = [
        content_hash(files, root),
        *(content_hash([path], path.parent) for path in tokenizer),
    ]
    key = hashlib.blake2b(json.dumps([settings, contents]).encode(), digest_size=8).hexdigest()
    known.parent.mkdir(exist_ok=True)
    written = known.with_suffix(".new")
    written.write_text(key)
    written.replace(known)  # complete or absent, whenever the process is killed
    return key


def _is_outdated(path: Path) -> bool:
    """Return whether an earlier version, which kept no hashes, has built this corpus."""
    with contextlib.suppress(UnreadableError):
        values = read_json(path / _MANIFEST, _LARGEST_MANIFEST)
        return isinstance(values, dict) and "checked_ns" in values
    return False


def _read_manifest(path: Path) -> Manifest:
    """Return the manifest of the corpus in `path`; every file must have the size that it says.

    Raises ConfigError.
    """
    way_out = f"delete {path}, and prepare it again"
    try:
        values = read_json(path / _MANIFEST, _LARGEST_MANIFEST, follow=False)
        if isinstance(values, dict) and "checked_ns" in values:
            raise UnreadableError(f"{path} is from an earlier version, which kept no hashes")
        if (wrong := _misfit(values)) is not None:
            raise UnreadableError(f"{path / _MANIFEST}: {wrong}")
        sizes = {name: _size(path / name) for name in _FILES}
    except UnreadableError as error:
        raise ConfigError(f"{error}; {way_out}") from None
    manifest = Manifest(**{name: values[name] for name in values if name != _OWN_HASH})
    for name, expected in manifest.file_bytes.items():
        if sizes[name] != expected:
            raise ConfigError(
                f"{path / name} has {sizes[name]} bytes instead of {expected}; {way_out}"
            )
    return manifest


def _hash_of(values: Mapping[str, object]) -> str:
    """Return the hash of the entries of a manifest."""
    text = json.dumps(values, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _misfit(values: object) -> str | None:
    """Return what keeps the value of a manifest from being one, None if nothing does."""
    kinds = get_type_hints(Manifest)
    if not isinstance(values, dict) or values.keys() != {*kinds, _OWN_HASH}:
        return "it does not have the entries of a corpus"
    if values[_OWN_HASH] != _hash_of({name: values[name] for name in kinds}):
        return "it does not match its hash"
    for name, kind in kinds.items():
        value = values[name]
        if kind is int and not (type(value) is int and 0 <= value < 2**63):
            return f"{name} is not a whole number"
        if kind is str and not (
            isinstance(value, str) and re.fullmatch("[0-9A-Za-z_]{1,64}", value)
        ):
            return f"{name} is not a name"
    if type(values["seconds"]) not in (int, float):
        return "seconds is not a number"
    sizes, blocks = values["file_bytes"], values["blocks"]
    for entry in (sizes, blocks):
        if not isinstance(entry, dict) or sorted(entry) != list(_FILES):
            return f"it does not describe {', '.join(_FILES)} alone"
    for name in _FILES:
        if type(sizes[name]) is not int or sizes[name] < 0:
            return f"the size of {name} is not a whole number"
        hashes = blocks[name]
        if not isinstance(hashes, list) or len(hashes) != -(-sizes[name] // BLOCK):
            return f"{name} does not have a hash for every block"
        if not all(isinstance(text, str) and len(text) == DIGITS for text in hashes):
            return f"the hashes of {name} are not hashes"
    if not 1 <= values["num_documents"] <= values["num_tokens"]:
        return "it has no documents, or fewer tokens than documents"
    if not values["end_token"] < values["vocab_size"]:
        return "its end token is outside the vocabulary"
    return None


def _build(
    path: Path,
    key: str,
    config: DataConfig,
    files: tuple[Path, ...],
    vocab_size: int,
    progress: bool,
) -> None:
    """Build a corpus in a temporary directory and rename it: a kill leaves no corpus half done.

    The caller holds the lock of the cache, so no other process uses the temporary directory.
    """
    started = time.perf_counter()
    temporary = path.parent / "building"  # if it exists, a killed process left it
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        if config.tokenizer:
            tokenizer = load_tokenizer(Path(config.tokenizer), vocab_size)
        else:
            _say_training(progress, vocab_size, files)
            tokenizer = train_tokenizer(
                _training_texts(files, config, _TRAINING_CHARACTERS), vocab_size
            )
        end = end_token_id(tokenizer, config.end_token)
        tokenizer.save(str(temporary / "tokenizer.json"))
        documents = _encoded(tokenizer, read_documents(files, config.jsonl_field, warn=True), end)
        num_documents, num_tokens = write_dataset(
            temporary / "tokens", _with_progress(documents, progress), vocab_size
        )
        if num_documents == 0:
            raise ConfigError(
                f"{files[0]} and the {len(files) - 1} files after it hold no text; "
                "set data.path to some that do"
            )
        check_tokens(temporary / "tokens", vocab_size)
        manifest = Manifest(
            name=config.name,
            content_hash=key,
            num_files=len(files),
            num_documents=num_documents,
            num_tokens=num_tokens,
            vocab_size=vocab_size,
            num_token_ids=tokenizer.get_vocab_size(with_added_tokens=True),
            end_token=end,
            file_bytes={file.name: file.stat().st_size for file in sorted(temporary.iterdir())},
            blocks={name: block_hashes(temporary / name) for name in _FILES},
            seconds=time.perf_counter() - started,
        )
        values = asdict(manifest)
        (temporary / _MANIFEST).write_text(
            json.dumps(values | {_OWN_HASH: _hash_of(values)}, indent=1) + "\n"
        )
        for file in (*temporary.iterdir(), temporary):
            sync(file)
        if path.exists():
            shutil.rmtree(path)  # it has no manifest, so it is not complete
        temporary.rename(path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _encoded(tokenizer: Tokenizer, documents: Iterator[Document], end: int) -> Iterator[list[int]]:
    """Yield the token ids of every non-empty document, followed by the token `end`."""
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" within the text is ordinary text
    while batch := list(islice(documents, _BATCH)):
        cut = [pieces(document.text, _LONGEST_WORD) for document in batch]
        encodings = iter(
            tokenizer.encode_batch_fast(list(chain.from_iterable(cut)), add_special_tokens=False)
        )
        for parts in cut:
            ids = [token for encoding in islice(encodings, len(parts)) for token in encoding.ids]
            if ids:
                yield [*ids, end]


def _training_texts(files: tuple[Path, ...], config: DataConfig, limit: int) -> Iterator[str]:
    """Yield documents until they have more than `limit` characters together."""
    seen = 0
    for document in read_documents(files, config.jsonl_field):
        yield from pieces(document.text, _LONGEST_TRAINED_WORD)
        seen += len(document.text)
        if seen > limit:
            return


def _with_progress(documents: Iterator[list[int]], progress: bool) -> Iterator[list[int]]:
    """Yield the documents and show progress: a bar on a terminal, one plain line elsewhere."""
    if not progress:
        yield from documents
        return
    _say(not sys.stderr.isatty(), "tokenizing")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("tokenizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("documents"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("tokenizing", total=None)
        for document in documents:
            yield document
            bar.advance(task)


def _say_training(speak: bool, vocab_size: int, files: Sequence[Path]) -> None:
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    _say(speak, f"training a tokenizer of {vocab_size:,} tokens on {megabytes:.1f} MB")


def _say(speak: bool, line: str) -> None:
    if speak:
        print(line, file=sys.stderr, flush=True)
