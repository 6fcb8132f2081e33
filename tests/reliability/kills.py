"""kill -9 of a rank at a random moment: complete checkpoints remain, and losses repeat exactly.

Runs save in every step, so most kills come while a checkpoint is copied, written or committed.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

import torch

from tests.ranks import free_port, ready_context
from tests.training import config_of, metrics_of, train
from vp_train.checkpoint.store import find
from vp_train.durable import checkpoints_in

RANKS, STEPS, LONGEST = 2, 12, 0.3  # the longest time in seconds from the first step to a kill


def _rank(rank, port, config):
    """Train as one rank of a job, to the end."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    store = dist.TCPStore(
        "127.0.0.1", port, RANKS, is_master=rank == 0, timeout=timedelta(seconds=60)
    )
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    train(rank, RANKS, config)
    os._exit(0)


def _start(config):
    """Return the processes of a job that trains or resumes."""
    port = free_port()
    processes = [
        ready_context().Process(target=_rank, args=(rank, port, config), daemon=True)
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    return processes


def _kill(chance, config, processes):
    """Kill a random rank at a random moment after the first step, and then the others.

    Returns whether the job was still running.
    """
    metrics = config.run.directory / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.stat().st_size <= size:
        if wait([process.sentinel for process in processes], 0.005):
            break
        assert time.monotonic() < deadline, "no step within 60 s"
    time.sleep(chance.uniform(0.0, LONGEST))
    victim = chance.choice(processes)
    is_running = all(process.is_alive() for process in processes)
    for process in (victim, *processes):
        process.kill()
    for process in processes:
        process.join()
    return is_running


def _wrong(config, newest_before):
    """Return the newest step after a kill, and what is wrong with the checkpoints, or None."""
    newest = 0
    for step, path in checkpoints_in(config.run.checkpoints):
        try:
            find(path)
        except ValueError as error:
            return newest_before, f"not complete: {error}"
        newest = step
    if newest < newest_before:
        return newest, f"step {newest_before} was committed, but step {newest} is the newest"
    return newest, None


def campaign(seed: int, count: int) -> list[str]:
    """Kill `count` times, in runs that go on until they are done; return the failures."""
    chance, failures, kills, number = random.Random(seed), [], 0, 0
    with tempfile.TemporaryDirectory() as root:
        options = {"checkpoint_every": 1, "eval_every": 0, "trace_step": 0}
        whole = config_of(Path(root), "whole", STEPS, RANKS, **options)
        whole = replace(whole, model=replace(whole.model, num_layers=RANKS))
        assert _ended(_start(whole)), "the run without kills failed"
        expected = [(record["step"], record["loss"]) for record in metrics_of(whole)]
        while kills < count:
            number += 1
            config = replace(whole, run=replace(whole.run, name=f"run{number}", resume=True))
            newest = 0
            while newest < STEPS and kills < count:
                kills += _kill(chance, config, _start(config))
                newest, wrong = _wrong(config, newest)
                if wrong is not None:
                    failures.append(f"run {number}, kill {kills}: {wrong}")
                    break
            if newest < STEPS and not _ended(_start(config)):
                failures.append(f"run {number} did not go on after kill {kills}")
            elif [(record["step"], record["loss"]) for record in metrics_of(config)] != expected:
                failures.append(f"run {number}: other losses than those of a run without kills")
    return failures


def _ended(processes):
    """Wait for a job, and return whether it ended well."""
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes] == [0] * RANKS
