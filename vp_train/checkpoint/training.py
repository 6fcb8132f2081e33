"""What of a training run a checkpoint holds: parameters, AdamW's moments, and a little JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vp_train.assembly import RankModel
from vp_train.checkpoint import store
from vp_train.checkpoint.store import Piece
from vp_train.config import ConfigError, RunConfig
from vp_train.optim.adamw import MOMENTS

# What may not differ between a checkpoint and the run that continues it; layouts, schedules and lengths may.
_FIXED = ("model", "data")
_FREE_DATA = ("cache_dir",)


def save_run(
    directory: Path, step: int, config: RunConfig, model: RankModel, optimizer: torch.optim.AdamW, group: dist.ProcessGroup
) -> Path:
    """Write step `step`; collective.  Raises CheckpointError on all ranks."""
    counted = {name for name in model.parameters if name not in model.copied}
    pieces = {key: piece for key, piece in _pieces(model, optimizer).items() if key.rpartition(":")[2] in counted}
    updates = next((values["step"].item() for values in optimizer.state.values()), 0.0)
    state = {"step": step, "updates": updates, "config": _fixed(config)}
    return store.save(directory, step, pieces, state, group, config.run.keep_checkpoints)


def restore_run(path: Path, config: RunConfig, model: RankModel, optimizer: torch.optim.AdamW) -> int:
    """Load `path` into model and optimizer; returns its step.  Raises ConfigError where the run is another one."""
    _require_same(store.read_manifest(path)["state"]["config"], _fixed(config), path)
    state = store.load(path, _pieces(model, optimizer))
    for values in optimizer.state.values():
        values["step"].fill_(state["updates"])
    return int(state["step"])


def _pieces(model: RankModel, optimizer: torch.optim.AdamW) -> dict[str, Piece]:
    """`parameter:NAME`, `exp_avg:NAME`, `exp_avg_sq:NAME` for every parameter of this rank."""
    pieces = {}
    for name, parameter in model.parameters.items():
        tensors = {"parameter": parameter.detach()} | {moment: optimizer.state[parameter][moment] for moment in MOMENTS}
        shard = model.rows.get(name)
        for kind, tensor in tensors.items():
            if shard is None:
                pieces[f"{kind}:{name}"] = Piece(tensor)
            else:
                pieces[f"{kind}:{name}"] = Piece(tensor, shard.start, model.vocab_size)
    return pieces


def _fixed(config: RunConfig) -> dict[str, Any]:
    """What must stay the same, as JSON gives it back: with lists for tuples."""
    values: dict[str, Any] = json.loads(json.dumps({section: asdict(getattr(config, section)) for section in _FIXED}))
    values["data"] = {key: value for key, value in values["data"].items() if key not in _FREE_DATA}
    values["run"] = {"dtype": config.run.dtype}
    batch = config.num_microbatches * config.micro_batch_size
    return values | {"batch": {"num_microbatches * micro_batch_size": batch}}


def _require_same(saved: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    for section, values in ours.items():
        for key, value in values.items():
            before = saved.get(section, {}).get(key)
            if before != value:
                raise ConfigError(
                    f"{path} was saved with {section}.{key}={before}, this run has {value}; resume with the same value"
                )
