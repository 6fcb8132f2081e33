"""The small files of a model's directory: found without links, read and copied within bounds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vp_train.config import ConfigError
from vp_train.durable import (
    PointerError,
    UnreadableError,
    open_regular,
    read_bytes,
    read_json,
    write_new,
)

_MOST_JSON = 64 << 20  # bytes of config.json and of an index
_MOST_COPIED = 256 << 20  # bytes of a tokenizer's file


def file_in(directory: Path, name: str) -> Path | None:
    """Return the regular file `name` of a model's directory without links, None if it is absent.

    A link may lead to another file of the directory, or to a blob of the same model, as in the
    cache of Hugging Face.  Raises ConfigError for any other link, for what is no regular file, and
    for the pointer of Git LFS to a file that was not fetched.
    """
    path = directory / name
    if not os.path.lexists(path):
        return None
    place, root = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    blobs = [root.parent.parent / "blobs"] if root.parent.name == "snapshots" else []
    if not any(place.is_relative_to(inside) for inside in (root, *blobs)):
        raise ConfigError(
            f"{path} is a link to {place}, which is outside of {directory}; copy the file there"
        )
    try:
        with open_regular(place, follow=False):
            return place
    except PointerError as error:
        raise ConfigError(str(error)) from None
    except UnreadableError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.  Raises ConfigError for anything else."""
    try:
        value = read_json(path, _MOST_JSON)
    except UnreadableError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def existing(directory: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return those of `names` that are files in `directory`, with their places."""
    found = {name: file_in(directory, name) for name in names}
    return {name: path for name, path in found.items() if path is not None}


def copy(source: Path, target: Path, names: Sequence[str]) -> list[str]:
    """Copy those of `names` that are files in `source`, and return their names."""
    found = existing(source, names)
    for name, path in found.items():
        try:
            content = read_bytes(path, _MOST_COPIED)
        except UnreadableError as error:
            raise ConfigError(str(error)) from None
        write_new(target / name, [content])
    return list(found)
