"""The launcher of all ranks of a run on this machine.

It checks the settings before the ranks start, and turns their ends into one exit code.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vp_train.commands.local_ranks import Stopped, run_ranks
from vp_train.commands.orphans import launching
from vp_train.communication import flight_recorder
from vp_train.config import ConfigError, RunConfig
from vp_train.failures import EXIT_OK, RankEnd, root_cause
from vp_train.metrics.run_directory import refuse_running, refuse_used, run_path
from vp_train.planning.degrees import check_node, wanted_ranks
from vp_train.planning.plan import SEARCHING, make_plan
from vp_train.settings import override


def launch(config: RunConfig, overrides: Sequence[str]) -> int:
    """Check the plan, prepare the data and run the ranks.

    Returns the exit code of the job: 0, or that of the failure that `root_cause` finds.
    """
    num_ranks = wanted_ranks(config.parallel)
    check_node(num_ranks)
    plan = None if config.schedule.is_solved else make_plan(config, num_ranks)
    refuse_running(config.run)
    refuse_used(config.run)
    if config.schedule.is_solved:
        print(SEARCHING, flush=True)
    if config.run.init_from is not None and not Path(config.run.init_from).expanduser().is_dir():
        raise ConfigError(
            f"run.init_from={config.run.init_from} is not a directory; "
            "give that of a run or of vp-import"
        )
    if plan is None:  # the search runs once, for all ranks
        plan = make_plan(config, num_ranks)
        solved = run_path(config.run) / "schedule.txt"
        solved.parent.mkdir(parents=True, exist_ok=True)
        solved.write_text(plan.schedule.text())
        overrides = [
            *overrides,
            override("schedule.file", str(solved)),
            f"vocab.algorithm={plan.problem.algorithm.name}",
        ]
    from vp_train.communication.nccl import require_gpu
    from vp_train.data import prepare_all

    require_gpu(config.run)
    prepare_all(config.data, config.model.vocab_size, progress=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started = time.time()

    def record_of(rank: int) -> Path | None:
        """Return the flight recorder's file of `rank` if this run wrote it."""
        record = flight_recorder.file_of(os.environ, run_path(config.run), rank)
        return record if flight_recorder.is_fresh(record, started) else None

    try:
        with launching():
            deaths = run_ranks([sys.executable, "-u", "-m", "vp_train", *overrides], num_ranks)
    except Stopped as stopped:
        has_checkpoint = any((run_path(config.run) / "checkpoints").glob("step-*"))
        words = "run.resume=true goes on from the newest checkpoint"
        words = words if has_checkpoint else "no checkpoint was written yet"
        print(f"vp-train: stopped by {stopped}; {words}", file=sys.stderr)
        return 128 + stopped.number
    if not deaths:
        return EXIT_OK
    failure = root_cause([RankEnd(*death) for death in deaths.items()], config.run, record_of)
    if failure.words:
        print(f"vp-train: {failure.words}", file=sys.stderr)
    return failure.code
