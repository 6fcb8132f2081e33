"""The metrics of every step, in metrics.jsonl and for TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from vp_train.durable import naming


class MetricsLog:
    """A log with one record per step.

    When a run resumes, records of steps after its checkpoint are dropped, so no step appears twice.
    """

    def __init__(self, jsonl: Path, tensorboard: Path, last_step: int) -> None:
        """Open the log after `last_step`, the step of the checkpoint; 0 for a new run."""
        from torch.utils.tensorboard import SummaryWriter

        continues = jsonl.exists()
        if continues:
            _drop_after(jsonl, last_step)
        self._path, self._file = jsonl, jsonl.open("a", buffering=1)
        self._writer = SummaryWriter(
            str(tensorboard), purge_step=last_step + 1 if continues else None
        )

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line {"step": ..., **values}.

        Numbers that are not finite become null, so that every line is JSON.
        """
        line = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with naming(self._path):
            self._file.write(json.dumps({"step": step, **line}) + "\n")
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._file.close()
        self._writer.close()


def _drop_after(jsonl: Path, last_step: int) -> None:
    """Drop the lines after `last_step`.

    The new file replaces the old one by a rename, so that a kill leaves one of the two.
    """
    kept = [line for line in jsonl.read_text().splitlines() if _step_of(line) <= last_step]
    shorter = jsonl.with_suffix(".tmp")
    shorter.write_text("".join(f"{line}\n" for line in kept))
    shorter.replace(jsonl)


def _step_of(line: str) -> float:
    """Return the step of a line, or infinity for a line that a kill has cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
