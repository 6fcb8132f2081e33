"""Files of torch's profiler for chosen steps and ranks, in the folder profile/ of a run.

They are worth less than the run: one that cannot be written is a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from vp_train.metrics.log import warn_unwritten

_MOST_EVENTS = 200_000  # of the allocator, in a memory snapshot


@contextmanager
def profiling(directory: Path, step: int, rank: int, device: str) -> Iterator[None]:
    """Record what torch does within this context, and write it below `directory`.

    The trace is step-S-rank-R.json.gz, in Chrome's format.  On CUDA step-S-rank-R.pickle is the
    allocator's history of the step, for https://pytorch.org/memory_viz.
    """
    name = f"step-{step:08d}-rank-{rank:05d}"
    on_cuda = device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    profiler = profile(activities=activities)
    if on_cuda:
        torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)
    profiler.start()
    try:
        yield
    finally:
        profiler.stop()
        _write(directory / f"{name}.json.gz", profiler.export_chrome_trace)
        if on_cuda:
            _write(directory / f"{name}.pickle", torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)


def _write(path: Path, write: Callable[[str], None]) -> None:
    """Let `write` write a file that then gets the name `path`, or warn."""
    partial = path.with_name(f".writing-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(str(partial))
        partial.replace(path)
    except OSError as error:
        warn_unwritten(path, error)
    except RuntimeError as error:
        warn_unwritten(path, OSError(None, str(error), str(path)))
