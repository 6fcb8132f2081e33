"""A prepared corpus: a directory named by the hash of its contents, complete or absent."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from vp_train.config import ConfigError, DataConfig
from vp_train.data.documents import content_hash, find_files, read_documents
from vp_train.data.indexed import check_tokens, write_dataset
from vp_train.data.tokenizer import end_token_id, load_tokenizer, train_tokenizer

_FORMAT = 1
_BATCH = 64  # documents encoded together
_TRAINING_CHARACTERS = 200_000_000  # more text does not change a tokenizer's merges noticeably


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a corpus holds; written last, so a directory with a manifest is complete."""

    name: str
    num_files: int
    num_documents: int
    num_tokens: int
    vocab_size: int
    num_token_ids: int  # of the tokenizer, at most vocab_size
    end_token: int
    file_bytes: dict[str, int]
    seconds: float


@dataclass(frozen=True, slots=True)
class Corpus:
    """A complete corpus on disk.  `prefix` + .bin/.idx are its tokens; `fresh` if this call built it."""

    path: Path
    manifest: Manifest
    fresh: bool

    @property
    def prefix(self) -> Path:
        return self.path / "tokens"


def describe(corpus: Corpus) -> str:
    """A few lines for people."""
    m = corpus.manifest
    state = f"built in {m.seconds:.1f} s" if corpus.fresh else "already there"
    return (
        f"{m.name}: {m.num_files} files, {m.num_documents} documents, {m.num_tokens:,} tokens ({state})\n"
        f"tokenizer: {m.num_token_ids:,} tokens of model.vocab_size={m.vocab_size:,}\n"
        f"stored in {corpus.path}"
    )


@contextmanager
def exclusive(cache_dir: Path) -> Iterator[None]:
    """One process at a time; the lock goes with its process."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    with (cache_dir / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(config: DataConfig, vocab_size: int, progress: bool) -> Corpus:
    """Find the corpus in the cache or build it there; every token is checked against `vocab_size` either way.

    Raises ConfigError for data a user must change: nothing to read, a broken file, a token out of range.
    """
    files = find_files(config)
    settings = [_FORMAT, config.name, vocab_size, config.tokenizer, config.end_token, config.jsonl_field]
    cache_dir = Path(config.cache_dir).expanduser()
    with exclusive(cache_dir):
        key = _content_key(cache_dir, config, files, settings)
        path = cache_dir / f"{config.name}-{key}"
        fresh = not (path / "manifest.json").exists()
        if fresh:
            _build(path, config, files, vocab_size, progress)
    corpus = Corpus(path, _read_manifest(path), fresh)
    check_tokens(corpus.prefix, vocab_size)
    return corpus


def _content_key(cache_dir: Path, config: DataConfig, files: tuple[Path, ...], settings: list[object]) -> str:
    """The hash of contents and settings; contents are read again only where a size or a time has changed."""
    sources = (*files, Path(config.tokenizer)) if config.tokenizer else files
    stats = [(str(path), stat.st_size, stat.st_mtime_ns) for path in sources if path.exists() for stat in (path.stat(),)]
    fingerprint = hashlib.blake2b(json.dumps([settings, stats]).encode(), digest_size=12).hexdigest()
    known = cache_dir / "fingerprints" / fingerprint
    if known.exists():
        return known.read_text()
    root = Path(os.path.commonpath([str(path.parent) for path in files]))
    contents = content_hash(files, root)
    if config.tokenizer and Path(config.tokenizer).is_file():
        contents += content_hash([Path(config.tokenizer)], None)
    key = hashlib.blake2b(json.dumps([settings, contents]).encode(), digest_size=8).hexdigest()
    known.parent.mkdir(exist_ok=True)
    known.write_text(key)
    return key


def _read_manifest(path: Path) -> Manifest:
    try:
        manifest = Manifest(**json.loads((path / "manifest.json").read_text()))
        sizes = {name: (path / name).stat().st_size for name in manifest.file_bytes}
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is damaged ({error}); delete the directory, it will be built again") from None
    for name, expected in manifest.file_bytes.items():
        if sizes[name] != expected:
            raise ConfigError(
                f"{path / name} has {sizes[name]} bytes instead of {expected}; delete {path}, it will be built again"
            )
    return manifest


def _build(path: Path, config: DataConfig, files: tuple[Path, ...], vocab_size: int, progress: bool) -> None:
    """Build in a temporary directory and rename: a kill leaves nothing that looks complete."""
    started = time.perf_counter()
    temporary = Path(tempfile.mkdtemp(prefix="building-", dir=path.parent))
    try:
        total = sum(file.stat().st_size for file in files)
        if config.tokenizer:
            tokenizer = load_tokenizer(Path(config.tokenizer), vocab_size)
        else:
            _say(progress, f"training a tokenizer of {vocab_size:,} tokens on {total / 1e6:.1f} MB")
            tokenizer = train_tokenizer(_training_texts(files, config), vocab_size)
        end = end_token_id(tokenizer, config.end_token)
        counts = {"documents": 0, "tokens": 0}

        def encoded() -> Iterator[list[int]]:
            documents = read_documents(files, config.jsonl_field, warn=True)
            while batch := list(islice(documents, _BATCH)):
                for encoding in tokenizer.encode_batch_fast([document.text for document in batch], add_special_tokens=False):
                    if encoding.ids:
                        counts["documents"] += 1
                        counts["tokens"] += len(encoding.ids) + 1
                        yield [*encoding.ids, end]

        write_dataset(temporary / "tokens", _with_progress(encoded(), progress), vocab_size)
        if counts["documents"] == 0:
            raise ConfigError(f"the {len(files)} files of data.name={config.name} hold no text")
        tokenizer.save(str(temporary / "tokenizer.json"))
        sizes = {name: (temporary / name).stat().st_size for name in ("tokens.bin", "tokens.idx", "tokenizer.json")}
        manifest = Manifest(
            config.name,
            len(files),
            counts["documents"],
            counts["tokens"],
            vocab_size,
            tokenizer.get_vocab_size(with_added_tokens=True),
            end,
            sizes,
            time.perf_counter() - started,
        )
        (temporary / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1) + "\n")
        for name in os.listdir(temporary):
            with (temporary / name).open("rb") as file:
                os.fsync(file.fileno())
        if path.exists():
            shutil.rmtree(path)  # without a manifest: what an older interruption left
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _training_texts(files: tuple[Path, ...], config: DataConfig) -> Iterator[str]:
    seen = 0
    for document in read_documents(files, config.jsonl_field):
        yield document.text
        seen += len(document.text)
        if seen > _TRAINING_CHARACTERS:
            return


def _with_progress(documents: Iterator[list[int]], progress: bool) -> Iterator[list[int]]:
    """Pass documents through, with a bar on a terminal and two plain lines elsewhere."""
    if not progress:
        yield from documents
        return
    _say(not sys.stderr.isatty(), "tokenizing")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("tokenizing"), BarColumn(), MofNCompleteColumn(), TextColumn("documents"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("tokenizing", total=None)
        for document in documents:
            yield document
            bar.advance(task)


def _say(speak: bool, line: str) -> None:
    if speak:
        print(line, file=sys.stderr, flush=True)
