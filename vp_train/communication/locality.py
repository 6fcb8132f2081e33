"""The CPUs near a GPU: a rank runs on those of its GPU's part of the node."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

_FEWEST = 4  # CPUs: passes, communications, data and a checkpoint each have a thread


def stay_near_gpu(index: int, sysfs: Path = Path("/sys")) -> None:
    """Let this thread, and those that it starts, run only on the CPUs near GPU `index`.

    Host memory that they touch first is near the GPU, too.  Nothing changes where the system does
    not say which CPUs are near, where these are fewer than four, or where this thread may not use
    all of them: then a launcher has chosen its CPUs.  It starts CUDA.
    """
    gpu: Any = torch.cuda.get_device_properties(index)
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    with suppress(OSError, ValueError):  # no such file, other words, or no right to bind
        text = (sysfs / "bus/pci/devices" / address / "local_cpulist").read_text()
        near = _cpus_of(text)
        if len(near) >= _FEWEST and near <= os.sched_getaffinity(0):
            os.sched_setaffinity(0, near)


def _cpus_of(text: str) -> set[int]:
    """Return the CPUs of a list such as `0-23,48`.  Raises ValueError for other text."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        cpus.update(range(int(first), int(last or first) + 1))
    return cpus
