"""The contents of a run's checkpoint: parameters, the moments of AdamW, and a little JSON state."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from vp_train.assembly import EvaluationModel, RankModel
from vp_train.checkpoint.manifest import (
    BATCH,
    MANIFEST,
    MOST_STEPS,
    Manifest,
    read_manifest,
    saved_settings,
)
from vp_train.checkpoint.saver import Saver
from vp_train.checkpoint.store import CheckpointTensor, Damage, load, newest
from vp_train.checkpoint.text import kept_corpora, kept_words
from vp_train.communication.control import ControlGroup
from vp_train.config import ConfigError, DataConfig, LossConfig, RunConfig
from vp_train.config.canonical import model_changes
from vp_train.config.resume import (
    KEPT_SECTIONS,
    keeps_on_resume,
    keeps_with_weights,
    permission_of,
)
from vp_train.config.typed import shell_word
from vp_train.durable import plain, shown
from vp_train.mesh import Mesh
from vp_train.optim.adamw import MOMENTS
from vp_train.tensors.precision import statistics_dtype

Value = TypeVar("Value")

_MOST_TOKENS = 2**60  # that a run uses
# What a setting was before there was a choice; a new one gets a default that changes nothing.
_DEFAULTS = {name: getattr(RunConfig(), name) for name in KEPT_SECTIONS}


@dataclass(frozen=True, slots=True)
class Progress:
    """What a run has seen so far.

    tokens: of the stream of training samples, those that steps have used or that were left out.
    losses, norms: of the last steps, for their medians.
    spikes, skipped: the spikes seen and the steps not applied.
    """

    tokens: int = 0
    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    spikes: int = 0
    skipped: int = 0

    @classmethod
    def of(cls, value: Any) -> Progress:
        """Return the progress in a manifest.  Raises ValueError."""
        counts, history = {"tokens", "spikes", "skipped"}, {"losses", "norms"}
        if not isinstance(value, dict) or value.keys() != history | counts:
            raise ValueError(f"state.progress is {shown(value)}, not that of a run")
        for name in counts:
            most = _MOST_TOKENS if name == "tokens" else MOST_STEPS
            if type(value[name]) is not int or not 0 <= value[name] <= most:
                words = f"{shown(value[name])}, not a number of {name}"
                raise ValueError(f"state.progress.{name} is {words}")
        for name in history:
            if not (isinstance(value[name], list) and all(map(_is_finite, value[name]))):
                raise ValueError(f"state.progress.{name} is {shown(value[name])}, not numbers")
        return cls(**value | {name: tuple(value[name]) for name in history})


def _with_tokens(value: Any, step: int, settings: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return the progress of an earlier version with the tokens of its steps, all of one size.

    Such a progress counts the steps whose data was left out, or is null.
    """
    value = {"left_out": 0, "losses": [], "norms": []} if value is None else value
    if not isinstance(value, dict) or "left_out" not in value:
        return value
    counts = {
        "progress.left_out": value["left_out"],
        "config.batch": settings.get("batch", {}).get(BATCH),
        "config.model.seq_length": settings.get("model", {}).get("seq_length"),
    }
    for name, number in counts.items():
        if type(number) is not int or not 0 <= number <= MOST_STEPS:
            raise ValueError(f"state.{name} is {shown(number)}, not a count")
    left_out, batch, length = counts.values()
    rest = {name: number for name, number in value.items() if name != "left_out"}
    return {"spikes": 0, "skipped": 0} | rest | {"tokens": (step + left_out) * batch * length}


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


@dataclass(frozen=True, slots=True)
class _RunState:
    """What a run keeps in the manifest beside its tensors.

    config: the settings of `_settings`, by section.
    contents: the hashes of the corpora.
    """

    updates: int
    loss_scale: tuple[float, int]  # its value, and the finite steps at it
    config: Mapping[str, Mapping[str, Any]]
    contents: tuple[str, ...]
    progress: Progress

    @classmethod
    def of(cls, manifest: Manifest) -> _RunState:
        """Return the state in a manifest.  Raises ValueError if it is not that of a run."""
        state = manifest.state
        updates, contents = state.get("updates"), state.get("contents")
        scale = state.get("loss_scale")
        if state.get("step") != manifest.step:
            raise ValueError(f"state.step is {shown(state.get('step'))}, not {manifest.step}")
        if type(updates) is not int or not 0 <= updates <= manifest.step:
            raise ValueError(f"state.updates is {shown(updates)}, not a number of steps")
        if not (
            isinstance(scale, list)
            and len(scale) == 2
            and _is_finite(scale[0])
            and scale[0] > 0
            and type(scale[1]) is int
            and 0 <= scale[1] <= MOST_STEPS
        ):
            raise ValueError(f"state.loss_scale is {shown(scale)}, not a scale and a count")
        if not (isinstance(contents, list) and all(isinstance(one, str) for one in contents)):
            raise ValueError(f"state.contents is {shown(contents)}, not a list of hashes")
        settings = saved_settings(manifest)
        progress = Progress.of(_with_tokens(state.get("progress"), manifest.step, settings))
        return cls(updates, (scale[0], scale[1]), settings, tuple(contents), progress)


def begin_save(
    saver: Saver,
    step: int,
    config: RunConfig,
    model: RankModel,
    mesh: Mesh,
    contents: Sequence[str],
    progress: Progress,
) -> None:
    """Begin to save `step`, and return when all tensors are copied.  Collective over all ranks.

    `contents` are the hashes of the corpora (`Source.contents`).  Only the replica with data rank 0
    writes tensors.
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
        "progress": asdict(progress),
    }
    saver.begin(step, pieces, state)


def latest_of_run(directory: Path, group: ControlGroup) -> tuple[Path | None, list[Damage]]:
    """Return the newest undamaged checkpoint of a run, and the damage of the newer ones.

    Collective over `group`.  Raises ConfigError like `newest`.
    """

    def check(manifest: Manifest) -> None:
        _RunState.of(manifest)

    return newest(directory, group, check, "restore one, or move them away to begin without")


def restore_run(
    path: Path, config: RunConfig, model: RankModel, mesh: Mesh, contents: Sequence[str]
) -> tuple[int, Progress]:
    """Load checkpoint `path` into model and optimizer.  Collective.

    Returns its step and the progress until then.

    Raises ConfigError if the checkpoint is of another run: if the model, the data, the loss, the
    dtype or the sequences of a step differ, and run.allow does not have it.
    """
    manifest, state = _opened(path, _RunState.of)
    ours = _settings(config, mesh.degrees.dp)
    _require_same(_completed(state.config), ours, path, config, keeps_on_resume)
    begin = state.config.get("data", {}).get("begin_token")
    _require_same_text(state.contents, contents, path, config.data, begin)
    model.optimizer.restore(lambda kind, name: _read(path, manifest, model, kind, name, cast=False))
    model.optimizer.updates = state.updates
    model.loss_scale.value, model.loss_scale.finite_steps = state.loss_scale
    return manifest.step, state.progress


def load_weights(path: Path, config: RunConfig, model: RankModel) -> None:
    """Load only the parameters of checkpoint `path`; the moments of AdamW become zero.  Collective.

    The checkpoint may have any parallel layout and any dtype.  Raises ConfigError if it is of
    another model, naming the setting or the tensor, and both values.
    """
    manifest = _opened_weights(path, config)

    def read(kind: str, name: str) -> Tensor:
        if kind in MOMENTS:
            return torch.zeros(model.parameters[name].shape, dtype=model.gradients.dtype)
        return _read(path, manifest, model, kind, name, cast=True)

    model.optimizer.restore(read)


@torch.no_grad()
def load_parameters(path: Path, config: RunConfig, model: EvaluationModel) -> None:
    """Load the parameters of checkpoint `path`; the rest is as in `load_weights`."""
    manifest = _opened_weights(path, config)
    for name, parameter in model.parameters.items():
        parameter.copy_(_read(path, manifest, model, "parameter", name, cast=True))


def _opened_weights(path: Path, config: RunConfig) -> Manifest:
    """Return the manifest of checkpoint `path`.  Raises ConfigError if it is of another model."""
    manifest, saved = _opened(path, saved_settings)
    theirs = asdict(_DEFAULTS["model"]) | dict(saved.get("model", {}))
    changed = {name: getattr(config.model, name) for name in model_changes(theirs, config.model)}
    _require_same(saved, {"model": changed}, path, config, keeps_with_weights)
    return manifest


def _opened(path: Path, read: Callable[[Manifest], Value]) -> tuple[Manifest, Value]:
    """Return the manifest of checkpoint `path`, and what `read` finds in it.

    Raises ConfigError where the manifest is damaged.
    """
    manifest = None
    try:
        manifest = read_manifest(path)
        return manifest, read(manifest)
    except ValueError as error:
        where = "" if manifest is None else f"{path / MANIFEST} is damaged: "
        raise ConfigError(f"{where}{error}") from None


def _key(kind: str, name: str) -> str:
    """Return the checkpoint key: `parameter:NAME`, `exp_avg:NAME` or `exp_avg_sq:NAME`."""
    return f"{kind}:{name}"


def _read(
    path: Path,
    manifest: Manifest,
    model: RankModel | EvaluationModel,
    kind: str,
    name: str,
    *,
    cast: bool,
) -> Tensor:
    """Read this rank's slice of a parameter or moment, in the dtype of the gradients."""
    parameter = model.parameters[name]
    tensor = torch.empty(parameter.shape, dtype=statistics_dtype(parameter.dtype))
    load(
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
        json.dumps({name: asdict(getattr(config, name)) for name in KEPT_SECTIONS})
    )
    values["data"]["synthetic"] = config.data.name == "synthetic"
    values["data"]["weights"] = list(config.data.weights)
    values["data"]["sample_length"] = config.sample_length
    values["data"]["split_seed"] = config.data.validation_seed
    values["run"] = {"dtype": config.run.dtype}
    batch = num_replicas * config.num_microbatches * config.micro_batch_size
    values["batch"] = {BATCH: batch, "batch_ramp": [list(pair) for pair in config.batch_ramp]}
    return values


def _completed(saved: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """Return the settings of a checkpoint with those that earlier versions did not have."""
    length = saved.get("model", {}).get("seq_length")
    data = {"sample_length": length, **saved.get("data", {})}
    if data.get("split_seed") is None:
        data["split_seed"] = data.get("seed", _DEFAULTS["data"].seed)
    return {
        **saved,
        "loss": saved.get("loss", asdict(LossConfig())),
        "data": data,
        "batch": {"batch_ramp": [], **saved.get("batch", {})},
    }


def _require_same_text(
    saved: Sequence[str],
    ours: Sequence[str],
    path: Path,
    data: DataConfig,
    begin: str | None = None,
) -> None:
    """Raise ConfigError if the corpora are others.  begin: the data.begin_token of the run."""
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
    kept = kept_corpora(data, saved)
    ways = ["bring that back", _as_another_run(path)]
    if begin != data.begin_token:
        word = "data.begin_token=null"
        if begin is not None:
            word = shell_word("data.begin_token", begin)
        ways[0] += f": {word}"
    elif kept:
        ways.insert(0, kept_words(data, kept))
    raise ConfigError(f"{which} not what {path} was trained on; {'; or '.join(ways)}")


def _as_another_run(path: Path) -> str:
    origin = shell_word("run.init_from", str(path))
    return f"go on from its weights as another run: {origin} run.name=NAME"


def _require_same(
    saved: Mapping[str, Mapping[str, Any]],
    ours: dict[str, Any],
    path: Path,
    config: RunConfig,
    keeps: Callable[[str, RunConfig], bool],
) -> None:
    """Raise ConfigError if a setting that `keeps` says must stay is not what was saved."""
    for section, values in ours.items():
        for key, value in values.items():
            before = saved.get(section, {}).get(key)
            if key not in saved.get(section, {}):  # checkpoints of earlier versions
                before = json.loads(json.dumps(getattr(_DEFAULTS.get(section), key, None)))
            if before == value or not keeps(f"{section}.{key}", config):
                continue
            if (section, key) == ("data", "synthetic"):
                words = "was" if before else "was not"
                raise ConfigError(
                    f"{path} {words} trained on data=synthetic; use the same data, or "
                    f"{_as_another_run(path)}"
                )
            permission = permission_of(f"{section}.{key}", config)
            way_out = "" if permission is None else f", or give run.allow=[{permission}]"
            raise ConfigError(
                f"{path} was saved with {_name(section, key)}={_word(before)}, this run has "
                f"{_word(value)}; use the same value{way_out}"
                f"{_ORIGIN_OF_DP if section == 'batch' else ''}"
            )


_ORIGIN_OF_DP = "; where parallel.dp is not set, it follows from the number of ranks"


def _name(section: str, key: str) -> str:
    """Return the name that somebody types for what a checkpoint calls `key` of `section`."""
    if section == "batch":
        return key.replace("dp *", "parallel.dp *")
    if (section, key) == ("data", "weights"):
        return "the weights of data.blend"
    return f"{section}.{key}"


def _word(value: object) -> str:
    """Return a setting for a message."""
    return plain(value) if isinstance(value, str) else shown(value)
