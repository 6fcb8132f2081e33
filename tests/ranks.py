"""Real gloo processes for tests.

`Ranks` are started once per world size and reused by many cases.  `in_processes` starts new
processes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from importlib import import_module
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch
import torch.multiprocessing as multiprocessing

from tests.meshes import forget


class RankFailed(AssertionError):
    """A rank raised, died or hung; the message contains its traceback or stack."""


def _serve(rank: int, world_size: int, port: int, pipe: Connection, stacks: str) -> None:
    import torch.distributed as dist

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for pytest, which ends its ranks
    _end_with_parent()
    torch.set_num_threads(1)
    file = open(stacks, "w")  # noqa: SIM115 - open as long as the process
    faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
    store = dist.TCPStore(
        "127.0.0.1", port, world_size, is_master=rank == 0, timeout=timedelta(seconds=60)
    )
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    while True:
        task = pipe.recv()
        if task is None:
            os._exit(0)
        function, arguments = task
        try:
            pipe.send(("done", function(rank, world_size, *arguments)))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))


def _end_with_parent() -> None:
    """End this process as soon as the one that started it has ended, whatever a test does."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def ready_context() -> Any:
    """Return a context whose processes start with the imports of ranks done.

    The imports take seconds.  The fork server does them once.
    """
    if torch.cuda.is_available():  # CUDA does not survive a fork
        return multiprocessing.get_context("spawn")
    with _STARTING:  # not in two threads, which would leave each other's directory behind
        _start_fork_server()
    return multiprocessing.get_context("forkserver")


_STARTING = Lock()


def share_fork_server(address: str) -> None:
    """Make the imports of ranks, and start a fork server for this process and all its copies.

    `address` is where it makes its socket.

    By itself, multiprocessing starts one for every process that wants one.  It still does so in
    Python 3.14 and later, where a fork server asks for a key.
    """
    import_module("tests.preloaded")
    if sys.version_info >= (3, 14):
        return
    resource_tracker.ensure_running()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        alive, keeps_alive = os.pipe()  # the server ends with the last copy
        shared = forkserver._forkserver  # type: ignore[attr-defined]
        shared._forkserver_address = address  # processes of the server know it too
        shared.ensure_running = forkserver.ensure_running = lambda: None
        if not os.fork():
            try:
                os.close(keeps_alive)
                forkserver.main(listener.fileno(), alive, [])
            finally:
                os._exit(0)
        os.close(alive)
    shared._forkserver_alive_fd = keeps_alive


@cache
def _start_fork_server() -> None:
    """Start the fork server where it finds `tests`: a test may have another current directory."""
    multiprocessing.set_forkserver_preload(["tests.preloaded"])
    with contextlib.chdir(Path(__file__).parents[1]):
        forkserver.ensure_running()


def free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def in_processes(function: Callable[..., None], arguments: tuple[Any, ...], nprocs: int) -> None:
    """Run function(rank, *arguments) in `nprocs` new processes.

    It replaces `torch.multiprocessing.spawn`, which starts more slowly.  Raises RankFailed if a
    process fails.
    """
    context = ready_context()
    processes = [
        context.Process(target=function, args=(rank, *arguments), daemon=True)
        for rank in range(nprocs)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RankFailed(f"{function.__name__} left with {codes}")


class Ranks:
    """`world_size` processes that stay alive, with a default gloo group."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._rests = True

    def run(self, function: Callable[..., Any], *arguments: Any, timeout: float = 60) -> list[Any]:
        """Run function(rank, world_size, *arguments) on every rank; return results in rank order.

        `function` must be importable.  Raises RankFailed with the traceback of a rank that raised,
        or with the stacks of all ranks after `timeout` seconds.  The next run then starts new
        processes.
        """
        if not self._processes:
            self._start()
        self._rests = False
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results: dict[int, Any] = {}
        while len(results) < self.world_size:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, timeout)
            if not ready:
                raise RankFailed(
                    f"no answer within {timeout} s; stacks of all ranks:\n{self._stacks_of_all()}"
                )
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    status, value = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(10)
                    code = self._processes[rank].exitcode
                    status, value = "failed", f"the process died with exit code {code}"
                if status == "failed":
                    self.stop()
                    raise RankFailed(f"rank {rank} of {self.world_size}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world_size)]

    def rest(self) -> None:
        """Destroy the groups that tests have left, because idle gloo groups keep a CPU busy."""
        if self._processes and not self._rests:
            self.run(forget)
            self._rests = True

    def stop(self) -> None:
        """Kill the processes; the next run starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        if self._processes:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        port = free_port()
        context = ready_context()
        self._directory = tempfile.mkdtemp()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            stacks = os.path.join(self._directory, str(rank))
            process = context.Process(
                target=_serve, args=(rank, self.world_size, port, theirs, stacks), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _stacks_of_all(self) -> str:
        for process in self._processes:
            os.kill(process.pid, signal.SIGUSR1)
        for process in self._processes:
            process.join(0.5)
        texts = []
        for rank in range(self.world_size):
            with open(os.path.join(self._directory, str(rank))) as file:
                texts.append(f"rank {rank}:\n{file.read()}")
        self.stop()
        return "\n".join(texts)
