"""Programs of ours in processes that are forked from one that has made their imports.

`Program` takes the place of `subprocess.Popen([sys.executable, ...])`, whose imports take three
seconds of CPU time each.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import IO, Any

import torch

from tests.ranks import ready_context


class Program:
    """A running `main`, an importable function that reads `sys.argv`, in a session of its own.

    It has the environment of this process, and `variables` besides.  What it writes comes out of
    the pipes `stdout` and `stderr`.  `with` kills it at the end if it still runs.
    """

    def __init__(
        self,
        main: Callable[[], Any],
        words: Sequence[str],
        *,
        directory: str | Path = ".",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        context = ready_context()
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        environment = {**os.environ, **(variables or {})}
        self._process = context.Process(
            target=_be,
            args=(
                main,
                [str(word) for word in words],
                os.path.abspath(directory),
                environment,
                *(theirs for _, theirs in pipes),
            ),
        )
        self._process.start()
        for _, theirs in pipes:
            theirs.close()
        self.stdout, self.stderr = (_text_of(ours) for ours, _ in pipes)

    @property
    def pid(self) -> int:
        """Return the process id."""
        return int(self._process.pid)

    def wait(self, seconds: float) -> int:
        """Return the exit code, negative after a signal.  Raises TimeoutExpired if it runs on."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("the program", seconds)
        return int(self._process.exitcode)

    def finish(self, seconds: float) -> subprocess.CompletedProcess[str]:
        """Return the exit code and what was written and not yet read, as subprocess.run does.

        Raises TimeoutExpired if it runs on.
        """
        said: dict[str, str] = {}

        def read(name: str, stream: IO[str]) -> None:
            said[name] = stream.read()

        readers = [
            Thread(target=read, args=pair, daemon=True)
            for pair in (("stdout", self.stdout), ("stderr", self.stderr))
        ]
        for reader in readers:
            reader.start()
        code = self.wait(seconds)
        for reader in readers:
            reader.join(seconds)
        return subprocess.CompletedProcess([], code, said.get("stdout"), said.get("stderr"))

    def kill(self) -> None:
        """Kill it and what it has started in its session, and wait for it."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Program:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        for stream in (self.stdout, self.stderr):
            stream.close()


def finished(
    main: Callable[[], Any], *words: str, seconds: float = 90, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a `Program` to its end, as subprocess.run does."""
    with Program(main, words, **options) as program:
        return program.finish(seconds)


def python() -> None:
    """Do what `python` does with the words of sys.argv: -m MODULE, -c CODE or a script, and more.

    A script finds its neighbours.  The current directory is not searched.
    """
    option, *words = (word for word in sys.argv[1:] if word not in ("-u", "-P"))
    if option == "-c":
        sys.argv = ["-c", *words[1:]]
        exec(words[0], {"__name__": "__main__"})
    elif option == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [option, *words]
        sys.path.insert(0, os.path.dirname(os.path.abspath(option)))
        runpy.run_path(option, run_name="__main__")


def _text_of(pipe: Connection) -> IO[str]:
    text = open(os.dup(pipe.fileno()), errors="replace")  # noqa: SIM115 - closed by its Program
    pipe.close()
    return text


def _be(
    main: Callable[[], Any],
    words: list[str],
    directory: str,
    environment: dict[str, str],
    stdout: Connection,
    stderr: Connection,
) -> None:
    os.setsid()
    for number, pipe in ((1, stdout), (2, stderr)):
        os.dup2(pipe.fileno(), number)
        pipe.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    tempfile.tempdir = None  # found anew, from TMPDIR
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    torch.set_num_threads(1)
    sys.argv = [main.__module__, *words]
    main()
