"""The manifest of a checkpoint: which files it has, their hashes, and the tensors in them.

A checkpoint may come from somebody else, so everything in a manifest is checked here before it is
used.  After `read_manifest` every name is that of a file within the checkpoint, all shapes and
ranges fit each other, and the files hold every value of a tensor at most once.  After `check_file`
a file is what the manifest says.  Manifests are read without torch, whose import takes
seconds.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from vp_train.config.bounds import DTYPES
from vp_train.durable import (
    UnreadableError,
    checkpoint_step,
    checkpoints_in,
    open_regular,
    plain,
    read_json,
    shown,
    write_new,
)
from vp_train.tensors.slices import TensorSlice

MANIFEST = "manifest.json"
_FORMAT = 2
_MOST_BYTES = 32 << 20  # of a manifest; a model of 400 B on 1,024 ranks has about 6 MB
MOST_STEPS = 10**12
BATCH = "dp * num_microbatches * micro_batch_size"  # a setting of the section `batch`
_FILE_NAME = re.compile(r"rank-[0-9]{5,9}\.safetensors")
_HASH = re.compile(r"[0-9a-f]{128}")


class AlteredError(ValueError):
    """Bytes that are not those that were saved: they will never be right again."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: the whole one of `shape`, or its slice `split`."""

    dtype: str
    shape: tuple[int, ...]
    split: TensorSlice | None = None

    @property
    def shape_in_file(self) -> tuple[int, ...]:
        """The shape of what the file holds."""
        if self.split is None:
            return self.shape
        held = sum(stop - start for start, stop in self.split.ranges)
        return (*self.shape[: self.split.dim], held, *self.shape[self.split.dim + 1 :])

    def as_json(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        entry: dict[str, Any] = {"dtype": self.dtype, "shape": list(self.shape)}
        if self.split is not None:
            entry |= {"dim": self.split.dim, "ranges": [list(part) for part in self.split.ranges]}
        return entry


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of a checkpoint: its size, the BLAKE2b hash of its bytes, and its tensors by name."""

    num_bytes: int
    blake2b: str
    tensors: Mapping[str, StoredTensor]

    def as_json(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        tensors = {name: tensor.as_json() for name, tensor in self.tensors.items()}
        return {"bytes": self.num_bytes, "blake2b": self.blake2b, "tensors": tensors}


@dataclass(frozen=True, slots=True)
class Manifest:
    """The contents of a checkpoint: its step, the files by name, and the `state` of its writer.

    `state` is any JSON object; whoever wrote it checks it.
    """

    step: int
    state: Mapping[str, Any]
    files: Mapping[str, StoredFile]


def file_name(rank: int) -> str:
    """Return the name of the file that `rank` writes."""
    return f"rank-{rank:05d}.safetensors"


def write_manifest(
    path: Path, step: int, state: Mapping[str, Any], files: Mapping[str, Any]
) -> None:
    """Write the manifest of the checkpoint in directory `path`, with its own hash, and sync it.

    `files` are entries as from `StoredFile.as_json`.  Raises OSError that names the file, and
    ValueError if the manifest would be too large to be read.
    """
    body = json.dumps({"format": _FORMAT, "step": step, "state": state, "files": files})
    digest = hashlib.blake2b(body.encode()).hexdigest()
    text = json.dumps({"blake2b": digest, "manifest": body}).encode()
    if len(text) > _MOST_BYTES:
        raise ValueError(f"{path / MANIFEST} would have {len(text):,} bytes, which is too many")
    write_new(path / MANIFEST, [text])


def read_manifest(path: Path) -> Manifest:
    """Return the checked manifest of checkpoint `path`.  The files that it lists are not read.

    Raises ValueError, which names the file, if the manifest is missing, damaged or inconsistent,
    or has another format.
    """
    place = path / MANIFEST
    try:
        wrapped = _object(read_json(place, _MOST_BYTES, follow=False), "the whole")
        body = _text(wrapped, "manifest", "")
        if hashlib.blake2b(body.encode()).hexdigest() != wrapped.get("blake2b"):
            raise AlteredError("it does not match its hash")
        manifest = _parsed(_object(json.loads(body), "the manifest"))
        named = checkpoint_step(path.name)
        if named is not None and named != manifest.step:
            raise ValueError(f"it is that of step {manifest.step}, not of {path.name}")
    except UnreadableError as error:
        raise ValueError(f"{path} is incomplete: {error}") from None
    except RecursionError:
        raise ValueError(f"{place} is damaged: it nests too deeply") from None
    except ValueError as error:  # JSONDecodeError is one
        kind = AlteredError if isinstance(error, AlteredError) else ValueError
        raise kind(f"{place} is damaged: {error}") from None
    return manifest


def saved_settings(manifest: Manifest) -> Mapping[str, Mapping[str, Any]]:
    """Return the settings in a manifest by section.  Raises ValueError if there are none."""
    config = manifest.state.get("config")
    if not (isinstance(config, dict) and all(isinstance(part, dict) for part in config.values())):
        raise ValueError(f"state.config is {shown(config)}, not settings")
    return config


def saved_batch(directory: Path) -> int | None:
    """Return the sequences of a step as the newest checkpoint in `directory` has them, if any."""
    for _, path in sorted(checkpoints_in(directory), reverse=True):
        with suppress(ValueError):
            batch = saved_settings(read_manifest(path)).get("batch", {}).get(BATCH)
            return batch if type(batch) is int else None
    return None


def newest_step(directory: Path, hashed_from: float = math.inf) -> int | None:
    """Return the step of the newest checkpoint in `directory` that looks whole, None if none does.

    Its manifest is right, and its files have their sizes.  Files are read, and compared with their
    hashes, only in checkpoints of step `hashed_from` and later: give the first step that decides
    something which is not to hang on a damaged file.
    """
    for step, path in reversed(checkpoints_in(directory)):
        try:
            for name, stored in read_manifest(path).files.items():
                if step >= hashed_from:
                    _check_bytes(path / name, stored)
                elif (path / name).stat().st_size != stored.num_bytes:
                    raise AlteredError(f"{path / name} has another size")
            return step
        except (ValueError, OSError):
            continue
    return None


def check_file(path: Path, stored: StoredFile) -> None:
    """Raise ValueError, which names the file, unless `path` is the file that the manifest lists.

    It is AlteredError where the bytes are others.
    """
    from vp_train.checkpoint.stream import describe_tensors

    _check_bytes(path, stored)
    held = {
        name: (str(tensor.dtype).removeprefix("torch."), tensor.shape)
        for name, tensor in describe_tensors(path).items()
    }
    listed = {name: (tensor.dtype, tensor.shape_in_file) for name, tensor in stored.tensors.items()}
    for name in held.keys() | listed.keys():
        if held.get(name) != listed.get(name):
            raise ValueError(
                f"{path} holds {plain(name)} as {shown(held.get(name))}, "
                f"but its manifest says {shown(listed.get(name))}"
            )


def _check_bytes(path: Path, stored: StoredFile) -> None:
    """Raise ValueError like `check_file` unless `path` has the bytes that were saved.

    The size is compared first, so no more than the listed number of bytes is read.
    """
    try:
        with open_regular(path, follow=False) as file:
            size = file.seek(0, 2)
            if size != stored.num_bytes:
                words = f"{size:,} bytes, but {stored.num_bytes:,} were saved"
                raise AlteredError(f"{path} has {words}")
            file.seek(0)
            if hashlib.file_digest(file, "blake2b").hexdigest() != stored.blake2b:  # type: ignore[arg-type]
                raise AlteredError(f"{path} does not match its hash")
    except (OSError, UnreadableError) as error:
        raise ValueError(f"{path.parent} is incomplete: {error}") from None


def _parsed(manifest: dict[str, Any]) -> Manifest:
    if manifest.get("format") != _FORMAT:
        raise ValueError(
            f"its format is {shown(manifest.get('format'))}, but this version reads {_FORMAT}"
        )
    files = {}
    for name, entry in _object(manifest.get("files"), "files").items():
        if not _FILE_NAME.fullmatch(name):
            raise ValueError(f"files has {plain(name)}, which is not like {file_name(0)}")
        files[name] = _file(_object(entry, name), name)
    _check_overlaps(files)
    return Manifest(
        _whole(manifest, "step", "", MOST_STEPS), _object(manifest.get("state"), "state"), files
    )


def _file(entry: dict[str, Any], name: str) -> StoredFile:
    digest = _text(entry, "blake2b", name)
    if not _HASH.fullmatch(digest):
        raise ValueError(f"{name}: blake2b={shown(digest)} is not a hash")
    tensors = _object(entry.get("tensors"), f"{name}: tensors")
    return StoredFile(
        _whole(entry, "bytes", name, 1 << 60),
        digest,
        {
            key: _tensor(_object(value, f"{name}: {plain(key)}"), f"{name}: {plain(key)}")
            for key, value in tensors.items()
        },
    )


def _tensor(entry: dict[str, Any], where: str) -> StoredTensor:
    dtype = _text(entry, "dtype", where)
    if dtype not in DTYPES:
        raise ValueError(f"{where}: dtype={shown(dtype)} is not one of {', '.join(DTYPES)}")
    shape = entry.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) > 8
        or not all(type(size) is int and size >= 0 for size in shape)
        or math.prod(max(1, size) for size in shape) > 1 << 60
    ):
        raise ValueError(f"{where}: shape={shown(shape)} is not a shape")
    if "dim" not in entry and "ranges" not in entry:
        return StoredTensor(dtype, tuple(shape))
    dim = entry.get("dim")
    if type(dim) is not int or not 0 <= dim < len(shape):
        raise ValueError(f"{where}: dim={shown(dim)} is not a dimension of {shown(shape)}")
    ranges = entry.get("ranges")
    if not isinstance(ranges, list) or not all(_is_range(part, shape[dim]) for part in ranges):
        raise ValueError(f"{where}: ranges={shown(ranges)} are not within {shape[dim]}")
    split = TensorSlice(dim, shape[dim], tuple((start, stop) for start, stop in ranges))
    return StoredTensor(dtype, tuple(shape), split)


def _is_range(part: Any, size: int) -> bool:
    return (
        isinstance(part, list)
        and len(part) == 2
        and all(type(bound) is int for bound in part)
        and 0 <= part[0] <= part[1] <= size
    )


def _check_overlaps(files: Mapping[str, StoredFile]) -> None:
    """Raise ValueError if the parts of a tensor differ in kind, or hold a value twice.

    `load` counts the values that it has copied.  A value that is there twice would hide that
    another one is missing.
    """
    parts: dict[str, list[StoredTensor]] = {}
    for file in files.values():
        for name, tensor in file.tensors.items():
            parts.setdefault(name, []).append(tensor)
    for name, found in parts.items():
        first = found[0]
        dims = {None if part.split is None else part.split.dim for part in found}
        if any((part.dtype, part.shape) != (first.dtype, first.shape) for part in found):
            raise ValueError(f"the parts of {plain(name)} have different shapes or dtypes")
        if len(dims) > 1 or (dims == {None} and len(found) > 1):
            raise ValueError(f"{plain(name)} is in more than one file, but not split over them")
        ranges = sorted(
            (start, stop)
            for part in found
            for start, stop in (part.split.ranges if part.split is not None else ())
            if start < stop
        )
        if any(stop > start for (_, stop), (start, _) in pairwise(ranges)):
            raise ValueError(f"the parts of {plain(name)} overlap")


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(value)}, which is not an object")
    return value


def _text(entry: Mapping[str, Any], key: str, where: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{where and f'{where}: '}{key} is {shown(value)}, which is not a text")
    return value


def _whole(entry: Mapping[str, Any], key: str, where: str, most: int) -> int:
    value = entry.get(key)
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(
            f"{where and f'{where}: '}{key} is {shown(value)}, which is not a number up to {most}"
        )
    return value
