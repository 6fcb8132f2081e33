"""The command `vp-train`, also `python -m vp_train`.

The process is a rank if torchrun started it, else the launcher of all ranks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from vp_train.commands.command import Command, path_of, run
from vp_train.commands.orphans import die_with_launcher, has_launcher
from vp_train.config import RunConfig
from vp_train.metrics.run_directory import run_path
from vp_train.settings import check_start, config_text, resume_words, started_from
from vp_train.supervision.requests import hold_signals

_TRAIN_EXAMPLES = """\
  vp-train                              4 ranks on this machine, Python's standard library as text
  vp-train vocab=two_barrier model.vocab_size=65536 parallel.pp=2 run.name=two
  vp-train run.resume=true              continue from the newest checkpoint of runs/default
  torchrun --nproc-per-node 4 -m vp_train schedule=gpipe data=synthetic"""


def main() -> None:
    """Run the command."""
    if _is_rank():
        hold_signals()
        die_with_launcher()
    purpose = "trains a decoder with vocabulary and pipeline parallelism"
    run(Command("vp-train", purpose, _train, _TRAIN_EXAMPLES))


def _train(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> int:
    prints = os.environ.get("RANK", "0") == "0" and not has_launcher()
    if prints and (words := resume_words(config)) is not None:
        print(words, flush=True)
    config = with_origin(config)
    check_start(config)
    if _is_rank():
        from vp_train.train import run_rank

        run_rank(
            config, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), config_text(config)
        )
    from vp_train.commands.launch import launch

    return launch(config, overrides)


def with_origin(config: RunConfig) -> RunConfig:
    """Return `config` with an absolute run.init_from; a resumed run keeps the one of its start.

    vp-export follows run.init_from of the config.yaml that a run keeps.
    """
    run, origin = (
        config.run,
        None if config.run.init_from is None else path_of(config.run.init_from),
    )
    if run.resume and origin is None:
        origin = started_from(run_path(run))
        origin = origin if origin is not None and origin.is_dir() else None
    return replace(
        config, run=replace(run, init_from=None if origin is None else str(origin.absolute()))
    )


def _is_rank() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
