"""Step 13: linear layers in float8."""

from __future__ import annotations

import itertools
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from gpu.common import (
    Report,
    Where,
    elapsed,
    first_layers,
    get_ahead,
    main_gradient,
    mark,
    milliseconds,
)


def float8_layers(where: Where, report: Report) -> None:
    """Multiply in float8 against bfloat16: error, time and rate of y and dx, then a whole layer."""
    from vp_train.model.float8 import Float8Products

    shapes = ((2048, 3072, 12288), (8192, 4096, 14336), (8192, 14336, 4096), (8192, 4096, 6144))
    rows = []
    for tokens, inner, outer in shapes if where.on_gpu else ((48, 32, 64),):
        x, dy = (where.randn(tokens, size, dtype=torch.bfloat16) for size in (inner, outer))
        weight = nn.Parameter(where.randn(outer, inner, dtype=torch.bfloat16))
        row: dict[str, Any] = {"tokens": tokens, "in": inner, "out": outer}
        row |= _times_of_products(where, "bfloat16", None, x, dy, weight)
        for name in ("row", "tensor"):
            products = Float8Products(by_row=name == "row")
            _judge_float8(
                report, f"{tokens} x {inner} x {outer} by {name}", products, x, dy, weight
            )
            row |= _times_of_products(where, name, products, x, dy, weight)
        speed = (row["bfloat16 y"] + row["bfloat16 dx"]) / (row["row y"] + row["row dx"])
        report.check(
            f"{tokens} x {inner} x {outer}: y and dx by row, with rounding",
            "at least 1.2 times as fast as bfloat16",
            f"{speed:.2f} times",
            speed >= 1.2,
            judged=where.on_gpu,
        )
        rows.append(row)
        report.note(products=rows)
    _float8_layer(where, report)


def _times_of_products(
    where: Where, name: str, products: Any, x: Tensor, dy: Tensor, weight: nn.Parameter
) -> dict[str, float]:
    """Return the milliseconds of y and dx with the weight rounded before, and their TFLOP/s."""
    from vp_train.model.linear import PLAIN

    formed = PLAIN if products is None else products
    with formed.fixed_weights(), torch.no_grad():
        y = milliseconds(where, lambda: formed.output(x, weight))
        dx = milliseconds(where, lambda: formed.input_gradient(dy, weight))
    flops = 2e-9 * x.numel() * len(weight)
    return {
        f"{name} y": y,
        f"{name} dx": dx,
        f"{name} y TFLOP/s": flops / y,
        f"{name} dx TFLOP/s": flops / dx,
    }


def _judge_float8(
    report: Report, what: str, products: Any, x: Tensor, dy: Tensor, weight: nn.Parameter
) -> None:
    """Compare y and dx with fp32 products of the same rounded matrices, in a part of their rows."""
    from vp_train.model.float8 import PRECISE, rounded

    by_row, some = products._by_row, slice(0, 256)
    worst = 0.0
    with torch.no_grad():
        for left, dtype, right, found in (
            (x, PRECISE, weight, products.output(x, weight)),
            (dy, products.gradient_dtype, weight.T, products.input_gradient(dy, weight)),
        ):
            a, b = rounded(left, dtype, by_row=by_row), rounded(right, PRECISE, by_row=by_row)
            scale = a.scale[some] if by_row else a.scale
            exact = (a.values[some].float() * scale) @ (b.values.float() * b.scale).T
            error = (found[some].float() - exact).abs().max() / exact.abs().max()
            worst = max(worst, error.item())
    # bfloat16 rounds by 2^-8; the fast accumulation of an H100 has about 14 bits.
    report.check(f"{what}: error", "under 1.5e-2", f"{worst:.1e}", worst < 1.5e-2)


def _float8_layer(where: Where, report: Report) -> None:
    """Time F, I and W of one layer in bfloat16 and in float8, and its gradients' difference."""
    from vp_train.model.float8 import Float8Products
    from vp_train.model.linear import PLAIN

    for name in ("gpt_4b", "llama3_8b") if where.on_gpu else ("llama3_8b",):
        times: dict[str, dict[str, float]] = {}
        gradients = {}
        for kind, products in (("bfloat16", PLAIN), ("float8", Float8Products(by_row=True))):
            stage, model = first_layers(name, where, dtype=torch.bfloat16, products=products)
            torch.manual_seed(1)
            shape = (model.seq_length, 1, model.hidden_size)
            x, dy = (where.randn(*shape, dtype=torch.bfloat16) for _ in range(2))
            x.requires_grad_()
            with stage.fixed_weights():
                times[kind] = _passes_of_layer(where, stage, x, dy)
                for parameter in stage.parameters():
                    main_gradient(parameter)
                stage(x).backward(dy)
            gradients[kind] = [parameter.grad for parameter in stage.parameters()]
            del stage
        report.note(**{f"{name} passes in ms": times})
        error = max(
            ((ours - theirs).norm() / theirs.norm()).item()
            for ours, theirs in zip(*gradients.values(), strict=True)
        )
        what = f"{name}: what float8 changes of the gradient of a parameter"
        report.check(what, "at most 20 %", f"{error:.1%}", error <= 0.2)
        speed = sum(times["bfloat16"].values()) / sum(times["float8"].values())
        report.check(
            f"{name}: F, I and W",
            "at least 1.15 times as fast as bfloat16",
            f"{speed:.2f} times",
            speed >= 1.15,
            judged=where.on_gpu,
        )


def _passes_of_layer(where: Where, stage: Any, x: Tensor, dy: Tensor) -> dict[str, float]:
    """Return the median milliseconds of F, I and W of a stage, one after another."""
    found: dict[str, list[float]] = {"F": [], "I": [], "W": []}
    for _ in range(6 if where.on_gpu else 2):
        where.synchronise()
        get_ahead(where)
        marks = [mark(where)]
        y = stage(x)
        marks.append(mark(where))
        with stage.weight_grads.deferring(0):
            y.backward(dy)
        marks.append(mark(where))
        stage.weight_grads.drain(0)
        marks.append(mark(where))
        for kind, (begin, end) in zip("FIW", itertools.pairwise(marks), strict=True):
            found[kind].append(elapsed(where, begin, end))
    return {kind: median(values[1:]) for kind, values in found.items()}
