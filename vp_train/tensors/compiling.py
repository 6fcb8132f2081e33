"""torch.compile: where it works, how functions are compiled, and how it is turned off.

Compiled code takes seconds to make, so functions are compiled before the first step, for few
shapes.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, MutableMapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SHAPES = 64  # compiled shapes per function; torch runs further shapes uncompiled
_OFF = "TORCHDYNAMO_DISABLE"  # torch reads it too


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled for all shapes; only a dimension of size 1 is compiled again."""
    return _compile(function, dynamic=True)


@cache
def compiled_exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled for every shape anew.  That takes seconds, so use few shapes.

    It is for functions that are called often and have little to do on a CPU: without torch.compile
    around it, a call takes a third of the time.  No two tensors may share memory, and none may
    require a gradient.
    """
    made: dict[Any, Callable[..., Any]] = {}

    def call(*arguments: Any) -> Any:
        key = tuple(
            (each.dtype, each.shape, each.stride()) if isinstance(each, Tensor) else each
            for each in arguments
        )
        run = made.get(key)
        if run is None:
            run = made[key] = _build(function, arguments)
        return run(*[each for each in arguments if isinstance(each, Tensor)])

    return call


@torch.no_grad()
def _build(function: Callable[..., Any], arguments: Sequence[Any]) -> Callable[..., Any]:
    """Return `function` compiled for tensors like those of `arguments`; the rest is constant.

    Meanwhile no other thread may call what torch.compile has made.
    """
    _trust_instructions()
    import torch._inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    def of_tensors(*tensors: Tensor) -> Any:
        given = iter(tensors)
        return function(*(next(given) if isinstance(a, Tensor) else a for a in arguments))

    tensors: list[Any] = [each for each in arguments if isinstance(each, Tensor)]
    graph = make_fx(of_tensors)(*(each.clone() for each in tensors))
    run: Callable[..., Any] = torch._inductor.compile(graph, tensors)
    return run


@cache
def compiled_as_marked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled for every shape anew, but for dimensions marked as dynamic."""
    return _compile(function, dynamic=False)


@cache
def compiled_as_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled for its first shape; if there is another one, for all shapes."""
    return _compile(function, dynamic=None)


def _compile(function: Callable[..., Any], *, dynamic: bool | None) -> Callable[..., Any]:
    _trust_instructions()
    compiler: Callable[..., Callable[..., Any]] = torch.compile
    if "recompile_limit" in inspect.signature(compiler).parameters:
        return compiler(function, dynamic=dynamic, recompile_limit=_SHAPES)
    run = compiler(function, dynamic=dynamic)

    def call(*arguments: Any, **named: Any) -> Any:
        # Before torch 2.13 the limit is that of the calling thread, such as one of autograd.
        torch._dynamo.config.recompile_limit = _SHAPES
        return run(*arguments, **named)

    return call


def _trust_instructions() -> None:
    """Spare torch the test whether its compiler knows AVX512, which takes seconds.

    Where torch itself runs with AVX512, that follows from the C++20 which torch needs.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # read when inductor is imported


def turn_off(environment: MutableMapping[str, str]) -> None:
    """Let nothing be compiled in the process of `environment`: what can be compiled runs plainly.

    Triton's kernels of the vocabulary are no part of this.
    """
    environment[_OFF] = "1"


def compiles_on(device: torch.device) -> bool:
    """Return whether torch.compile works for `device`; a GPU needs Triton besides a compiler."""
    return has_compiler() and (device.type != "cuda" or has_triton())


def has_compiler() -> bool:
    """Return whether torch.compile works on this CPU, and is not turned off."""
    return os.environ.get(_OFF) != "1" and _finds_compiler()


@cache
def _finds_compiler() -> bool:
    """Return whether there is what torch.compile needs: g++ or the like, and Python.h."""
    compiler = shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    return compiler is not None and (Path(sysconfig.get_path("include")) / "Python.h").is_file()


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
