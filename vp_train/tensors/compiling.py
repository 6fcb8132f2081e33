"""torch.compile: where it works, how functions are compiled, and how it is turned off.

Compiled code takes seconds to make, so functions are compiled before the first step, for few
shapes.  What a CPU in 16 bits needs for every shape is in `kernels`.
"""

from __future__ import annotations

import fcntl
import importlib.util
import inspect
import os
import shutil
import stat
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Event, Lock, Thread
from typing import IO, Any

import torch
from torch import Tensor

_SHAPES = 64  # compiled shapes per function; torch runs further shapes uncompiled
_MOST_METADATA = 4_096  # entries of a table of compiled code
_OFF = "TORCHDYNAMO_DISABLE"  # torch reads it too
_PATIENCE_SECONDS = 120.0  # with another process that compiles
_SILENT_SECONDS = 1.0  # of compiling, before a line says so
# Seconds between two lines on how long it takes so far, by whether stdout is a terminal.
_EVERY_SECONDS = {True: 1.0, False: 10.0}
_THREADS = "TORCHINDUCTOR_COMPILE_THREADS"  # torch reads it
_NO_KERNEL = ("No valid triton configs", "No triton configs")  # how torch begins to say so
_compiling = Lock()  # before torch 2.13 settings of dynamo are those of all threads
_given_up = Event()  # since torch 2.13 its own switch counts for the calling thread only


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled for all shapes; only a dimension of size 1 is compiled again.

    It takes tensors and hashable constants by position, and returns tensors without history.
    """
    return _ByMetadata(function, dynamic=True)


@cache
def compiled_for_tokens(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what `compiled` does, for all numbers of tokens.

    These are the first dimension of a matrix [T, ..], and the first two of more dimensions [s, b,
    ..].  All other sizes are constants, and so is that of a vector, which is a weight.
    """
    return _ByMetadata(function, dynamic=False)


class _ByMetadata:
    """A compiled function whose code a table finds, by the metadata of its arguments.

    torch.compile would evaluate its guards in every call.  Here that happens for metadata that is
    new, and never again.  So global state that guards would see, such as deterministic algorithms,
    must not change after the first call.  Where torch cannot compile ahead of time, torch.compile
    calls the function, with guards.
    """

    def __init__(self, function: Callable[..., Any], *, dynamic: bool) -> None:
        self._function, self._dynamic = function, dynamic
        self._table: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._made_ahead: list[Any] = []
        guarded = _compile(function, dynamic=dynamic)
        self._with_guards = lambda *arguments: guarded(*map(_marked, arguments))

    def __call__(self, *arguments: Any) -> Any:
        if _given_up.is_set():
            return self._function(*arguments)
        metadata = tuple(map(_metadata, arguments))
        run = self._table.get(metadata)
        if run is None:
            with _compiling:
                run = self._code_for(tuple(map(_marked, arguments)))
                if len(self._table) >= _MOST_METADATA:  # lengths that vary without end
                    self._table.clear()
                self._table[metadata] = run
        return run(*arguments)

    def _code_for(self, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        """Return what runs for `arguments`; compile it if nothing else suits them."""
        for made in self._made_ahead:
            if made.guard_check(*arguments):
                return made.fn  # type: ignore[no-any-return]
        if len(self._made_ahead) >= _SHAPES:
            return self._function
        try:
            self._made_ahead.append(self._compile_ahead(arguments))
        except Exception:  # of an interface that may change; an error of the code comes up again
            return self._with_guards
        return self._made_ahead[-1].fn  # type: ignore[no-any-return]

    def _compile_ahead(self, arguments: tuple[Any, ...]) -> Any:
        # Marks for profilers would be made in every call.
        with torch._dynamo.config.patch(enable_aot_compile=True, record_runtime_overhead=False):
            whole: Any = torch.compile(self._function, fullgraph=True, dynamic=self._dynamic)
            return whole.aot_compile((arguments, {}))


def _metadata(argument: Any) -> Any:
    """Return all of an argument that compiled code may depend on."""
    if not isinstance(argument, Tensor):
        return type(argument), argument
    return argument.dtype, argument.device, argument.shape, argument.stride()


def _marked(argument: Any) -> Any:
    """Return an argument as code is compiled for it: detached, its tokens marked as dynamic.

    Compiled code would be made again for a tensor that requires a gradient where the first one did
    not, as in a validation.
    """
    if not isinstance(argument, Tensor):
        return argument
    tensor = argument.detach()
    if tensor.dim() > 1:  # not a weight
        torch._dynamo.maybe_mark_dynamic(tensor, [0, 1] if tensor.dim() > 2 else [0])
    return tensor


@cache
def compiled_as_called(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` compiled for its first shape; if there is another one, for all shapes."""
    return _compile(function, dynamic=None)


def _compile(function: Callable[..., Any], *, dynamic: bool | None) -> Callable[..., Any]:
    prepare_inductor()
    compiler: Callable[..., Callable[..., Any]] = torch.compile
    takes_limit = "recompile_limit" in inspect.signature(compiler).parameters
    limit = {"recompile_limit": _SHAPES} if takes_limit else {}
    run = compiler(function, dynamic=dynamic, **limit)

    def call(*arguments: Any, **named: Any) -> Any:
        if _given_up.is_set():
            return function(*arguments, **named)
        if not takes_limit:
            # Before torch 2.13 the limit is a setting, maybe of the calling thread only.
            torch._dynamo.config.recompile_limit = _SHAPES
        return run(*arguments, **named)

    return call


def prepare_inductor() -> None:
    """Spare torch's compiler two things on a CPU; call this before it is imported.

    Where torch itself runs with AVX512 its C++20 compiler knows it, and the test takes seconds.
    Worker processes would compile for GPUs only, and each rank would start some.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault(_THREADS, "1")


@contextmanager
def announced(parts: Sequence[str]) -> Iterator[None]:
    """Print which parts of a run are compiled inside, how long so far, and how long at the end.

    Nothing is printed without parts, or if it takes less than a second.  A thread prints the first
    lines; there is none any more at the end.
    """
    began, has_said, has_ended = time.monotonic(), Event(), Event()
    is_terminal = sys.stdout.isatty()

    def announce() -> None:
        if has_ended.wait(_SILENT_SECONDS):
            return
        has_said.set()
        _say(f"compile   {', '.join(parts)}: once on this machine, later starts take less")
        while not has_ended.wait(_EVERY_SECONDS[is_terminal]):
            line = f"compile   {time.monotonic() - began:.0f} s so far"
            _say(line, end="\r" if is_terminal else "\n")  # the next line takes its place

    thread = Thread(target=announce, daemon=True)
    if parts:
        thread.start()
    try:
        yield
    finally:
        has_ended.set()
        if parts:
            thread.join()
    if has_said.is_set():
        _say(f"compile   took {time.monotonic() - began:.1f} s")


def _say(line: str, end: str = "\n") -> None:
    with suppress(BrokenPipeError):  # a reader like `head`; the reporter notices it, too
        print(line, end=end, flush=True)


def compiles_alone() -> bool:
    """Return whether torch's compiler starts no worker, after `prepare_inductor`."""
    return os.environ.get(_THREADS) in ("0", "1")


@contextmanager
def compile_one_first() -> Iterator[None]:
    """Let one process of this user and machine run what is inside, and then all others at once.

    torch keeps compiled code on disk, so the others load what the first one has made.  Inside, no
    process may wait for another.  After two minutes the others go on too, and at once where files
    cannot be locked.
    """
    directory = build_directory()
    with ExitStack() as stack:
        if directory is not None:
            with suppress(OSError):
                _await_turn(stack.enter_context((directory / "compiling").open("w")))
        yield


def _await_turn(lock: IO[str]) -> None:
    """Return when no other process holds `lock` alone; hold it alone if nobody has held it."""
    if _locked(lock, fcntl.LOCK_EX):
        return
    until = time.monotonic() + _PATIENCE_SECONDS
    while not _locked(lock, fcntl.LOCK_SH) and time.monotonic() < until:
        time.sleep(0.05)


def _locked(lock: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def build_directory() -> Path | None:
    """Return a directory for what is compiled.

    None if others may write to the one there is, or if there is no place for one.
    """
    try:
        directory = Path(tempfile.gettempdir()) / f"vp_train_{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
    except OSError:
        return None
    safe = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return directory if safe and not found.st_mode & 0o022 else None


def turn_off(environment: MutableMapping[str, str]) -> None:
    """Let nothing be compiled in the process of `environment`: what can be compiled runs plainly.

    Triton's kernels of the vocabulary are no part of this.
    """
    environment[_OFF] = "1"


def is_turned_off() -> bool:
    """Return whether nothing is to be compiled in this process."""
    return os.environ.get(_OFF) == "1"


def give_up() -> None:
    """Run plainly from now on, in every thread, what torch was to compile.

    `compiles_on` is then False.  Kernels in C++ go on.
    """
    _given_up.set()


def is_failure(error: Exception) -> bool:
    """Return whether torch says with `error` that it cannot compile something.

    Where a kernel needs more shared memory than a GPU has, torch may notice when the kernel is
    launched first, and raise a RuntimeError.
    """
    errors = sys.modules.get("torch._dynamo.exc")  # absent before anything is compiled
    if errors is not None and isinstance(error, errors.TorchDynamoException):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith(_NO_KERNEL)


def reason_of(message: str) -> str:
    """Return why something cannot be compiled in one line: the first one, and the first error."""
    first, *others = message.strip().splitlines() or ["no reason is known"]
    errors = [line.strip() for line in others if "error:" in line]
    line = ": ".join([first.strip(), *errors[:1]])
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def tell(words: str) -> None:
    """Say once per node what is not compiled."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(words, file=sys.stderr, flush=True)


def tell_failure(reason: str) -> None:
    """Say once per node that the run goes on without what could not be compiled."""
    tell(f"going on without compiling, more slowly: {reason}")


def compiles_on(device: torch.device) -> bool:
    """Return whether torch.compile works for `device`."""
    return not remedy_for(device)


def remedy_for(device: torch.device) -> str:
    """Return in words what to do so that torch.compile works for `device`, "" if it does."""
    remedies = {
        "start a new process, because torch could not compile in this one": _given_up.is_set(),
        f"unset {_OFF}": is_turned_off(),
        "install a C++ compiler": not _finds_compiler(),
        "install the headers of Python": not _finds_headers(),
        "install triton": device.type == "cuda" and not has_triton(),
    }
    return " and ".join(words for words, is_needed in remedies.items() if is_needed)


def has_cpp_compiler() -> bool:
    """Return whether C++ can be compiled, and that is not turned off."""
    return not is_turned_off() and _finds_compiler()


@cache
def _finds_compiler() -> bool:
    return cpp_compiler() is not None


@cache
def _finds_headers() -> bool:
    return (Path(sysconfig.get_path("include")) / "Python.h").is_file()


def cpp_compiler() -> str | None:
    """Return the path of the C++ compiler that torch.compile calls too, None if there is none."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
