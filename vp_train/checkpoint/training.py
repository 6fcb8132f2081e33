"""What of a training run a checkpoint holds: parameters, AdamW's moments, and a little JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vp_train.assembly import RankModel
from vp_train.checkpoint import store
from vp_train.checkpoint.store import Piece
from vp_train.config import ConfigError, RunConfig
from vp_train.mesh import Mesh
from vp_train.optim.adamw import MOMENTS
from vp_train.optim.optimizer import State

# What may not differ between a checkpoint and the run that continues it; layouts, schedules and lengths may.
_FIXED = ("model", "data")
_FREE_DATA = ("cache_dir",)


def save_run(directory: Path, step: int, config: RunConfig, model: RankModel, mesh: Mesh) -> Path:
    """Write step `step`; collective.  Raises CheckpointError on all ranks."""
    tensors, pieces = model.optimizer.state(), {}
    if mesh.data_rank == 0:
        pieces = {key: piece for key, piece in _pieces(model, tensors).items() if key.rpartition(":")[2] not in model.copied}
    state = {
        "step": step,
        "updates": model.optimizer.updates,
        "loss_scale": [model.loss_scale.value, model.loss_scale.finite_steps],
        "config": _fixed(config, mesh.degrees.dp),
    }
    return store.save(directory, step, pieces, state, mesh.world, config.run.keep_checkpoints)


def restore_run(path: Path, config: RunConfig, model: RankModel, mesh: Mesh) -> int:
    """Load `path` into model and optimizer; returns its step.  Collective.  Raises ConfigError where the run is another one."""
    _require_same(store.read_manifest(path)["state"]["config"], _fixed(config, mesh.degrees.dp), path)
    tensors = model.optimizer.state()
    state = store.load(path, _pieces(model, tensors))
    model.optimizer.restore(tensors)
    model.optimizer.updates = int(state["updates"])
    model.loss_scale.value, model.loss_scale.finite_steps = state["loss_scale"]
    return int(state["step"])


# What a run may change of the model whose weights it starts from; all else means something else by the same tensors.
_FREE_MODEL = (
    *("seq_length", "init_std", "norm_epsilon", "sliding_window", "full_attention_every", "logit_softcap"),
    *("rope_base", "rope_local_base", "rope_scaling", "rope_factor"),
    *("rope_low_frequency", "rope_high_frequency", "rope_original_length"),
)


def load_weights(path: Path, config: RunConfig, model: RankModel) -> None:
    """Take the parameters of checkpoint `path`, of any layout and precision, and nothing else.  Collective.

    Raises ConfigError where they are those of another model, naming the tensor or the setting, and both values.
    """
    tensors = model.optimizer.state()
    state = store.load(path, _pieces(model, {"parameter": tensors["parameter"]}), cast=True)
    ours = {key: value for key, value in asdict(config.model).items() if key not in _FREE_MODEL}
    _require_same(state["config"], {"model": ours}, path)
    for moment in MOMENTS:
        for tensor in tensors[moment].values():
            tensor.zero_()
    model.optimizer.restore(tensors)


def _pieces(model: RankModel, tensors: State) -> dict[str, Piece]:
    """`parameter:NAME`, `exp_avg:NAME`, `exp_avg_sq:NAME` for every parameter of this rank, in the optimizer's precision."""
    return {
        f"{kind}:{name}": Piece(tensor, model.splits.get(name))
        for kind, by_name in tensors.items()
        for name, tensor in by_name.items()
    }


def _fixed(config: RunConfig, num_replicas: int) -> dict[str, Any]:
    """What must stay the same, as JSON gives it back: with lists for tuples."""
    values: dict[str, Any] = json.loads(json.dumps({section: asdict(getattr(config, section)) for section in _FIXED}))
    values["data"] = {key: value for key, value in values["data"].items() if key not in _FREE_DATA}
    values["run"] = {"dtype": config.run.dtype}
    batch = num_replicas * config.num_microbatches * config.micro_batch_size
    return values | {"batch": {"dp * num_microbatches * micro_batch_size": batch}}


def _require_same(saved: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    for section, values in ours.items():
        for key, value in values.items():
            before = saved.get(section, {}).get(key)
            if before != value:
                raise ConfigError(f"{path} was saved with {section}.{key}={before}, this run has {value}; use the same value")
