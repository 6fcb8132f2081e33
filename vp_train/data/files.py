"""Finding the files of a corpus, in a fixed order, and opening them.

A file is read as its ending says, below .gz or .zst if it has one of those.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from vp_train.config import ConfigError, DataConfig
from vp_train.config.typed import shell_word
from vp_train.data.json_lines import (
    JsonContent,
    is_object,
    json_content,
    one_value_words,
    short_words,
)
from vp_train.data.left_out import (
    ABOUT,
    HIDDEN,
    JSON_RECORDS,
    JSON_TEXTS,
    LINK_TO_NOTHING,
    LINKED_DIRECTORY,
    NO_FILE,
    OTHER_ENDING,
    LeftOut,
    words_of,
)
from vp_train.data.manifest import MANIFEST
from vp_train.durable import PointerError, UnreadableError, open_regular, read_json

_PROSE = frozenset({".txt", ".md", ".rst", ".tex", ".html"})
_TEXTS = _PROSE | {".csv"} | {".py", ".c", ".h", ".cc", ".cpp", ".java", ".js", ".ts", ".go", ".rs"}
_LINES = frozenset({".jsonl", ".ndjson"})
_JSON = ".json"
_TABLES = frozenset({".parquet", ".arrow"})
INDEX, TOKENS = ".idx", ".bin"  # the files of a pair that Megatron-LM has tokenized
_PACKED = frozenset({".gz", ".zst"})
# What tells about a data set, also in another language: README, README.md, README_zh-CN.md
_ABOUT = re.compile(
    "(readme|licen[cs]e|copying|notice|authors|citation|contributing|change(s|log)"
    "|code_of_conduct|security)([-_.][a-z]{2,4}){0,2}",
    re.IGNORECASE,
)
INSTALL = "pip install 'vp_train[data]'"
_BUFFER = 1 << 20  # bytes
_LARGEST_STATE = 1 << 26  # bytes of a JSON file that describes a data set


def kind_of(path: Path) -> str:
    """Return how a file is read: `lines`, `json`, `parquet`, `arrow` or `tokens`, else `text`.

    What `json` holds is known when its beginning is read; see `kind_to_read`.  But .json.gz and
    .json.zst hold one document a line, as published data sets do.
    """
    suffix, packed = _suffixes(path)
    if suffix in _TABLES and not packed:
        return suffix[1:]
    if suffix in (INDEX, TOKENS) and not packed:
        return "tokens"
    if suffix == _JSON:
        return "lines" if packed else "json"
    return "lines" if suffix in _LINES else "text"


def kind_to_read(path: Path, field: str) -> str:
    """Return `kind_of` a file, of .json `lines` or `text`, as it begins.

    field: of a line of JSON, that holds the text.

    Raises ConfigError for a .json that holds one JSON value, which is no text.
    """
    kind = kind_of(path)
    if kind != "json":
        return kind
    content = content_of_json(path, field)
    if content.kind not in ("lines", "text"):
        raise ConfigError(one_value_words(path, content.kind, field))
    return content.kind


def no_lines_words(path: Path, field: str, first: bytes) -> str:
    """Return why a packed .json, which is read as lines, holds none, empty if it does.

    first: its first line.
    """
    if _suffixes(path)[0] != _JSON or is_object(first):
        return ""
    kind = content_of_json(path, field).kind
    return "" if kind in ("lines", "text") else short_words(path, kind, field)


def content_of_json(path: Path, field: str) -> JsonContent:
    """Return what a .json holds.  Raises ConfigError if it cannot be read."""
    with open_unpacked(path) as (file, _):
        return json_content(file, field, is_packed=bool(_suffixes(path)[1]))


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the ending that says what a file holds, and .gz or .zst if that is behind it."""
    last = path.suffix.lower()
    return (path.with_suffix("").suffix.lower(), last) if last in _PACKED else (last, "")


def _is_known(path: Path) -> bool:
    suffix, packed = _suffixes(path)
    known = suffix in _TEXTS | _LINES or (bool(packed) and suffix == _JSON)
    return known or (suffix in _TABLES and not packed)


def find_files(config: DataConfig, left_out: LeftOut | None = None) -> tuple[Path, ...]:
    """Return the files of the corpus, sorted by path.  Raises ConfigError if there are none.

    Files of a directory whose endings are not known are counted in `left_out`, and what is no file:
    links that lead to a directory or to nothing, pipes, devices; what is hidden; and what tells
    about the tables beside it.  Either all files are text, or all belong to pairs of .bin and .idx,
    both of which are returned.
    """
    left_out = LeftOut() if left_out is None else left_out
    if config.name == "pystdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = _modules_of(root)
    else:
        assert config.path is not None
        # A link keeps its name: its ending says what it holds, as in the cache of a hub.
        root = Path(os.path.abspath(os.path.expanduser(config.path)))
        if not root.exists() and Path(f"{root}{INDEX}").is_file():  # the prefix of a pair
            root = Path(f"{root}{INDEX}")
        if not root.exists():
            raise ConfigError(
                f"data.path={config.path} does not exist; "
                "give a directory of text files, or one file"
            )
        if not root.is_file():
            files = _files_of(root, config.jsonl_field, left_out)
        else:
            is_pair = kind_to_read(root, config.jsonl_field) == "tokens"
            files = _pair(root) if is_pair else [root]
    files = sorted(path for path in files if path.is_file())
    if not files:
        known = " ".join(sorted(_TEXTS | _LINES | {_JSON} | _TABLES))
        found = "; ".join(words_of(left_out.as_dict()))
        raise ConfigError(
            f"data.path={root} holds no text file{found and f' ({found})'}; known endings are "
            f"{known}, and all but .arrow and .parquet with .gz or .zst behind them; or pairs of "
            ".bin and .idx of Megatron-LM"
        )
    return tuple(files)


_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def _modules_of(root: Path) -> list[Path]:
    """Return the modules of Python's standard library; what is installed there is not looked at.

    Every rank does this before its first step, and site-packages may hold many thousands of files.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    return found


def _files_of(root: Path, field: str, left_out: LeftOut) -> list[Path]:
    if not root.is_dir():
        raise ConfigError(
            f"data.path={root} is a device, a pipe or a socket; give a directory or a file"
        )
    found, halves, tables = [], [], []
    shards: dict[Path, frozenset[str] | None] = {}
    for path in sorted(_below(root, left_out)):
        folder = path.parent
        if path.name == "dataset_dict.json":
            raise ConfigError(_splits_words(path))
        if folder not in shards:
            shards[folder] = _saved_shards(folder)
        saved = shards[folder]
        if saved is not None and path.suffix in (".arrow", ".json"):
            # Beside the shards of a saved data set lie its description and files of a cache.
            found += [path] if path.name in saved else []
        elif path.is_symlink() and not path.is_file():
            kind = (
                LINKED_DIRECTORY if path.is_dir() else NO_FILE if path.exists() else LINK_TO_NOTHING
            )
            left_out.add(kind, str(path))
        elif not path.is_file():
            if not path.is_dir():
                left_out.add(NO_FILE, str(path))
        elif _is_known(path):
            found.append(path)
        elif kind_of(path) == "json":
            content = content_of_json(path, field)
            if content.kind == "lines":
                found.append(path)
            else:
                kind = JSON_RECORDS if content.has_records else OTHER_ENDING
                if content.kind in ("texts", "arrays", "string"):
                    kind = JSON_TEXTS
                left_out.add(kind, str(path), num_bytes=path.stat().st_size)
                tables += [path] if content.has_records else []
        elif kind_of(path) == "tokens" and not _is_ours(path):
            halves.append(path)
        else:
            left_out.add(OTHER_ENDING, str(path), num_bytes=path.stat().st_size)
    found = _without_words_about([*found, *tables], left_out)
    found = [path for path in found if path not in tables]
    if not {path.with_suffix("") for path in halves if path.suffix == INDEX}.intersection(
        path.with_suffix("") for path in halves if path.suffix == TOKENS
    ):
        for path in halves:
            left_out.add(OTHER_ENDING, str(path), num_bytes=path.stat().st_size)
        return found
    if found:
        raise ConfigError(
            f"data.path={root} holds text ({found[0]}) and tokens of Megatron-LM ({halves[0]}), "
            "which may be the same text; give one of them, or both with data.blend"
        )
    return sorted({path for half in halves for path in _pair(half)})


def _without_words_about(found: Sequence[Path], left_out: LeftOut) -> list[Path]:
    """Return the files without those that tell about tables which lie in their folder or below."""
    tables = (path for path in found if kind_of(path) != "text")
    folders = {folder for path in tables for folder in path.parents}
    kept = []
    for path in found:
        is_prose = _suffixes(path)[0] in _PROSE  # not security.py
        if is_prose and path.parent in folders and _ABOUT.fullmatch(path.stem):
            left_out.add(ABOUT, str(path))
        else:
            kept.append(path)
    return kept


def _is_ours(path: Path) -> bool:
    """Return whether a file belongs to a corpus of vp-prepare, which is given by its directory."""
    return path.stem == "tokens" and (path.parent / MANIFEST).exists()


def _pair(path: Path) -> list[Path]:
    """Return both files of the pair to which one belongs.  Raises ConfigError if one is missing."""
    pair = [path.with_suffix(TOKENS), path.with_suffix(INDEX)]
    for file in pair:
        if not file.is_file():
            raise ConfigError(
                f"{path} needs {file.name} beside it: Megatron-LM keeps tokens in a .bin and their "
                "index in an .idx; copy both, or rename the file if it holds text"
            )
    return pair


def _below(root: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yield everything below a directory but what is hidden; links are not followed.

    What is hidden is the work of tools, such as .git and .ipynb_checkpoints.  Raises OSError for a
    directory that may not be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders.sort()
        for name in sorted((*folders, *names)):
            path = Path(folder, name)
            if name.startswith("."):
                left_out.add(HIDDEN, str(path))
            else:
                yield path
        folders[:] = [name for name in folders if not name.startswith(".")]


def _saved_shards(folder: Path) -> frozenset[str] | None:
    """Return the names of the shards if `datasets.save_to_disk` has written a folder, else None.

    Raises ConfigError if it keeps only a choice of its rows.
    """
    state = folder / "state.json"
    if not state.is_file() or not (folder / "dataset_info.json").is_file():
        return None
    try:
        value = read_json(state, _LARGEST_STATE)
        entries = value["_data_files"]
        names = frozenset(str(entry["filename"]) for entry in entries)
    except UnreadableError as error:
        raise ConfigError(f"{error}; save the data set again") from None
    except (KeyError, TypeError):
        return None
    if value.get("_indices_data_files"):
        raise ConfigError(
            f"{state} names a choice of rows (indices); call flatten_indices() on the data set, "
            "and save it again"
        )
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ConfigError(f"{folder / missing[0]} is not there, but {state} names it")
    return names


def _splits_words(path: Path) -> str:
    """Return the message for a folder with several splits of a data set."""
    try:
        splits = [str(name) for name in read_json(path)["splits"]]
    except (UnreadableError, KeyError, TypeError):
        splits = []
    names = ", ".join(splits) or "see its folders"
    example = path.parent / (splits[0] if splits else "train")
    return (
        f"{path.parent} holds the splits of a data set ({names}); "
        f"give the one to train on, for example {shell_word('data.path', str(example))}"
    )


def content_hash(files: Sequence[Path], root: Path) -> str:
    """Return a hash of the names (relative to `root`) and contents of the files.

    Raises ConfigError for a file that is not a regular one.
    """
    digest = hashlib.blake2b(digest_size=12)
    for path in files:
        digest.update(os.fsencode(path.relative_to(root)) + b"\0")
        digest.update(hash_of_file(path))
    return digest.hexdigest()


def hash_of_file(path: Path) -> bytes:
    """Return a hash of the contents of a file.  Raises ConfigError if it cannot be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "blake2b").digest()  # type: ignore[arg-type]
    except UnreadableError as error:
        raise refused(error) from None


def refused(error: UnreadableError) -> ConfigError:
    """Return the error about a file of a corpus that cannot be read."""
    way_out = "" if isinstance(error, PointerError) else "; remove it from the data, or repair it"
    return ConfigError(f"{error}{way_out}")


@contextmanager
def open_unpacked(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file for reading: a stream of its contents, unpacked if need be, and the raw file.

    What is unpacked is not kept, so a small file that unpacks to a huge one takes time, but no
    memory.  Raises ConfigError, also while the stream is read inside: the file is broken, packed
    in a way that takes too much memory, or a package is missing.
    """
    packed = _suffixes(path)[1]
    try:
        with open_regular(path) as raw:
            if packed == ".gz":
                inner = cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
                yield cast(BinaryIO, io.BufferedReader(inner, _BUFFER)), raw
            elif packed == ".zst":
                with _unzstd(path, raw) as stream:
                    yield stream, raw
            else:
                yield raw, raw
    except UnreadableError as error:
        raise refused(error) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(f"{path} is not a whole gzip file ({error}); get it again") from None


@contextmanager
def _unzstd(path: Path, raw: BinaryIO) -> Iterator[BinaryIO]:
    try:
        import zstandard
    except ImportError:
        raise ConfigError(f"{path} needs the package zstandard: {INSTALL}") from None
    try:
        with io.BufferedReader(_Frames(raw, zstandard.ZstdDecompressor()), _BUFFER) as stream:
            yield cast(BinaryIO, stream)
    except (zstandard.ZstdError, _CutOff) as error:
        if "memory" in str(error):
            raise ConfigError(
                f"{path} was packed with a window above 128 MiB; unpack it: unzstd --long=31 {path}"
            ) from None
        raise ConfigError(f"{path} is not a whole zstd file ({error}); get it again") from None


class _CutOff(Exception):
    """A packed file ends too early."""


class _Frames(io.RawIOBase):
    """The contents of a zstd file.  The library's own reader does not notice a missing end.

    A kilobyte holds at most 256 blocks of 128 KiB, which bounds what is unpacked at once.
    """

    _INPUT = 1 << 10  # bytes

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor
        self._frame: Any = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            packed = self._input or self._raw.read(self._INPUT)
            if not packed:
                if self._frame is not None and not self._frame.eof:
                    raise _CutOff("it ends too early")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(packed))
            self._input = self._frame.unused_data if self._frame.eof else b""
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size
