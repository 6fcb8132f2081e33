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
    trace = directory / f"step-{step:08d}-rank-{rank:05d}.json.gz"
    snapshot = trace.with_name(trace.name.replace(".json.gz", ".pickle"))
    on_cuda = device == "cuda"
    profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda)
    if not _attempt(trace, profiler.start):
        yield
        return
    if on_cuda:
        torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)
    try:
        yield
    finally:
        if _attempt(trace, profiler.stop):
            _write(trace, profiler.export_chrome_trace)
        if on_cuda:
            _write(snapshot, torch.cuda.memory._dump_snapshot)
            torch.cuda.memory._record_memory_history(enabled=None)


def _write(path: Path, write: Callable[[str], None]) -> None:
    """Let `write` write a file that then gets the name `path`, or warn."""

    def whole() -> None:
        partial = path.with_name(f".writing-{path.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(str(partial))
        partial.replace(path)

    _attempt(path, whole)


def _attempt(path: Path, action: Callable[[], None]) -> bool:
    """Return whether `action` succeeds; warn that the file `path` is not written if it fails."""
    try:
        action()
    except OSError as error:
        warn_unwritten(path, error)
        return False
    except RuntimeError as error:  # torch's own
        warn_unwritten(path, OSError(None, str(error), str(path)))
        return False
    return True
