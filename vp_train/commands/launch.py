"""The launcher of all ranks of a run on this machine.

It runs torchrun's agent, with our checks before it and our exit codes after it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vp_train.commands.orphans import launching
from vp_train.communication import flight_recorder
from vp_train.config import ConfigError, RunConfig
from vp_train.failures import explain_deaths
from vp_train.metrics.run_directory import refuse_running, refuse_used, run_path
from vp_train.planning.degrees import wanted_ranks
from vp_train.planning.plan import SEARCHING, make_plan


def launch(config: RunConfig, overrides: Sequence[str]) -> int:
    """Check the plan, prepare the data and run the ranks.

    Returns the exit code of the job: 0, or that of the failure that `explain_deaths` finds.
    """
    num_ranks = wanted_ranks(config.parallel)
    refuse_used(config.run)
    refuse_running(config.run)
    if config.schedule.is_solved:
        print(SEARCHING, flush=True)
    if config.run.init_from is not None and not Path(config.run.init_from).expanduser().is_dir():
        raise ConfigError(
            f"run.init_from={config.run.init_from} is not a directory; "
            "give that of a run or of vp-import"
        )
    plan = make_plan(config, num_ranks)
    if config.schedule.is_solved:  # once, for all ranks
        solved = run_path(config.run) / "schedule.txt"
        solved.parent.mkdir(parents=True, exist_ok=True)
        solved.write_text(plan.schedule.text())
        # Quotes, because a path may hold characters with a meaning in an override: = , ( [
        quoted = str(solved).replace("'", "\\'")
        overrides = [
            *overrides,
            f"schedule.file='{quoted}'",
            f"vocab.algorithm={plan.problem.algorithm.name}",
        ]
    from vp_train.data import prepare_all

    prepare_all(config.data, config.model.vocab_size, progress=True)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # The ranks and this launcher say what happened.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
    started = time.time()

    def record_of(rank: int) -> Path | None:
        """Return the flight recorder's file of `rank` if this run wrote it."""
        record = flight_recorder.file_of(os.environ, run_path(config.run), rank)
        return record if flight_recorder.is_fresh(record, started) else None

    try:
        with launching():
            elastic_launch(agent, sys.executable)("-u", "-m", "vp_train", *overrides)
    except ChildFailedError as error:
        deaths = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        failure = explain_deaths(
            {rank: int(death.exitcode) for rank, death in deaths}, config.run, record_of
        )
        if failure.words:
            print(f"vp-train: {failure.words}", file=sys.stderr)
        return failure.code
    except SignalException as error:
        print(
            f"vp-train: stopped by {error.sigval.name}; "
            "run.resume=true goes on from the newest checkpoint",
            file=sys.stderr,
        )
        return 128 + error.sigval.value
    return 0
