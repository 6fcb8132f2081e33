"""Checkpoints of Hugging Face to ours and back, one tensor at a time: the whole model is never in memory.

Ours is an ordinary checkpoint of step 0 with parameters alone; beside it lie the model as YAML, and config.json and the
tokenizer as they came.  Pickled weights are not read: a pickle runs what it holds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vp_train.checkpoint import store
from vp_train.checkpoint.store import CheckpointTensor
from vp_train.checkpoint.stream import Described, describe_tensors, read_tensor, write_tensors
from vp_train.config import ConfigError, ModelConfig
from vp_train.durable import sync
from vp_train.hf.families import config_of, model_of
from vp_train.hf.names import Entry, entries
from vp_train.hf.values import check

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
_GENERATION = "generation_config.json"
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_IGNORED = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
)  # buffers that some files hold


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import wrote."""

    model: ModelConfig
    num_parameters: int
    checkpoint: Path
    model_file: Path
    tokenizer: Path | None


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote.  `reach`: max_position_embeddings; `reach_from`: the config.json that says it, None: none does."""

    files: tuple[str, ...]
    reach: int
    reach_from: Path | None


def _silent(words: str) -> None:
    """No progress is shown."""


def import_checkpoint(
    source: Path, target: Path, *, progress: Callable[[str], None] = _silent
) -> Imported:
    """Write the model in directory `source` as a checkpoint under `target`.

    Raises ConfigError for an architecture, a feature or a file that is not read here, and for tensors that are missing, left
    over, or of another shape.  `target` is complete or absent.  `progress` hears after every tensor how much is written.
    """
    if not (source / "config.json").is_file():
        raise ConfigError(
            f"{source / 'config.json'} is not there; give the directory of a model in the format of Hugging Face"
        )
    place = _place(target)
    config = _read_json(source / "config.json")
    try:
        model = model_of(config)
    except ConfigError as error:
        raise ConfigError(f"{source / 'config.json'}: {error}") from None
    everything = list(entries(model))
    files = _files(source)
    described = _described(source, files, everything, model)
    ours = [
        Described(f"parameter:{entry.ours}", entry.shape, described[entry.theirs[0]].dtype)
        for entry in everything
    ]
    num_bytes = sum(one.num_bytes for one in ours)
    joined = (
        entry.join([read_tensor(files[name], name) for name in entry.theirs])
        for entry in everything
    )
    tensors = _counted(joined, num_bytes, progress)
    state = {"step": 0, "updates": 0, "config": {"model": asdict(model)}}
    with _complete(place, num_bytes) as directory:
        (directory / "model.yaml").write_text(
            "".join(f"{key}: {json.dumps(value)}\n" for key, value in asdict(model).items())
        )
        copied = _copy(source, directory, ("config.json", *_TOKENIZER, _GENERATION))
        checkpoint = target / store.save_stream(directory, 0, ours, tensors, state).name
    tokenizer = target / "tokenizer.json" if "tokenizer.json" in copied else None
    return Imported(
        model, sum(one.num_values for one in ours), checkpoint, target / "model.yaml", tokenizer
    )


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None,
    origins: Sequence[Path] = (),
    progress: Callable[[str], None] = _silent,
) -> Exported:
    """Write the newest checkpoint at `source` as a model in the format of Hugging Face.

    `dtype` None: as stored.  `tokenizer`: where its files are; None: beside the checkpoint, by the data.tokenizer of its run,
    or in `origins`, the imports or runs that the weights were started from.  What config.json says besides the model is looked
    for in the same places.  `target` is complete or absent.  `progress` hears after every tensor how much is written.  Raises
    ConfigError for a model that no architecture has, and a checkpoint that does not hold it.
    """
    place = _place(target)
    path = store.find(source)
    manifest = store.read_manifest(path)
    model = _saved_model(manifest, path)
    config = config_of(model)
    held = {
        name: entry
        for content in manifest["files"].values()
        for name, entry in content["tensors"].items()
    }
    everything = list(entries(model))
    for entry in everything:
        _check_held(held.get(f"parameter:{entry.ours}"), entry, path)
    kinds = {
        entry.ours: DTYPES[dtype or held[f"parameter:{entry.ours}"]["dtype"]]
        for entry in everything
    }
    theirs = [
        Described(name, shape, kinds[entry.ours])
        for entry in everything
        for name, shape in entry.their_shapes.items()
    ]
    told = [] if tokenizer is None else [_directory_of(tokenizer)]
    of_data = manifest["state"]["config"].get("data", {}).get("tokenizer")
    beside = [source, path.parent]
    before = [
        origin.parent if origin.name.startswith("step-") else origin for origin in origins
    ]  # not a checkpoint of it
    everywhere = [
        *told,
        *beside,
        *([] if of_data is None else [Path(of_data).expanduser().parent]),
        *before,
    ]
    # How far a model reaches is of its weights, not of its tokenizer, which may be that of another one.
    reach = _config_in([*beside, *before], config["model_type"], "max_position_embeddings")
    if reach is not None:
        config["max_position_embeddings"] = max(
            model.seq_length, _read_json(reach)["max_position_embeddings"]
        )
    special = _config_in(everywhere, config["model_type"], *_SPECIAL)
    if special is not None:
        config |= {key: value for key, value in _read_json(special).items() if key in _SPECIAL}
    config["torch_dtype"] = str(next(iter(kinds.values()))).removeprefix("torch.")
    num_bytes = sum(one.num_bytes for one in theirs)
    tensors = _counted(_exported(path, manifest, everything, kinds, held), num_bytes, progress)
    with _complete(place, num_bytes) as directory:
        _write_shards(directory, theirs, shard_bytes, tensors)
        for names in (_TOKENIZER, (_GENERATION,)):
            _copy(
                next((one for one in everywhere if _there(one, names)), directory), directory, names
            )
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files = tuple(sorted(file.name for file in target.iterdir()))
    return Exported(files, config["max_position_embeddings"], reach)


def _place(target: Path) -> Path:
    """Where `target` really is.  Raises ConfigError, before anything is read, where no directory can be put in its place."""
    place = Path(os.path.realpath(target))
    if target.is_symlink() and not target.exists():
        raise ConfigError(
            f"{target} is a link to {place}, which is not there; make that directory, or remove the link"
        )
    if not place.exists():
        return place
    if not place.is_dir():
        raise ConfigError(
            f"{target} is not a directory; give one that is empty, or is still to be made"
        )
    if any(place.iterdir()):
        raise ConfigError(
            f"{target} is not empty; give a directory that is, or is still to be made"
        )
    if (
        place == Path.cwd() or place.is_mount()
    ):  # the one would stay behind in a deleted directory, the other cannot be renamed
        raise ConfigError(
            f"{target} cannot be replaced as a whole; give a directory within it, for example {target / 'model'}"
        )
    return place


def _counted(
    tensors: Iterable[Tensor], num_bytes: int, progress: Callable[[str], None]
) -> Iterator[Tensor]:
    done = 0
    for tensor in tensors:
        yield tensor
        done += tensor.nbytes
        progress(f"{done / 1e9:.1f} of {num_bytes / 1e9:.1f} GB written")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return value


def _files(source: Path) -> dict[str, Path]:
    """The file of each tensor.  Raises ConfigError where there are none, or only pickled ones."""
    if (source / _INDEX).is_file():
        files = {name: source / file for name, file in _weight_map(source / _INDEX).items()}
        absent = sorted({path.name for path in files.values() if not path.is_file()})
        if absent:
            raise ConfigError(
                f"{source / _INDEX} names {', '.join(absent)}, which {source} does not have"
            )
        return files
    if (source / _SINGLE).is_file():
        return dict.fromkeys(_describe(source / _SINGLE), source / _SINGLE)
    pickles = sorted(path.name for pattern in _PICKLES for path in source.glob(pattern))
    if pickles:
        raise ConfigError(
            f"{source} has its weights in {pickles[0]}, a pickle, which runs what it holds when it is read; "
            "have them saved as safetensors (save_pretrained does) where they are trusted"
        )
    raise ConfigError(f"{source} has neither {_SINGLE} nor {_INDEX}")


def _weight_map(index: Path) -> dict[str, str]:
    """The name of each tensor's file, which is beside the index: it must not lead to files of somebody else."""
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict):
        raise ConfigError(
            f"{index}: weight_map={json.dumps(names)[:60]} must be an object, from tensors to names of files"
        )
    for tensor, name in names.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise ConfigError(
                f"{index}: {tensor} is in {json.dumps(name)[:60]}; it must be the name of a file beside the index"
            )
    return names


def _describe(path: Path) -> Mapping[str, Described]:
    try:
        return describe_tensors(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _described(
    source: Path, files: Mapping[str, Path], everything: Sequence[Entry], model: ModelConfig
) -> dict[str, Described]:
    """The tensors of `everything`, checked to be all that the files hold."""
    held = {path: _describe(path) for path in sorted(set(files.values()))}
    wanted = {name: shape for entry in everything for name, shape in entry.their_shapes.items()}
    missing = [name for name in wanted if name not in files or name not in held[files[name]]]
    if missing:
        raise ConfigError(
            f"{source} has no {missing[0]}{_and_more(missing)}, which its config.json asks for"
        )
    found = {name: held[files[name]][name] for name in wanted}
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ConfigError(
                f"{name} is {list(found[name].shape)} in {source}, but {list(shape)} by its config.json"
            )
    spare = {"lm_head.weight"} if model.tied_embeddings else set()
    every = dict.fromkeys(name for names in held.values() for name in names)
    left = [
        name
        for name in every
        if name not in wanted and name not in spare and not name.endswith(_IGNORED)
    ]
    if left:
        raise ConfigError(
            f"{source} has {left[0]}{_and_more(left)}, which this architecture does not have here"
        )
    for entry in everything:
        kinds = {str(found[name].dtype).removeprefix("torch.") for name in entry.theirs}
        if len(kinds) > 1:
            raise ConfigError(
                f"{', '.join(entry.theirs)} are {', '.join(sorted(kinds))} in {source}; they must have one dtype"
            )
    return found


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _saved_model(manifest: Mapping[str, Any], path: Path) -> ModelConfig:
    settings = manifest["state"]["config"]["model"]
    try:
        return ModelConfig(**settings)
    except TypeError as error:
        raise ConfigError(f"{path} was written by another version: {error}") from None


def _check_held(held: Mapping[str, Any] | None, entry: Entry, path: Path) -> None:
    if held is None:
        raise ConfigError(f"{path} has no {entry.ours}, which its model asks for")
    if held["shape"] != list(entry.shape):
        raise ConfigError(
            f"{entry.ours} is {held['shape']} in {path}, but {list(entry.shape)} by its model"
        )


def _exported(
    path: Path,
    manifest: Mapping[str, Any],
    everything: Sequence[Entry],
    kinds: Mapping[str, torch.dtype],
    held: Mapping[str, Any],
) -> Iterator[Tensor]:
    for entry in everything:
        name = f"parameter:{entry.ours}"
        whole = torch.empty(entry.shape, dtype=DTYPES[held[name]["dtype"]])
        store.load(path, manifest, {name: CheckpointTensor(whole)})
        for part in entry.split(whole):
            yield part.to(kinds[entry.ours])


def _write_shards(
    directory: Path, described: Sequence[Described], shard_bytes: int, tensors: Iterator[Tensor]
) -> None:
    """Files of at most `shard_bytes`, but one tensor at least, and their index if there are several."""
    shards: list[list[Described]] = [[]]
    for one in described:
        if (
            shards[-1]
            and sum(other.num_bytes for other in shards[-1]) + one.num_bytes > shard_bytes
        ):
            shards.append([])
        shards[-1].append(one)
    names = [
        f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        names = [_SINGLE]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(directory / name, shard, islice(tensors, len(shard)))
    assert next(tensors, None) is None
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(one.num_bytes for one in described)},
            "weight_map": {
                one.name: name for name, shard in zip(names, shards, strict=True) for one in shard
            },
        }
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _directory_of(told: Path) -> Path:
    """The directory of `told`, which may be a file of a tokenizer."""
    directory = told.parent if told.is_file() else told
    if not _there(directory, _TOKENIZER):
        raise ConfigError(
            f"--tokenizer {told}: no tokenizer files there; give the directory of a model, or its tokenizer.json"
        )
    return directory


def _config_in(directories: Sequence[Path], model_type: str, *keys: str) -> Path | None:
    """The first config.json of this type of model that says any of `keys`."""
    for path in (directory / "config.json" for directory in directories):
        told = _read_json(path) if path.is_file() else {}
        if told.get("model_type") == model_type and any(told.get(key) is not None for key in keys):
            check(told, f"{path}: ")
            return path
    return None


def _there(directory: Path, names: Sequence[str]) -> list[str]:
    return [name for name in names if (directory / name).is_file()]


def _copy(source: Path, target: Path, names: Sequence[str]) -> list[str]:
    there = _there(source, names)
    for name in there:
        shutil.copyfile(source / name, target / name)
    return there


@contextmanager
def _complete(target: Path, num_bytes: int) -> Iterator[Path]:
    """A directory that becomes `target` when all is written, and is gone if anything fails."""
    writing = target.with_name(f".writing-{target.name}")
    shutil.rmtree(writing, ignore_errors=True)
    try:
        writing.mkdir(parents=True)
        yield writing
        for file in (*writing.iterdir(), writing):
            sync(file)
        writing.replace(target)  # which is absent or empty
        sync(target.parent)
    except OSError as error:
        at = f" ({error.filename})" if error.filename else ""
        raise OSError(
            f"{target} was not made: {error.strerror or error}{at}; it needs a directory where you may write, and room for "
            f"{num_bytes / 1e9:.1f} GB"
        ) from None
    finally:
        shutil.rmtree(writing, ignore_errors=True)
