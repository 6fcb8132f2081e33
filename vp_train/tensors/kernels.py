"""The kernels of `kernels.cpp`: built once per machine, and called on the memory of tensors.

They are for matrices in 16 bits on a CPU, beside sums in fp32.  A build takes a second and is kept
in a directory of the user.  Any thread may call them, for any shape.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from vp_train.tensors.compiling import (
    build_directory,
    cpp_compiler,
    has_cpp_compiler,
    reason_of,
    tell_failure,
)

_SOURCE = Path(__file__).with_name("kernels.cpp")
_ELEMENTS = {torch.bfloat16: "BFloat16", torch.float16: "Float16"}
_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
# Pointers, whole numbers of 64 bits, floats and flags, in order; the number of threads follows.
_ARGUMENTS = {
    "extend": "ppnpppnnnff",
    "combine": "ppfppnn",
    "input_term": "pppppppffppnn",
    "input_term_rounded": "pppppppffppnn",
    "scale": "ppppfpnn",
    "scale_rounded": "ppppfpnn",
    "subtract_targets": "pppppfnn",
    "accumulate": "ppppninn",
    "accumulate_transposed": "pppnnn",
}
_INSTRUCTIONS = {  # by what torch itself runs with
    "AVX2": ("-mavx2", "-mfma"),
    "AVX512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"),
        "-mprefer-vector-width=512",
    ),
}


def suits(matrix: Tensor, *sums: Tensor) -> bool:
    """Return whether the kernels take `matrix` [M, N] in 16 bits, and `sums` in fp32 beside it.

    All must be contiguous.  The kernels need a C++ compiler, see `has_cpp_compiler`.  Where they
    cannot be built this says so once.
    """
    is_matrix = matrix.device.type == "cpu" and matrix.dim() == 2 and matrix.is_contiguous()
    return is_matrix and suits_sums(matrix.dtype, *sums)


def suits_sums(dtype: torch.dtype, *sums: Tensor) -> bool:
    """Return whether the kernels take `sums` on a CPU, beside matrices of `dtype`."""
    if dtype not in _ELEMENTS or not has_cpp_compiler() or not _are_built(dtype):
        return False
    return all(
        each.dtype is torch.float32 and each.device.type == "cpu" and each.is_contiguous()
        for each in sums
    )


def run(name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
    """Call the function `name` of `kernels.cpp` for matrices of `dtype`.

    None is a null pointer.  Raises RuntimeError where they cannot be built.
    """
    addresses = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
    assert len(addresses) == len(_ARGUMENTS[name])
    _functions(dtype)[name](*addresses, torch.get_num_threads())


@cache
def _are_built(dtype: torch.dtype) -> bool:
    try:
        _functions(dtype)
    except RuntimeError as error:
        tell_failure(reason_of(str(error)))
        return False
    return True


@cache
def _functions(dtype: torch.dtype) -> Mapping[str, Callable[..., None]]:
    """Return the functions by name, built for `dtype`."""
    library = _load(_ELEMENTS[dtype])
    functions = {}
    for name, arguments in _ARGUMENTS.items():
        function = functions[name] = getattr(library, name)
        function.argtypes = [_TYPES[letter] for letter in arguments + "i"]
        function.restype = None
    return functions


def _load(element: str) -> ctypes.CDLL:
    """Load the kernels for `element`, and build them unless this user has done so before."""
    compiler = cpp_compiler()
    assert compiler is not None
    command = [compiler, *_flags(), f"-DELEMENT={element}"]
    key = hashlib.sha256(_SOURCE.read_bytes() + "\n".join(command).encode()).hexdigest()[:32]
    try:
        with ExitStack() as stack:
            directory = build_directory()
            if directory is None:
                own = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
                directory = Path(stack.enter_context(own))
            path = directory / f"kernels-{key}.so"
            with (directory / "lock").open("w") as lock:  # one process builds, the others wait
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not path.exists():
                    _build(command, path)
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise RuntimeError(f"{_SOURCE.name}: {error}; {_WAY_OUT}") from error


_WAY_OUT = "mend CXX or TMPDIR"


def _build(command: list[str], path: Path) -> None:
    unfinished = path.with_suffix(".unfinished")
    done = subprocess.run(
        [*command, str(_SOURCE), "-o", str(unfinished)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        reason = next((line for line in lines if "error" in line), lines[-1])
        raise RuntimeError(f"{command[0]} cannot build {_SOURCE.name}: {reason}; {_WAY_OUT}")
    unfinished.replace(path)


def _flags() -> tuple[str, ...]:
    return (
        *("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
        "-fopenmp" if sys.platform == "linux" else "-fopenmp-simd",
        *_INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), ()),
    )
