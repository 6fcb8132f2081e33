"""Finding and reading the documents of a corpus, in a fixed order."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vp_train.config import ConfigError, DataConfig, printable

_TEXT_SUFFIXES = frozenset(
    {".txt", ".md", ".rst", ".tex", ".html", ".csv", ".jsonl"}
    | {".py", ".c", ".h", ".cc", ".cpp", ".java", ".js", ".ts", ".go", ".rs"}
)


@dataclass(frozen=True, slots=True)
class Document:
    """One text and its origin: a path, for .jsonl files with the line number."""

    origin: str
    text: str


def find_files(config: DataConfig) -> tuple[Path, ...]:
    """Return the files of the corpus, sorted by path.  Raises ConfigError if there are none."""
    if config.name == "pystdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        files = [
            path
            for path in root.rglob("*.py")
            if not skipped.intersection(path.relative_to(root).parts)
        ]
    else:
        assert config.path is not None
        root = Path(os.path.realpath(os.path.expanduser(config.path)))
        if not root.exists():
            raise ConfigError(
                f"data.path={config.path} does not exist; "
                "give a directory of text files, or one file"
            )
        files = (
            [root]
            if root.is_file()
            else [path for path in root.rglob("*") if path.suffix.lower() in _TEXT_SUFFIXES]
        )
    files = sorted(path for path in files if path.is_file())
    if not files:
        raise ConfigError(
            f"data.path={root} holds no text file; "
            f"known endings are {' '.join(sorted(_TEXT_SUFFIXES))}"
        )
    return tuple(files)


def content_hash(files: Sequence[Path], root: Path) -> str:
    """Return a hash of the names (relative to `root`) and contents of the files."""
    digest = hashlib.blake2b(digest_size=12)
    for path in files:
        digest.update(os.fsencode(path.relative_to(root)) + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()


def read_documents(
    files: Sequence[Path], jsonl_field: str, warn: bool = False
) -> Iterator[Document]:
    """Yield every document in order.  Files that are not UTF-8 are skipped.

    With `warn`, one line on stderr names the skipped files.  Raises ConfigError with file and line
    number for a .jsonl line that is not UTF-8 JSON or lacks the text field `jsonl_field`.
    """
    skipped = []
    for path in files:
        try:
            if path.suffix.lower() == ".jsonl":
                yield from _read_lines(path, jsonl_field)
            else:
                yield Document(str(path), path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            skipped.append(path)
    if skipped and warn:
        others = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        print(f"left out, not UTF-8: {printable(str(skipped[0]))}{others}", file=sys.stderr)


LONGEST_PIECE = 1 << 24  # characters that are tokenized together


def pieces(text: str, longest_run: int) -> list[str]:
    """Cut a text where it has more than `longest_run` characters with or without a blank in a row.

    The time of a tokenizer grows faster than the length of a word, and its memory by some 50 bytes
    for each character, so texts are cut at a blank too.  The pieces together are the text.
    """
    if len(text) <= longest_run:
        return [text]
    runs = re.finditer(rf"\S{{{longest_run}}}|\s{{{longest_run}}}", text)
    cuts = [0, *(run.end() for run in runs), len(text)]
    found = []
    for start, stop in pairwise(cuts):
        while stop - start > LONGEST_PIECE:
            blank = text.rfind(" ", start + 1, start + LONGEST_PIECE)
            cut = blank if blank > 0 else start + LONGEST_PIECE
            found.append(text[start:cut])
            start = cut
        if start < stop:
            found.append(text[start:stop])
    return found


def _read_lines(path: Path, field: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                raise ConfigError(
                    f"{path}:{number} is not JSON in UTF-8 ({error}); repair or remove the line"
                ) from None
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                found = (
                    ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
                )
                raise ConfigError(
                    f"{path}:{number} has no text field {field!r} (found: {found}); "
                    "set data.jsonl_field"
                )
            # JSON can escape half of a surrogate pair, which no tokenizer accepts.
            yield Document(
                f"{path}:{number}", record[field].encode("utf-8", "replace").decode("utf-8")
            )
