"""The fixtures that the tests of compiled code share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

import pytest
import torch

from vp_train.tensors import compiling

CACHED = (compiling.compiled, compiling.compiled_as_called, compiling.compiled_for_tokens)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Let compiled functions be traced, but run as torch operations; yield what was traced."""
    from torch._dynamo.aot_compile_types import SerializableCallable

    seen = []

    class Operations(SerializableCallable):
        def __init__(self, graph):
            self._graph = graph

        def __call__(self, *arguments):
            return self._graph(*arguments)

        @classmethod
        def serialize_compile_artifacts(cls, made):
            raise NotImplementedError

        @classmethod
        def deserialize_compile_artifacts(cls, data):
            raise NotImplementedError

    def backend(graph, inputs):
        seen.append(graph)
        return Operations(graph)

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
