"""The only door to hydra: overrides -> RunConfig, and the settings in words.

Overrides and YAML files are checked for size and depth before hydra or omegaconf parses them.
Nothing is interpolated: `${...}` is refused wherever it stands, also in overrides, since the shell
expands variables, and a file that somebody else wrote must not read the environment.

`python -m vp_train.settings > docs/settings.md` writes the page of all settings.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import pickle
import re
import shlex
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any

from vp_train.config import (
    CPU_COSTS,
    FREE_MODEL,
    RAMP_WORDS,
    BlendEntry,
    ConfigError,
    DataConfig,
    RunConfig,
    Setting,
    ValidationEntry,
    keeps_on_resume,
    permission_of,
    printable,
    setting_of,
    unknown,
)
from vp_train.durable import (
    UnreadableError,
    checkpoints_in,
    homes,
    read_text,
    runs_beside,
    similar_run,
)
from vp_train.units import plural

# What is read of a command line, and of a file with settings.  Hydra takes seconds for more: it
# parses in Python, and the time of lists and quotes grows with the square of their length.
_MOST_WORDS = 1_000  # overrides
_MOST_CHARACTERS = 65_536
_MOST_SIGNS = 2_048  # commas, brackets, quotes and backslashes
_MOST_NODES = 4_096  # values in a file
_DEEPEST = 10
_LONGEST_KEY = 200  # characters
_LARGEST_FILE = 1 << 18  # bytes


def load_config(overrides: Sequence[str], known_options: Sequence[str] = ()) -> RunConfig:
    """Compose configs/ and `overrides`.

    With run.resume=true the settings that the run has saved take the place of configs/.

    Raises ConfigError with the offending override and the way out.
    """
    options = [word for word in overrides if word.startswith("-")]
    if options:
        known = ", ".join((*known_options, "--help"))
        raise ConfigError(
            f"{options[0]} is not an option; {_instead_of(options[0], known_options)}there are "
            f"{known} and --print-config, all else is key=value"
        )
    _check_size(overrides)
    for before, word in itertools.pairwise(("", *overrides)):
        if word.startswith("="):
            raise ConfigError(f"{word!r} is not an override; write key=value without blanks")
        if "=" not in word and not word.startswith(("+", "~")):
            raise ConfigError(f"{word!r} is not an override; {_instead_of_word(word, before)}")
    _refuse_two_choices(overrides)
    chosen = {word.partition("=")[0] for word in overrides}
    files = {word: settings for word in overrides if (settings := _of_file(word)) is not None}
    try:
        overrides = [
            _as_written(_at_home(word)) for given in overrides for word in files.get(given, [given])
        ]
        for word in overrides:
            _check_word(word)
        if (saved := _saved_by_run(overrides)) is not None:
            return _resumed(saved, overrides, chosen)
        config = _composed("config", overrides)
        _refuse_unused(config.data, overrides)
        if config.vocab.balance and config.vocab.algorithm == "none":
            raise ConfigError(
                "vocab.balance=true needs a sharded vocabulary, but vocab=none; drop one of the two"
            )
        return config
    except ConfigError:
        for given, settings in files.items():  # is one of the files at fault?
            try:
                for word in settings:
                    _check_word(word)
                _composed("config", settings)
            except ConfigError as error:
                raise ConfigError(f"{given}: {error}") from None
        raise


def _refuse_two_choices(overrides: Sequence[str]) -> None:
    """Raise ConfigError for two choices of a group, of which hydra takes the last without a word.

    A setting may be given twice, and the last one counts: what a plan proposes is appended.
    """
    chosen: dict[str, str] = {}
    for word in overrides:
        group = word.partition("=")[0]
        first = chosen.setdefault(group, word)
        if group in sections() and first != word:
            raise ConfigError(f"{first} and {word}: a group has one choice; drop one of the two")


# Settings of `data` that do not count with a choice of data.name.
_UNUSED_DATA = {
    "synthetic": (
        *("tokenizer", "other_tokenizer", "end_token", "jsonl_field"),
        *("cache_dir", "workers", "validation_fraction"),
    ),
    "pystdlib": ("jsonl_field",),
}


def _refuse_unused(data: DataConfig, overrides: Sequence[str]) -> None:
    """Raise ConfigError for one of `overrides` that the chosen data does not use.

    A default does no harm, nor does one that a resumed run or another choice has kept.
    """
    given, default = {word.partition("=")[0] for word in overrides}, DataConfig()
    for name in _UNUSED_DATA.get(data.name, ()):
        value = getattr(data, name)
        if f"data.{name}" not in given or value == getattr(default, name):
            continue
        if name == "jsonl_field" and data.validation:
            continue
        raise ConfigError(
            f"data.{name}={_value(value)} does not count with data={data.name}; drop it, or for "
            "text of your own add data=text data.path=DIR"
        )


# Names of settings in other frameworks, and what people call them.
_ELSEWHERE = {
    **dict.fromkeys(("learning_rate", "max_lr"), "optim.lr"),
    **dict.fromkeys(("lr_warmup_iters", "warmup_iters", "warmup"), "optim.warmup_steps"),
    **dict.fromkeys(("train_iters", "max_steps", "max_iters", "iterations"), "run.steps"),
    **dict.fromkeys(("save_interval", "save_every", "save_steps"), "run.checkpoint_every"),
    **dict.fromkeys(("eval_interval", "eval_steps"), "run.eval_every"),
    **dict.fromkeys(("log_interval", "logging_steps"), "run.log_every"),
    **dict.fromkeys(("output_dir", "out_dir", "save_dir", "save"), "run.root"),
    **dict.fromkeys(("precision", "bf16", "fp16"), "run.dtype"),
    **dict.fromkeys(("load", "init", "from_pretrained"), "run.init_from"),
    **dict.fromkeys(("n_layer", "n_layers", "num_hidden_layers", "layers"), "model.num_layers"),
    **dict.fromkeys(("n_head", "n_heads", "num_attention_heads", "heads"), "model.num_heads"),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads"), "model.num_query_groups"),
    **dict.fromkeys(("n_embd", "d_model", "hidden_dim", "dim"), "model.hidden_size"),
    **dict.fromkeys(("d_ff", "intermediate_size"), "model.ffn_hidden_size"),
    **dict.fromkeys(("block_size", "context_length", "max_seq_len"), "model.seq_length"),
    **dict.fromkeys(("sequence_length", "max_position_embeddings"), "model.seq_length"),
    **dict.fromkeys(("tensor_model_parallel_size", "tp_size"), "parallel.tp"),
    **dict.fromkeys(("pipeline_model_parallel_size", "pp_size"), "parallel.pp"),
    **dict.fromkeys(("data_parallel_size", "dp_size"), "parallel.dp"),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulate"), "num_microbatches"),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size"), "micro_batch_size"),
    **dict.fromkeys(("global_batch_size", "gbs"), "num_microbatches"),
    **dict.fromkeys(("data_path", "dataset", "train_data"), "data.path"),
    **dict.fromkeys(("tokenizer_path", "tokenizer_name"), "data.tokenizer"),
}
# Options of other launchers, and ours.
_OPTIONS_ELSEWHERE = {
    **dict.fromkeys(("nproc_per_node", "nprocs", "num_processes", "num_gpus", "gpus"), "--ranks"),
    **dict.fromkeys(("nnodes", "num_nodes", "num_machines"), "--nodes"),
    **dict.fromkeys(("node_rank", "machine_rank"), "--node"),
    **dict.fromkeys(("master_addr", "rdzv_endpoint", "main_process_ip"), "--head"),
    "multirun": "-m",
    "output": "--out",
}
_NO_FILE = (
    "settings are words key=value; model=FILE.yaml and cost=FILE.yaml alone take a file, and "
    "vp-train -m FILE trains with each line of overrides in it"
)


def close_names(word: str) -> list[str]:
    """Return the settings that somebody may mean by `word`, the likeliest first, at most two."""
    if word in sections():
        return [word]
    names, last = setting_names(), word.lower().replace("-", "_").rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    if same:
        return same[:2]
    if last in _ELSEWHERE:
        return [_ELSEWHERE[last]]
    close = difflib.get_close_matches(word, names if "." in word else [*names, *sections()], n=2)
    if close or "." in word:
        return close
    of_last = {name.rpartition(".")[2]: name for name in reversed(names)}
    return [of_last[one] for one in difflib.get_close_matches(last, of_last, n=2, cutoff=0.75)]


def _instead_of(word: str, known_options: Sequence[str]) -> str:
    """Return what to write instead of an option that is none, and a semicolon; else nothing."""
    name, equals, value = word.lstrip("-").partition("=")
    option = _OPTIONS_ELSEWHERE.get(name.lower().replace("-", "_"))
    if option not in known_options and name not in sections():
        option = next(iter(difflib.get_close_matches(word, known_options, n=1, cutoff=0.75)), None)
    if option in known_options:
        return f"did you mean {option}? "
    if re.match(r"(config|cfg|conf)\b|config_|config-", name):
        return f"{_NO_FILE}; "
    if difflib.get_close_matches(re.sub("[-_]", "", name.lower()), ["dryrun"], cutoff=0.8):
        way = "vp-plan with the same settings says what a run would do and starts nothing; "
        return f"{way}--preflight stops before step 1; " if "--preflight" in known_options else way
    names = close_names(name)
    if names and len(name) > 1:
        return f"write {names[0]}={value if equals else '...'}; "
    return ""


def _instead_of_word(word: str, before: str) -> str:
    """Return what to write instead of a word without `=` that stands behind the word `before`."""
    if word and before.endswith("=") and before.count("=") == 1:
        return f"write {before}{word} without a blank"
    if word in setting_names():
        return f"write key=value without blanks, here {word}=..."
    groups = [name for name, choices in group_choices().items() if word in choices]
    if groups and word != "default":
        return f"write {groups[0]}={word}"
    path = Path(os.path.expanduser(word))
    if path.suffix in (".yaml", ".yml", ".toml"):
        return _NO_FILE
    if 0 < len(word) < _LONGEST_KEY and path.exists():
        return f"for text of your own write data=text data.path={word}"
    if word in ("help", "version"):
        return f"write --{word}"
    return "write key=value, e.g. run.steps=100"


_MOST_COMBINATIONS = 10_000


def combinations(words: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every combination of the values in `words`, the last one fastest.

    A word may have several values as in hydra's multirun: `a=1,2`, `a=choice(1,2)`,
    `a=range(1,5)`.  All other words stay as they are, and so does one that hydra cannot parse, so
    that `load_config` says what is wrong with it.  Raises ConfigError for other kinds of sweeps,
    for shuffle(...), with which an index would be another run in every process, and for too many
    combinations.
    """
    from hydra.errors import HydraException

    _check_size(words)
    choices, total = [], 1
    for word in words:
        values = [word]
        try:
            parsed = _parsed(word)
        except HydraException:
            parsed = None
        if parsed is not None and parsed.is_sweep_override():
            values = _swept(parsed, word)
        if (total := total * len(values)) > _MOST_COMBINATIONS:
            raise ConfigError(
                f"{word}: the lists have more than {_MOST_COMBINATIONS:,} combinations; give fewer"
            )
        choices.append(values)
    return [list(chosen) for chosen in itertools.product(*choices)]


def _swept(parsed: Any, word: str) -> list[str]:
    """Return the overrides that hydra makes of a sweep, not many more than are allowed.

    `parsed` is what hydra read in `word`.  Raises ConfigError for a sweep without a fixed order.
    """
    from hydra.errors import HydraException

    wrong = ConfigError(f"{word}: a sweep takes a list of values, choice(...) or range(...)")
    if not parsed.is_discrete_sweep() or getattr(parsed.value(), "shuffle", False):
        raise wrong
    key = parsed.get_key_element()
    try:
        values = itertools.islice(parsed.sweep_string_iterator(), _MOST_COMBINATIONS + 1)
        found = [f"{key}={value}" for value in values]
    except (HydraException, ValueError, TypeError, AttributeError, AssertionError):
        raise wrong from None
    if not found:
        raise ConfigError(f"{word} has no values")
    return found


def _check_size(words: Sequence[str]) -> None:
    """Raise ConfigError for more overrides, or longer ones, than hydra can parse in a second."""
    found = {
        "overrides": (len(words), _MOST_WORDS),
        "characters": (sum(map(len, words)), _MOST_CHARACTERS),
        "commas, brackets and quotes": (
            sum(character in ",[]{}()\\'\"" for word in words for character in word),
            _MOST_SIGNS,
        ),
    }
    for what, (number, most) in found.items():
        if number > most:
            raise ConfigError(
                f"the overrides {max(words, key=len)[:60]} ... have {number:,} {what}; at most "
                f"{most:,} are read"
            )


def _check_word(word: str) -> None:
    """Raise ConfigError for an override that hydra would take for something else than a value."""
    key, _, value = word.partition("=")
    if word.startswith(("+", "~")):
        raise ConfigError(f"{word}: settings cannot be added or removed; write key=value")
    if len(key) > _LONGEST_KEY:
        raise ConfigError(f"{key} is not a setting; see vp-train --help for all keys")
    if key.startswith("hydra") or "@" in key:
        raise ConfigError(f"{key} is not a setting; see vp-train --help for all keys")
    for name, (_, example) in _ENTRIES.items():
        if key.startswith(f"{name}."):
            raise ConfigError(f"{word}: entries of {name} are not set one by one; {example}")
    if "${" in word:
        raise ConfigError(f"{word}: ${{...}} is not expanded in settings; write the value itself")
    if key in sections() and value.lstrip().startswith(("[", "{")):
        raise ConfigError(f"{word}: {_one_choice(key)}")
    depth = deepest = 0
    for character in value:
        depth += (character in "[{(") - (character in ")}]")
        deepest = max(deepest, depth)
    if deepest > _DEEPEST:
        raise ConfigError(f"{word} is nested {deepest} deep; no setting is")


def _one_choice(group: str) -> str:
    """Return the way out for a group that was given something else than the name of a choice."""
    choices = ", ".join(group_choices().get(group, ["vp-train --help lists them"]))
    return (
        f"a group takes the name of one of its choices ({choices}); "
        f"for one value write {group}.NAME=VALUE"
    )


def group_choices() -> dict[str, list[str]]:
    """Return the choices of every group of settings: the names of its YAML files, sorted."""
    from importlib.resources import files

    return {
        entry.name: sorted(
            file.name.removesuffix(".yaml")
            for file in entry.iterdir()
            if file.name.endswith(".yaml")
        )
        for entry in sorted(files("vp_train.configs").iterdir(), key=lambda entry: entry.name)
        if entry.is_dir() and not entry.name.startswith("_")
    }


def _composed(primary: str, overrides: Sequence[str]) -> RunConfig:
    """Compose the configuration `primary` and `overrides`; raise ConfigError like `load_config`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    composed = _updated(overrides) if primary == "config" else None
    composed = composed or _of_hydra(primary, overrides)
    try:
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from None
    except ConfigError as error:
        for word in overrides:
            name, _, value = word.partition("=")
            meant = _choice_of_group(word)
            if meant is not None and str(error).startswith(f"{name}={value!r} is not known"):
                raise ConfigError(f"{error}; did you mean {meant}?") from None
        raise
    assert isinstance(config, RunConfig)
    return config


def _of_hydra(primary: str, overrides: Sequence[str]) -> Any:
    """Return what hydra composes; raise its errors as ConfigErrors."""
    from hydra.errors import (
        ConfigCompositionException,
        HydraException,
        MissingConfigException,
        OverrideParseException,
    )
    from omegaconf.errors import OmegaConfBaseException

    try:
        return _hydra_composed(primary, overrides)
    except OverrideParseException as error:
        word = str(error.override)
        way_out = _broken_list(word) or _quoted_words(word)
        way_out = way_out or "write key=value, e.g. run.steps=100"
        raise ConfigError(f"{error.override!r} is not an override; {way_out}") from None
    except MissingConfigException as error:
        raise ConfigError(_unknown_choice(error)) from None
    except ConfigCompositionException as error:
        raise ConfigError(_bad_override(error, overrides)) from None
    except (OmegaConfBaseException, HydraException) as error:
        raise ConfigError(_first_line(error)) from None
    except Exception:  # whatever hydra's parser and merge stumble over, they never run our code
        known = group_choices()
        split = [(word, *word.partition("=")[::2]) for word in overrides]
        groups = [
            word
            for word, key, value in split
            if key in sections() and value not in known.get(key, ())
        ]
        if groups:
            words = _one_choice(groups[0].partition("=")[0])
            raise ConfigError(f"{' '.join(groups)}: {words}") from None
        words = " ".join(overrides)
        raise ConfigError(f"{words} cannot be read; write key=value, e.g. run.steps=100") from None


def _updated(overrides: Sequence[str]) -> Any:
    """Compose as hydra does, but each choice of a group once; None for what is left to hydra.

    Hydra reads all files for every call, and settings of its own, which takes most of its time.
    """
    from omegaconf import OmegaConf

    groups = group_choices()
    chosen: dict[str, str] = {}
    others = []
    for word in overrides:
        group, _, choice = word.partition("=")
        if group not in groups:
            others.append(word)
        elif choice in groups[group]:
            chosen[group] = choice
        else:
            return None
    try:
        composed = pickle.loads(_of_choices(tuple(sorted(chosen.items()))))
        for word in others:
            parsed = _parsed(word)
            if parsed.is_sweep_override():
                return None
            OmegaConf.update(composed, parsed.key_or_group, parsed.value())
    except Exception:  # hydra's own way will say what is wrong
        return None
    return composed


@cache
def _of_choices(chosen: tuple[tuple[str, str], ...]) -> bytes:
    """Return the settings of these choices, each a group and its choice, pickled.

    Reading that takes a seventh of the time of a copy.  Raises ValueError for what is left to
    hydra: several choices that ask for others, and groups that configs/config.yaml does not have.
    """
    from omegaconf import OmegaConf

    own, (_, *groups, _), _ = _ours("config")  # first the schema, last its own settings
    defaults = {str(group): choice for entry in groups for group, choice in entry.items()}
    asked = _asked_by(defaults | dict(chosen))
    choices = defaults | dict(asked) | dict(chosen)
    if len(asked) > 1 or asked != _asked_by(choices) or choices.keys() != defaults.keys():
        raise ValueError(f"{choices} are left to hydra")
    parts = [_of_choice(*choice)[0] for choice in choices.items()]
    return pickle.dumps(OmegaConf.merge(_schema(), *parts, own))


def _asked_by(choices: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the choices of other groups that these choices ask for, each a group and a choice."""
    return [asked for choice in choices.items() for asked in _of_choice(*choice)[1]]


@cache
def _of_choice(group: str, choice: str) -> tuple[Any, list[tuple[str, str]]]:
    """Return the settings of a choice of a group, and the choices of other groups it asks for.

    Its file may build on choices of the same group and the same package.  Raises ValueError for
    what else hydra knows.
    """
    from omegaconf import OmegaConf

    (own, defaults, is_global), parts, asked = _ours(f"{group}/{choice}"), [], []
    for entry in defaults if "_self_" in defaults else [*defaults, "_self_"]:
        if entry == "_self_":
            parts.append(own if is_global else {group: own})
        elif isinstance(entry, str) and _ours(f"{group}/{entry}")[2] == is_global:
            settings, others = _of_choice(group, entry)
            parts.append(settings)
            asked += others
        elif is_global and "override /" in str(entry):
            asked += [(key.removeprefix("override /"), other) for key, other in entry.items()]
        else:
            raise ValueError(f"{entry} of {group}/{choice}.yaml is left to hydra")
    return OmegaConf.merge(*parts), asked


@cache
def _ours(name: str) -> tuple[Any, list[Any], bool]:
    """Return the settings, the list of defaults, and whether the package is _global_, of a file.

    Raises ValueError for another package.
    """
    from importlib.resources import files

    from omegaconf import OmegaConf

    text = files("vp_train.configs").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    is_global = text.startswith("# @package _global_\n")
    if "@package" in text and not is_global:
        raise ValueError(f"the package of {name}.yaml is left to hydra")
    settings: Any = OmegaConf.create(text)
    return settings, [*settings.pop("defaults", [])], is_global


def _parsed(word: str) -> Any:
    """Return what hydra's grammar reads in an override.  Raises HydraException."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(word)


def _hydra_composed(primary: str, overrides: Sequence[str]) -> Any:
    """Return what hydra composes.  Raises its errors."""
    from hydra import compose, initialize_config_module
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=_schema())
    with initialize_config_module("vp_train.configs", version_base="1.3"):
        return compose(primary, overrides=list(overrides))


@cache
def _schema() -> object:
    """Return the types of all settings."""
    from omegaconf import OmegaConf

    schema = OmegaConf.structured(RunConfig)
    _thaw(schema)
    return schema


# A resumed run does not take these over: they follow from where it is found, and a change that is
# allowed once is not allowed for ever.
_NOT_SAVED = ("run.name", "run.root", "run.resume", "run.allow", "run.init_from")


def _saved_by_run(overrides: Sequence[str]) -> Path | None:
    """Return the settings that the run to be resumed has saved; None if there is no such run.

    Only what says where it lies is looked at: the other overrides may fit nothing but its settings.
    """
    if not any(word.startswith("run.resume=") for word in overrides):
        return None
    names = ("run", "run.name", "run.root", "run.resume")
    where = [word for word in overrides if word.partition("=")[0] in names]
    run = _composed("config", where).run
    saved = run.directory / "config.yaml"
    return saved if run.resume and saved.is_file() else None


def _resumed(path: Path, overrides: Sequence[str], chosen: set[str]) -> RunConfig:
    """Return the settings that a run has saved in `path`, with `overrides` on top of them.

    A group among the `chosen` names begins anew with that choice.  Raises ConfigError where the
    file is broken.
    """
    from importlib.resources import files

    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    saved = _saved_settings(path)
    for section_name in sections():
        if not any(name.partition(".")[0] == section_name for name in saved):
            raise ConfigError(f"{path} has no section {section_name}; {_REPAIR}")
    groups: dict[str, dict[str, object]] = {}
    values: dict[str, object] = {}
    for name in _keys(_schema()):
        section, _, key = name.partition(".")
        if name in saved and name not in _NOT_SAVED and section not in chosen:
            (groups.setdefault(section, {}) if key else values)[key or section] = saved[name]
    if _is_searched(saved, path):
        groups.get("schedule", {}).pop("file", None)  # other settings may lead to another one
    defaults = OmegaConf.load(str(files("vp_train.configs").joinpath("config.yaml"))).defaults
    again = [
        entry
        for entry in defaults
        if not isinstance(entry, str) and chosen.intersection(map(str, entry))
    ]
    store = ConfigStore.instance()
    store.store(name="saved", node={**values, **groups})
    store.store(name="resumed", node={"defaults": ["schema", "saved", *again, "_self_"]})
    try:
        config = _composed("resumed", overrides)
    except ConfigError:
        try:  # do the saved settings fit without the overrides?
            _composed("resumed", [])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}; {_REPAIR}") from None
        raise
    if any(word.startswith("data.sample_length=") for word in overrides):
        return config
    length = _sample_length(saved)
    if length in (None, config.sample_length) or not checkpoints_in(config.run.checkpoints):
        return config
    return replace(config, data=replace(config.data, sample_length=length))


def _sample_length(saved: Mapping[str, object]) -> int | None:
    """Return the length of a run's samples; None if its settings have none that can be used."""
    length = saved.get("data.sample_length") or saved.get("model.seq_length")
    return length if type(length) is int else None


def _is_searched(saved: Mapping[str, object], path: Path) -> bool:
    """Return whether the schedule.file in the settings at `path` is what the search has found."""
    file = Path(str(saved.get("schedule.file")))
    is_own = file.parts[-2:] == (path.parent.name, "schedule.txt")
    return saved.get("schedule.name") == "auto" and is_own


def _saved_settings(path: Path) -> dict[str, object]:
    """Return every setting in the config.yaml of a run by its name.

    Raises ConfigError where the file is broken.
    """
    from omegaconf import OmegaConf

    try:
        saved = _read_yaml(path)
    except UnreadableError as error:
        raise ConfigError(f"{error}; {_REPAIR}") from None
    values = {
        name: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        for name, value in _leaves(saved)
    }
    # Runs of earlier versions have saved all of them although nobody had chosen them.
    once = {f"cost.{name}": value for name, value in CPU_COSTS.items()}
    costs = {name: values[name] for name in once if name in values}  # some versions had fewer
    if None not in costs.values():
        values |= {name: None for name, value in costs.items() if value == once[name]}
    return values


def saved_words(path: Path) -> dict[str, str]:
    """Return every setting in the config.yaml of a run, as it is written on a command line.

    Raises ConfigError where the file is broken.
    """
    return {printable(name): _setting_words(value) for name, value in _saved_settings(path).items()}


def default_words() -> dict[str, str]:
    """Return every setting without any override, as it is written on a command line."""
    return {name: _setting_words(value) for name, value in _values_of(load_config([])).items()}


def _setting_words(value: object) -> str:
    """Return the value of a setting in words, without control characters."""
    return printable(_value(value))


_REPAIR = "repair it, or delete it and give all settings of the run again"


def _read_yaml(path: Path) -> object:
    """Return the mapping in a YAML file as an omegaconf node; nothing in it is interpolated.

    The file is looked through as a stream of events before anything is built from it, so a few
    bytes cannot become many.  Raises UnreadableError for a file that is not regular or too large,
    for aliases, tags, `${...}`, deep nesting, and for anything else than a mapping.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    text = read_text(path, _LARGEST_FILE)
    try:
        if (reason := _refusal(text)) is not None:
            raise UnreadableError(f"{path}: {reason}")
        settings = OmegaConf.create(text)
    except UnreadableError:
        raise
    except (ValueError, TypeError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)  # counts lines from 0
        place = "" if mark is None else f"line {mark.line + 1}: "
        raise UnreadableError(f"{path} is not YAML ({place}{_first_line(error)})") from None
    if not isinstance(settings, DictConfig) or not settings:
        raise UnreadableError(f"{path} holds no settings, one `key: value` per line")
    return settings


def _refusal(text: str) -> str | None:
    """Return why a YAML text is not parsed, with its line; None if it may be.

    Raises YAMLError where it is not YAML.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = nodes = 0
    for event in yaml.parse(text, Loader=loader):
        reason = None
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            reason = "has anchors or aliases; write each value where it belongs"
        elif isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            reason = f"{event.value[:60]} is not expanded in settings; write the value itself"
        elif isinstance(event, yaml.ScalarEvent) and event.value == "???":
            reason = "has the value ???; write the value itself"
        elif isinstance(event, yaml.NodeEvent) and event.tag not in (None, "!"):
            reason = f"has the tag {event.tag[:60]}; settings have none"
        nodes += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST or nodes > _MOST_NODES:
            reason = f"is nested deeper than {_DEEPEST} or has over {_MOST_NODES:,} values"
        if reason is not None:
            return f"line {event.start_mark.line + 1} {reason}"
    return None


def _leaves(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the name and value of every setting; a list is one value."""
    from omegaconf import DictConfig

    assert isinstance(node, DictConfig)
    for key in node:
        value = node[key]
        if isinstance(value, DictConfig):
            yield from _leaves(value, f"{prefix}{key!s}.")
        else:
            yield f"{prefix}{key!s}", value


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that a resumed run had with another value, and whether it may change.

    permission: the word of run.allow with which it may, None if there is none.
    decides_text: whether the text may be another one with it, which only its tokens tell.
    """

    name: str
    before: str
    now: str
    is_refused: bool
    permission: str | None
    decides_text: bool = False

    @property
    def verdict(self) -> str:
        """Return whether the change is allowed, in words."""
        if self.decides_text and not self.is_refused:
            return "refused unless the tokens stay the same"
        if self.permission is None:
            return "refused" if self.is_refused else "allowed"
        words = "refused without" if self.is_refused else "allowed by"
        return f"{words} run.allow=[{self.permission}]"


_BATCH = "sequences of a step"
# What chooses the text or its tokens, which a resumed run compares when it has read them.
_TEXT = (
    *("data.name", "data.path", "data.blend", "data.tokenizer", "data.end_token"),
    "data.jsonl_field",
)

# The sequences of a step, which several settings and the number of ranks decide: as the run had
# them, and as it would have them now.  None if not known.
BatchChange = tuple[int, int] | None


def changes(config: RunConfig, batch: BatchChange = None) -> list[Change]:
    """Return what a resumed run would have otherwise than its config.yaml, in the order of names.

    A setting of another version is not compared.  Raises ConfigError where the file is broken.
    """
    path, now = config.run.directory / "config.yaml", _values_of(config)
    before, found = _saved_settings(path), []
    is_done = bool(checkpoints_in(config.run.checkpoints))  # else it begins anew

    def change(name: str, was: object, value: object, permission: str | None) -> Change:
        keeps = is_done and (keeps_on_resume(name) or permission is not None)
        is_refused = keeps and permission not in config.run.allow
        words, new_words = (printable(_value(one)) for one in (was, value))
        if is_done and name == "data.name" and "synthetic" in (was, value):
            is_refused = True
        decides_text = is_done and name in _TEXT
        return Change(
            name, words, new_words, is_refused, permission if keeps else None, decides_text
        )

    for name in (name for name in now if name in before):
        was, value = before[name], now[name]
        if name == "data.sample_length":
            was, value = _sample_length(before), config.sample_length
        is_found = name == "vocab.algorithm" and value == "auto"  # by the search of a schedule
        is_found |= name == "schedule.file" and value is None and _is_searched(before, path)
        if name in _NOT_SAVED or _value(was) == _value(value) or is_found:
            continue
        is_table = name == "model.seq_length" and config.model.positions == "learned"
        found.append(change(name, was, value, None if is_table else permission_of(name)))
    if batch is not None and batch[0] != batch[1]:
        found.append(change(_BATCH, *batch, "batch"))
    return found


def check_start(config: RunConfig, batch: BatchChange = None) -> None:
    """Raise ConfigError if a run cannot go on, or start, with these settings from what is there.

    The settings that were saved decide.  They are compared here, before data is prepared.  The
    checkpoint is compared again when it is loaded.
    """
    run, directory = config.run, config.run.directory
    if run.resume and checkpoints_in(run.checkpoints) and (directory / "config.yaml").is_file():
        _refuse([change for change in changes(config, batch) if change.is_refused], directory)
        origin = _saved_settings(directory / "config.yaml").get("run.init_from")
        if run.init_from is not None and not _is_same_place(run.init_from, origin):
            words = "from new weights" if origin is None else f"from {origin}"
            raise ConfigError(
                f"run.init_from={run.init_from}, but {directory} started {words}, and goes on "
                "from its own checkpoint; drop run.init_from, or choose another run.name"
            )
    elif run.init_from is not None:
        place = Path(os.path.expanduser(run.init_from)).absolute()
        origin_settings, now = _model_of(place), _values_of(config)
        names = (name for name in now if name.startswith("model."))
        fixed = [name for name in names if name.removeprefix("model.") not in FREE_MODEL]
        if config.model.positions == "learned":  # a row of the weights for each
            fixed.append("model.seq_length")
        for name in fixed:
            _require_same(name, origin_settings, now, f"run.init_from={run.init_from} is")


def _refuse(refused: Sequence[Change], directory: Path) -> None:
    """Raise ConfigError that names all changes that a run does not allow, if there are any."""
    if not refused:
        return
    before = ", ".join(f"{change.name}={change.before}" for change in refused)
    words = f"the same {plural(len(refused), 'value')}"
    permissions = list(dict.fromkeys(change.permission for change in refused))
    if None not in permissions:
        words += f", or give run.allow=[{','.join(filter(None, permissions))}]"
    if any(change.name == _BATCH for change in refused):
        words += f"; {_BATCH} are num_microbatches x micro_batch_size x parallel.dp"
    raise ConfigError(
        f"{directory} has run with {before}, this command line has "
        f"{', '.join(change.now for change in refused)}; use {words}"
    )


def _require_same(
    name: str, before: Mapping[str, object], now: Mapping[str, object], what: str
) -> None:
    """Raise ConfigError if a setting has changed; one of another version is not compared."""
    if name in before and _value(before[name]) != _value(now[name]):
        raise ConfigError(
            f"{what} with {name}={_value(before[name])}, this command line has "
            f"{_value(now[name])}; use the same value"
        )


def _is_same_place(ours: str, theirs: object) -> bool:
    """Return whether two origins are the same directory, or the other one is gone and has moved."""
    if not isinstance(theirs, str):
        return False
    place = Path(os.path.expanduser(theirs))
    return not place.exists() or place.resolve() == Path(os.path.expanduser(ours)).resolve()


def _model_of(place: Path) -> Mapping[str, object]:
    """Return the model settings that lie beside the weights in a run, an import or a checkpoint.

    They are empty if there are none that can be read.
    """
    for directory in homes(place):
        with contextlib.suppress(ConfigError, UnreadableError):
            if (directory / "config.yaml").is_file():
                return _saved_settings(directory / "config.yaml")
            if (directory / "model.yaml").is_file():
                settings = _leaves(_read_yaml(directory / "model.yaml"))
                return {f"model.{name}": value for name, value in settings}
    return {}


def _values_of(config: RunConfig) -> dict[str, object]:
    """Return every setting of a configuration by its name."""
    values = {
        f"{name}.{item.name}": getattr(getattr(config, name), item.name)
        for name, kind in sections().items()
        for item in fields(kind)
    }
    return values | {item.name: getattr(config, item.name) for item in _own_fields()}


def resume_words(
    config: RunConfig, batch: BatchChange = None, done: int | None = None
) -> str | None:
    """Say where the settings of a resumed run come from and what this command line changes.

    `done` is the step of the newest checkpoint, None if there is none.  All changes are rows of a
    table: setting, before, now, and whether it is allowed.  If there is no run or no checkpoint to
    go on from, say that it begins.  Return None without run.resume.
    """
    path = config.run.directory / "config.yaml"
    if not config.run.resume:
        return None
    if not path.is_file() and checkpoints_in(config.run.checkpoints):
        return (
            f"{path} is not a file, but there are checkpoints: "
            "only settings of this command line count, so give all that the run had"
        )
    if not path.is_file():
        close = similar_run(config.run.directory)
        hint = "" if close is None else f" (did you mean run.name={close.name}?)"
        if close is None and (names := runs_beside(config.run.directory, 3)):
            hint = f" (the newest runs there: {', '.join(names)})"
        return (
            f"{config.run.directory} holds no run{hint}: NOTHING IS RESUMED, "
            "a new one begins at step 1 with the settings of this command line"
        )
    begins = ""
    if not checkpoints_in(config.run.checkpoints):
        begins = f" ({config.run.checkpoints} holds no checkpoint: training begins at step 1)"
    rows = []
    for one in changes(config, batch):
        is_behind = one.name == "run.steps" and done is not None and config.run.steps < done
        verdict = f"refused, step {done} is done" if is_behind else one.verdict
        rows.append((one.name, one.before, one.now, verdict))
    if not rows:
        return f"settings of {path}{begins}"
    rows.insert(0, ("setting", "was", "now", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]).rstrip() for row in rows]
    return "\n  ".join([f"settings of {path}{begins}, changed here:", *lines])


_QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
_QUOTED_OR_HOME = re.compile(rf"{_QUOTED}|(?<=[=:,\[])\s*(~[^,\]}}]*)")


def _at_home(word: str) -> str:
    """Expand a `~` that begins a value outside quotes: hydra's grammar has none."""

    def found(match: re.Match[str]) -> str:
        return match[0] if match[1] is None else _word(os.path.expanduser(match[1]))

    return _QUOTED_OR_HOME.sub(found, word)


_MEANT_FOR_HYDRA = re.compile(r"""\s*(?:['"\[{].*|null\s*)|.*[,\\].*|""", re.I | re.S)


def _as_written(word: str) -> str:
    """Quote the value of a text setting, so that `=`, `(` or `#` in a path is one of its letters.

    Lists, quoted values and null stay what they are in hydra's grammar, and so do values with a
    comma, which separates several, or a backslash, which escapes.
    """
    name, equals, value = word.partition("=")
    if not equals or not _is_text(name) or _MEANT_FOR_HYDRA.fullmatch(value):
        return word
    return override(name, value)


def _is_text(name: str) -> bool:
    """Return whether a setting takes any text."""
    if name not in setting_names():
        return False
    item, section = _field_of(name)
    kind = typing.get_type_hints(section)[item.name]
    return kind in (str, str | None) and not setting_of(item).choices


def _quoted_words(word: str) -> str:
    """Return the way out for a text that hydra takes for something else; empty for other words."""
    name, _, value = word.partition("=")
    if name in _ENTRIES:
        return "quote a path with other signs than letters, digits and /-_.: {path:'/data/a=b'}"
    if not _is_text(name) or re.fullmatch(_QUOTED, value):
        return ""
    typed = override(name, value.replace("'", ""))
    return f"if that is one text, quote it for the shell and for hydra: {for_shell(typed)}"


def for_shell(word: str) -> str:
    """Return a word of a command as one types it: in quotes where it needs them, double if able."""
    plain = shlex.quote(word)
    return plain if plain == word or re.search(r'["$`\\!]', word) else f'"{word}"'


_OF_FILES = ("model", "cost")  # groups that take a file


def _of_file(word: str) -> list[str] | None:
    """Return `model=FILE.yaml` or `cost=FILE.yaml` as overrides, one per setting in the file.

    vp-import writes such files of models, vp-profile of costs.  Returns None for any other word.
    Raises ConfigError if the file cannot be read.
    """
    group, _, value = word.partition("=")
    path = Path(os.path.expanduser(value))
    if group not in _OF_FILES or path.suffix != ".yaml":
        return None
    from omegaconf import DictConfig

    try:
        settings = _read_yaml(path)
    except UnreadableError as error:
        raise ConfigError(f"{group}={error}{'' if path.exists() else _made_by(group)}") from None
    assert isinstance(settings, DictConfig)
    known = {item.name for item in fields(sections()[group])}
    for key, setting in settings.items():
        if str(key) not in known and not isinstance(setting, str | int | float | bool | NoneType):
            raise ConfigError(
                f"{word}: {key!s} is no setting of {group}; such a file has the settings of this "
                f"group alone, such as {next(iter(fields(sections()[group]))).name}: 8"
            )
    return [f"{group}.{key!s}={_word(setting)}" for key, setting in settings.items()]


def has_settings(path: Path, group: str) -> bool:
    """Return whether a file has settings of a group, and nothing else."""
    try:
        settings = _read_yaml(path)
    except UnreadableError:
        return False
    assert isinstance(settings, Mapping)
    return {str(key) for key in settings} <= {item.name for item in fields(sections()[group])}


def _made_by(group: str) -> str:
    """Return the way out where a file of a group is not there."""
    maker = {"model": "vp-import SRC DST", "cost": "vp-profile --cost FILE.yaml"}[group]
    choices = ", ".join(group_choices()[group])
    return f"; {maker} writes one, or choose one of {choices}"


def _word(setting: object) -> str:
    """Return a value of a file as hydra reads it after `key=`."""
    if isinstance(setting, str):
        # A backslash counts as one unless it stands before a quote.
        return "'" + re.sub(r"(\\*)('|$)", _escaped, setting) + "'"
    return "null" if setting is None else str(setting)


def _escaped(found: re.Match[str]) -> str:
    return found[1] * 2 + ("\\'" if found[2] else "")


def override(name: str, value: str) -> str:
    """Return the override that sets a text, whatever characters it has."""
    return f"{name}={_word(value)}"


_PLAIN_TEXT = re.compile(r"(?!null$)[A-Za-z0-9_./+:-]+", re.I)


def typed(name: str, value: str) -> str:
    """Return the override that sets a text as one types it: in quotes only where it needs them."""
    return f"{name}={value}" if _PLAIN_TEXT.fullmatch(value) else override(name, value)


def config_text(config: RunConfig) -> str:
    """Return the whole configuration as YAML."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))


def _thaw(node: object) -> None:
    """Make `node` and all nodes in it writable.

    A frozen dataclass makes read-only nodes, into which nothing can be merged.
    """
    from omegaconf import DictConfig, OmegaConf

    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, False)
        for key in node:
            _thaw(node._get_node(key))


def _keys(node: object, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings and sections in `node`."""
    from omegaconf import DictConfig

    assert isinstance(node, DictConfig)
    for key in node:
        child = node._get_node(key)
        name = f"{prefix}{key!s}"
        yield name
        if isinstance(child, DictConfig):
            yield from _keys(child, f"{name}.")


def _first_line(error: BaseException) -> str:
    """Return the first line of a message, or the name of an exception without one."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1]}"
    return lines[0] if lines else type(error).__name__


def _broken_list(word: str) -> str:
    """Return what is wrong with a list of values that hydra cannot read; empty for other words."""
    name, _, value = word.partition("=")
    if (missing := value.count("(") - value.count(")")) > 0 and re.match(
        r"(range|choice)\(", value
    ):
        return f"a closing bracket is missing: {word}{')' * missing}"
    items = [item.strip() for item in value.split(",")]
    if "[" in value or "(" in value or len(items) < 2 or all(items):
        return ""
    kept = f"{name}={','.join(filter(None, items))}"
    if value.endswith(",") and all(items[:-1]):
        return f"drop the comma at the end: {kept}"
    return f"item {items.index('') + 1} of its list is empty: {kept}"


def _unknown_choice(error: BaseException) -> str:
    """Return hydra's message about an unknown choice of a group, in one line.

    Hydra lists the options one per line after 'Available options in'.
    """
    lines = str(error).splitlines()
    missing = lines[0].partition("Could not find ")[2].strip("'") or lines[0]
    options = [line.strip() for line in lines if line.startswith("\t") and "=" not in line]
    group, _, choice = missing.partition("/")
    if not choice:
        return f"{missing.removesuffix('/')}= names no preset; give one, or drop the word"
    if group == "data" and len(choice) < _LONGEST_KEY and Path(os.path.expanduser(choice)).exists():
        return f"data={choice} is not known; for text of your own: data=text data.path={choice}"
    is_path = group in _OF_FILES and "/" in choice
    way_out = ", or give a file of settings whose name ends with .yaml" if is_path else ""
    return unknown(f"{group}={choice}", choice, options) + way_out


def _bad_override(error: BaseException, overrides: Sequence[str]) -> str:
    """Return hydra's message about one of `overrides` that it cannot merge, in one line."""
    first = _first_line(error)
    reason = f": {_first_line(error.__cause__)}" if error.__cause__ is not None else ""
    for name, (kind, example) in _ENTRIES.items():
        if first.startswith((f"Could not override '{name}'", f"Error merging override {name}=")):
            given = [word for word in overrides if word.startswith(f"{name}=")]
            return f"{_wrong_entry(given[-1], kind)}; {example}" if given else f"{name}{reason}"
    if first.startswith("Ambiguous value"):
        word = first[first.index("'") + 1 : first.rindex("'")]
        way_out = _quoted_words(word) or _one_value(word)
        return f"{word}: one value is needed; {way_out}"
    if first.startswith("Could not override"):
        key = first.split("'")[1]
        meant = (_choice_of_group(word) for word in overrides if word.startswith(f"{key}="))
        close = [*filter(None, meant)][:1] or close_names(key)
        section = key.partition(".")[0]
        where = f" {section} lists those of {section}"
        if section not in sections():
            where = f" lists all, and with a name those of {', '.join(sections())}"
        hint = f"did you mean {' or '.join(close)}?" if close else f"vp-train --help{where}"
        return f"{key} is not a setting; {hint}"
    word = first.removeprefix("Error merging override ")
    if (words := _wrong_type(word)) is not None:
        return words
    return word + reason


def _choice_of_group(word: str) -> str | None:
    """Return `optim=wsd` for `optim.name=wsd`: the choice of a group that a setting was given."""
    name, _, value = word.partition("=")
    group, dot, _ = name.partition(".")
    return f"{group}={value}" if dot and value in group_choices().get(group, ()) else None


def _one_value(word: str) -> str:
    """Return the way out for several values of a setting, separated by commas."""
    name, _, value = word.partition("=")
    if name in setting_names():
        item, section = _field_of(name)
        kind = str(typing.get_type_hints(section)[item.name])
        if "tuple" in kind or "list" in kind:
            return f"a list is written {name}=[{value}]"
        if "int" in kind and re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+", value):
            number = f"{name}={value.replace(',', '')}"
            return f"a number has no commas ({number}), and vp-train -m trains with each of several"
    return "vp-simulate --compare compares several schedules, vp-train -m trains with each value"


# Settings that are lists of sections: the type of an entry, and how a list is written.
_ENTRIES = {
    "data.blend": (BlendEntry, "write data.blend=[{path:DIR,weight:3},{name:pystdlib,weight:1}]"),
    "data.validation": (
        ValidationEntry,
        "write data.validation=[{name:wiki,path:DIR},{name:code,path:FILE}]",
    ),
}


def _wrong_entry(word: str, entry_type: type) -> str:
    """Return what is wrong with the types in an override of a list of such entries."""
    value = _parsed(word).value()
    if not isinstance(value, list):
        return f"{word} is not a list of corpora"
    list_name = word.partition("=")[0]
    kinds = typing.get_type_hints(entry_type)
    for number, entry in enumerate(value):
        place = f"{list_name}[{number}]"
        if not isinstance(entry, dict):
            return f"{place}={entry} is not a corpus"
        for name, setting in entry.items():
            if str(name) not in kinds:
                return unknown(f"{place}.{name}", name, list(kinds))
            kind = kinds[str(name)]
            if not _fits(setting, kind):
                return f"{place}.{name}={_value(setting)} is not {_kind_words(kind)}"
    return f"{word} is not a list of corpora"


def _fits(setting: object, kind: Any) -> bool:
    """Return whether omegaconf takes a value of a list for a text or number of this type."""
    if setting is None:
        return isinstance(kind, UnionType)
    if kind is not float:
        return not isinstance(setting, list | dict)
    if isinstance(setting, bool) or not isinstance(setting, str | int | float):
        return False
    with contextlib.suppress(ValueError):
        float(setting)
        return True
    return False


def _wrong_type(word: str) -> str | None:
    """Return which values the setting of an override takes; None if it is not a simple one."""
    name, equals, value = word.partition("=")
    if not equals or name not in setting_names():
        return None
    if name == "batch_ramp":
        return f"{word} is not a list of pairs, each a step and a number of sequences; {RAMP_WORDS}"
    item, section = _field_of(name)
    kind, setting = typing.get_type_hints(section)[item.name], setting_of(item)
    if (words := _kind_words(kind)) is None:
        return None
    if setting.choices:
        return f"{word} is not {words}; choose one of {setting.allowed}"
    if not setting.allowed:
        return f"{word} is not {words}; see vp-train --help {name}"
    verb = "lie in" if setting.allowed.startswith(("[", "(")) else "be"
    subject = "each" if "list" in words else "it"
    digits = _in_digits(value)
    way_out = ""
    with contextlib.suppress(ConfigError):
        if digits is not None:
            setting.check(name, int(digits), item.default)
            way_out = f"; write {name}={digits}"
    return f"{word} is not {words}; {subject} must {verb} {setting.allowed}{way_out}"


def _in_digits(value: str) -> str | None:
    """Return a whole number that has an exponent or a point in digits, None for all else."""
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?(e\+?[0-9]{1,2})?", value, re.I):
        return None
    number = float(value)
    return f"{number:.0f}" if number.is_integer() and number < 1e15 else None


def _kind_words(kind: Any) -> str | None:
    """Return a type as it is named in errors, for example `a whole number or null`."""
    if isinstance(kind, UnionType):
        parts = [_kind_words(part) for part in typing.get_args(kind)]
        return None if None in parts else " or ".join(filter(None, parts))
    if typing.get_origin(kind) is tuple:
        plural = {int: "whole numbers", float: "numbers", str: "texts"}
        element = plural.get(typing.get_args(kind)[0])
        return None if element is None else f"a list of {element}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return {**names, NoneType: "null"}.get(kind)


def run_of(source: Path) -> Path:
    """Return the directory of a run from that, or from one of its checkpoints."""
    place = source.resolve()
    return next(
        (path.parent for path in (place, place.parent) if path.name == "checkpoints"), place
    )


def started_from(source: Path) -> Path | None:
    """Return run.init_from of the run in directory `source`, or of the run of that checkpoint.

    It is None if the run started from nothing, or if its config.yaml cannot be read.
    """
    try:
        origin = _saved_settings(run_of(source) / "config.yaml").get("run.init_from")
    except ConfigError:
        return None
    return Path(os.path.expanduser(origin)) if isinstance(origin, str) else None


# Settings in words


@cache
def sections() -> Mapping[str, type]:
    """Return the classes of the configuration's sections by their names."""
    types = typing.get_type_hints(RunConfig)
    return MappingProxyType(
        {
            item.name: types[item.name]
            for item in fields(RunConfig)
            if is_dataclass(types[item.name])
        }
    )


def settings_help(config: RunConfig) -> str:
    """Return one line for every setting: its value in `config`, and its meaning."""
    rows = []
    for name in sections():
        section = getattr(config, name)
        rows += [
            (f"{name}.{item.name}", getattr(section, item.name), setting_of(item))
            for item in fields(section)
        ]
    rows += [(item.name, getattr(config, item.name), setting_of(item)) for item in _own_fields()]
    words = [(f"{name}={_value(value)}", setting) for name, value, setting in rows]
    width = min(44, max(len(word) for word, _ in words))
    return "\n".join(f"  {word:<{width}}  {_sentence(setting)}" for word, setting in words)


def section_help(name: str, config: RunConfig) -> str:
    """Return the purpose of one section, and every setting of it in full.

    A setting has its value in `config`, meaning, allowed values, unit and default.
    """
    section = getattr(config, name)
    parts = [_in_full(f"{name}.{item.name}", item, section) for item in fields(section)]
    purpose = f"{name}: {_paragraphs(type(section))}".splitlines()
    wrapped = "\n".join(textwrap.fill(line, 100, break_on_hyphens=False) for line in purpose)
    return "\n".join([wrapped, "", *parts])


def setting_help(name: str, config: RunConfig) -> str:
    """Return one setting: in full, or its line of `settings_help` if it is in no section."""
    group, dot, _ = name.partition(".")
    if not dot:
        lines = map(str.strip, settings_help(config).splitlines())
        return next(line for line in lines if line.startswith(f"{name}="))
    return _in_full(name, _field_of(name)[0], getattr(config, group))


def _field_of(name: str) -> tuple[Any, type]:
    """Return the field of a setting and the class that has it."""
    group, _, key = name.rpartition(".")
    section = sections()[group] if group else RunConfig
    (item,) = (item for item in fields(section) if item.name == key)
    return item, section


@cache
def setting_names() -> tuple[str, ...]:
    """Return the names of all settings: `section.name`, or `name` for those of no section."""
    names = [f"{name}.{item.name}" for name, kind in sections().items() for item in fields(kind)]
    return (*names, *(item.name for item in _own_fields()))


def _in_full(name: str, item: Any, section: object) -> str:
    """Return value, meaning, allowed values, unit and default of a field of `section`."""
    setting, kind = setting_of(item), typing.get_type_hints(type(section))[item.name]
    facts = [_values_words(name, kind, setting), setting.unit, f"default {_value(item.default)}"]
    return (
        f"{name}={_value(getattr(section, item.name))}\n"
        f"    {setting.meaning}\n"
        f"    ({'; '.join(filter(None, facts))})"
    )


def settings_page() -> str:
    """Return docs/settings.md: every setting with its default, allowed values, unit and meaning."""
    parts = [
        "# Settings",
        "Every setting of a run. Append `section.name=value` to any command to change one; of\n"
        "two values the last counts, and a group has one choice.\n"
        "`vp-train --help SECTION` shows a section too. Values are taken as they are written:\n"
        "`${...}` is refused, in overrides and in files, because a file of somebody else must not\n"
        "read the environment, and the shell expands your variables. Names have no control\n"
        "characters. A text may have spaces, `=`, `(` or `#`; one with a comma or a backslash is\n"
        "quoted, for the shell too: `\"data.path='a,b'\"`. This page is generated:\n"
        "`python -m vp_train.settings > docs/settings.md`.",
    ]
    for name, section in [
        *sections().items(),
        ("", RunConfig),
        *((f"an entry of {name}", kind) for name, (kind, _) in _ENTRIES.items()),
    ]:
        title = "top level" if section is RunConfig else name
        own = _own_fields() if section is RunConfig else fields(section)
        types = typing.get_type_hints(section)
        rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
        for item in own:
            setting = setting_of(item)
            values = "; ".join(
                filter(
                    None,
                    [_values_words(f"{name}.{item.name}", types[item.name], setting), setting.unit],
                )
            )
            rows.append(
                f"| `{item.name}` | `{_value(item.default)}` | {values} | {setting.meaning} |"
            )
        paragraphs = [] if section is RunConfig else _paragraphs(section).split("\n\n")
        text = "".join(
            f"{textwrap.fill(words, 100, break_on_hyphens=False)}\n\n" for words in paragraphs
        )
        parts.append(f"## {title}\n\n{text}" + "\n".join(rows))
    return "\n\n".join(parts) + "\n"


@cache
def _own_fields() -> tuple[Any, ...]:
    """Return the fields of RunConfig that are not sections."""
    return tuple(item for item in fields(RunConfig) if item.name not in sections())


def _sentence(setting: Setting) -> str:
    """Return the meaning of a setting, followed by its unit."""
    return f"{setting.meaning} [{setting.unit}]" if setting.unit else setting.meaning


def _paragraphs(section: type) -> str:
    """Return the docstring of a section with one line per paragraph."""
    lines = (line.strip() for line in (section.__doc__ or "").strip().splitlines())
    return "\n\n".join(" ".join(part.split("\n")) for part in "\n".join(lines).split("\n\n"))


def _value(value: Any) -> str:
    """Return a value as it is written on a command line."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):  # an entry of a list; what is null is not typed
        pairs = (f"{key}:{_value(one)}" for key, one in value.items() if one is not None)
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(_value, value))}]"
    return str(value)


# The values of these settings are the choices of their group.
_NAMED = {"schedule.name": "schedule", "vocab.algorithm": "vocab"}


def _values_words(name: str, kind: Any, setting: Setting) -> str:
    """Return in words which values the setting `name` takes."""
    if name in _NAMED:
        return f"one of {', '.join(group_choices()[_NAMED[name]])}"
    if not setting.choices:
        return "; ".join(filter(None, [_type_words(kind), setting.allowed]))
    return _type_words(kind).replace("text", f"one of {setting.allowed}")


def _type_words(kind: Any) -> str:
    """Return a type in words, for example `int or null`."""
    names = {int: "int", float: "float", bool: "true or false", str: "text", NoneType: "null"}
    if isinstance(kind, UnionType):
        return " or ".join(map(_type_words, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"list of {_type_words(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is list:
        return f"lists of {_type_words(typing.get_args(kind)[0])}"
    return names.get(kind, "entries")


if __name__ == "__main__":
    print(settings_page(), end="")
