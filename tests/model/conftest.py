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


class Operations:
    """A graph that runs as torch operations, only for the kinds of inputs that it was made for.

    Like code of torch's compiler it is wrong for another dtype or another number of dimensions, and
    for other sizes where they are constants.
    """

    def __init__(self, graph: torch.fx.GraphModule) -> None:
        self._graph = graph
        self._kinds = [
            self._kind_of(node.meta["example_value"])
            for node in graph.graph.find_nodes(op="placeholder")
        ]

    def __call__(self, *arguments: Any) -> Any:
        for argument, kind in zip(arguments, self._kinds, strict=True):
            assert len(found := self._kind_of(argument)) == len(kind)
            assert all(mine in (None, other) for mine, other in zip(kind, found, strict=True))
        return self._graph(*arguments)

    @staticmethod
    def _kind_of(value: Any) -> tuple[Any, ...]:
        """Return dtype, device and sizes of a tensor; None is a size that is no constant."""
        if not isinstance(value, torch.Tensor):
            return (isinstance(value, torch.SymInt | int),)
        sizes = [size if isinstance(size, int) else None for size in value.shape]
        return value.dtype, value.device, *sizes


def made_ahead(graph: torch.fx.GraphModule) -> Any:
    """Return `Operations` of a kind that torch takes for code made ahead of time."""
    from torch._dynamo.aot_compile_types import SerializableCallable

    class Serializable(Operations, SerializableCallable):
        @classmethod
        def serialize_compile_artifacts(cls, made: Any) -> bytes:
            raise NotImplementedError

        @classmethod
        def deserialize_compile_artifacts(cls, data: bytes) -> Any:
            raise NotImplementedError

    return Serializable(graph)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Let compiled functions be traced, but run as torch operations; yield what was traced."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return made_ahead(graph)

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
