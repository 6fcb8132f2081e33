"""The manifest of a prepared corpus: what it holds, and the hashes of its files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_type_hints

from vp_train.config import ConfigError
from vp_train.data.integrity import BLOCK, DIGITS
from vp_train.durable import UnreadableError, open_regular, read_json

MANIFEST = "manifest.json"
FILES = ("tokenizer.json", "tokens.bin", "tokens.idx")
_OWN_HASH = "manifest_hash"
_LARGEST_MANIFEST = 1 << 26  # bytes; the hashes of a terabyte take 9 MB
# Entries that corpora of earlier versions do not have.
_LATER = {"largest_token", "left_out", "text_bytes", "begin_token", "unspelled"}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The description of a corpus.  It is written last: a directory with a manifest is complete."""

    name: str
    content_hash: str  # of contents, tokenizer and settings; the directory's name ends with it
    num_files: int
    num_documents: int
    num_tokens: int
    vocab_size: int  # that holds every id of the tokenizer
    num_token_ids: int  # of the tokenizer, at most vocab_size
    end_token: int
    file_bytes: dict[str, int]
    blocks: dict[str, list[str]]  # the hashes of every file; see `integrity`
    seconds: float  # that the build took
    largest_token: int | None = None  # in the text or at its ends; None if not known
    left_out: dict[str, list[int | str]] = field(default_factory=dict)  # see `left_out`
    text_bytes: int | None = None  # of the files that were read; None if not known
    begin_token: int | None = None  # in front of every document; None if there is none
    unspelled: dict[str, int | str] = field(default_factory=dict)  # see `unspelled.Tally`


def is_outdated(path: Path) -> bool:
    """Return whether an earlier version, which kept no hashes, has built this corpus."""
    with contextlib.suppress(UnreadableError):
        values = read_json(path / MANIFEST, _LARGEST_MANIFEST)
        return isinstance(values, dict) and "checked_ns" in values
    return False


def read_manifest(path: Path) -> Manifest:
    """Return the manifest of the corpus in `path`; every file must have the size that it says.

    Raises ConfigError.
    """
    way_out = f"delete {path}, and prepare it again"
    try:
        values = read_json(path / MANIFEST, _LARGEST_MANIFEST, follow=False)
        if isinstance(values, dict) and "checked_ns" in values:
            raise UnreadableError(f"{path} is from an earlier version, which kept no hashes")
        if (wrong := _misfit(values)) is not None:
            raise UnreadableError(f"{path / MANIFEST}: {wrong}")
        sizes = {name: size_of(path / name) for name in FILES}
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
    if not isinstance(values, dict) or values.keys() | _LATER != {*kinds, _OWN_HASH}:
        return "it does not have the entries of a corpus"
    if values[_OWN_HASH] != _hash_of({name: values[name] for name in values.keys() - {_OWN_HASH}}):
        return "it does not match its hash"
    for name, kind in kinds.items():
        value = values.get(name)
        if kind is int and not (type(value) is int and 0 <= value < 2**63):
            return f"{name} is not a whole number"
        if kind is str and not (
            isinstance(value, str) and re.fullmatch("[0-9A-Za-z_]{1,64}", value)
        ):
            return f"{name} is not a name"
    if type(values["seconds"]) not in (int, float):
        return "seconds is not a number"
    if (wrong := _later_misfit(values)) is not None:
        return wrong
    sizes, blocks = values["file_bytes"], values["blocks"]
    for entry in (sizes, blocks):
        if not isinstance(entry, dict) or sorted(entry) != list(FILES):
            return f"it does not describe {', '.join(FILES)} alone"
    for name in FILES:
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
    if (values.get("begin_token") or 0) >= values["vocab_size"]:
        return "its begin token is outside the vocabulary"
    return None


def _later_misfit(values: Mapping[str, object]) -> str | None:
    """Return what is wrong with the entries that earlier versions do not have."""
    largest, left_out = values.get("largest_token"), values.get("left_out", {})
    if largest is not None and not (type(largest) is int and 0 <= largest < 2**31):
        return "largest_token is not a token"
    size = values.get("text_bytes")
    if size is not None and not (type(size) is int and 0 <= size < 2**63):
        return "text_bytes is not a number of bytes"
    begin = values.get("begin_token")
    if begin is not None and not (type(begin) is int and 0 <= begin < 2**31):
        return "begin_token is not a token"
    if not isinstance(left_out, dict) or not all(
        isinstance(entry, list) and [type(item) for item in entry] in ([int, str], [int, str, int])
        for entry in left_out.values()
    ):
        return "left_out is not what was left out"
    if not _counts_unspelled(values.get("unspelled", {})):
        return "unspelled is not what the tokenizer could not spell"
    return None


def _counts_unspelled(value: object) -> bool:
    if not isinstance(value, dict) or not value:
        return value == {}
    kinds = {name: type(entry) for name, entry in value.items()}
    expected = {"lost": int, "total": int, "first": str}
    if kinds not in (expected, expected | {"token": str}):
        return False
    return bool(0 < value["lost"] <= value["total"] < 2**63)


def size_of(path: Path) -> int:
    """Return the size of a regular file of a corpus.  Raises UnreadableError for anything else."""
    with open_regular(path, follow=False) as file:
        return os.fstat(file.fileno()).st_size


def manifest_text(manifest: Manifest) -> str:
    """Return the text of a manifest's file."""
    values = asdict(manifest)
    return json.dumps(values | {_OWN_HASH: _hash_of(values)}, indent=1) + "\n"
