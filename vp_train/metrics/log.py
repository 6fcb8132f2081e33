"""Numbers of every step: metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from vp_train.durable import naming


class MetricsLog:
    """Appends one record per step.  After a resume, records of later steps are dropped: each step appears once."""

    def __init__(self, jsonl: Path, tensorboard: Path, last_step: int) -> None:
        """`last_step`: the step of the checkpoint this run continues, 0 for a new run."""
        from torch.utils.tensorboard import SummaryWriter

        continues = jsonl.exists()
        if continues:
            _drop_after(jsonl, last_step)
        self._path, self._file = jsonl, jsonl.open("a", buffering=1)
        self._writer = SummaryWriter(
            str(tensorboard), purge_step=last_step + 1 if continues else None
        )

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """One line {"step": ..., **values}; non-finite numbers become null, so that every line is JSON."""
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with naming(self._path):
            self._file.write(json.dumps({"step": step, **line}) + "\n")
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._file.close()
        self._writer.close()


def _drop_after(jsonl: Path, last_step: int) -> None:
    """Keep the lines up to `last_step`; by rename, so that a kill leaves the old file or the new one."""
    kept = [line for line in jsonl.read_text().splitlines() if _step_of(line) <= last_step]
    shorter = jsonl.with_suffix(".tmp")
    shorter.write_text("".join(f"{line}\n" for line in kept))
    shorter.replace(jsonl)


def _step_of(line: str) -> float:
    """The step of a line; a line cut off by a kill belongs to no step and is dropped."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
