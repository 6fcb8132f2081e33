"""The fixtures that the tests of compiled code share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest
import torch

from vp_train.model.elementwise import compiled_kernels
from vp_train.tensors import compiling

CACHED = (
    compiling.compiled,
    compiling.compiled_as_called,
    compiling.compiled_as_marked,
    compiled_kernels,
)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Let compiled functions be traced, but run as torch operations; yield what was traced."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    with compiled_by(backend, monkeypatch):
        yield seen


@contextmanager
def compiled_by(backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch compile with `backend`, as in a process that has compiled nothing yet."""
    import torch._dynamo

    compiler = torch.compile

    @functools.wraps(compiler)
    def compile_function(function, **options):
        return compiler(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(compiling, "_finds_compiler", lambda: True)
    monkeypatch.setattr(compiling, "_finds_headers", lambda: True)
    monkeypatch.setattr(compiling, "_given_up", Event())
    for cached in CACHED:
        cached.cache_clear()
    torch._dynamo.reset()
    yield
    for cached in CACHED:
        cached.cache_clear()
    torch._dynamo.reset()
