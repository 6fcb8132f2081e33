"""The commands.  This module alone knows hydra: it turns overrides into a RunConfig, and errors into exit codes."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from vp_train.config import ConfigError, RunConfig
from vp_train.exits import EXIT_CONFIG, EXIT_INTERNAL, EXIT_IO, EXIT_OK, EXIT_TIME
from vp_train.metrics.run_directory import run_path
from vp_train.orphans import die_with_launcher, has_launcher
from vp_train.settings import config_text, load_config, resume_words, section_help, sections, settings_help, started_from

_HELP = """\
{command}: {purpose}

usage: {command} [group=choice ...] [key=value ...]
       {command} --print-config ...     show the resolved configuration and stop
       {command} --help [GROUP]         this page, or one group of settings in full
{options}
Groups and their choices (each is a YAML file of configs/):
{groups}

Settings, with what this command line sets them to (`{command} --help model`: one group in full):
{values}

A list is written [1,2,3], nothing is null.  Examples:
{examples}
"""

_TRAIN_EXAMPLES = """\
  vp-train                                       4 ranks on this machine, Python's standard library as text
  vp-train vocab=two_barrier model.vocab_size=65536 parallel.pp=2 run.name=two
  vp-train run.resume=true                       go on from the newest checkpoint of runs/default
  torchrun --nproc-per-node 4 -m vp_train schedule=gpipe data=synthetic"""

_SIMULATE_EXAMPLES = """\
  vp-simulate schedule=v_half parallel.pp=8 num_microbatches=32 cost=a100_4b
  vp-simulate --out shown schedule=zb_h1         also as pictures and as a trace for Perfetto
  vp-simulate --runtime cuda schedule=zb_v       also as CUDA's streams would execute it
  vp-simulate --compare 1f1b,zb_h1,v_half --vocab none,one_barrier --out compared parallel.pp=8 cost=a100_4b"""


_PLAN_EXAMPLES = """\
  vp-plan model=gpt_4b cluster=a100_80g_node num_microbatches=128
  vp-plan model=llama3_8b cluster=h100_80g_node cluster.num_nodes=4 parallel.tp=2 parallel.pp=4 num_microbatches=32
  vp-plan --search --top 10 model=gpt_21b cluster=a100_80g_node cluster.num_nodes=2 num_microbatches=256"""

_PROFILE_EXAMPLES = """\
  vp-profile cluster=laptop parallel.pp=4 num_microbatches=8
  vp-profile model=gpt_4b cluster=h100_80g_node num_microbatches=32 --ranks 0,3,7 --cost h100.yaml
  vp-plan model=gpt_4b cluster=h100_80g_node num_microbatches=128 cost=h100.yaml"""


_SILENT_SECONDS = 10.0  # between two lines of progress


@dataclass(frozen=True, slots=True)
class _Command:
    """A console entry.  `options`: their name -> (what to write for their value, empty if they have none; what they do)."""

    name: str
    purpose: str
    body: Callable[[RunConfig, Sequence[str], Mapping[str, str]], int]
    examples: str = _TRAIN_EXAMPLES
    options: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def train() -> None:
    """`vp-train` and `python -m vp_train`: a rank when torchrun started us, otherwise the launcher of all ranks."""
    if _is_rank():
        die_with_launcher()
    _main(_Command("vp-train", "trains a decoder with vocabulary and pipeline parallelism", _train))


def prepare() -> None:
    """`vp-prepare`: tokenize the data of a run, so that training starts at once."""
    _main(_Command("vp-prepare", "tokenizes text and stores it for training", _prepare))


def simulate() -> None:
    """`vp-simulate`: what a step would take and keep, without running it."""
    options = {
        "--out": ("DIR", "write pictures, trace and figures there"),
        "--compare": ("A,B,...", "one line for each of these schedules, or for all"),
        "--vocab": ("A,B,...", "with --compare: with each of these algorithms, or with all"),
        "--runtime": ("NAME", "also replay the program as cuda or gloo executes it"),
    }
    purpose = "simulates one step: time, bubble and memory of a schedule"
    _main(_Command("vp-simulate", purpose, _simulate, _SIMULATE_EXAMPLES, options))


def plan() -> None:
    """`vp-plan`: bytes, seconds and MFU of a run on a cluster, before anything starts."""
    options = {
        "--search": ("", "rank every way to run the batch on the cluster, fastest first"),
        "--top": ("K", "with --search: show so many (5)"),
        "--seconds": ("N", "with --search: weigh and simulate for so long, then one more at most (60)"),
        "--json": ("FILE", "write the report there"),
    }
    _main(_Command("vp-plan", "predicts memory, time and MFU of a run on a cluster", _plan, _PLAN_EXAMPLES, options))


def profile() -> None:
    """`vp-profile`: passes and bytes of single ranks, measured here, and what they predict for the whole job."""
    options = {
        "--ranks": ("0,3,...", "pipeline ranks to measure; all"),
        "--steps": ("N", "steps of each (3)"),
        "--cost": ("FILE", "write the costs there, for cost=FILE"),
        "--json": ("FILE", "write everything there"),
    }
    purpose = "measures ranks of a job one by one on this machine"
    _main(_Command("vp-profile", purpose, _profile, _PROFILE_EXAMPLES, options))


def import_model() -> None:
    """`vp-import`: a model in the format of Hugging Face becomes a checkpoint to start from."""
    _guarded("vp-import", lambda: _import(sys.argv[1:]))


def export_model() -> None:
    """`vp-export`: a checkpoint becomes a model in the format of Hugging Face."""
    _guarded("vp-export", lambda: _export(sys.argv[1:]))


def _with_origin(config: RunConfig) -> RunConfig:
    """run.init_from from the root, and a resumed run's as it was told first: vp-export follows what config.yaml says."""
    run, origin = config.run, None if config.run.init_from is None else _path(config.run.init_from)
    if run.resume and origin is None:
        origin = started_from(run_path(run))
        origin = origin if origin is not None and origin.is_dir() else None
    return replace(config, run=replace(run, init_from=None if origin is None else str(origin.absolute())))


def _is_rank() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _train(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> int:
    words = resume_words(config)
    if words is not None and os.environ.get("RANK", "0") == "0" and not has_launcher():
        print(words, flush=True)
    config = _with_origin(config)
    if _is_rank():
        from vp_train.train import run_rank

        run_rank(config, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), config_text(config))
    from vp_train.launcher import launch

    return launch(config, overrides)


def _prepare(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> int:
    from vp_train.data import describe, prepare_all

    corpora = prepare_all(config.data, config.model.vocab_size, progress=True)
    print("\n".join(map(describe, corpora)) or f"data={config.data.name}: nothing to prepare")
    return EXIT_OK


def _profile(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> int:
    from vp_train.profile.show import show_profile

    told = options.get("--steps", "3")
    if not told.isdecimal() or not int(told):
        raise ConfigError(f"--steps={told} is not a number of steps; write for example --steps 3")
    cost, record = (Path(options[name]).expanduser() if name in options else None for name in ("--cost", "--json"))
    show_profile(config, options.get("--ranks"), int(told), cost, record)
    return EXIT_OK


def _simulate(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> int:
    from vp_train.simulation import compare, runtime_called, show

    directory = Path(options["--out"]).expanduser() if "--out" in options else None
    if "--vocab" in options and "--compare" not in options:
        raise ConfigError(f"--vocab belongs to --compare; for one algorithm write vocab={options['--vocab'].split(',')[0]}")
    runtime = runtime_called(options["--runtime"]) if "--runtime" in options else None
    if "--compare" in options:
        names, algorithms = options["--compare"], options.get("--vocab")
        compare(config, names, algorithms, directory, config_text(config), runtime)
    else:
        show(config, directory, config_text(config), runtime)
    return EXIT_OK


def _plan(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> int:
    from vp_train.planner.show import show_plan, show_search

    path = Path(options["--json"]).expanduser() if "--json" in options else None
    if "--search" not in options:
        for name in ("--top", "--seconds"):
            if name in options:
                raise ConfigError(f"{name} belongs to --search")
        return EXIT_OK if show_plan(config, path) else EXIT_CONFIG
    top, seconds = _number(options, "--top", 5), _number(options, "--seconds", 60)
    result = show_search(config, top, seconds, path)
    if result.best:
        return EXIT_OK
    return EXIT_TIME if result.open_choices else EXIT_CONFIG


def _number(options: Mapping[str, str], name: str, default: int) -> int:
    word = options.get(name, str(default))
    if not word.isdecimal() or int(word) < 1:
        raise ConfigError(f"{name} {word} is not a whole number of at least 1")
    return int(word)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every command here does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _import(arguments: Sequence[str]) -> int:
    parser = _Parser("vp-import", description="makes a checkpoint to start from of a model in the format of Hugging Face")
    parser.add_argument("source", metavar="SRC", type=_path, help="directory with config.json and safetensors files")
    parser.add_argument("target", metavar="DST", type=_path, help="directory to make")
    told = parser.parse_args(arguments)
    from vp_train.hf.convert import import_checkpoint

    imported = import_checkpoint(told.source, told.target, progress=_NowAndThen())
    tokenizer = "" if imported.tokenizer is None else f" data.tokenizer={imported.tokenizer}"
    print(
        f"{imported.num_parameters:,} parameters in {imported.checkpoint}\n"
        f"vp-train model={imported.model_file} run.init_from={told.target}{tokenizer} ..."
    )
    return EXIT_OK


def _export(arguments: Sequence[str]) -> int:
    parser = _Parser("vp-export", description="makes a model in the format of Hugging Face of a checkpoint")
    parser.add_argument("source", metavar="SRC", type=_path, help="directory of a run, of vp-import, or of one checkpoint")
    parser.add_argument("target", metavar="DST", type=_path, help="directory to make")
    parser.add_argument("--dtype", choices=("float64", "float32", "float16", "bfloat16"), help="of the weights; as stored")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest file, unless one tensor is (5)")
    parser.add_argument("--tokenizer", type=_path, metavar="DIR", help="where its files are; with the data of the run")
    told = parser.parse_args(arguments)
    shard_bytes = told.max_shard_gb * 1e9
    if not 1 <= shard_bytes < math.inf:
        raise ConfigError(f"--max-shard-gb={told.max_shard_gb} must be above 0 and finite, for example 5")
    from vp_train.hf.convert import export_checkpoint

    exported = export_checkpoint(
        told.source,
        told.target,
        dtype=told.dtype,
        shard_bytes=int(shard_bytes),
        tokenizer=told.tokenizer,
        origins=_origins(told.source),
        progress=_NowAndThen(),
    )
    print(f"{told.target}: {', '.join(exported.files)}")
    if exported.reach_from is None:
        print(f"max_position_embeddings={exported.reach} is model.seq_length; where it reaches further, change config.json")
    if "tokenizer.json" not in exported.files and "tokenizer.model" not in exported.files:
        print("without a tokenizer; --tokenizer DIR copies one")
    return EXIT_OK


def _origins(source: Path) -> list[Path]:
    """What the run of `source` started from by its run.init_from, what that did if it was a run, and so on."""
    found: list[Path] = []
    origin = started_from(source)
    while origin is not None and origin not in found:
        found.append(origin)
        origin = started_from(origin)
    return found


class _NowAndThen:
    """Says a line on stderr every ten seconds, and none of what is done before."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _SILENT_SECONDS

    def __call__(self, words: str) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _SILENT_SECONDS
            print(words, file=sys.stderr, flush=True)


def _path(word: str) -> Path:
    return Path(word).expanduser()


def _main(command: _Command) -> NoReturn:
    _guarded(command.name, lambda: _configured(command, sys.argv[1:]))


def _configured(command: _Command, arguments: Sequence[str]) -> int:
    words = [word for word in arguments if word not in ("--help", "-h", "--print-config")]
    wants_help = "--help" in arguments or "-h" in arguments
    chosen = [word for word in words if word in sections()] if wants_help else []
    overrides, options = _split([word for word in words if word not in chosen], command.options)
    config = load_config(overrides, tuple(command.options))
    if wants_help:
        pages = [section_help(name, config) for name in chosen]
        print("\n\n".join(pages) if pages else _help(command, config))
        return EXIT_OK
    if "--print-config" in arguments:
        print(config_text(config), end="")
        return EXIT_OK
    return command.body(config, overrides, options)


def _guarded(name: str, body: Callable[[], int]) -> NoReturn:
    """Run a command and leave with its exit code; errors of the user and of the system are one line."""
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        code = body()
        sys.stdout.flush()
    except ConfigError as error:
        if speaks:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        code = EXIT_CONFIG
    except BrokenPipeError:  # a reader like `head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except OSError as error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
        code = EXIT_IO
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = EXIT_INTERNAL
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _split(words: Sequence[str], known: Mapping[str, tuple[str, str]]) -> tuple[list[str], dict[str, str]]:
    """Overrides, and the values of known options, written `--out DIR` or `--out=DIR`; "" of those without one."""
    overrides: list[str] = []
    options: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name not in known:
            overrides.append(word)
            continue
        if not known[name][0]:
            options[name] = ""
            continue
        value = value if equals else next(rest, "")
        if not value or value.startswith("-"):
            raise ConfigError(f"{name} needs a value: {name} {known[name][0]}")
        options[name] = value
    return overrides, options


def _help(command: _Command, config: RunConfig) -> str:
    from importlib.resources import files

    root = files("vp_train.configs")
    groups = {
        entry.name: sorted(file.name.removesuffix(".yaml") for file in entry.iterdir() if file.name.endswith(".yaml"))
        for entry in sorted(root.iterdir(), key=lambda entry: entry.name)
        if entry.is_dir() and not entry.name.startswith("_")
    }
    lines = "\n".join(f"  {group:<10} {', '.join(choices)}" for group, choices in groups.items())
    options = "".join(f"       {f'{name} {value}':<20} {does}\n" for name, (value, does) in command.options.items())
    return _HELP.format(
        command=command.name,
        purpose=command.purpose,
        options=options,
        groups=lines,
        values=settings_help(config),
        examples=command.examples,
    ).rstrip()
