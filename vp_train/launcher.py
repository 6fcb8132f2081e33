"""Starts all ranks of a run on this machine: torchrun's agent, with our checks before it and our exit codes after it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vp_train.config import ConfigError, RunConfig
from vp_train.degrees import wanted_ranks
from vp_train.exits import EXIT_INTERNAL
from vp_train.metrics.run_directory import refuse_running, refuse_used, run_path
from vp_train.orphans import launching
from vp_train.plan import SEARCHING, make_plan


def launch(config: RunConfig, overrides: Sequence[str]) -> int:
    """Check the plan, prepare the data, then run the ranks; returns the exit code of the first rank that failed, or 0."""
    num_ranks = wanted_ranks(config.parallel)
    refuse_used(config.run)
    refuse_running(config.run)
    if config.schedule.is_solved:
        print(SEARCHING, flush=True)
    if config.run.init_from is not None and not Path(config.run.init_from).expanduser().is_dir():
        raise ConfigError(f"run.init_from={config.run.init_from} is not a directory; give that of a run or of vp-import")
    plan = make_plan(config, num_ranks)
    if config.schedule.is_solved:  # once, for all ranks
        solved = run_path(config.run) / "schedule.txt"
        solved.parent.mkdir(parents=True, exist_ok=True)
        solved.write_text(plan.schedule.text())
        quoted = str(solved).replace("'", "\\'")  # a path may hold what means something in an override: = , ( [
        overrides = [*overrides, f"schedule.file='{quoted}'", f"vocab.algorithm={plan.problem.algorithm.name}"]
    from vp_train.data import prepare_all

    prepare_all(config.data, config.model.vocab_size, progress=True)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks and we say what happened
    agent = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        run_id=config.run.name,
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        with launching():
            elastic_launch(agent, sys.executable)("-u", "-m", "vp_train", *overrides)
    except ChildFailedError as error:
        # Ranks that only lost a peer have EXIT_INTERNAL; another code knows more.
        reasons = [item for item in error.failures.items() if item[1].exitcode > 0 and item[1].exitcode != EXIT_INTERNAL]
        rank, failure = reasons[0] if reasons else error.get_first_failure()
        code = int(failure.exitcode)
        if code < 0:
            print(f"vp-train: rank {rank} was killed by signal {-code}; the other ranks were stopped", file=sys.stderr)
            return 128 - code
        return code
    except SignalException as error:
        print(f"vp-train: stopped by {error.sigval.name}; run.resume=true goes on from the newest checkpoint", file=sys.stderr)
        return 128 + error.sigval.value
    return 0
