"""Step 7: one layer forward and backward, on the device and on the host."""

from __future__ import annotations

import itertools
import subprocess
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gpu.common import (
    Report,
    Where,
    elapsed,
    first_layers,
    get_ahead,
    mark,
    top_kernels,
)

_LAYER_MILLISECONDS = {
    "gpt_4b": (1.0, 2.1),
    "llama3_8b": (7.4, 15.9),
}  # F and B, estimated for an H100
_TOLERANCE = 1.25
_PEAK = 9.89e14  # bfloat16 FLOP/s of an H100, dense


def layers(where: Where, report: Report) -> None:
    """Time one layer forward and backward, on the GPU and on the host, and list its kernels.

    Also without compiled elementwise work, which takes other times of both, and layer after layer
    without a pause, when the GPU reaches its limit of power and lowers its clock; with zeros it
    takes less power.
    """
    from vp_train.model.shape import layer_flops

    for name, expected in _LAYER_MILLISECONDS.items():
        stage, model = first_layers(name, where)
        shape = (model.seq_length, 1, model.hidden_size)
        x, dy = where.randn(*shape).requires_grad_(), where.randn(*shape)
        times = _host_and_device(where, stage, x, dy)
        for letter, most in zip("FB", expected, strict=True):
            measured, limit = times[letter], most * _TOLERANCE
            report.check(
                f"{name}: {letter}",
                f"about {most} ms",
                f"{measured:.2f} ms",
                measured <= limit,
                judged=where.on_gpu,
            )
        host, device = (sum(times[letter + kind] for letter in "FB") for kind in (" host", ""))
        report.check(
            f"{name}: host ahead",
            "less than the GPU's time",
            f"{host:.2f} of {device:.2f} ms",
            host < device,
            judged=where.on_gpu,
        )
        work = partial(_forward_backward, stage, x, dy)
        steady, clock = _without_pause(where, work, sum(times[letter] for letter in "FB"))
        rate = 3e3 * layer_flops(model, model.seq_length) / steady
        report.check(
            f"{name}: layer after layer",
            "at least 55 % MFU",
            f"{steady:.2f} ms, {rate / _PEAK:.1%} MFU; {clock}",
            rate >= 0.55 * _PEAK,
            judged=where.on_gpu and name == "llama3_8b",
        )
        zeros = partial(_forward_backward, stage, torch.zeros_like(x, requires_grad=True), 0 * dy)
        of_zeros, cool_clock = _without_pause(where, zeros, steady)
        plain, _ = first_layers(name, where, compiles="off")
        report.note(
            **{
                f"{name} milliseconds": times,
                f"{name} layer after layer": {
                    "milliseconds": steady,
                    "clock": clock,
                    "milliseconds, of zeros": of_zeros,
                    "clock, of zeros": cool_clock,
                },
                f"{name} milliseconds, nothing compiled": _host_and_device(where, plain, x, dy),
            }
        )
        report.note(**{f"{name} kernels": top_kernels(where, work)})
        report.note(**{f"{name} on the host": top_kernels(where, work, 30, by_host=True)})


def _forward_backward(stage: Any, x: Tensor, dy: Tensor) -> None:
    stage(x, None).backward(dy)


def _without_pause(
    where: Where, work: Callable[[], object], milliseconds: float
) -> tuple[float, str]:
    """Return the median milliseconds of `work` in the second of two seconds of it.

    The other result is the clock and the power in between, as nvidia-smi says them.
    milliseconds: what `work` takes about.
    """
    count = max(2, int(2000 / milliseconds)) if where.on_gpu else 2
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader"]
    marks, clock, asked = [mark(where)], "no GPU", None
    for turn in range(count):
        if where.on_gpu and turn == count // 2:
            marks[-1].synchronize()  # half of the work is done, so the GPU is warm
            asked = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        work()
        marks.append(mark(where))
    if asked is not None:
        clock = asked.communicate()[0].strip()
    times = [elapsed(where, *pair) for pair in itertools.pairwise(marks[count // 2 :])]
    return median(times), clock


def _host_and_device(where: Where, stage: Any, x: Tensor, dy: Tensor) -> dict[str, float]:
    """Return the milliseconds of F and B on the device, and those of the host to issue them."""
    found: dict[str, list[float]] = {"F": [], "B": [], "F host": [], "B host": []}
    for turn in range(8 if where.on_gpu else 2):
        where.synchronise()
        get_ahead(where)
        marks, clock = [mark(where)], [time.perf_counter()]
        y = stage(x, None)
        marks.append(mark(where))
        clock.append(time.perf_counter())
        y.backward(dy)
        marks.append(mark(where))
        clock.append(time.perf_counter())
        if turn < 2 and where.on_gpu:
            continue
        for index, letter in enumerate("FB"):
            found[letter].append(elapsed(where, *marks[index : index + 2]))
            found[f"{letter} host"].append(1e3 * (clock[index + 1] - clock[index]))
    return {key: median(values) for key, values in found.items()}
