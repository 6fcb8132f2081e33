"""The machines of a run on GPUs, where nobody has typed them: its launch and its GPU say them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vp_train.commands.command import typed
from vp_train.commands.local_ranks import default_signals, fork
from vp_train.commands.orphans import die_with_launcher
from vp_train.config import RunConfig
from vp_train.durable import write_all
from vp_train.planning.cluster import known_peak_flops
from vp_train.settings import load_config
from vp_train.settings.tree import group_choices

# Choices of `cluster` by what torch calls the GPU.  Boards of PCIe have other links and clocks.
PRESETS = {
    "NVIDIA A100-SXM4-40GB": "a100_40g_node",
    "NVIDIA A100-SXM4-80GB": "a100_80g_node",
    "NVIDIA H100 80GB HBM3": "h100_80g_node",
    "NVIDIA H200": "h200_141g_node",
}
NAMELESS = "a GPU that does not say its name"


def machine_words(
    config: RunConfig, overrides: Sequence[str], num_nodes: int, num_local: int, gpu: str
) -> tuple[list[str], str]:
    """Return the overrides that say which machines a run on GPUs has, and a line about them.

    The launch gives `num_nodes` and the ranks of each, `num_local`; what is typed stands.  `gpu` is
    the name of a GPU, "" if there is none.  It chooses the preset if nobody has typed `cluster`
    and the peak of the cluster is that of no machine.  A resumed run keeps the cluster it has
    saved.  The line is empty where there is nothing to say.
    """
    counts = {"cluster.num_nodes": num_nodes, "cluster.gpus_per_node": num_local}
    words = [f"{name}={count}" for name, count in counts.items() if not typed(overrides, name)]
    if typed(overrides, "cluster") or not gpu:
        return words, ""
    preset, dtype = PRESETS.get(gpu), config.run.dtype
    peak = known_peak_flops(config.cluster, dtype)
    if peak is None and preset is None:
        known = ", ".join(name for name in group_choices()["cluster"] if name != "laptop")
        return words, (
            f"no preset for {gpu}, so costs are assumed to be those of cluster=laptop, and MFU is "
            f"not known; type the nearest cluster=NAME: {known}"
        )
    if peak is None:
        # A preset chooses device and dtype too.
        chosen = [f"cluster={preset}", f"run.device={config.run.device}", f"run.dtype={dtype}"]
        return [*chosen, *words], f"{preset}, by the name of the GPU, {gpu}"
    if preset is None or not config.run.resume:
        return words, ""
    if known_peak_flops(load_config([f"cluster={preset}"]).cluster, dtype) == peak:
        return words, ""
    return words, f"the run keeps that of other GPUs; cluster={preset} is that of {gpu}"


def gpu_name() -> str:
    """Return what torch calls the first GPU that this process sees, "" if there is none.

    A copy of this process asks CUDA.  Once started here, CUDA would work in no later copy, and
    would not read what is still to be set in the environment.
    """
    import torch

    if not torch.cuda.device_count():
        return ""
    ours, theirs = os.pipe()
    process = os.getpid()
    if not (copy := fork()):
        try:
            default_signals()
            die_with_launcher(process)
            write_all(theirs, torch.cuda.get_device_name(0).encode())
        finally:  # what is wrong with the GPU, the ranks will say
            os._exit(0)
    os.close(theirs)
    with open(ours, "rb") as pipe:
        name = pipe.read().decode()
    os.waitpid(copy, 0)
    return name or NAMELESS
