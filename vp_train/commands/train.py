"""The command `vp-train`, also `python -m vp_train`.

The process is a rank if torchrun or an agent started it, or if Slurm starts one task per rank.
Otherwise it is the agent of its node, which on one machine is the launcher of all ranks.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from vp_train.commands.command import Command, guarded, path_of, prints, run, typed, whole_number
from vp_train.commands.orphans import LAUNCHER, die_with_launcher, has_launcher
from vp_train.commands.place import Place, is_rank, is_slurm_rank, place_of, slurm_rank
from vp_train.commands.sweep import SWEEP, is_sweep, sweep
from vp_train.commands.titles import entitle
from vp_train.config import ConfigError, RunConfig, RunSettings, printable
from vp_train.durable import checkpoints_in
from vp_train.failures import ending_of_command
from vp_train.metrics.run_directory import refuse_running
from vp_train.planning.degrees import MOST_ON_A_NODE
from vp_train.settings import load_config
from vp_train.settings.files import config_text
from vp_train.settings.resume import BatchChange, check_start, refuse_misspelt, resume_words
from vp_train.settings.saved import started_from
from vp_train.supervision.ending import PIPE, leave
from vp_train.supervision.requests import hold_signals, start_clock

if TYPE_CHECKING:
    from vp_train.commands.store_server import StoreServer

_TRAIN_EXAMPLES = """\
  vp-train                              4 ranks on this machine, Python's standard library as text
  vp-train vocab=two_barrier model.vocab_size=65536 parallel.pp=2 run.name=two
  vp-train run.resume=true              continue from the newest checkpoint of runs/default
  vp-train --nodes 2 --node 0 --head node0 run.device=cuda      on node 0 of two; node 1 likewise
  vp-train --preflight                  compare the nodes, and stop before step 1
  vp-train -m optim.lr=1e-3,3e-4 schedule=1f1b,v_half           every combination, in turn
  torchrun --nproc-per-node 4 -m vp_train schedule=gpipe data=synthetic"""
_PREFLIGHT = "--preflight"
_ONLY_PREFLIGHT = "VP_TRAIN_ONLY_PREFLIGHT"  # environment variable: the launcher got this option

_OPTIONS = {
    "--nodes": ("N", "number of nodes; also give --node and --head"),
    "--node": ("I", "number of this node, from 0"),
    "--head": ("HOST", "address of node 0, HOST or HOST:PORT, the same on every node"),
    "--ranks": ("N", "ranks on this node; from the degrees, or one per GPU, if not given"),
    _PREFLIGHT: ("", "compare the nodes, time their network, and stop before step 1"),
    "-m": (
        "",
        "a sweep: every combination of lists of values, or the lines of a file, in turn; "
        "no setting twice",
    ),
    "--only": ("I", "with -m: only run I of the sweep, from 0"),
    "--max-restarts": ("N", "times to start all ranks again after a failure that this can mend"),
}


def main() -> None:
    """Run the command."""
    # Libraries read it when they are imported.  Every rank has one thread, and an agent that is
    # to fork none but its own.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Else torch's store writes a stack of C++ frames for every connection that a dead process had.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Else torch's profiler says when it starts and stops; 6 leaves errors.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    start_clock()
    if is_rank(os.environ) or is_slurm_rank(os.environ):
        hold_signals()
    if is_rank(os.environ):
        die_with_launcher(int(os.environ.get(LAUNCHER, os.getppid())))
    elif SWEEP in os.environ:
        die_with_launcher(int(os.environ.pop(SWEEP)))
    purpose = "trains a decoder with vocabulary and pipeline parallelism"
    command = Command("vp-train", purpose, _train, _TRAIN_EXAMPLES, _OPTIONS)
    if is_sweep(sys.argv[1:]):
        guarded(command.name, lambda: sweep(command, sys.argv[1:]))
    run(command)


def _train(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> int:
    if "--only" in options:
        raise ConfigError(f"--only {options['--only']} chooses a run of a sweep; it belongs to -m")
    if _PREFLIGHT in options:
        os.environ[_ONLY_PREFLIGHT] = "1"
    server = None
    if not is_rank(os.environ) and is_slurm_rank(os.environ):
        os.environ.update(slurm_rank(os.environ))
        server = _serve_ranks()
    place = None if is_rank(os.environ) else place_of(options, os.environ)
    is_first = os.environ.get("RANK", "0") == "0" if place is None else place.node == 0
    num_ranks = whole_number(options, "--ranks", 0, most=MOST_ON_A_NODE)
    # A batch script types run.resume=true for the first start too; nobody is there to answer.
    if place is not None and place.is_alone and "SLURM_JOB_ID" not in os.environ:
        refuse_misspelt(config.run, overrides)
    # Ranks that our agent has started need not read again what it has read.
    if config.run.device == "cuda" and not has_launcher():
        config, overrides = _on_its_machines(config, overrides, place, num_ranks, says=is_first)
    batch = None if has_launcher() else _batch_change(config, place, num_ranks)
    if is_first and not has_launcher():
        if words := resume_words(config, batch, _step_done(config.run)):
            print(words, flush=True)
        refuse_running(config.run)  # another process would change what is looked at here
    config = with_origin(config)
    check_start(config, batch)
    check_steps(config.run)
    if place is None:
        _check_ramp_alone(config)
        _train_rank(config, server)
    from vp_train.commands.launch import launch

    return launch(
        config,
        overrides,
        _train_rank,
        place,
        num_ranks=num_ranks,
        num_restarts=whole_number(options, "--max-restarts", 0, least=0),
        only_preflight=_PREFLIGHT in options,
    )


def _on_its_machines(
    config: RunConfig, overrides: Sequence[str], place: Place | None, num_ranks: int, *, says: bool
) -> tuple[RunConfig, Sequence[str]]:
    """Return `config` and `overrides` with the cluster of the launch and of the GPUs here.

    `num_ranks` is the value of --ranks, 0 if it is not given.  A line says which cluster that is if
    this process `says` it.  All ranks of torchrun plan for the same nodes, each with the mean of
    their ranks.
    """
    from vp_train.commands.launch import num_local_ranks
    from vp_train.commands.machine import gpu_name, machine_words

    found = ("", "") if typed(overrides, "cluster") else gpu_name()  # before GPUs are counted
    if place is None:
        world = int(os.environ["WORLD_SIZE"])
        of_one = math.ceil(world / int(os.environ.get("LOCAL_WORLD_SIZE", world)))
        num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", of_one))
        num_local = math.ceil(world / num_nodes)
    else:
        num_nodes, num_local = place.num_nodes, num_local_ranks(config, place, num_ranks)
    words, line = machine_words(config, overrides, num_nodes, num_local, *found)
    if line and says:
        print(f"cluster   {printable(line)}", flush=True)
    overrides = [*overrides, *words]
    return load_config(overrides), overrides


def check_steps(settings: RunSettings) -> None:
    """Raise ConfigError for fewer steps than the run to be resumed has done.

    A directory that only has the name of a checkpoint says nothing.
    """
    done = _step_done(settings)
    if done is not None and settings.steps < done:
        raise ConfigError(
            f"run.steps={settings.steps}, but the newest checkpoint of {settings.directory} is of "
            f"step {done}; give at least {done}"
        )


def _step_done(settings: RunSettings) -> int | None:
    """Return the step of the checkpoint that a resumed run goes on from, None if there is none.

    One that refuses run.steps is compared with its hashes; others may turn out to be damaged.
    """
    if not settings.resume or not checkpoints_in(settings.checkpoints):
        return None
    from vp_train.checkpoint.manifest import newest_step

    return newest_step(settings.checkpoints, settings.steps + 1)


def _check_ramp_alone(config: RunConfig) -> None:
    """Check the steps of a batch-size ramp in a rank without an agent, which would have done so."""
    if not config.batch_ramp or PIPE in os.environ:
        return
    from vp_train.planning.plan import check_ramp, make_plan

    check_ramp(config, make_plan(config, int(os.environ["WORLD_SIZE"])))


def _batch_change(config: RunConfig, place: Place | None, num_ranks: int) -> BatchChange:
    """Return the sequences of a step before and now, if there is a run to be resumed.

    `num_ranks` is the value of --ranks, 0 if it is not given.
    """
    if not config.run.resume or not checkpoints_in(config.run.checkpoints):
        return None
    from vp_train.checkpoint.manifest import saved_batch
    from vp_train.commands.launch import num_local_ranks
    from vp_train.planning.degrees import split_ranks

    if place is None:
        num_ranks = int(os.environ["WORLD_SIZE"])
    else:
        num_ranks = place.num_nodes * num_local_ranks(config, place, num_ranks)
    before = saved_batch(config.run.checkpoints)
    replicas = split_ranks(config.parallel, num_ranks).dp
    now = replicas * config.num_microbatches * config.micro_batch_size
    return None if before is None else (before, now)


def _train_rank(config: RunConfig, server: StoreServer | None = None) -> NoReturn:
    """Train as the rank that the environment names, and end the process.

    `server` is the store of all ranks if this one serves it.
    """
    entitle(f"vp rank {os.environ['RANK']}")
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:  # torchrun has started it again
        config = replace(config, run=replace(config.run, resume=True))
    try:
        from vp_train.train import run_rank

        run_rank(
            config,
            int(os.environ["RANK"]),
            int(os.environ["WORLD_SIZE"]),
            config_text(config),
            only_preflight=_ONLY_PREFLIGHT in os.environ,
            is_introduced=has_launcher(),
            has_lost_store=(lambda: False) if server is None else server.has_ended,
        )
    except (Exception, KeyboardInterrupt) as error:
        ending = ending_of_command(error, "vp-train")
        if PIPE not in os.environ and isinstance(error, ConfigError) and not prints():
            ending = replace(ending, words="")
        leave(ending)  # a process with threads of torch must not be taken down in order


def _serve_ranks() -> StoreServer | None:
    """Serve the store of the ranks that Slurm has started, if this is the first of them.

    Raises ConfigError or OSError like `StoreServer.at_port`.
    """
    from vp_train.commands.store_server import LOOPBACK_ADDRESS, StoreServer, loopback

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if address == LOOPBACK_ADDRESS:
        os.environ.update({**loopback(), **os.environ})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    if os.environ["RANK"] != "0":
        return None
    return StoreServer.at_port(
        address if address == LOOPBACK_ADDRESS else "",
        port,
        "rank 0",
        ", which follows from the numbers of the Slurm job and step; start another step or job",
    )


def with_origin(config: RunConfig) -> RunConfig:
    """Return `config` with an absolute run.init_from; a resumed run keeps the one of its start.

    vp-export follows run.init_from of the config.yaml that a run keeps.
    """
    run, origin = (
        config.run,
        None if config.run.init_from is None else path_of(config.run.init_from),
    )
    if run.resume and origin is None:
        origin = started_from(run.directory)
        origin = origin if origin is not None and origin.is_dir() else None
    return replace(
        config, run=replace(run, init_from=None if origin is None else str(origin.absolute()))
    )
