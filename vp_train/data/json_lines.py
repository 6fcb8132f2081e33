"""What a file named .json holds: lines of JSON, one JSON value, or text.

Data sets of a hub often name lines of JSON .json, and so the files that describe them.
"""

from __future__ import annotations

import codecs
import json
import re
import shlex
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

LONGEST_LINE = 1 << 26  # bytes of a JSON line; one of small values takes 25 times as much memory
_HEAD = 1 << 16  # bytes of a JSON value that are searched for the field


class JsonContent(NamedTuple):
    """What a file named .json holds.

    kind: `lines`, one JSON value (`array` or `object`), or `text`: no JSON.
    has_records: whether the beginning of a JSON value has the field with a text, or with a column.
    """

    kind: Literal["lines", "array", "object", "text"]
    has_records: bool = False


def json_content(stream: BinaryIO, field: str) -> JsonContent:
    """Return what a stream holds, by its beginning.  Empty lines there count as nothing.

    They are lines if the first one is an object with `field`, which is no column, or the first two
    are objects.
    """
    first = _next_line(stream).removeprefix(codecs.BOM_UTF8).lstrip()
    if not first.startswith((b"{", b"[")):
        return JsonContent("text")
    record = _object(first)
    if record is not None and (_has(record, field) or _object(_next_line(stream))):
        return JsonContent("lines")
    head, name = first[:_HEAD] + stream.read(_HEAD), re.escape(json.dumps(field).encode())
    # A list or an object from "0" on is a column; other objects describe one.
    has_records = re.search(name + rb'\s*:\s*(["\[]|\{\s*"0")', head) is not None
    return JsonContent("array" if first.startswith(b"[") else "object", has_records)


def _has(record: dict[str, object], field: str) -> bool:
    return field in record and not isinstance(record[field], list | dict)


def _next_line(stream: BinaryIO) -> bytes:
    """Return the next line that is not empty, or what is read of it; b"" at the end."""
    while line := stream.readline(LONGEST_LINE + 1):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            return line
    return b""


def _object(line: bytes) -> dict[str, object] | None:
    """Return the object that a line of JSON holds, None if it holds something else."""
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def one_value_words(path: Path, kind: str) -> str:
    """Return the message about a file with one JSON value, an `array` or an `object`."""
    chosen, more = "'.[]'", ""
    if kind == "object":
        chosen, more = ".", " ('.NAME[]' instead of . takes the entries of its list NAME)"
    source, target = (shlex.quote(str(one)) for one in (path, path.with_suffix(".jsonl")))
    return (
        f"{path} holds one JSON {kind}, not lines of JSON, so its names and brackets would be "
        f"text; give each document a line: jq -c {chosen} {source} > {target}{more}; "
        "or name it .txt if all of it is meant"
    )
