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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vp_train.checkpoint.stream import Described, write_tensors
from vp_train.communication.control import ControlGroup
from vp_train.config import ConfigError
from vp_train.durable import sync
from vp_train.tensors.slices import TensorSlice

_MANIFEST = "manifest.json"
_FORMAT = 2


class CheckpointError(OSError):
    """A checkpoint could not be written; the ones before it are untouched."""


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor of this rank: a whole one, or the part of a global one that `split` says."""

    tensor: Tensor
    split: TensorSlice | None = None

    @property
    def global_shape(self) -> list[int]:
        return list(
            self.tensor.shape if self.split is None else self.split.whole_shape(self.tensor.shape)
        )

    @property
    def dtype(self) -> str:
        return _name(self.tensor.dtype)


def _name_of(step: int) -> str:
    return f"step-{step:08d}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save(
    directory: Path,
    step: int,
    pieces: Mapping[str, CheckpointTensor],
    state: Mapping[str, Any],
    group: ControlGroup,
    keep: int,
) -> Path:
    """Write checkpoint `step` under `directory`; collective over `group`.  Each global tensor must be covered exactly once.

    `state` must be JSON.  It and the `keep` - 1 checkpoints before it stay.  Raises CheckpointError on all ranks if any could
    not write.
    """
    rank = group.rank
    final, temporary = directory / _name_of(step), directory / f".writing-{_name_of(step)}"
    try:
        error = _attempt(lambda: _make_empty(temporary)) if rank == 0 else None
        _agree(error, group)
        name = f"rank-{rank:05d}.safetensors"
        description: dict[str, Any] = {}
        error = _attempt(lambda: description.update(_write_pieces(temporary / name, pieces)))
        everyone = _agree((name, description) if error is None else error, group)
        error = None
        if rank == 0:
            manifest = {
                "format": _FORMAT,
                "step": step,
                "state": dict(state),
                "files": dict(everyone),
            }
            error = _attempt(lambda: _commit(manifest, temporary, final))
            if (
                error is None
                and (left := _attempt(lambda: _retain(directory, step, keep))) is not None
            ):
                print(
                    f"{final} is complete, but what is older could not be removed: {left}",
                    file=sys.stderr,
                    flush=True,
                )
        _agree(error, group)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
        raise
    return final


def save_stream(
    directory: Path,
    step: int,
    described: Sequence[Described],
    tensors: Iterable[Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write checkpoint `step` under `directory` by one process, which holds one of the tensors at a time."""
    final, temporary = directory / _name_of(step), directory / f".writing-{_name_of(step)}"
    path = temporary / "rank-00000.safetensors"
    _make_empty(temporary)
    write_tensors(path, described, tensors)
    held = {one.name: {"dtype": _name(one.dtype), "shape": list(one.shape)} for one in described}
    content = {"bytes": path.stat().st_size, "blake2b": _digest(path), "tensors": held}
    _commit(
        {"format": _FORMAT, "step": step, "state": dict(state), "files": {path.name: content}},
        temporary,
        final,
    )
    return final


def _attempt(work: Any) -> str | None:
    """None, or what went wrong."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _agree(mine: Any, group: ControlGroup) -> list[Any]:
    """What every rank has to say; CheckpointError on all ranks if one of them says an error (a string)."""
    everyone = _said(mine, group)
    for rank, said in enumerate(everyone):
        if isinstance(said, str):
            raise CheckpointError(f"rank {rank} could not write the checkpoint: {said}")
    return everyone


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _write_pieces(path: Path, pieces: Mapping[str, CheckpointTensor]) -> dict[str, Any]:
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
        file.write(
            json.dumps({"blake2b": hashlib.blake2b(body.encode()).hexdigest(), "manifest": body})
        )
        file.flush()
        os.fsync(file.fileno())
    sync(temporary)
    if final.exists():  # the same step again, after a resume from an earlier one
        _remove(final)
    temporary.rename(final)
    sync(final.parent)


def _retain(directory: Path, step: int, keep: int) -> None:
    """Checkpoints of later steps were passed over as damaged when the run began: they neither count nor go.

    What a killed process left unfinished goes.
    """
    for stray in (*directory.glob(".writing-*"), *directory.glob(".removing-*")):
        shutil.rmtree(stray, ignore_errors=True)
    paths = sorted(directory.glob("step-*"))
    for old in [path for path in paths if path.name <= _name_of(step)][:-keep]:
        _remove(old)


def _remove(path: Path) -> None:
    """Rename first: a half deleted checkpoint must not look like one."""
    doomed = path.with_name(f".removing-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of checkpoint `path`.  Raises ValueError if it is damaged; what it names has not been looked at."""
    try:
        wrapped = json.loads((path / _MANIFEST).read_text())
        body = wrapped["manifest"]
        if hashlib.blake2b(body.encode()).hexdigest() != wrapped["blake2b"]:
            raise ValueError(f"{path / _MANIFEST} does not match its hash")
        manifest: dict[str, Any] = json.loads(body)
        if manifest["format"] != _FORMAT:
            raise ValueError(
                f"{path} has format {manifest['format']}, this version reads {_FORMAT}"
            )
    except (OSError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is incomplete: {error}") from None
    return manifest


def _damage(path: Path, group: ControlGroup | None) -> str | None:
    """What is wrong with checkpoint `path`.  The ranks of `group` check a part of its files each."""
    everyone = _said(_damaged_part(path, *_place(group)), group)
    return next((said for said in everyone if said is not None), None)


def _damaged_part(path: Path, rank: int, num_ranks: int) -> str | None:
    """What is wrong with every `num_ranks`-th file, from the one numbered `rank` on."""
    try:
        for name, expected in list(read_manifest(path)["files"].items())[rank::num_ranks]:
            if _digest(path / name) != expected["blake2b"]:
                return f"{path / name} does not match its hash"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{path} is incomplete: {error}"
    return None


def _place(group: ControlGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank, group.size)


def _said(mine: Any, group: ControlGroup | None) -> list[Any]:
    """What every rank has to say, which must be JSON."""
    return [mine] if group is None else group.all_gather_json(mine)


def latest(directory: Path, group: ControlGroup | None = None) -> Path | None:
    """The newest undamaged checkpoint, None if there is none; damaged ones are named on stderr and passed over.

    Collective over `group`.  Raises ConfigError where there are checkpoints and all are damaged.
    """
    names: list[str] = _said(
        sorted((path.name for path in directory.glob("step-*")), reverse=True), group
    )[0]
    for path in (directory / name for name in names):
        damage = _damage(path, group)
        if damage is None:
            return path
        if _place(group)[0] == 0:
            print(f"checkpoint passed over: {damage}", file=sys.stderr, flush=True)
    if names:
        raise ConfigError(
            f"every checkpoint in {directory} is damaged; restore one, or move them away to begin without"
        )
    return None


def find(path: Path, group: ControlGroup | None = None) -> Path:
    """The checkpoint at `path`, or the newest of the run or directory there; collective over `group`.

    Raises ConfigError if there is none that is undamaged.
    """
    if _said((path / _MANIFEST).exists(), group)[0]:
        damage = _damage(path, group)
        if damage is not None:
            raise ConfigError(damage)
        return path
    newest = latest(path / "checkpoints", group) or latest(path, group)
    if newest is None:
        raise ConfigError(
            f"{path} holds no checkpoint; give the directory of a run, of vp-import, or of one checkpoint"
        )
    return newest


def load(
    path: Path,
    manifest: Mapping[str, Any],
    pieces: Mapping[str, CheckpointTensor],
    *,
    cast: bool = False,
) -> None:
    """Fill the tensors of `pieces` in place from checkpoint `path`, which `latest` or `find` has verified.

    Only what is asked for is read, whatever ranks wrote it.  Raises ConfigError, naming the tensor and both values, if one
    is missing or has another shape or, unless it may be `cast`, dtype.
    """
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
            raise ConfigError(
                f"{path} does not hold all of {name}; {verb} with the model it was saved from"
            )


def _split(entry: Mapping[str, Any]) -> TensorSlice | None:
    if "ranges" not in entry:
        return None
    return TensorSlice(
        entry["dim"],
        entry["shape"][entry["dim"]],
        tuple((start, stop) for start, stop in entry["ranges"]),
    )


@torch.no_grad()
def _copy(stored: Any, held: TensorSlice | None, piece: CheckpointTensor) -> int:
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
