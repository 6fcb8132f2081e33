"""The settings with which the model of a run is opened: its own, in a layout of the caller's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vp_train.config import (
    ConfigError,
    CostConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    VocabConfig,
)
from vp_train.config.typed import override
from vp_train.durable import homes, meant_run, other_place
from vp_train.planning.degrees import Degrees, split_ranks
from vp_train.settings import load_config

_COUNTING = (
    *("parallel.pp", "parallel.dp", "parallel.tp"),
    *("parallel.placement", "parallel.layers_per_stage"),
    *("vocab", "vocab.algorithm", "vocab.backend", "vocab.shards"),
    *("model.seq_length", "data.tokenizer", "data.end_token", "data.begin_token"),
    *("run.comm_backend", "run.timeout_seconds", "run.world_timeout_seconds", "run.compile"),
)
_MODEL = "model.yaml"  # the settings of an import
_DEGREES = ("parallel.pp", "parallel.dp", "parallel.tp")


@dataclass(frozen=True, slots=True)
class Opening:
    """The settings of an opened run, and where its weights are looked for.

    An import of vp-import is opened like a run.
    directory: that of the run or import, or of one of its checkpoints.
    chooses_tokenizer: whether the caller has named data.tokenizer; else that of the run counts.
    chooses_begin: whether the caller has named data.begin_token; else that of the run counts.
    compiles: whether run.compile of the run is not off.  Commands that own their process then
        build kernels in C++, and compile nothing otherwise.  Layers are never compiled.
    """

    config: RunConfig
    directory: Path
    degrees: Degrees
    chooses_tokenizer: bool = False
    chooses_begin: bool = False
    compiles: bool = True

    @property
    def run(self) -> Path:
        """The directory of the run."""
        return _run_of(self.directory)


def opening_of(
    directory: str | Path,
    overrides: Sequence[str] = (),
    *,
    num_ranks: int | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    fills: bool = True,
) -> Opening:
    """Return the settings of a run, or an import, for `num_ranks` ranks that evaluate its model.

    overrides: settings as for vp-train; those that do not count are refused.
    num_ranks: of the job, in which the run's own layout counts, with as many replicas as fit; None
        before ranks are started, where the degrees are 1 but for `overrides`.
    dtype: what to compute in, as run.dtype, without float8; None: as the run did.
    fills: whether each replica evaluates as many microbatches together as fill its pipeline;
        otherwise one.

    Raises ConfigError where there is no run, and for settings that do not fit.
    """
    path = Path(os.path.expanduser(directory)).absolute()
    run = _run_of(path)
    if not run.is_dir():
        raise ConfigError(f"{run} is not a directory{meant_run(run)}; give that of a run")
    is_import = not (run / "config.yaml").is_file()
    if is_import and not (run / _MODEL).is_file():
        way_out = other_place(run, "give the directory of a run, or of vp-import")
        raise ConfigError(f"{run} has no config.yaml; {way_out}")
    names = {word.partition("=")[0] for word in overrides}
    for name in sorted(names - set(_COUNTING)):
        raise ConfigError(f"{name} does not count here; {_counting_words(name)}")
    given = names.intersection(_DEGREES)
    words = [override("run.root", str(run.parent)), override("run.name", run.name)]
    words = [f"model={run / _MODEL}"] if is_import else [*words, "run.resume=true"]
    if num_ranks is None or num_ranks == 1:
        words += [f"{name}=1" for name in _DEGREES if name not in given]
    elif "parallel.dp" not in given:
        words += ["parallel.dp=null"]
    config = load_config([*words, *overrides])
    if num_ranks is None:
        degrees = Degrees(config.parallel.dp or 1, config.parallel.pp or 1, config.parallel.tp)
    else:
        degrees = split_ranks(config.parallel, num_ranks)
    compiles = config.run.compile != "off"
    config = _evaluating(config, degrees, names, device, dtype)
    count = degrees.dp * (degrees.pp if fills else 1)
    run_settings = replace(config.run, eval_microbatches=count, eval_sequences=None)
    config = replace(config, run=run_settings)
    chosen = ("data.tokenizer" in names, "data.begin_token" in names)
    return Opening(config, path, degrees, *chosen, compiles)


def check_context(context: int, seq_length: int) -> None:
    """Raise ConfigError for a number of tokens that no window can have before a scored one."""
    if not 1 <= context <= seq_length:
        raise ConfigError(
            f"a context of {context} tokens is not in [1, {seq_length}], whose end is "
            "model.seq_length"
        )


def _run_of(path: Path) -> Path:
    """Return the directory of the run or import that `path` is, or is a checkpoint of."""
    return homes(path)[-1]


def _counting_words(name: str) -> str:
    """Return the settings of the section of `name` that count, or else which sections have some."""
    section = name.partition(".")[0]
    if own := [word for word in _COUNTING if word.partition(".")[0] == section]:
        return f"of {section} these do: {', '.join(own)}"
    sections = list(dict.fromkeys(word.partition(".")[0] for word in _COUNTING))
    return f"only some of {', '.join(sections[:-1])} and {sections[-1]} do, as parallel.pp=2"


def _evaluating(
    config: RunConfig, degrees: Degrees, given: set[str], device: str, dtype: str | None
) -> RunConfig:
    """Return the settings without what only training needs, or what another layout would not fit.

    `given` are the names of the settings that the caller has chosen.
    """
    run = replace(
        config.run,
        device=device,
        comm_backend="gloo" if degrees.num_ranks == 1 else config.run.comm_backend,
        dtype=dtype or config.run.dtype,
        linear_dtype="compute" if dtype else config.run.linear_dtype,
        compile="off",  # a few tokens do not repay it
        resume=False,
        init_from=None,
        profile_steps=(),
    )
    is_split = degrees.pp * degrees.tp > 1
    vocab = replace(config.vocab, balance=False)
    if "vocab.shards" not in given:
        vocab = replace(vocab, shards=None)
    if vocab.algorithm == "auto":
        vocab = replace(vocab, algorithm=VocabConfig().algorithm)
    own = config.parallel
    return replace(
        config,
        run=run,
        parallel=ParallelConfig(
            pp=degrees.pp,
            dp=degrees.dp,
            tp=degrees.tp,
            placement=own.placement if "parallel.placement" in given else "balanced",
            layers_per_stage=own.layers_per_stage if "parallel.layers_per_stage" in given else None,
        ),
        schedule=ScheduleConfig(),
        vocab=vocab if is_split else VocabConfig("none"),
        optim=replace(config.optim, name="adamw", offload=False),
        cost=CostConfig(),
        num_microbatches=1,
        micro_batch_size=1,
    )
