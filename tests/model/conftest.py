"""The fixtures that the tests of compiled code share."""

from __future__ import annotations

import functools
from collections.abc import Iterator

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
    import torch._dynamo

    compiler, seen = torch.compile, []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    @functools.wraps(compiler)
    def compile_function(function, **options):
        return compiler(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile_function)
    monkeypatch.setattr(compiling, "_finds_compiler", lambda: True)
    for cached in CACHED:
        cached.cache_clear()
    torch._dynamo.reset()
    yield seen
    for cached in CACHED:
        cached.cache_clear()
    torch._dynamo.reset()
