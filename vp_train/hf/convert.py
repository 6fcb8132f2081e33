"""Conversion of Hugging Face checkpoints to ours and back.

Tensors are converted one at a time, so the whole model is never in memory.  An import writes an
ordinary checkpoint of step 0 that holds only parameters.  Next to it are the model settings as
YAML, and unchanged copies of config.json and the tokenizer files.  Pickled weights are refused,
because reading a pickle executes code from it.

In this module, "ours" are names and shapes of this project, "theirs" those of Hugging Face.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from vp_train.checkpoint import store
from vp_train.checkpoint.manifest import Manifest, StoredTensor, read_manifest, saved_settings
from vp_train.checkpoint.saver import save_stream
from vp_train.checkpoint.store import CheckpointTensor
from vp_train.checkpoint.stream import Described, describe_tensors, read_tensor, write_tensors
from vp_train.config import ConfigError, ModelConfig, printable
from vp_train.data.tokenizer import begin_by_files
from vp_train.durable import homes, plain, shown, sync
from vp_train.hf.families import FAMILIES, config_of, model_of
from vp_train.hf.files import copy, existing, file_in, read_object
from vp_train.hf.names import OUTPUT, Entry, Names, entries
from vp_train.hf.tokenizer import GENERATION, TOKENIZER, RunText, find_text, unusual_end
from vp_train.hf.values import check
from vp_train.tensors.precision import DTYPES
from vp_train.units import human_bytes

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_IGNORED = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
)  # buffers, not parameters, in some files


@dataclass(frozen=True, slots=True)
class Imported:
    """The result of an import."""

    model: ModelConfig
    num_parameters: int
    checkpoint: Path
    model_file: Path  # the model settings as YAML
    tokenizer: Path | None  # tokenizer.json, None if the source has none
    end_token: str | None  # data.end_token, where the usual names do not find one
    begin_token: str | None  # data.begin_token: what the tokenizer puts in front of a text, if any
    untied: bool  # whether config.json ties the output layer, but its weights are others


@dataclass(frozen=True, slots=True)
class Exported:
    """The result of an export."""

    files: tuple[str, ...]
    reach: int  # the longest sequence that its config.json allows
    knows_reach: bool  # False if nothing says more than model.seq_length
    end: int | None  # the token that ends the documents of the run, None if that is not known
    unfollowed: tuple[str, ...] = ()  # settings of the run that lead elsewhere
    begin: str | None = None  # the token in front of the documents of the run
    strange: str | None = None  # what the tokenizer puts in front of a text, but the run did not


def _silent(words: str) -> None:
    """Show no progress."""


def import_checkpoint(
    source: Path, target: Path, *, progress: Callable[[str], None] = _silent
) -> Imported:
    """Write the Hugging Face model in directory `source` as a checkpoint under `target`.

    `target` is complete or absent afterwards.  `progress` is called after every tensor with a text
    that says how much is written.  Raises ConfigError for an architecture, feature or file that is
    not supported, and for tensors that are missing, unexpected, of another shape, or not finite.
    Raises OSError if `target` cannot be written.
    """
    config_file = file_in(source, "config.json")
    if config_file is None and not source.exists() and len(source.parts) == 2:
        raise ConfigError(
            f"{source} is not there; give the directory of a model. Names of the Hugging Face hub "
            f"are not downloaded: hf download {source} --local-dir DIR does it, then give DIR"
        )
    if config_file is None:
        raise ConfigError(
            f"{source / 'config.json'} is not there; "
            "give the directory of a model in the format of Hugging Face"
        )
    place = _checked_target(target)
    config = read_object(config_file)
    model = _model_of_file(source / "config.json", config)
    files = _files(source)
    _check_layers(model, len(files), f"{source / 'config.json'}")
    names = _names_in(files, FAMILIES[config["model_type"]].names)
    untied = model.tied_embeddings and _output_differs(files, names)
    if untied:
        model = replace(model, tied_embeddings=False)
    everything = list(entries(model, names))
    described = _checked_tensors(source, files, everything)
    ours = [
        Described(f"parameter:{entry.ours}", entry.shape, described[entry.theirs[0]].dtype)
        for entry in everything
    ]
    num_bytes = sum(tensor.num_bytes for tensor in ours)
    joined = (
        entry.join([_read_finite(files[name], name) for name in entry.theirs])
        for entry in everything
    )
    tensors = _counted(joined, num_bytes, progress)
    state = {"step": 0, "updates": 0, "config": {"model": asdict(model)}}
    with _complete(place, num_bytes) as directory:
        (directory / "model.yaml").write_text(
            "".join(f"{key}: {json.dumps(value)}\n" for key, value in asdict(model).items())
        )
        copied = copy(source, directory, ("config.json", *TOKENIZER, GENERATION))
        checkpoint = target / save_stream(directory, 0, ours, tensors, state).name
    tokenizer = target / "tokenizer.json" if "tokenizer.json" in copied else None
    num_parameters = sum(tensor.num_values for tensor in ours)
    return Imported(
        model,
        num_parameters,
        checkpoint,
        target / "model.yaml",
        tokenizer,
        unusual_end(target),
        begin_by_files(target),
        untied,
    )


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    dtype: str | None = None,
    shard_bytes: float = math.inf,
    tokenizer: Path | None = None,
    origins: Sequence[Path] = (),
    follows: bool = True,
    progress: Callable[[str], None] = _silent,
) -> Exported:
    """Write the newest checkpoint at `source` as a model in the format of Hugging Face.

    `dtype` is a key of DTYPES; None keeps the stored dtype.  `shard_bytes` is the largest size of a
    weight file; by default there is one file.  `tokenizer` is where the tokenizer files are.  If it
    is None they are searched next to the checkpoint, at the data.tokenizer of its run, and in
    `origins`, the imports or runs that the weights were started from.  The same places are searched
    for what config.json holds in addition to the model: special token ids and
    max_position_embeddings.  Without `follows`, which is for the run of somebody else, nothing
    outside `source` but `tokenizer` is looked at.

    `target` is complete or absent afterwards.  `progress` is called after every tensor with a text
    that says how much is written.  Raises ConfigError if no supported architecture has this model,
    if the checkpoint lacks tensors of it, or for values that `dtype` cannot hold.
    Raises OSError if `target` cannot be written.
    """
    place = _checked_target(target)
    path = store.find(source)
    manifest = read_manifest(path)
    settings = _saved_settings(manifest, path)
    model = _saved_model(settings, path)
    held: dict[str, list[StoredTensor]] = {}
    for file in manifest.files.values():
        for name, tensor in file.tensors.items():
            held.setdefault(name, []).append(tensor)
    _check_layers(model, len(held), f"{path}")
    places = _places(source, path, settings, origins, follows)
    config = config_of(model, _model_type([*places.beside, *places.before]))
    model_type = config["model_type"]
    everything = list(entries(model, FAMILIES[model_type].names))
    for entry in everything:
        _check_held(held.get(f"parameter:{entry.ours}", []), entry, path)
    kinds = {
        entry.ours: DTYPES[dtype or held[f"parameter:{entry.ours}"][0].dtype]
        for entry in everything
    }
    theirs = [
        Described(name, shape, kinds[entry.ours])
        for entry in everything
        for name, shape in entry.their_shapes.items()
    ]
    given = None if tokenizer is None else _tokenizer_directory(tokenizer)
    others = [*places.data, *places.before]
    words = find_text(given, places.beside, others, _text_of(settings, model), model_type)
    reach, knows_reach = _reach(model, model_type, places)
    if reach is not None:
        config["max_position_embeddings"] = reach
    config |= words.ids
    config["torch_dtype"] = str(next(iter(kinds.values()))).removeprefix("torch.")
    num_bytes = sum(tensor.num_bytes for tensor in theirs)
    tensors = _counted(_exported(path, manifest, everything, kinds, held), num_bytes, progress)
    with _complete(place, num_bytes) as directory:
        _write_shards(directory, theirs, shard_bytes, tensors)
        words.write(directory)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files = tuple(sorted(file.name for file in target.iterdir()))
    return Exported(
        files,
        reach or model.seq_length,
        knows_reach,
        words.end,
        places.unfollowed,
        words.begin,
        words.strange,
    )


@dataclass(frozen=True, slots=True)
class _Places:
    """The directories that may have what a checkpoint lacks.

    `beside` are next to the checkpoint, `data` where its run had its tokenizer, `before` next to
    what its weights were started from.  `unfollowed` are the settings that lead to other places,
    which must not be looked at.
    """

    beside: list[Path]
    data: list[Path]
    before: list[Path]
    unfollowed: tuple[str, ...]


def _places(
    source: Path,
    checkpoint: Path,
    settings: Mapping[str, Any],
    origins: Sequence[Path],
    follows: bool,
) -> _Places:
    """Return where to search for the checkpoint of `source`, see `export_checkpoint`."""
    beside = list(dict.fromkeys((*homes(source), *homes(checkpoint))))
    tokenizer = settings.get("data", {}).get("tokenizer")
    if follows:
        data = [Path(os.path.expanduser(tokenizer)).parent] if isinstance(tokenizer, str) else []
        return _Places(beside, data, [place for origin in origins for place in homes(origin)], ())
    unfollowed = [f"data.tokenizer={printable(tokenizer)}"] if isinstance(tokenizer, str) else []
    unfollowed += [f"run.init_from={printable(str(origin))}" for origin in origins[:1]]
    return _Places(beside, [], [], tuple(unfollowed))


def _reach(model: ModelConfig, model_type: str, places: _Places) -> tuple[int | None, bool]:
    """Return the max_position_embeddings of an export, and whether it is known.

    It is None where the model or nothing says it.  It belongs to the weights.  The tokenizer may be
    that of another model, so its directory is not searched.
    """
    said = _config_in([*places.beside, *places.before], model_type, "max_position_embeddings")
    if model.positions == "learned":
        return None, True
    if said is None:
        return None, False
    return max(model.seq_length, read_object(said)["max_position_embeddings"]), True


def _checked_target(target: Path) -> Path:
    """Resolve links in `target`, and check before anything is read that it can be written.

    Raises ConfigError if no directory can be moved to this place.
    """
    place = Path(os.path.realpath(target))
    if target.is_symlink() and not target.exists():
        raise ConfigError(
            f"{target} is a link to {place}, which is not there; "
            "make that directory, or remove the link"
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
    # Replacing the working directory would leave this process in a deleted one.  A mount point
    # cannot be replaced by a rename.
    if place == Path.cwd() or place.is_mount():
        raise ConfigError(
            f"{target} cannot be replaced as a whole; "
            f"give a directory within it, for example {target / 'model'}"
        )
    return place


def _counted(
    tensors: Iterable[Tensor], num_bytes: int, progress: Callable[[str], None]
) -> Iterator[Tensor]:
    """Yield the tensors, and report how much is done after each of them."""
    done = 0
    for tensor in tensors:
        yield tensor
        done += tensor.nbytes
        progress(f"{done / 1e9:.1f} of {num_bytes / 1e9:.1f} GB written")


def _model_of_file(path: Path, config: Mapping[str, Any]) -> ModelConfig:
    """Return the model of a config.json.  Raises ConfigError that names the file, in one line."""
    try:
        return model_of(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} nests too deeply") from None


def _check_layers(model: ModelConfig, num_tensors: int, where: str) -> None:
    """Raise ConfigError if there are fewer tensors than layers, before all layers are listed."""
    if model.num_layers > num_tensors:
        raise ConfigError(
            f"{where} asks for {model.num_layers:,} layers, but its files hold {num_tensors:,} "
            "tensors"
        )


def _files(source: Path) -> dict[str, Path]:
    """Return the file of each tensor.  Raises ConfigError if there is none, or only pickles."""
    if (index := file_in(source, _INDEX)) is not None:
        names = _weight_map(index)
        found = {name: file_in(source, name) for name in sorted(set(names.values()))}
        absent = [name for name, path in found.items() if path is None]
        if absent:
            raise ConfigError(
                f"{source / _INDEX} names {plain(', '.join(absent))}, which {source} does not have"
            )
        files = {tensor: found[name] for tensor, name in names.items()}
        return {tensor: path for tensor, path in files.items() if path is not None}
    if (single := file_in(source, _SINGLE)) is not None:
        return dict.fromkeys(_describe(single), single)
    pickles = sorted(path.name for pattern in _PICKLES for path in source.glob(pattern))
    if pickles:
        raise ConfigError(
            f"{source} has its weights in {pickles[0]}, a pickle, and reading a pickle can execute "
            "any code; convert them to safetensors (save_pretrained does) where they are trusted"
        )
    raise ConfigError(f"{source} has neither {_SINGLE} nor {_INDEX}")


def _weight_map(index: Path) -> dict[str, str]:
    """Return the file name of each tensor.  All files must be in the directory of the index.

    Raises ConfigError for any other path, since an index must not lead to files elsewhere.
    """
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict):
        raise ConfigError(
            f"{index}: weight_map={json.dumps(names)[:60]} must be an object, "
            "from tensors to names of files"
        )
    for tensor, name in names.items():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise ConfigError(
                f"{index}: {plain(tensor)} is in {json.dumps(name)[:60]}; "
                "it must be the name of a file beside the index"
            )
    return names


def _names_in(files: Mapping[str, Path], names: Names) -> Names:
    """Return the names as these files have them: those of a bare decoder have no prefix."""
    bare = not any(name.startswith(names.prefix) for name in files)
    return replace(names, prefix="") if bare else names


def _output_differs(files: Mapping[str, Path], names: Names) -> bool:
    """Return whether the files hold an output layer that is not the embedding.

    Like transformers, an import then unties the two, whatever config.json says.  The tensors are
    compared as they are mapped, in no memory of their own.
    """
    found = []
    for name in (OUTPUT, f"{names.prefix}{names.embedding}.weight"):
        if name not in files or name not in _describe(files[name]):
            return False
        found.append(read_tensor(files[name], name))
    return found[0].dtype != found[1].dtype or not torch.equal(*found)


def _describe(path: Path) -> Mapping[str, Described]:
    try:
        return describe_tensors(path)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _read_finite(path: Path, name: str) -> Tensor:
    """Return the tensor `name` of the file at `path`, mapped.

    Raises ConfigError if it holds NaN or an infinity, with which no loss would be a number.
    """
    tensor = read_tensor(path, name)
    if not _is_finite(tensor):
        raise ConfigError(
            f"{plain(name)} in {path} has values that are not finite numbers, so no loss would be "
            "one; get the file again, or save the model again where it was trained"
        )
    return tensor


def _checked_tensors(
    source: Path, files: Mapping[str, Path], everything: Sequence[Entry]
) -> dict[str, Described]:
    """Return a description of every tensor that the entries need, by its Hugging Face name.

    Raises ConfigError if one is missing or has another shape, if the files hold other tensors, or
    if the tensors of an entry differ in dtype.
    """
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
                f"{name} is {list(found[name].shape)} in {source}, "
                f"but {list(shape)} by its config.json"
            )
    # With tied embeddings, the output layer is a copy of the embedding.
    known = {*wanted, OUTPUT}
    every = dict.fromkeys(name for names in held.values() for name in names)
    left = [name for name in every if name not in known and not name.endswith(_IGNORED)]
    if left:
        raise ConfigError(
            f"{source} has {plain(left[0])}{_and_more(left)}, "
            "which this architecture does not have here"
        )
    for entry in everything:
        kinds = {str(found[name].dtype).removeprefix("torch.") for name in entry.theirs}
        if len(kinds) > 1:
            raise ConfigError(
                f"{', '.join(entry.theirs)} are {', '.join(sorted(kinds))} in {source}; "
                "they must have one dtype"
            )
    return found


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _saved_settings(manifest: Manifest, path: Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        return saved_settings(manifest)
    except ValueError as error:
        raise ConfigError(f"{path} has no settings: {error}") from None


def _saved_model(settings: Mapping[str, Mapping[str, Any]], path: Path) -> ModelConfig:
    """Return the model of saved settings.  Raises ConfigError if they are not those of a model."""
    model = settings.get("model", {})
    kinds = get_type_hints(ModelConfig)
    for name, value in model.items():
        if name not in kinds:
            raise ConfigError(f"{path} was written by another version: it has model.{name[:60]!r}")
        if not _is_of(value, kinds[name]):
            raise ConfigError(f"{path} has model.{name}={shown(value)}, which is of another type")
    try:
        return ModelConfig(**model)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a JSON value has the type of a setting; a whole number is a float, too."""
    kinds = get_args(kind) or (kind,)
    return type(value) in kinds or (type(value) is int and float in kinds)


def _check_held(held: Sequence[StoredTensor], entry: Entry, path: Path) -> None:
    if not held:
        raise ConfigError(f"{path} has no {entry.ours}, which its model asks for")
    if held[0].shape != entry.shape:
        raise ConfigError(
            f"{entry.ours} is {list(held[0].shape)} in {path}, but {list(entry.shape)} by its model"
        )
    if sum(math.prod(part.shape_in_file) for part in held) != math.prod(entry.shape):
        raise ConfigError(f"{path} does not hold all of {entry.ours}")


def _exported(
    path: Path,
    manifest: Manifest,
    everything: Sequence[Entry],
    kinds: Mapping[str, torch.dtype],
    held: Mapping[str, Sequence[StoredTensor]],
) -> Iterator[Tensor]:
    """Yield the Hugging Face tensors of all entries in order, converted to their dtypes."""
    for entry in everything:
        name = f"parameter:{entry.ours}"
        whole = torch.empty(entry.shape, dtype=DTYPES[held[name][0].dtype])
        store.load(path, manifest, {name: CheckpointTensor(whole)})
        kind = kinds[entry.ours]
        for theirs, part in zip(entry.theirs, entry.split(whole), strict=True):
            if not _is_finite(part):
                raise ConfigError(
                    f"{theirs} in {path} has values that are not finite numbers; export an earlier "
                    "checkpoint"
                )
            converted = part.to(kind)
            if kind is not part.dtype and not _is_finite(converted):
                raise ConfigError(
                    f"{theirs} has values that {str(kind).removeprefix('torch.')} cannot hold; "
                    "export as float32, or as bfloat16 if it was trained so"
                )
            yield converted


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all values are finite numbers.  It takes no memory of its own."""
    if not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _write_shards(
    directory: Path, described: Sequence[Described], shard_bytes: float, tensors: Iterator[Tensor]
) -> None:
    """Write weight files of at most `shard_bytes`, and an index if there is more than one.

    A tensor that is larger than `shard_bytes` gets a file of its own.
    """
    shards: list[list[Described]] = [[]]
    for tensor in described:
        size = sum(other.num_bytes for other in shards[-1]) + tensor.num_bytes
        if shards[-1] and size > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        several = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = several if len(shards) > 1 else _SINGLE
        write_tensors(directory / name, shard, islice(tensors, len(shard)))
        weight_map |= {tensor.name: name for tensor in shard}
    assert next(tensors, None) is None
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in described)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _tokenizer_directory(path: Path) -> Path:
    """Return the directory of tokenizer files at `path`, which may be one of the files."""
    directory = path.parent if path.is_file() else path
    if not existing(directory, TOKENIZER):
        raise ConfigError(
            f"--tokenizer {path}: no tokenizer files there; "
            "give the directory of a model, or its tokenizer.json"
        )
    return directory


def _text_of(settings: Mapping[str, Mapping[str, Any]], model: ModelConfig) -> RunText | None:
    """Return what the settings of a run say about its text, None for an import or synthetic data.

    Values of another type than a setting has are left out.
    """
    data = settings.get("data")
    if data is None or data.get("synthetic"):
        return None
    end, begin = data.get("end_token"), data.get("begin_token")
    return RunText(
        end_token=end if isinstance(end, str) else None,
        after_end=data.get("packing", "none") == "none",
        longest=model.seq_length,
        begin_token=begin if isinstance(begin, str) else None,
    )


def _model_type(directories: Sequence[Path]) -> str | None:
    """Return the model_type of the first config.json, None if there is none."""
    for directory in directories:
        path = file_in(directory, "config.json")
        if path is not None:
            found: str | None = read_object(path).get("model_type")
            return found
    return None


def _config_in(directories: Sequence[Path], model_type: str, key: str) -> Path | None:
    """Return the first config.json with this model type that sets `key`."""
    for directory in directories:
        path = file_in(directory, "config.json")
        config = {} if path is None else read_object(path)
        if config.get("model_type") == model_type and config.get(key) is not None:
            check(config, f"{path}: ")
            return path
    return None


@contextmanager
def _complete(target: Path, num_bytes: int) -> Iterator[Path]:
    """Yield a directory that becomes `target` at the end, and is removed if anything fails.

    Raises OSError with the place and `num_bytes` if writing fails.
    """
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
            f"{target} was not made: {error.strerror or error}{at}; it needs a directory "
            f"where you may write, and room for {human_bytes(num_bytes)}"
        ) from None
    finally:
        shutil.rmtree(writing, ignore_errors=True)
