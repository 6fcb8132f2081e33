"""Checkpoints: complete or absent, verified before use, readable by any number of ranks.

One safetensors file per rank and a JSON manifest with the hash of each.  torch.distributed.checkpoint would do part of it,
but its metadata is a pickle, it does not notice a flipped bit, and its sharded tensors cannot have unequal shards.

A checkpoint is written into a temporary directory, synced, and renamed: a kill at any moment leaves only complete ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vp_train.checkpoint.stream import Described, write_tensors
from vp_train.config import ConfigError
from vp_train.durable import sync
from vp_train.split import Split

_MANIFEST = "manifest.json"
_FORMAT = 2


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are untouched."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of this rank: a whole one, or the part of a global one that `split` says."""

    tensor: Tensor
    split: Split | None = None

    @property
    def global_shape(self) -> list[int]:
        return list(self.tensor.shape if self.split is None else self.split.whole_shape(self.tensor.shape))

    @property
    def dtype(self) -> str:
        return _name(self.tensor.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save(
    directory: Path, step: int, pieces: Mapping[str, Piece], state: Mapping[str, Any], group: dist.ProcessGroup, keep: int
) -> Path:
    """Write checkpoint `step` under `directory`; collective over `group`.  Each global tensor must be covered exactly once.

    `state` must be JSON.  The newest `keep` checkpoints stay.  Raises CheckpointError on all ranks if any could not write.
    """
    rank = dist.get_rank(group)
    final, temporary = directory / f"step-{step:08d}", directory / f".writing-step-{step:08d}"
    error = None
    if rank == 0:
        error = _attempt(lambda: _make_empty(temporary))
    _agree(error, group)
    name = f"rank-{rank:05d}.safetensors"
    description: dict[str, Any] = {}
    error = _attempt(lambda: description.update(_write_pieces(temporary / name, pieces)))
    everyone = _agree((name, description) if error is None else error, group)
    if rank == 0:
        manifest = {"format": _FORMAT, "step": step, "state": dict(state), "files": dict(everyone)}
        error = _attempt(lambda: _commit(manifest, temporary, final))
        if error is None:
            _retain(directory, keep)
    _agree(error if rank == 0 else None, group)
    return final


def save_stream(
    directory: Path, step: int, described: Sequence[Described], tensors: Iterable[Tensor], state: Mapping[str, Any]
) -> Path:
    """Write checkpoint `step` under `directory` by one process, which holds one of the tensors at a time."""
    final, temporary = directory / f"step-{step:08d}", directory / f".writing-step-{step:08d}"
    path = temporary / "rank-00000.safetensors"
    _make_empty(temporary)
    write_tensors(path, described, tensors)
    held = {one.name: {"dtype": _name(one.dtype), "shape": list(one.shape)} for one in described}
    content = {"bytes": path.stat().st_size, "blake2b": _digest(path), "tensors": held}
    _commit({"format": _FORMAT, "step": step, "state": dict(state), "files": {path.name: content}}, temporary, final)
    return final


def _attempt(work: Any) -> str | None:
    """None, or what went wrong."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _agree(mine: Any, group: dist.ProcessGroup) -> list[Any]:
    """What every rank has to say; CheckpointError on all ranks if one of them says an error (a string)."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for rank, said in enumerate(everyone):
        if isinstance(said, str):
            raise CheckpointError(f"rank {rank} could not write the checkpoint: {said}")
    return everyone


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _write_pieces(path: Path, pieces: Mapping[str, Piece]) -> dict[str, Any]:
    save_file({name: piece.tensor.detach().contiguous() for name, piece in pieces.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    tensors = {
        name: {"dtype": piece.dtype, "shape": piece.global_shape}
        | ({} if piece.split is None else {"dim": piece.split.dim, "ranges": piece.split.ranges})
        for name, piece in pieces.items()
    }
    return {"bytes": path.stat().st_size, "blake2b": _digest(path), "tensors": tensors}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _commit(manifest: dict[str, Any], temporary: Path, final: Path) -> None:
    body = json.dumps(manifest)
    with (temporary / _MANIFEST).open("w") as file:
        file.write(json.dumps({"blake2b": hashlib.blake2b(body.encode()).hexdigest(), "manifest": body}))
        file.flush()
        os.fsync(file.fileno())
    sync(temporary)
    if final.exists():  # the same step again, after a resume from an earlier one
        _remove(final)
    temporary.rename(final)
    sync(final.parent)


def _retain(directory: Path, keep: int) -> None:
    for old in sorted(directory.glob("step-*"))[:-keep]:
        _remove(old)


def _remove(path: Path) -> None:
    """Rename first: a half deleted checkpoint must not look like one."""
    doomed = path.with_name(f".removing-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of checkpoint `path`, checked with every file it names.  Raises ValueError saying what is damaged."""
    try:
        wrapped = json.loads((path / _MANIFEST).read_text())
        body = wrapped["manifest"]
        if hashlib.blake2b(body.encode()).hexdigest() != wrapped["blake2b"]:
            raise ValueError(f"{path / _MANIFEST} does not match its hash")
        manifest: dict[str, Any] = json.loads(body)
        for name, expected in manifest["files"].items():
            if _digest(path / name) != expected["blake2b"]:
                raise ValueError(f"{path / name} does not match its hash")
    except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is incomplete: {error}") from None
    if manifest["format"] != _FORMAT:
        raise ValueError(f"{path} has format {manifest['format']}, this version reads {_FORMAT}")
    return manifest


def latest(directory: Path) -> Path | None:
    """The newest undamaged checkpoint; damaged ones are named on stderr and passed over."""
    for path in sorted(directory.glob("step-*"), reverse=True):
        try:
            read_manifest(path)
        except ValueError as error:
            print(f"checkpoint passed over: {error}", file=sys.stderr, flush=True)
        else:
            return path
    return None


def find(path: Path) -> Path:
    """The checkpoint at `path`, or the newest of the run or directory there.  Raises ConfigError if there is none."""
    if (path / _MANIFEST).exists():
        return path
    newest = latest(path / "checkpoints") or latest(path)
    if newest is None:
        raise ConfigError(f"{path} holds no checkpoint; give the directory of a run, of vp-import, or of one checkpoint")
    return newest


def load(path: Path, pieces: Mapping[str, Piece], *, cast: bool = False) -> dict[str, Any]:
    """Fill the tensors of `pieces` in place from the verified checkpoint `path`; returns its state.

    Only what is asked for is read, whatever ranks wrote it.  Raises ConfigError, naming the tensor and both values, if one
    is missing or has another shape or, unless it may be `cast`, dtype.
    """
    manifest = read_manifest(path)
    fill(path, manifest, pieces, cast=cast)
    return dict(manifest["state"])


def fill(path: Path, manifest: Mapping[str, Any], pieces: Mapping[str, Piece], *, cast: bool) -> None:
    """`load`, from a checkpoint that was verified when its manifest was read."""
    verb = "start" if cast else "resume"
    for name, piece in pieces.items():
        missing = piece.tensor.numel()
        for file, content in manifest["files"].items():
            entry = content["tensors"].get(name)
            if entry is None:
                continue
            if entry["shape"] != piece.global_shape or not (cast or entry["dtype"] == piece.dtype):
                raise ConfigError(
                    f"{name} is {entry['dtype']} {entry['shape']} in {path}, but {piece.dtype} {piece.global_shape} "
                    f"in this run; {verb} with the model{'' if cast else ' and run.dtype'} it was saved with"
                )
            with safe_open(path / file, "pt") as opened:
                missing -= _copy(opened.get_slice(name), _split(entry), piece)
        if missing:
            raise ConfigError(f"{path} does not hold all of {name}; {verb} with the model it was saved from")


def _split(entry: Mapping[str, Any]) -> Split | None:
    if "ranges" not in entry:
        return None
    return Split(entry["dim"], entry["shape"][entry["dim"]], tuple((start, stop) for start, stop in entry["ranges"]))


@torch.no_grad()
def _copy(stored: Any, held: Split | None, piece: Piece) -> int:
    """Copy what a file has of `piece`, of which it holds the part `held`; the number of values."""
    if not piece.tensor.dim():
        piece.tensor.copy_(stored[...])
        return 1
    dim = next((split.dim for split in (piece.split, held) if split is not None), 0)
    everything = ((0, piece.global_shape[dim]),)
    copied = target = 0
    for start, stop in everything if piece.split is None else piece.split.ranges:
        source = 0
        for first, last in everything if held is None else held.ranges:
            low, high = max(start, first), min(stop, last)
            if low < high:
                place = (slice(None),) * dim + (slice(source + low - first, source + high - first),)
                into = piece.tensor.narrow(dim, target + low - start, high - low)
                into.copy_(stored[place])
                copied += into.numel()
            source += last - first
        target += stop - start
    return copied
