"""torch.compile: where it works, how functions are compiled, and how it is turned off.

Compiled code takes seconds to make, so functions are compiled before the first step, for few
shapes.  What a CPU in 16 bits needs for every shape is in `kernels`.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, MutableMapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

_SHAPES = 64  # compiled shapes per function; torch runs further shapes uncompiled
_OFF = "TORCHDYNAMO_DISABLE"  # torch reads it too


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled for all shapes; only a dimension of size 1 is compiled again."""
    return _compile(function, dynamic=True)


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
    """Return whether code for this CPU can be compiled, and that is not turned off."""
    return os.environ.get(_OFF) != "1" and _finds_compiler()


@cache
def _finds_compiler() -> bool:
    """Return whether there is what torch.compile needs: g++ or the like, and Python.h."""
    headers = Path(sysconfig.get_path("include"))
    return cpp_compiler() is not None and (headers / "Python.h").is_file()


def cpp_compiler() -> str | None:
    """Return the path of the C++ compiler that torch.compile calls too, None if there is none."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
