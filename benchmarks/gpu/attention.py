"""Steps 10 and 14: packed documents, softcaps and windows."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gpu.common import Report, Where, first_layers, milliseconds

# 10


def packed(where: Where, report: Report) -> None:
    """Pack sixteen documents of sixteen lengths: what new lengths cost the host, and known ones."""
    _attentions(where, report)
    stage, model = first_layers("llama3_8b", where)
    length, count = model.seq_length, 16

    def segments(seed: int) -> Tensor:
        """[1, s], of documents that all have other lengths."""
        generator = torch.Generator().manual_seed(seed)
        cuts = (torch.randperm(length - 1, generator=generator)[: count - 1] + 1).sort().values
        begins = torch.zeros(length, dtype=torch.int64)
        begins[cuts] = 1
        return begins.cumsum(0)[None]

    x = where.randn(length, 1, model.hidden_size).requires_grad_()
    dy = where.randn(length, 1, model.hidden_size)

    def visit(segments: Tensor | None) -> tuple[float, float]:
        """Return the host's and the whole time of F and B, in ms."""
        where.synchronise()
        begin = time.perf_counter()
        stage(x, segments).backward(dy)
        host = time.perf_counter() - begin
        where.synchronise()
        return 1e3 * host, 1e3 * (time.perf_counter() - begin)

    for unknown in (None, segments(0), None):  # loads kernels
        visit(unknown)
    whole = visit(None)
    first, second, others, again = (visit(segments(seed)) for seed in (1, 1, 2, 2))
    report.note(unpacked=whole, first=first, second=second, others=others, others_again=again)
    each = max(first[0] - second[0], others[0] - again[0], 0) / count
    report.check(
        "a new length, on the host",
        "at most 1 ms (cuDNN would make a plan)",
        f"{each:.2f} ms",
        each <= 1,
        judged=where.on_gpu,
    )
    known = max(second[0], again[0]) / count
    report.check(
        "a known length, on the host",
        "at most 1 ms",
        f"{known:.2f} ms",
        known <= 1,
        judged=where.on_gpu,
    )


def _attentions(where: Where, report: Report) -> None:
    """Time F and B of attention: torch's choice, one document, 16 of them, windows."""
    from vp_train.model.attention import Documents, Rule, attend_documents, block_attention

    times = {}
    for tokens, heads, groups in ((2048, 24, 24), (8192, 32, 8)) if where.on_gpu else ((64, 4, 2),):
        q, k, v = (
            where.randn(tokens, count, 128).requires_grad_() for count in (heads, groups, groups)
        )
        dy = where.randn(tokens, heads * 128)
        windowed = Rule(128**-0.5, None, tokens // 4)

        def whole(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            inputs = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
            y = nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
            return y[0].transpose(0, 1).flatten(1)

        def blocks(q: Tensor = q, k: Tensor = k, v: Tensor = v, rule: Rule = windowed) -> Tensor:
            return block_attention(q[:, None], k[:, None], v[:, None], rule)[:, 0]

        works: dict[str, Callable[[], Tensor | None]] = {
            "whole": whole,
            "windows by blocks": blocks,
        }
        for name, count, window in (
            ("one document", 1, None),
            ("16 documents", 16, None),
            ("windows by documents", 1, windowed.window),
        ):
            documents = Documents.on(where.device, (tokens // count,) * count)
            works[name] = partial(attend_documents, q, k, v, documents, windowed.scale, window)
        for name, work in works.items():
            y = work()
            if y is not None:  # there is no such kernel on a CPU
                times[f"T {tokens}: {name}"] = milliseconds(
                    where, lambda work=work, dy=dy: work().backward(dy), 3, 5
                )
    report.note(attention_milliseconds=times)


# 14


def rules(where: Where, report: Report) -> None:
    """Attend with softcaps, windows and documents: FlexAttention against blocks and the varlen."""
    from vp_train.model.attention import (
        Documents,
        Rule,
        attend_documents,
        attend_flexibly,
        block_attention,
    )

    tokens, heads, groups, size = (4096, 16, 8, 256) if where.on_gpu else (192, 4, 2, 16)
    window, scale = tokens // 4, size**-0.5
    dtype = torch.bfloat16
    q, k, v = (
        where.randn(tokens, count, size, dtype=dtype).requires_grad_()
        for count in (heads, groups, groups)
    )
    dy = where.randn(tokens, heads * size, dtype=dtype)
    generator = torch.Generator().manual_seed(0)

    def documents(count: int) -> Documents:
        cuts = (torch.randperm(tokens - 1, generator=generator)[: count - 1] + 1).sort().values
        ends = [0, *cuts.tolist(), tokens]
        return Documents.on(where.device, tuple(b - a for a, b in itertools.pairwise(ends)))

    def blocks(packed: Documents, rule: Rule) -> Tensor:
        pieces = zip(*(t[:, None].split(packed.lengths) for t in (q, k, v)), strict=True)
        return torch.cat([block_attention(*piece, rule)[:, 0] for piece in pieces])

    def gradients(y: Tensor) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]

    times: dict[str, dict[str, float]] = {}
    host: dict[str, float] = {}
    for name, rule, packed in (
        ("softcap", Rule(scale, 50.0, None), documents(1)),
        ("softcap, window", Rule(scale, 50.0, window), documents(1)),
        ("softcap, window, 9 documents", Rule(scale, 50.0, window), documents(9)),
        ("window", Rule(scale, None, window), documents(1)),
    ):
        works = {
            "blocks": partial(blocks, packed, rule),
            "flexible": partial(attend_flexibly, q, k, v, packed, rule),
        }
        if rule.softcap is None:
            works["varlen"] = partial(attend_documents, q, k, v, packed, scale, rule.window)
        begin = time.perf_counter()
        first = works["flexible"]()
        if first is None:  # there is no such kernel here
            report.check(name, "a kernel", "none", False, judged=where.on_gpu)
            del works["flexible"]
        else:
            found = gradients(first)
            where.synchronise()
            host[name] = time.perf_counter() - begin
            _judge_attention(report, name, found, gradients(blocks(packed, rule)))
        times[name] = {
            kind: milliseconds(where, lambda work=work: work().backward(dy), 3, 5)
            for kind, work in works.items()
            if work() is not None
        }
        report.note(milliseconds=times, first_seconds=host)
        if "flexible" in times[name]:
            ratio = times[name]["blocks"] / times[name]["flexible"]
            measured, what = f"{ratio:.1f} times", f"{name}: FlexAttention"
            report.check(what, "at least 3 times as fast as blocks", measured, ratio >= 3)
    _judge_new_documents(where, report, documents, (q, k, v, dy), Rule(scale, 50.0, window))
    _judge_other_sizes(where, report, (q, k, v), Rule(scale, 50.0, window))


def _judge_attention(
    report: Report, name: str, found: Sequence[Tensor], expected: Sequence[Tensor]
) -> None:
    """Check outputs and gradients of bfloat16 against each other."""
    worst = max(
        ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
        for a, b in zip(found, expected, strict=True)
    )
    report.check(f"{name}: y, dq, dk, dv", "within 2 %", f"{worst:.1e}", worst < 2e-2)


def _judge_new_documents(
    where: Where,
    report: Report,
    documents: Callable[[int], Any],
    tensors: tuple[Tensor, ...],
    rule: Any,
) -> None:
    """Check that documents of new lengths are compiled for no more, by what they cost the host."""
    from vp_train.model.attention import attend_flexibly

    q, k, v, dy = tensors
    seconds = []
    for count in (9, 2, 17, 33, 5):
        packed = documents(count)
        where.synchronise()
        begin = time.perf_counter()
        y = attend_flexibly(q, k, v, packed, rule)
        if y is None:
            return
        y.backward(dy)
        seconds.append(time.perf_counter() - begin)
    report.note(new_documents_host_milliseconds=[1e3 * value for value in seconds])
    worst = 1e3 * max(seconds[1:])
    report.check(
        "documents of new lengths, on the host", "at most 20 ms", f"{worst:.1f} ms", worst <= 20
    )


def _judge_other_sizes(
    where: Where, report: Report, tensors: tuple[Tensor, ...], rule: Any
) -> None:
    """Attend over fewer tokens, as inference does: the second size is compiled for all others."""
    from vp_train.model.attention import Documents, attend_flexibly, block_attention

    seconds, worst = [], 0.0
    for tokens in (len(tensors[0]) // part for part in (2, 3, 4, 5)):
        q, k, v = (tensor.detach()[:tokens] for tensor in tensors)
        where.synchronise()
        begin = time.perf_counter()
        y = attend_flexibly(q, k, v, Documents.on(where.device, (tokens,)), rule)
        if y is None:
            return
        where.synchronise()
        seconds.append(time.perf_counter() - begin)
        expected = block_attention(q[:, None], k[:, None], v[:, None], rule)[:, 0].float()
        worst = max(worst, ((y.float() - expected).abs().max() / expected.abs().max()).item())
    report.note(other_sizes_seconds=seconds)
    report.check("other numbers of tokens: y", "within 2 %", f"{worst:.1e}", worst < 2e-2)
    last = seconds[-1]
    report.check("the last of them", "not compiled: under 1 s", f"{last:.3f} s", last < 1)
