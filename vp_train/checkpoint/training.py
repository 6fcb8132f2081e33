"""The contents of a run's checkpoint: parameters, the moments of AdamW, and a little JSON state."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vp_train.assembly import RankModel
from vp_train.checkpoint import store
from vp_train.checkpoint.store import CheckpointTensor
from vp_train.config import FREE_DATA, FREE_MODEL, ConfigError, LossConfig, RunConfig
from vp_train.mesh import Mesh
from vp_train.optim.adamw import MOMENTS


def save_run(
    directory: Path,
    step: int,
    config: RunConfig,
    model: RankModel,
    mesh: Mesh,
    contents: Sequence[str],
    progress: Mapping[str, Any],
) -> Path:
    """Write the checkpoint of `step` and return its path.  Collective over all ranks.

    `contents` are the hashes of the corpora (`Source.contents`), and `progress` is JSON that
    `restore_run` returns.  Only the replica with data rank 0
    writes tensors.  Raises CheckpointError on all ranks if any rank could not write.
    """
    tensors, pieces = model.optimizer.state(), {}
    if mesh.data_rank == 0:
        pieces = {
            _key(kind, name): CheckpointTensor(tensor, model.splits.get(name))
            for kind, by_name in tensors.items()
            for name, tensor in by_name.items()
            if name not in model.copied
        }
    state = {
        "step": step,
        "updates": model.optimizer.updates,
        "loss_scale": [model.loss_scale.value, model.loss_scale.finite_steps],
        "config": _settings(config, mesh.degrees.dp),
        "contents": list(contents),
        "progress": dict(progress),
    }
    return store.save(directory, step, pieces, state, mesh.world, config.run.keep_checkpoints)


def restore_run(
    path: Path, config: RunConfig, model: RankModel, mesh: Mesh, contents: Sequence[str]
) -> tuple[int, dict[str, Any]]:
    """Load checkpoint `path` into model and optimizer.  Collective.

    Returns its step, and the `progress` that `save_run` got; older checkpoints have none.

    Raises ConfigError if the checkpoint is of another run: if the model, the data, the dtype or the
    global batch size differ.
    """
    manifest = store.read_manifest(path)
    state = manifest["state"]
    ours = _settings(config, mesh.degrees.dp)
    ours["data"] = {key: value for key, value in ours["data"].items() if key not in FREE_DATA}
    _require_same(state["config"], ours, path)
    _require_same_text(state["contents"], contents, path)
    model.optimizer.restore(lambda kind, name: _read(path, manifest, model, kind, name, cast=False))
    model.optimizer.updates = int(state["updates"])
    model.loss_scale.value, model.loss_scale.finite_steps = state["loss_scale"]
    return int(state["step"]), state.get("progress", {})


def load_weights(path: Path, config: RunConfig, model: RankModel) -> None:
    """Load only the parameters of checkpoint `path`; the moments of AdamW become zero.  Collective.

    The checkpoint may have any parallel layout and any dtype.  Raises ConfigError if it is of
    another model, naming the setting or the tensor, and both values.
    """
    manifest = store.read_manifest(path)
    ours = {key: value for key, value in asdict(config.model).items() if key not in FREE_MODEL}
    _require_same(manifest["state"]["config"], {"model": ours}, path)

    def read(kind: str, name: str) -> Tensor:
        if kind in MOMENTS:
            return torch.zeros(model.parameters[name].shape, dtype=model.gradients.dtype)
        return _read(path, manifest, model, kind, name, cast=True)

    model.optimizer.restore(read)


def _key(kind: str, name: str) -> str:
    """Return the checkpoint key: `parameter:NAME`, `exp_avg:NAME` or `exp_avg_sq:NAME`."""
    return f"{kind}:{name}"


def _read(
    path: Path, manifest: dict[str, Any], model: RankModel, kind: str, name: str, *, cast: bool
) -> Tensor:
    """Read this rank's slice of a parameter or moment, in the dtype of the gradients."""
    tensor = torch.empty(model.parameters[name].shape, dtype=model.gradients.dtype)
    store.load(
        path,
        manifest,
        {_key(kind, name): CheckpointTensor(tensor, model.splits.get(name))},
        cast=cast,
    )
    return tensor


def _settings(config: RunConfig, num_replicas: int) -> dict[str, Any]:
    """Return the settings that must be equal on resume, with lists for tuples as JSON has them.

    Parallel layout, schedule and number of steps may change, so they are not among them.
    """
    values: dict[str, Any] = json.loads(
        json.dumps(
            {
                "model": asdict(config.model),
                "data": asdict(config.data),
                "loss": asdict(config.loss),
            }
        )
    )
    values["data"]["synthetic"] = config.data.name == "synthetic"
    values["data"]["weights"] = list(config.data.weights)
    values["run"] = {"dtype": config.run.dtype}
    batch = num_replicas * config.num_microbatches * config.micro_batch_size
    return values | {"batch": {"dp * num_microbatches * micro_batch_size": batch}}


def _require_same_text(saved: Sequence[str], ours: Sequence[str], path: Path) -> None:
    if list(saved) == list(ours):
        return
    which = "the text or its tokenizer is"
    if len(saved) == len(ours) > 1:
        changed = [
            f"data.blend[{number}]"
            for number, pair in enumerate(zip(saved, ours, strict=True))
            if len(set(pair)) > 1
        ]
        which = f"the text or tokenizer of {', '.join(changed)} is"
    raise ConfigError(
        f"{which} not what {path} was trained on; bring that back, "
        f"or go on from its weights as another run: run.init_from={path} run.name=NAME"
    )


def _require_same(saved: dict[str, Any], ours: dict[str, Any], path: Path) -> None:
    for section, values in ours.items():
        for key, value in values.items():
            before = saved.get(section, {}).get(key)
            if section == "loss" and section not in saved:  # checkpoints of earlier versions
                before = getattr(LossConfig(), key)
            if before != value:
                raise ConfigError(
                    f"{path} was saved with {section}.{key}={before}, this run has {value}; "
                    "use the same value"
                )
