"""Find the cluster of a run on GPUs.

Nodes and ranks come from the launch, the preset from the name of the GPU.
"""

from __future__ import annotations

import json
import os
import select
import signal
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from vp_train.commands.command import typed
from vp_train.commands.local_ranks import default_signals, fork
from vp_train.commands.nodes import wait_until
from vp_train.commands.orphans import die_with_launcher
from vp_train.config import ClusterConfig, RunConfig
from vp_train.durable import write_all
from vp_train.planning.cluster import known_peak_flops, peak_flops
from vp_train.settings import load_config
from vp_train.settings.tree import group_choices

# Choices of `cluster` by what torch calls the GPU.  Boards of PCIe have other links and clocks.
PRESETS = {
    "NVIDIA A100-SXM4-40GB": "a100_40g_node",
    "NVIDIA A100-SXM4-80GB": "a100_80g_node",
    "NVIDIA H100 80GB HBM3": "h100_80g_node",
    "NVIDIA H200": "h200_141g_node",
}
_ASK_SECONDS = 30.0  # a driver that hangs never answers
_REAP_SECONDS = 1.0  # a process that waits for such a driver does not go
_MOST_CHARACTERS = 400  # of an error


def machine_words(
    config: RunConfig,
    overrides: Sequence[str],
    num_nodes: int,
    num_local: int,
    gpu: str,
    problem: str = "",
) -> tuple[list[str], str]:
    """Return the overrides that say which machines a run on GPUs has, and a line about them.

    The launch gives `num_nodes` and the ranks of each, `num_local`; what is typed stands.  `gpu`
    and `problem` are what `gpu_name` returns.  The name chooses the preset if nobody has typed
    `cluster` and the peak of the cluster is that of no machine.  A resumed run keeps the cluster it
    has saved.  The line is empty where there is nothing to say.
    """
    counts = {"cluster.num_nodes": num_nodes, "cluster.gpus_per_node": num_local}
    words = [f"{name}={count}" for name, count in counts.items() if not typed(overrides, name)]
    if typed(overrides, "cluster") or not (gpu or problem):
        return words, ""
    preset, dtype = PRESETS.get(gpu), config.run.dtype
    has_rates = known_peak_flops(config.cluster, dtype) is not None
    if preset is not None and not has_rates:
        # A preset chooses device and dtype too.
        chosen = [f"cluster={preset}", f"run.device={config.run.device}", f"run.dtype={dtype}"]
        return [*chosen, *words], f"{preset}, by the name of the GPU, {gpu}"
    unknown = f"no preset for {gpu}" if gpu else f"the name of the GPU cannot be read ({problem})"
    if not has_rates:
        known = ", ".join(name for name in group_choices()["cluster"] if name != "laptop")
        return words, (
            f"{unknown}, so costs are assumed to be those of cluster=laptop, and MFU is not known; "
            f"type the nearest cluster=NAME: {known}"
        )
    if not config.run.resume:
        return words, ""
    if preset is None:
        return words, f"{unknown}; this run keeps the cluster that it was planned for"
    if _rates(load_config([f"cluster={preset}"]).cluster, dtype) == _rates(config.cluster, dtype):
        return words, ""
    return words, (
        "this run was planned for other GPUs and keeps that cluster; type "
        f"cluster={preset} to plan for {gpu}"
    )


def _rates(cluster: ClusterConfig, dtype: str) -> tuple[float, float]:
    """Return what tells the GPUs of presets apart; their memory may be set for the same GPU."""
    return peak_flops(cluster, dtype), cluster.memory_bytes_per_second


def gpu_name() -> tuple[str, str]:
    """Return what torch calls the first GPU that this process sees, and why it cannot be read.

    One of them is "", and both are if there is no GPU.  A copy of this process asks CUDA.  Once
    started here, CUDA would work in no later copy, and would not read what is still to be set in
    the environment.  Call this before anything counts GPUs: without NVML that starts CUDA.
    """
    import_module("torch")  # it may take longer than a driver is waited for
    ours, theirs = os.pipe()
    process = os.getpid()
    if not (copy := fork()):
        _tell_name(process, theirs)
    os.close(theirs)
    try:
        if not select.select([ours], [], [], _ASK_SECONDS)[0]:
            return "", f"its driver does not answer within {_ASK_SECONDS:g} s"
        said = os.read(ours, select.PIPE_BUF)
    finally:
        os.close(ours)
        _end(copy)
    if not said:
        return "", "the process that asks for it died"
    name, problem = json.loads(said)
    return name, problem


def _tell_name(process: int, pipe: int) -> NoReturn:
    """Write what `gpu_name` returns into the pipe, and end this copy of `process`."""
    import torch

    try:
        default_signals()
        die_with_launcher(process)
        name, problem = "", ""
        try:
            if torch.cuda.device_count():
                name = torch.cuda.get_device_name(0)
        except Exception as error:  # whatever a driver says
            problem = " ".join(f"{type(error).__name__}: {error}".split())[:_MOST_CHARACTERS]
        write_all(pipe, json.dumps([name, problem]).encode())
    finally:
        os._exit(0)


def _end(copy: int) -> None:
    """Kill a copy of this process, and wait a little for its end."""
    with suppress(ProcessLookupError):
        os.kill(copy, signal.SIGKILL)
    wait_until(lambda: os.waitpid(copy, os.WNOHANG)[0] or None, _REAP_SECONDS)
