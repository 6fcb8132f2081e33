"""The origin of a result file: command, hardware, versions and commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

# CPU features that decide the speed of matrix products.
_UNITS = (
    "amx_bf16",
    "avx512_bf16",
    "avx512f",
    "avx2",
)
_PACKAGES = ("torch", "megatron-core", "numpy")
_GPU_PACKAGES = ("triton", "deepspeed", "transformers")  # added on machines with a GPU


def processor() -> str:
    """Return the processor's name and its widest vector units, "" if the system does not say."""
    path = Path("/proc/cpuinfo")
    fields = (
        dict(line.partition(":")[::2] for line in path.read_text().splitlines())
        if path.is_file()
        else {}
    )
    values = {key.strip(): value.strip() for key, value in fields.items()}
    units = [unit for unit in _UNITS if unit in values.get("flags", "").split()]
    return ", ".join([values.get("model name", ""), *units]).strip(", ")


def accelerator() -> dict[str, str]:
    """Return the card's name and memory, and the versions of driver, CUDA, cuDNN and NCCL.

    Returns {} without a GPU.  If nvidia-smi works, this process gets no CUDA context.
    """
    import torch

    if not torch.cuda.is_available():
        return {}
    found = dict.fromkeys(("card", "memory", "driver"), "")
    asked = _output(
        "nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"
    )
    if asked:
        found = dict(zip(found, map(str.strip, asked.splitlines()[0].split(",")), strict=False))
    found["card"] = found["card"] or torch.cuda.get_device_name(0)
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else ()
    return found | {
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "nccl": ".".join(map(str, nccl)),
    }


def provenance() -> dict[str, Any]:
    """Return command, hardware, versions and commit of the running benchmark."""
    gpu = accelerator()
    packages = (*_PACKAGES, *_GPU_PACKAGES) if gpu else _PACKAGES
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "processor": processor(),
        **({"accelerator": gpu} if gpu else {}),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in packages},
        "commit": _output(
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--dirty=+",
            "--exclude=*",
        ),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _output(program: str, *arguments: str) -> str:
    """Return what a program prints, "" if it is missing or fails."""
    if shutil.which(program) is None:
        return ""
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""
