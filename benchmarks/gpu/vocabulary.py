"""Steps 4 and 6: accumulated products, and the passes S and T."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from gpu.common import Report, Where, main_gradient, milliseconds, top_kernels

# 4


def accumulation(where: Where, report: Report) -> None:
    """Add products to fp32 gradients in place: the weight gradients of a layer."""
    from vp_train.model.linear import _accumulate

    shapes = ((2048, 3072, 12288), (8192, 4096, 14336), (8192, 4096, 4096))
    for tokens, inner, outer in shapes if where.on_gpu else ((64, 32, 48),):
        x, dy = where.randn(tokens, inner), where.randn(tokens, outer)
        weight = nn.Parameter(where.randn(outer, inner))
        main_gradient(weight)
        gradient, plain = weight.grad, torch.empty_like(weight, requires_grad=False)
        assert gradient is not None
        source = torch.empty_like(gradient)
        for _ in range(2):
            _accumulate(weight, x, dy)
        exact = 2 * (dy.float().T @ x.float())
        error = ((gradient - exact).abs().max() / exact.abs().max()).item()
        name = f"{outer} x {tokens} x {inner}"
        report.check(
            f"{name}: error", "under 1e-3", f"{error:.1e}", error < 1e-3 and weight.grad is gradient
        )
        del exact
        grown = 0
        if where.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _accumulate(weight, x, dy)
            torch.cuda.synchronize()
            grown = torch.cuda.max_memory_allocated() - before
        report.check(
            f"{name}: memory", "does not grow", f"{grown} bytes", grown == 0, judged=where.on_gpu
        )
        ours = milliseconds(where, lambda x=x, dy=dy, weight=weight: _accumulate(weight, x, dy))
        theirs = milliseconds(
            where, lambda x=x, dy=dy, out=plain: torch.mm(dy.T, x, out=out.detach())
        )
        copied = milliseconds(
            where, lambda gradient=gradient, source=source: gradient.copy_(source)
        )
        rate = 2e-9 * tokens * inner * outer / theirs
        report.check(
            f"{name}: time",
            "at most that of a product of bf16 and a copy of the gradient",
            f"{ours:.3f} of {theirs:.3f} + {copied:.3f} ms; {rate:.0f} TFLOP/s",
            ours <= theirs + copied,
            judged=where.on_gpu,
        )


# 6


def vocabulary(where: Where, report: Report) -> None:
    """Time S and T for several sizes of chunks, against three products and other libraries."""
    from peers_vocab import installed
    from vocab_passes import DeviceCase, Ours

    from vp_train.vocab.loss import LossOptions

    report.note(peers=installed())
    sizes = [size << 20 for size in (32, 128, 512)] if where.on_gpu else [4096, 16384]
    shapes = (
        ((4096, 4096, 16384), (4096, 4096, 32768), (2048, 3072, 32000), (8192, 4096, 16032))
        if where.on_gpu
        else ((32, 16, 256),)
    )
    rows: list[dict[str, Any]] = []
    for tokens, hidden, num_rows in shapes:
        shape = f"T {tokens} H {hidden} R {num_rows}"
        case = DeviceCase(where.device.type, where.dtype, tokens, hidden, num_rows)
        ours = {size: Ours(case, "chunked", "one_barrier", LossOptions()) for size in sizes}
        works, missing = _vocabulary_works(where, case, ours)
        times = {name: milliseconds(where, work, 2, 5) for name, work in works.items()}
        for size, layer in ours.items():
            sized = {"tokens": tokens, "hidden": hidden, "rows": num_rows, "chunk_bytes": size}
            rows.append(sized | _pass_milliseconds(where, size, layer))
            report.note(passes=rows)
        report.note(**{f"{shape} milliseconds": times, f"{shape} missing": missing})
        best = min(sizes, key=lambda size: times[_chunks(size)])
        report.note(**{f"{shape} kernels": top_kernels(where, works[_chunks(best)], 20)})
        flops = 6.0 * tokens * hidden * num_rows
        _judge_vocabulary(where, report, shape, times=times, best=best, flops=flops)
        del works, ours
        if where.on_gpu:
            torch.cuda.empty_cache()


def _chunks(size: int) -> str:
    return f"chunks of {size} bytes"


def _with_chunk(where: Where, size: int, work: Callable[[], object]) -> Callable[[], object]:
    """Return `work` as it runs with chunks of this size."""
    from vp_train.vocab.chunks import CHUNKS, ChunkSize

    least = 1_024 if where.on_gpu else 1

    def run() -> object:
        CHUNKS[where.device.type] = ChunkSize(size, least, 32_768)
        return work()

    return run


def _vocabulary_works(
    where: Where, case: Any, ours: dict[int, Any]
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Return what to time by name: products, our layers, peers; and why peers are missing."""
    from peers_vocab import PEERS
    from vocab_passes import AccumulatingFloor, Floor

    works: dict[str, Callable[[], object]] = {
        "floor": AccumulatingFloor(case),
        "floor without sum": Floor(case),
    }
    works |= {_chunks(size): _with_chunk(where, size, layer) for size, layer in ours.items()}
    missing = {}
    for name in [name for name in PEERS if name != "published"]:
        try:
            peer = PEERS[name](*case.inputs())
            peer()  # it may fail only here
            works[name] = peer
        except Exception as error:  # whatever a peer lacks here is a result too
            first_line, _, _ = str(error).partition("\n")
            missing[name] = f"{type(error).__name__}: {first_line}"
    return works, missing


def _pass_milliseconds(where: Where, size: int, layer: Any) -> dict[str, float]:
    """Return the medians of S and of T, each on its own."""
    layer.apart = {}
    for _ in range(3):
        _with_chunk(where, size, layer)()
    return {name: 1e3 * median(seconds) for name, seconds in layer.apart.items()}


def _judge_vocabulary(
    where: Where, report: Report, shape: str, *, times: dict[str, float], best: int, flops: float
) -> None:
    """Check the time with the best size of chunks against the floor and the fastest peer."""
    from peers_vocab import PEERS

    ours, floor = times[_chunks(best)], times["floor"]
    rate = f"floor at {1e-9 * flops / floor:.0f} TFLOP/s"
    measured = f"{ours / floor:.2f} with chunks of {best >> 20} MiB, {rate}"
    what, passed = f"{shape}: S and T / floor", 0.75 * ours <= floor
    report.check(what, "at most 1.33", measured, passed, judged=where.on_gpu)
    others = {name: time for name, time in times.items() if name in PEERS}
    if others:
        fastest = min(others, key=others.__getitem__)
        measured = f"{ours / others[fastest]:.2f} of {fastest}"
        what, passed = f"{shape}: S and T / fastest peer", ours <= others[fastest]
        report.check(what, "at most 1", measured, passed, judged=where.on_gpu)
