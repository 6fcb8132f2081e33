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
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)  # possessive: in linear time


class JsonContent(NamedTuple):
    """What a file named .json holds.

    kind: `lines` of objects; one JSON value, which is an `array`, an array of `texts` or an
        `object`; lines of `arrays`; one `string` or lines of them; or `text`: no JSON.
    has_records: whether the beginning of a JSON value has the field with a text, or with a column.
    """

    kind: Literal["lines", "array", "texts", "object", "arrays", "string", "text"]
    has_records: bool = False


# What a file holds, the jq filter that makes lines of it, and what to know of that.
_WAYS = {
    "array": ("one JSON array", ".[]", ""),
    "texts": ("one JSON array of strings", ".[] | {{{field}: .}}", ""),
    "object": (
        "one JSON object",
        ".",
        " ('.NAME[]' instead of . takes the entries of its list NAME)",
    ),
    "arrays": (
        "lines of JSON arrays",
        "{{{field}: .[0]}}",
        " (.[0] is the first entry of each line; take the one that has the text)",
    ),
    "string": ("a JSON string", "{{{field}: .}}", ""),
}
_UNPACK = {".gz": "gzip -dc", ".zst": "zstd -dc"}


def json_content(stream: BinaryIO, field: str, is_packed: bool = False) -> JsonContent:
    """Return what a stream holds, by its beginning.  Empty lines there count as nothing.

    They are lines if the first one is an object with `field`, which is no column, or if an object
    follows an object or an array that ends with its line.

    is_packed: whether lines are expected, so that the first one may also be a broken object.
    """
    first = _next_line(stream).removeprefix(codecs.BOM_UTF8).lstrip()
    if not first.startswith((b"{", b"[", b'"')):
        return JsonContent("text")
    value = _value(first)
    if isinstance(value, dict) and _has(value, field):
        return JsonContent("lines")
    is_array = isinstance(value, list) or (_is_long_array(first) and _is_closed(first))
    second = _next_line(stream)
    other = _value(second)
    if isinstance(other, dict) and other:
        is_broken = is_packed and value is None and first.startswith(b"{")
        if isinstance(value, dict) or is_array or is_broken:
            return JsonContent("lines")
    if is_array and second:
        return JsonContent("arrays")
    if first.startswith(b'"'):
        is_string = isinstance(value, str) and (not second or isinstance(other, str))
        return JsonContent("string" if is_string else "text")
    head, name = first[:_HEAD] + second[:_HEAD] + stream.read(_HEAD), json.dumps(field).encode()
    # A list or an object from "0" on is a column; other objects describe one.
    column = re.escape(name) + rb'\s*:\s*(["\[]|\{\s*"0")'
    has_records = re.search(column, head) is not None
    if first.startswith(b"{"):
        return JsonContent("object", has_records)
    return JsonContent("texts" if re.match(rb'\[\s*"', head) else "array", has_records)


def _has(record: dict[str, object], field: str) -> bool:
    return field in record and not isinstance(record[field], list | dict)


def _next_line(stream: BinaryIO) -> bytes:
    """Return the next line that is not empty, or what is read of it; b"" at the end."""
    while line := stream.readline(LONGEST_LINE + 1):
        if line.removeprefix(codecs.BOM_UTF8).strip():
            return line
    return b""


def _is_long_array(line: bytes) -> bool:
    return line.startswith(b"[") and len(line) > _HEAD


def _is_closed(line: bytes) -> bool:
    """Return whether a line ends with a bracket, and has as many that close as that open."""
    bare = _STRING.sub(b"", line).rstrip()
    return bare.endswith(b"]") and bare.count(b"[") == bare.count(b"]")


def is_object(line: bytes) -> bool:
    """Return whether a line holds a JSON object."""
    return isinstance(_value(line.removeprefix(codecs.BOM_UTF8)), dict)


def _value(line: bytes) -> object:
    """Return the JSON value of a line, None for none and for a long array, which takes memory."""
    if _is_long_array(line):
        return None
    try:
        value: object = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return value


def one_value_words(path: Path, kind: str, field: str) -> str:
    """Return the message about a file of this kind of JSON; see `JsonContent`.

    field: that lines of JSON have their text in.
    """
    holds, command, more = _answer(path, kind, field)
    return (
        f"{path} holds {holds}, not lines of JSON objects, so its quotes and brackets would be "
        f"text; give each document a line: {command}{more}; or name it .txt{_packed(path)} if all "
        "of it is meant"
    )


def short_words(path: Path, kind: str, field: str) -> str:
    """Return what `one_value_words` says, for a line that begins with the path."""
    holds, command, more = _answer(path, kind, field)
    return f"{holds}; give each document a line: {command}{more}"


def _answer(path: Path, kind: str, field: str) -> tuple[str, str, str]:
    """Return what a file holds, the command that makes lines of it, and what to know of that."""
    holds, chosen, more = _WAYS[kind]
    packed = _packed(path)
    bare = path.with_suffix("") if packed else path
    source, target = (shlex.quote(str(one)) for one in (path, bare.with_suffix(".jsonl")))
    jq = f"jq -c {shlex.quote(chosen.format(field=json.dumps(field)))}"
    command = f"{_UNPACK[packed]} {source} | {jq}" if packed else f"{jq} {source}"
    return holds, f"{command} > {target}", more


def _packed(path: Path) -> str:
    """Return .gz or .zst if a file is packed, else nothing."""
    suffix = path.suffix.lower()
    return suffix if suffix in _UNPACK else ""
