"""What a result file must say about its origin."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_UNITS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # what the speed of matrix products hangs on


def processor() -> str:
    """Its name, and which of the widest units it has; empty where the system does not say."""
    path = Path("/proc/cpuinfo")
    fields = dict(line.partition(":")[::2] for line in path.read_text().splitlines()) if path.is_file() else {}
    values = {key.strip(): value.strip() for key, value in fields.items()}
    units = [unit for unit in _UNITS if unit in values.get("flags", "").split()]
    return ", ".join([values.get("model name", ""), *units]).strip(", ")


def provenance() -> dict[str, Any]:
    """Command, hardware, versions and commit of the running benchmark."""
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "hardware": f"{os.cpu_count()} cores, {platform.machine()}",
        "processor": processor(),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("torch", "megatron-core", "numpy")},
        "commit": commit.stdout.strip(),
    }
