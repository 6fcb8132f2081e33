"""Reading of checkpoints: verified before use, by any number of ranks.

A checkpoint is a directory with one safetensors file per rank and a JSON manifest, which holds
the hash of every file.  torch.distributed.checkpoint is not used for three reasons: its metadata
is a pickle, it does not notice a flipped bit, and its sharded tensors cannot have unequal shards.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vp_train.checkpoint.manifest import (
    MANIFEST,
    AlteredError,
    Manifest,
    StoredTensor,
    check_file,
    read_manifest,
)
from vp_train.communication.control import ControlGroup
from vp_train.config import ConfigError
from vp_train.durable import checkpoints_in, other_place
from vp_train.tensors.slices import TensorSlice

Check = Callable[[Manifest], None]  # raises ValueError for a manifest that cannot be used


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor that this rank saves or loads: whole, or the slice `split` of a global tensor."""

    tensor: Tensor
    split: TensorSlice | None = None

    @property
    def stored(self) -> StoredTensor:
        """The description of the tensor that a manifest holds."""
        shape = tuple(self.tensor.shape)
        if self.split is not None:
            shape = self.split.whole_shape(self.tensor.shape)
        return StoredTensor(str(self.tensor.dtype).removeprefix("torch."), shape, self.split)


@dataclass(frozen=True, slots=True)
class Damage:
    """The fault of the checkpoint called `name`, in words.

    is_altered: whether its bytes are not those that were saved.  Otherwise it may be of another
    version, or a disk may not answer, and it may be of use again.
    """

    name: str
    words: str
    is_altered: bool


def _damage(path: Path, group: ControlGroup | None, check: Check | None) -> Damage | None:
    """Return what is wrong with checkpoint `path`, None if nothing is.

    The ranks of `group` share the work: each rank hashes some of the files.
    """
    found = _gather(_damage_in_part(path, check, *_rank_and_size(group)), group)
    wrong = [part for part in found if part is not None]
    if not wrong:
        return None
    return Damage(path.name, wrong[0][0], any(is_altered for _, is_altered in wrong))


def _damage_in_part(
    path: Path, check: Check | None, rank: int, num_ranks: int
) -> tuple[str, bool] | None:
    """Check the manifest and every `num_ranks`-th file, starting with file number `rank`.

    Returns the words of a `Damage` and whether bytes were altered.
    """
    try:
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link, which may lead elsewhere")
        manifest = read_manifest(path)
        if check is not None:
            try:
                check(manifest)
            except ValueError as error:
                raise ValueError(f"{path / MANIFEST} is damaged: {error}") from None
        for name, stored in list(manifest.files.items())[rank::num_ranks]:
            check_file(path / name, stored)
    except ValueError as error:
        return str(error), isinstance(error, AlteredError)
    return None


def _rank_and_size(group: ControlGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (group.rank, group.size)


def _gather(value: Any, group: ControlGroup | None) -> list[Any]:
    """Return the JSON values of all ranks."""
    return [value] if group is None else group.all_gather_json(value)


def latest(
    directory: Path, group: ControlGroup | None = None, check: Check | None = None
) -> Path | None:
    """Return the newest undamaged checkpoint in `directory`, None if it holds no checkpoint.

    Collective over `group`.  Raises ConfigError like `newest`.
    """
    return newest(directory, group, check)[0]


def newest(
    directory: Path,
    group: ControlGroup | None = None,
    check: Check | None = None,
    way_out: str = "restore one",
) -> tuple[Path | None, list[Damage]]:
    """Return the newest undamaged checkpoint as `latest`, and the damage of the newer ones.

    It is reported on stderr.  `check` may find damage in manifests, too.  Collective over
    `group`.  Raises ConfigError with `way_out` if there are checkpoints but all of them are
    damaged.
    """
    found = [path.name for _, path in reversed(checkpoints_in(directory))]
    names: list[str] = _gather(found, group)[0]
    passed_over: list[Damage] = []
    for name in names:
        damage = _damage(directory / name, group, check)
        if damage is None:
            return directory / name, passed_over
        passed_over.append(damage)
        if _rank_and_size(group)[0] == 0:
            print(f"checkpoint passed over: {damage.words}", file=sys.stderr, flush=True)
    if names:
        raise ConfigError(f"every checkpoint in {directory} is damaged or incomplete; {way_out}")
    return None, []


def find(path: Path, group: ControlGroup | None = None) -> Path:
    """Return the checkpoint at `path`, or the newest one of the run or directory at `path`.

    Collective over `group`.  Raises ConfigError if there is no undamaged checkpoint.
    """
    if _gather(os.path.lexists(path / MANIFEST), group)[0]:
        path = path.resolve()  # a link that the user gives is meant
        damage = _damage(path, group, None)
        if damage is not None:
            raise ConfigError(damage.words)
        return path
    found = latest(path / "checkpoints", group) or latest(path, group)
    if found is None:
        way_out = "give the directory of a run, of vp-import, or of one checkpoint"
        raise ConfigError(f"{path} holds no checkpoint; {other_place(path, way_out)}")
    return found


def load(
    path: Path,
    manifest: Manifest,
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
        ours, missing = piece.stored, piece.tensor.numel()
        for file, content in manifest.files.items():
            held = content.tensors.get(name)
            if held is None:
                continue
            if held.shape != ours.shape or not (cast or held.dtype == ours.dtype):
                raise ConfigError(
                    f"{name} is {held.dtype} {list(held.shape)} in {path}, "
                    f"but {ours.dtype} {list(ours.shape)} in this run; "
                    f"{verb} with the model{'' if cast else ' and run.dtype'} it was saved with"
                )
            dims = {split.dim for split in (held.split, piece.split) if split is not None}
            if len(dims) > 1:
                raise ConfigError(
                    f"{path} has slices of {name} along another dimension than this run; "
                    f"{verb} with a checkpoint that vp-train or vp-import has written"
                )
            with safe_open(path / file, "pt") as opened:
                missing -= _copy(opened.get_slice(name), held.split, piece)
        if missing:
            raise ConfigError(
                f"{path} does not hold all of {name}; {verb} with the model it was saved from"
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
    everything = ((0, piece.stored.shape[dim]),)
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
