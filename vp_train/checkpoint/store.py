"""Checkpoint files: complete or absent, verified before use, readable by any number of ranks.

A checkpoint is a directory with one safetensors file per rank and a JSON manifest, which holds
the hash of every file.  torch.distributed.checkpoint is not used for three reasons: its metadata
is a pickle, it does not notice a flipped bit, and its sharded tensors cannot have unequal shards.

A checkpoint is written into a temporary directory, synced to disk, and then renamed.  A process
killed at any moment therefore leaves only complete checkpoints behind.
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
from vp_train.failures import EXIT_IO, SharedFailure
from vp_train.tensors.slices import TensorSlice

_MANIFEST = "manifest.json"
_FORMAT = 2


class CheckpointError(SharedFailure, OSError):
    """A failure to write a checkpoint.  Earlier checkpoints are untouched."""

    exit_code = EXIT_IO


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor that this rank saves or loads: whole, or the slice `split` of a global tensor."""

    tensor: Tensor
    split: TensorSlice | None = None

    @property
    def global_shape(self) -> list[int]:
        """The shape of the global tensor."""
        return list(
            self.tensor.shape if self.split is None else self.split.whole_shape(self.tensor.shape)
        )

    @property
    def dtype(self) -> str:
        """The name of the dtype as the manifest stores it, such as "float32"."""
        return _dtype_name(self.tensor.dtype)


def _directory_name(step: int) -> str:
    return f"step-{step:08d}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save(
    directory: Path,
    step: int,
    pieces: Mapping[str, CheckpointTensor],
    state: Mapping[str, Any],
    group: ControlGroup,
    keep: int,
) -> Path:
    """Write checkpoint `step` under `directory` and return its path.  Collective over `group`.

    The `pieces` of all ranks together must cover every global tensor exactly once.  `state` must
    be JSON.  The new checkpoint and the `keep` - 1 checkpoints before it stay; older ones are
    removed.  Raises CheckpointError on all ranks if any rank could not write.
    """
    rank = group.rank
    final, temporary = _final_and_temporary(directory, step)
    # Three phases: rank 0 makes the directory, every rank writes its file, rank 0 commits.  The
    # ranks exchange their errors after each phase, so that all of them raise or none does.
    try:
        error = _attempt(lambda: _make_empty(temporary)) if rank == 0 else None
        _gather_or_raise(error, group)
        name = f"rank-{rank:05d}.safetensors"
        description: dict[str, Any] = {}
        error = _attempt(lambda: description.update(_write_pieces(temporary / name, pieces)))
        described = _gather_or_raise((name, description) if error is None else error, group)
        error = None
        if rank == 0:
            manifest = {
                "format": _FORMAT,
                "step": step,
                "state": dict(state),
                "files": dict(described),
            }
            error = _attempt(lambda: _commit(manifest, temporary, final))
            if (
                error is None
                and (left := _attempt(lambda: _retain(directory, step, keep))) is not None
            ):
                print(
                    f"{final} is complete, but older checkpoints could not be removed: {left}",
                    file=sys.stderr,
                    flush=True,
                )
        _gather_or_raise(error, group)
    except CheckpointError:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # frees space on a full disk
        raise
    return final


def save_stream(
    directory: Path,
    step: int,
    described: Sequence[Described],
    tensors: Iterable[Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write checkpoint `step` from a single process and return its path.

    Only one of `tensors` is in memory at a time.  They must match `described` in order, shape and
    dtype.
    """
    final, temporary = _final_and_temporary(directory, step)
    path = temporary / "rank-00000.safetensors"
    _make_empty(temporary)
    write_tensors(path, described, tensors)
    stored = {
        tensor.name: {"dtype": _dtype_name(tensor.dtype), "shape": list(tensor.shape)}
        for tensor in described
    }
    content = {"bytes": path.stat().st_size, "blake2b": _digest(path), "tensors": stored}
    _commit(
        {"format": _FORMAT, "step": step, "state": dict(state), "files": {path.name: content}},
        temporary,
        final,
    )
    return final


def _final_and_temporary(directory: Path, step: int) -> tuple[Path, Path]:
    """Return where checkpoint `step` ends up, and where it is written before the rename."""
    name = _directory_name(step)
    return directory / name, directory / f".writing-{name}"


def _attempt(work: Any) -> str | None:
    """Run `work` and return None, or the text of the exception that it raised."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _gather_or_raise(value: Any, group: ControlGroup) -> list[Any]:
    """Return the values of all ranks.  A string is an error: all ranks raise CheckpointError."""
    gathered = _gather(value, group)
    for rank, result in enumerate(gathered):
        if isinstance(result, str):
            raise CheckpointError(f"rank {rank} could not write the checkpoint: {result}")
    return gathered


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _write_pieces(path: Path, pieces: Mapping[str, CheckpointTensor]) -> dict[str, Any]:
    """Write this rank's file and return its entry in the manifest."""
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
    """Write the manifest with its own hash, sync, and rename the checkpoint to its final name."""
    body = json.dumps(manifest)
    with (temporary / _MANIFEST).open("w") as file:
        file.write(
            json.dumps({"blake2b": hashlib.blake2b(body.encode()).hexdigest(), "manifest": body})
        )
        file.flush()
        os.fsync(file.fileno())
    sync(temporary)
    if final.exists():  # a run that resumed from an earlier step reached this step again
        _remove(final)
    temporary.rename(final)
    sync(final.parent)


def _retain(directory: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, and what killed processes left.

    Checkpoints of later steps were skipped as damaged when the run began.  They are neither
    counted nor removed.
    """
    for stray in (*directory.glob(".writing-*"), *directory.glob(".removing-*")):
        shutil.rmtree(stray, ignore_errors=True)
    paths = sorted(directory.glob("step-*"))
    for old in [path for path in paths if path.name <= _directory_name(step)][:-keep]:
        _remove(old)


def _remove(path: Path) -> None:
    """Remove a checkpoint.  It is renamed first, since a half-deleted one must not look valid."""
    doomed = path.with_name(f".removing-{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of checkpoint `path`.  The files that it lists are not checked.

    Raises ValueError if the manifest is missing or damaged, or has another format.
    """
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
    """Return what is wrong with checkpoint `path`, None if nothing is.

    The ranks of `group` share the work: each rank hashes some of the files.
    """
    found = _gather(_damage_in_part(path, *_rank_and_size(group)), group)
    return next((damage for damage in found if damage is not None), None)


def _damage_in_part(path: Path, rank: int, num_ranks: int) -> str | None:
    """Check every `num_ranks`-th file, starting with file number `rank`."""
    try:
        for name, expected in list(read_manifest(path)["files"].items())[rank::num_ranks]:
            if _digest(path / name) != expected["blake2b"]:
                return f"{path / name} does not match its hash"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{path} is incomplete: {error}"
    return None


def _rank_and_size(group: ControlGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank, group.size)


def _gather(value: Any, group: ControlGroup | None) -> list[Any]:
    """Return the JSON values of all ranks."""
    return [value] if group is None else group.all_gather_json(value)


def latest(directory: Path, group: ControlGroup | None = None) -> Path | None:
    """Return the newest undamaged checkpoint in `directory`, None if it holds no checkpoint.

    Damaged checkpoints are skipped and reported on stderr.  Collective over `group`.  Raises
    ConfigError if there are checkpoints but all of them are damaged.
    """
    names: list[str] = _gather(
        sorted((path.name for path in directory.glob("step-*")), reverse=True), group
    )[0]
    for path in (directory / name for name in names):
        damage = _damage(path, group)
        if damage is None:
            return path
        if _rank_and_size(group)[0] == 0:
            print(f"checkpoint passed over: {damage}", file=sys.stderr, flush=True)
    if names:
        raise ConfigError(
            f"every checkpoint in {directory} is damaged; "
            "restore one, or move them away to begin without"
        )
    return None


def find(path: Path, group: ControlGroup | None = None) -> Path:
    """Return the checkpoint at `path`, or the newest one of the run or directory at `path`.

    Collective over `group`.  Raises ConfigError if there is no undamaged checkpoint.
    """
    if _gather((path / _MANIFEST).exists(), group)[0]:
        damage = _damage(path, group)
        if damage is not None:
            raise ConfigError(damage)
        return path
    newest = latest(path / "checkpoints", group) or latest(path, group)
    if newest is None:
        raise ConfigError(
            f"{path} holds no checkpoint; "
            "give the directory of a run, of vp-import, or of one checkpoint"
        )
    return newest


def load(
    path: Path,
    manifest: Mapping[str, Any],
    pieces: Mapping[str, CheckpointTensor],
    *,
    cast: bool = False,
) -> None:
    """Fill the tensors of `pieces` in place from checkpoint `path`.

    The checkpoint must have been verified by `latest` or `find`.  Only the requested values are
    read, from whichever files hold them, so the layout of ranks may differ from the one that wrote
    them.  Raises ConfigError, naming the tensor and both values, if a tensor is missing or has
    another shape, or has another dtype and `cast` is False.
    """
    verb = "start" if cast else "resume"
    for name, piece in pieces.items():
        # Every file holds some ranges of the global tensor.  Copy the overlap of each file with
        # our ranges, and count the values that are still missing.
        missing = piece.tensor.numel()
        for file, content in manifest["files"].items():
            entry = content["tensors"].get(name)
            if entry is None:
                continue
            if entry["shape"] != piece.global_shape or not (cast or entry["dtype"] == piece.dtype):
                raise ConfigError(
                    f"{name} is {entry['dtype']} {entry['shape']} in {path}, "
                    f"but {piece.dtype} {piece.global_shape} in this run; "
                    f"{verb} with the model{'' if cast else ' and run.dtype'} it was saved with"
                )
            with safe_open(path / file, "pt") as opened:
                missing -= _copy(opened.get_slice(name), _stored_slice(entry), piece)
        if missing:
            raise ConfigError(
                f"{path} does not hold all of {name}; {verb} with the model it was saved from"
            )


def _stored_slice(entry: Mapping[str, Any]) -> TensorSlice | None:
    """Return the slice of the global tensor that a file holds, None if it holds all of it."""
    if "ranges" not in entry:
        return None
    return TensorSlice(
        entry["dim"],
        entry["shape"][entry["dim"]],
        tuple((start, stop) for start, stop in entry["ranges"]),
    )


@torch.no_grad()
def _copy(stored: Any, held: TensorSlice | None, piece: CheckpointTensor) -> int:
    """Copy the values of `piece` that a file holds, and return their number.

    `stored` is the tensor in the file: the slice `held` of the global tensor, or all of it.
    """
    if not piece.tensor.dim():
        piece.tensor.copy_(stored[...])
        return 1
    dim = next((split.dim for split in (piece.split, held) if split is not None), 0)
    everything = ((0, piece.global_shape[dim]),)
    # Intersect every wanted range with every held range.  `source` and `target` are the offsets
    # along `dim` at which the current ranges begin in the file and in `piece.tensor`.
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
