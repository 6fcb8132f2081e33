"""Small training runs on rank processes that many tests share."""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

import vp_train.commands.train
from tests.data.cases import text_config, write_letters
from tests.meshes import mesh_for
from tests.ranks import free_port, in_processes
from vp_train.assembly import build_rank
from vp_train.checkpoint.saver import Saver
from vp_train.checkpoint.training import begin_save
from vp_train.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RunSettings,
)
from vp_train.data import open_source
from vp_train.durable import checkpoint_name
from vp_train.metrics.reporter import Reporter
from vp_train.metrics.run_directory import RunDirectory
from vp_train.planning.plan import make_plan
from vp_train.tensors import compiling
from vp_train.train import DivergenceError, Run

OFFLOADED = {"dp": 4, "pp": 1, "optimizer": "zero1", "offload": True}


def config_of(root, name="run", steps=8, p=2, **run):
    return RunConfig(
        model=ModelConfig(
            num_layers=6,
            hidden_size=32,
            num_heads=2,
            num_query_groups=1,
            ffn_hidden_size=48,
            vocab_size=101,
            seq_length=16,
        ),
        parallel=ParallelConfig(pp=p),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        data=DataConfig(name="synthetic"),
        run=RunSettings(
            **(
                {
                    "name": name,
                    "root": str(root),
                    "steps": steps,
                    "eval_every": 4,
                    "eval_microbatches": 3,
                    "checkpoint_every": 4,
                    "trace_step": 3,
                    "report": False,
                }
                | run
            )
        ),
        num_microbatches=4,
        micro_batch_size=2,
    )


def config_on_letters(root, **run):
    """Return `config_of` for ten written documents, each of 200 letters, in `root`/text."""
    config = config_of(root, **run)
    write_letters(root / "text", [200] * 10)
    return replace(config, data=text_config(root), model=replace(config.model, vocab_size=300))


def begin(rank, num_ranks, config):
    """Return a loaded run that can report, in a process group that already exists."""
    plan = make_plan(config, num_ranks)
    directory = RunDirectory(config.run) if rank == 0 else None
    mesh = mesh_for(plan)
    source = open_source(config)
    run = Run(config, plan, mesh, source, build_rank(config, plan, mesh))
    run.load()
    if directory is not None:
        run.reporter = Reporter(config, plan, directory, run.first_step)
        run.reporter.start("resolved: true\n", run.take_notices())
    return run


def train(rank, num_ranks, config, stop_after=None):
    """Do what `run_rank` does, in a process group that already exists.

    Stops after step `stop_after` if it is given.  Returns the first step of the run, or the text of
    a DivergenceError.
    """
    run = begin(rank, num_ranks, config)
    try:
        run.validate_weights()
        for step in run.steps():
            run.train_step(step)
            if step == stop_after:
                run.finish_save()
                return run.first_step
        run.finish()
    except DivergenceError as error:
        return str(error)
    return run.first_step


def run_command(words, place, num_ranks=2):
    """Run `vp-train` with `words` in the directory `place`, in the ranks of a torchrun.

    It takes a fraction of the time of a launcher and ranks that import everything.
    """
    in_processes(_as_rank, (words, str(place), num_ranks, free_port()), num_ranks)


def _as_rank(rank, words, place, num_ranks, port):
    os.chdir(place)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks}
    given |= {"LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in given.items()}
    sys.argv = ["vp-train", "run.report=false", *words]
    vp_train.commands.train.main()


def save_run(directory, step, config, model, mesh, contents, progress):
    """Save a checkpoint as a run does, wait until it is complete, and return its path."""
    saver = Saver(directory, mesh.world, config.run.keep_checkpoints)
    begin_save(saver, step, config, model, mesh, contents, progress)
    saver.finish()
    assert saver.take_failure() is None
    return directory / checkpoint_name(step)


def uncompiled(rank, num_ranks, function, *arguments):
    """Call function(rank, num_ranks, *arguments) without torch.compile.

    In 16 bits it would compile for seconds for every shape.
    """
    with patch.dict(os.environ):
        compiling.turn_off(os.environ)
        return function(rank, num_ranks, *arguments)


def metrics_of(config):
    lines = (Path(config.run.root) / config.run.name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def release_locks(rank, num_ranks):
    """Release the run directories that runs with an early end still lock."""
    gc.collect()


def laid_out(config, *, pp, dp=1, tp=1, optimizer="adamw", offload=False, vocab=None, layers=None):
    """Return the same training in another parallel layout, with the same global batch."""
    return replace(
        config,
        parallel=ParallelConfig(pp=pp, dp=dp, tp=tp, layers_per_stage=layers),
        optim=replace(config.optim, name=optimizer, offload=offload),
        vocab=vocab or config.vocab,
        num_microbatches=config.num_microbatches // dp,
    )
