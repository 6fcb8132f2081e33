"""Step 15: activations in host memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gpu.common import Report, Where, elapsed, first_layers, main_gradient, mark, milliseconds

_UNDERWAY = 6  # microbatches between forward and backward, as on the first of six stages
_LEAVES, _RETURNS = 3, 2  # passes that a copy to the host and one back may take
_ON_DEVICE = 4  # microbatches that are on the device at most: two that leave, two that came back


def offloading(where: Where, report: Report) -> None:
    """Copy to host memory and back beside products, and run a stage whose activations wait there.

    The stage runs 1F1B as the first of six.  Half of its layers are offloaded: a link of 40 GB/s
    needs less time for them than the passes do.  On a slower one the passes wait.
    """
    rate = _time_link(where, report)
    stage, model = first_layers("llama3_8b", where, 4, num_offloaded=2)
    x, dy = (where.randn(model.seq_length, 1, model.hidden_size) for _ in range(2))
    found = {}
    for name, offloads in (("on the device", False), ("in host memory", True)):
        for _ in range(2):  # the first time allocates
            found[name] = _run_1f1b(where, stage, x, dy, offloads=offloads)
    here, away = found.values()
    worst = max(
        float((a - b).double().norm() / b.double().norm().clamp_min(1e-30))
        for a, b in zip(away.gradients, here.gradients, strict=True)
    )
    same = worst <= (1e-2 if where.on_gpu else 0)
    report.check("gradients with activations in host memory", "the same", f"{worst:.1e}", same)
    moved = away.moved_bytes / 2  # in each direction
    report.check(
        "bytes moved in each direction", "more than none", f"{moved / 2**20:.0f} MiB", moved > 0
    )
    copy = moved / (2 * _UNDERWAY) / rate / 1e6
    report.note(
        milliseconds={name: run.milliseconds for name, run in found.items()},
        peak_bytes={name: run.peak_bytes for name, run in found.items()},
        moved_bytes=moved,
        copy_milliseconds=copy,
        pass_milliseconds=here.passes,
    )
    expected = _with_copies(here.passes, copy)
    report.check(
        f"1F1B of {2 * _UNDERWAY} microbatches",
        f"at most 10 % above {expected:.1f} ms, what its passes and copies of {copy:.1f} ms take",
        f"{away.milliseconds:.1f} ms; {here.milliseconds:.1f} ms without copies",
        away.milliseconds <= 1.1 * expected,
        judged=where.on_gpu,
    )
    saved = here.peak_bytes - away.peak_bytes
    gone = (_UNDERWAY - _ON_DEVICE) * moved / (2 * _UNDERWAY)
    report.check(
        "peak memory",
        f"falls by {gone / 2**20:.0f} MiB, which {_UNDERWAY - _ON_DEVICE} microbatches keep, +-15%",
        f"falls by {saved / 2**20:.0f} MiB",
        abs(saved - gone) <= 0.15 * gone,
        judged=where.on_gpu,
    )


def _time_link(where: Where, report: Report) -> float:
    """Return the GB/s of the link in each direction with copies in both at once."""
    from vp_train.pipeline.offload import FROM_HOST, TO_HOST, HostLink
    from vp_train.tensors.streams import streams_of

    count, block = (64, 8 << 20) if where.on_gpu else (4, 1 << 18)
    link = HostLink(streams_of(where.device), where.device, block)
    pairs = {}
    for side in (TO_HOST, FROM_HOST):
        device = torch.ones(count * block, dtype=torch.uint8, device=where.device).split(block)
        host = [link.memory.take() for _ in range(count)]
        ends = (host, device) if side == TO_HOST else (device, host)
        pairs[side] = list(zip(*ends, strict=True))
    a, b = (where.randn(4096, 4096) if where.on_gpu else where.randn(64, 64) for _ in range(2))
    products = 64 if where.on_gpu else 2

    def work(sides: Sequence[str], num_products: int) -> None:
        copies = [link.copy(side, pairs[side]) for side in sides]
        for _ in range(num_products):
            torch.mm(a, b)
        for copy in copies:
            copy.wait()

    cases = {
        "to host": ((TO_HOST,), 0),
        "from host": ((FROM_HOST,), 0),
        "both": ((TO_HOST, FROM_HOST), 0),
        "products": ((), products),
        "all": ((TO_HOST, FROM_HOST), products),
    }
    times = {name: milliseconds(where, partial(work, *case), 1) for name, case in cases.items()}
    rates = {name: count * block / 1e6 / times[name] for name in ("to host", "from host", "both")}
    report.note(link_gigabytes_per_second=rates, link_milliseconds=times)
    least = max(times["both"], times["products"])
    report.check(
        "copies in both directions beside products",
        f"at most 40 % above the longer of the two, {least:.1f} ms",
        f"{times['all']:.1f} ms, {rates['both']:.1f} GB/s in each direction",
        times["all"] <= 1.4 * least,
        judged=where.on_gpu,
    )
    return rates["both"]


def _order() -> list[tuple[str, int]]:
    """Return the passes of the first of `_UNDERWAY` stages, for twice as many microbatches."""
    order = [(kind, i) for i in range(2 * _UNDERWAY) for kind in "FB"]
    return sorted(order, key=lambda entry: entry[1] + (_UNDERWAY - 0.5) * (entry[0] == "B"))


def _with_copies(passes: dict[str, float], copy: float) -> float:
    """Return the milliseconds of `_order` if a microbatch takes `copy` in each direction."""
    order, now, out, back = _order(), 0.0, 0.0, 0.0
    gone: dict[int, tuple[int, float]] = {}  # by microbatch, its forward's turn and its copy's end
    here: dict[int, float] = {}  # by microbatch, the end of its copy back
    for turn, (kind, i) in enumerate(order):
        now = max([now, *(end for begun, end in gone.values() if begun <= turn - _LEAVES)])
        soon = order[turn + _RETURNS] if turn + _RETURNS < len(order) else ("", 0)
        if soon[0] == "B":
            back = here[soon[1]] = max(back, now) + copy
        now = max(now, here.get(i, 0.0) if kind == "B" else 0.0) + passes[kind]
        if kind == "F":
            out = max(out, now) + copy
            gone[i] = (turn, out)
    return now


@dataclass(frozen=True, slots=True)
class _Run:
    """A run of a stage: its time, its memory of the device above that before it, its results.

    passes: the median milliseconds of F and of B.
    """

    milliseconds: float
    passes: dict[str, float]
    peak_bytes: int
    moved_bytes: int
    gradients: tuple[Tensor, ...]


def _run_1f1b(where: Where, stage: Any, x: Tensor, dy: Tensor, *, offloads: bool) -> _Run:
    """Run the passes of the first of `_UNDERWAY` stages for twice as many microbatches."""
    from vp_train.pipeline.offload import HostLink, SavedActivations, storages_of
    from vp_train.tensors.streams import streams_of

    for parameter in stage.parameters():
        main_gradient(parameter)
    link = HostLink(streams_of(where.device), where.device)
    order = _order()
    marks: list[Any] = []
    outputs: dict[int, Tensor] = {}
    kept: dict[int, SavedActivations] = {}
    left: dict[int, int] = {}  # after which pass each microbatch began to leave
    where.synchronise()
    before = torch.cuda.memory_allocated() if where.on_gpu else 0
    if where.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin = mark(where)
    for turn, (kind, i) in enumerate(order):
        for earlier in [earlier for earlier, at in left.items() if at <= turn - _LEAVES]:
            kept[earlier].offloaded()
            del left[earlier]
        soon = order[turn + _RETURNS] if turn + _RETURNS < len(order) else ("", 0)
        if soon[0] == "B" and soon[1] in kept:
            kept[soon[1]].reload()
        if kind == "F":
            kept_here = kept[i] = link.keep(f"0F{i}", storages_of(stage))
            with stage.offloading(kept_here.hooks) if offloads else nullcontext():
                outputs[i] = stage(x.detach().requires_grad_())
            if offloads:
                kept_here.offload()
                left[i] = turn
            else:
                del kept[i]
        else:
            if offloads:
                kept.pop(i).restored()
            outputs.pop(i).backward(dy)
        marks.append(mark(where))
    whole = elapsed(where, begin, marks[-1])
    times = [
        (kind, elapsed(where, *pair))
        for (kind, _), pair in zip(order[1:], itertools.pairwise(marks), strict=True)
    ]
    passes = {wanted: median(taken for kind, taken in times if kind == wanted) for wanted in "FB"}
    peak = torch.cuda.max_memory_allocated() - before if where.on_gpu else 0
    gradients = tuple(parameter.grad.clone() for parameter in stage.parameters())
    return _Run(whole, passes, peak, link.moved_bytes, gradients)
