"""What steps share: their device and findings, timing, and layers of a model."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True, slots=True)
class Where:
    """The device of a step, and a folder of its own."""

    device: torch.device
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Return bfloat16; on the CPU float32, which needs no compiler."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal values, made on the device."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)


class Report:
    """The findings of a step.  The file is rewritten at once, so that it outlives a crash."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.checks: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {}

    def check(
        self, what: str, expected: str, measured: str, passed: bool, *, judged: bool = True
    ) -> None:
        """Add a check; `judged` False: it counts for nothing here."""
        verdict = bool(passed) if judged else None
        self.checks.append(
            {"what": what, "expected": expected, "measured": measured, "passed": verdict}
        )
        self._write()

    def note(self, **figures: Any) -> None:
        """Add figures that nothing is expected of."""
        self.figures |= figures
        self._write()

    def _write(self) -> None:
        self._path.write_text(
            json.dumps({"checks": self.checks, "figures": self.figures}, indent=1)
        )


_AHEAD_CYCLES = 10_000_000  # 5 to 6 ms


def milliseconds(
    where: Where, work: Callable[[], object], calls: int = 5, rounds: int = 7
) -> float:
    """Return the median time of one call on the device: events around `calls` of them.

    The device sleeps before them, so that the host is ahead, as in a run.
    """
    for _ in range(2):
        work()
    times = []
    for _ in range(rounds if where.on_gpu else 2):
        get_ahead(where)
        begin = mark(where)
        for _ in range(calls):
            work()
        times.append(elapsed(where, begin, mark(where)) / calls)
    return median(times)


def mark(where: Where) -> Any:
    if not where.on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(where: Where, begin: Any, end: Any) -> float:
    """Return the milliseconds between two marks, once the second has been reached."""
    if not where.on_gpu:
        return 1e3 * (end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end))


def get_ahead(where: Where) -> None:
    """Keep the device busy for some milliseconds, in which the host issues what follows."""
    if where.on_gpu:
        torch.cuda._sleep(_AHEAD_CYCLES)


def sleep_cycles(milliseconds: float) -> int:
    """Return how many cycles torch.cuda._sleep needs for so long, as measured here."""
    cycles = 20_000_000
    torch.cuda._sleep(cycles)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return int(cycles * milliseconds / begin.elapsed_time(end))


def model_words(name: str, where: Where) -> list[str]:
    """Return the overrides for a model; on the CPU for one of its shape that is tiny."""
    words = [f"model={name}"]
    if not where.on_gpu:
        sizes = {
            "num_layers": 8,
            "hidden_size": 64,
            "num_heads": 4,
            "ffn_hidden_size": 128,
            "vocab_size": 4096,
        }
        groups = 4 if name.startswith("gpt") else 2
        sizes |= {"num_query_groups": groups, "seq_length": 64}
        words += [f"model.{key}={value}" for key, value in sizes.items()]
    return words


def lone_group() -> dist.ProcessGroup:
    """Return a gloo group of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def first_layers(
    name: str,
    where: Where,
    num_layers: int = 1,
    *,
    dtype: torch.dtype | None = None,
    products: Any = None,
    compiles: str = "auto",
    num_offloaded: int = 0,
) -> tuple[Any, Any]:
    """Return a stage with the first layers of a model, with fp32 gradients, and its ModelConfig.

    products: those of its linear layers, None for plain ones.
    compiles: a value of run.compile.
    num_offloaded: how many of the layers are offloaded.
    """
    from vp_train.model.elementwise import choose_fuse
    from vp_train.model.linear import PLAIN
    from vp_train.model.shape import compiles_layers
    from vp_train.model.stage import Stage
    from vp_train.settings import load_config

    model = load_config(model_words(name, where)).model
    stage = Stage(
        model,
        range(num_layers),
        final_norm=False,
        dtype=dtype or where.dtype,
        device=where.device,
        group=lone_group(),
        seed=1,
        products=products or PLAIN,
        fuse=choose_fuse(
            compiles,
            where.device,
            compiles=compiles_layers(
                compiles,
                model,
                model.seq_length * model.ffn_hidden_size,
                where.dtype.itemsize,
                on_cuda=where.device.type == "cuda",
            ),
        ),
        num_offloaded=num_offloaded,
    )
    for parameter in stage.parameters():
        main_gradient(parameter)
    return stage, model


def main_gradient(parameter: nn.Parameter) -> None:
    """Give a parameter an fp32 gradient of zeros, as a run does."""
    if parameter.dtype is not torch.float32:
        parameter.grad_dtype = torch.float32
    parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)


def command(where: Where, *words: str, seconds: float) -> str:
    """Run a Python command in this step's folder; return its output, raise with it if it fails."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=where.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} left with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def top_kernels(
    where: Where, work: Callable[[], object], count: int = 15, *, by_host: bool = False
) -> list[dict[str, Any]] | str:
    """Return what took longest on the device, or on the host, in one call of `work`.

    Where counters are forbidden, return why.
    """
    from torch.profiler import ProfilerActivity, profile

    on_device = where.on_gpu and not by_host
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    try:
        with profile(activities=activities) as profiler:
            work()
            where.synchronise()
    except Exception as error:
        return str(error)
    spent = f"self_{'device' if on_device else 'cpu'}_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, spent))
    return [
        {"name": event.key[:100], "calls": event.count, "microseconds": getattr(event, spent)}
        for event in events[:count]
    ]
