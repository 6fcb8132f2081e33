"""Reading the documents of files, in bounded memory.

A text file is one document: its characters as they stand, carriage returns too, without the byte
order mark that may come first.  A line of a .jsonl file or a row of a table is one document: the
text in one field.
"""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vp_train.config import ConfigError
from vp_train.data.files import kind_to_read, no_lines_words, open_unpacked
from vp_train.data.json_lines import LONGEST_LINE
from vp_train.data.left_out import (
    EMPTY,
    NO_FIELD,
    NO_LINES,
    NO_OBJECT,
    NOT_JSON,
    NOT_TEXT,
    NOT_UTF8,
    NULL,
    TOO_LONG,
    LeftOut,
    words_of,
)
from vp_train.durable import shown

_NAMES: dict[type, str] = {  # of JSON values
    list: "an array",
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}
_CHUNK = 1 << 22  # bytes of a text file that are read together


@dataclass(frozen=True, slots=True)
class Document:
    """One text, in parts, and its origin: a path, with the number of the line or the row.

    The parts of a text that is not long are a tuple.  Those of a long one can be read once, before
    the next document is taken.
    """

    origin: str
    parts: Iterable[str]

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.parts)


@dataclass(slots=True)
class Reading:
    """How far a corpus is read, and what was left out.

    num_bytes: of the files, as they are on disk.
    """

    left_out: LeftOut
    num_bytes: int = 0


def read_documents(
    files: Sequence[Path], field: str, warn: bool = False, reading: Reading | None = None
) -> Iterator[Document]:
    """Yield every document in order.

    field: of a JSON line, or the column of a table, that holds the text.
    warn: whether to say on stderr at the end what was left out, one line for each kind.
    reading: what is kept up to date meanwhile.

    What holds no text is left out.  Raises ConfigError for a file that cannot be read or is broken,
    and for a table without the column.
    """
    state = Reading(LeftOut()) if reading is None else reading
    done = state.num_bytes
    for path in files:
        kind = kind_to_read(path, field)
        if kind == "lines":
            yield from _lines(path, field, state)
        elif kind == "text":
            yield from _text(path, state)
        elif kind == "tokens":
            raise ConfigError(f"{path} is for the tokens of Megatron-LM; text is needed here")
        else:
            from vp_train.data.tables import rows

            for origin, value in rows(path, kind, field, state.left_out):
                yield from _document(origin, value, state.left_out)
        done += path.stat().st_size
        state.num_bytes = done
    if warn:
        for line in words_of(state.left_out.as_dict()):
            print(line, file=sys.stderr)


def _document(origin: str, value: object, left_out: LeftOut) -> Iterator[Document]:
    """Yield the document of a field, or count why there is none."""
    if value is None:
        left_out.add(NULL, origin)
    elif not isinstance(value, str):
        left_out.add(NOT_TEXT, origin, shown(value))
    elif not value:
        left_out.add(EMPTY, origin)
    else:
        yield Document(origin, (value,))


def _text(path: Path, state: Reading) -> Iterator[Document]:
    """Yield a text file as one document.  A long one is read twice, to see that all is UTF-8."""
    before = state.num_bytes
    try:
        with open_unpacked(path) as (stream, _):
            first = stream.read(_CHUNK)
            is_long = len(first) == _CHUNK and bool(stream.read(1))
        text = "" if is_long else first.decode("utf-8-sig")
        if is_long:
            with open_unpacked(path) as (stream, _):
                for _ in _decoded(stream):
                    pass
    except UnicodeDecodeError:
        with open_unpacked(path) as (stream, _):
            found = _utf16_words(stream.read(4))
        if not found:
            with open_unpacked(path) as (stream, _):
                found = f"line {_first_wrong_line(stream)}"
        state.left_out.add(NOT_UTF8, str(path), found, path.stat().st_size)
        return
    if is_long:
        with open_unpacked(path) as (stream, raw):
            yield Document(str(path), _followed(_decoded(stream), raw, state, before))
    elif text:
        yield Document(str(path), (text,))
    else:
        state.left_out.add(EMPTY, str(path))


def _utf16_words(start: bytes) -> str:
    """Return what a file is that begins with a byte order mark of UTF-16; empty if it is not."""
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if not start.startswith(marks) or start.startswith(codecs.BOM_UTF32_LE):
        return ""
    return "looks like UTF-16: iconv -f UTF-16 -t UTF-8 makes it UTF-8"


def _first_wrong_line(stream: BinaryIO) -> int:
    """Return the number of the first line that is not UTF-8, from 1; the last one if all are."""
    decoder, number = codecs.getincrementaldecoder("utf-8")(), 1
    with suppress(UnicodeDecodeError):
        while part := stream.readline(_CHUNK):
            decoder.decode(part)
            number += part.endswith(b"\n")
    return number


def _decoded(stream: BinaryIO) -> Iterator[str]:
    """Yield the text of a stream in parts.  Raises UnicodeDecodeError."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while chunk := stream.read(_CHUNK):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _followed(parts: Iterator[str], raw: BinaryIO, state: Reading, before: int) -> Iterator[str]:
    for part in parts:
        state.num_bytes = before + raw.tell()
        yield part


def _lines(path: Path, field: str, state: Reading) -> Iterator[Document]:
    before, left_out = state.num_bytes, state.left_out
    with open_unpacked(path) as (stream, raw):
        number = 0
        while line := stream.readline(LONGEST_LINE + 1):
            number += 1
            state.num_bytes = before + raw.tell()
            origin = f"{path}:{number}"
            if number == 1 and (found := no_lines_words(path, field, line)):
                left_out.add(NO_LINES, str(path), found, path.stat().st_size)
                return
            if len(line) > LONGEST_LINE:
                size = len(line)
                while line and not line.endswith(b"\n"):
                    line = stream.readline(_CHUNK)
                    size += len(line)
                left_out.add(TOO_LONG, origin, f"above {LONGEST_LINE:,} bytes", size)
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except (ValueError, RecursionError) as error:
                is_first = number == 1
                found = (is_first and _utf16_words(line)) or str(error)
                left_out.add(NOT_JSON, origin, found, len(line))
                continue
            if not isinstance(record, dict):
                words = f'{_NAMES[type(record)]}, not an object such as {{"{field}": "..."}}'
                left_out.add(NO_OBJECT, origin, words, len(line))
                continue
            if field not in record:
                words = f"no {field!r}, but {', '.join(sorted(record)) or 'nothing'}"
                left_out.add(NO_FIELD, origin, words, len(line))
                continue
            value = record[field]
            if isinstance(value, str) and not value.isascii():
                # JSON can escape half of a surrogate pair, which no tokenizer accepts.
                value = value.encode("utf-8", "replace").decode("utf-8")
            yield from _document(origin, value, left_out)
