"""All ranks of a job as processes of this machine, with nothing that listens beyond it.

The ranks find each other through a TCPStore of this process, on a port of the loopback interface.
torchrun's agent is not used on one machine: its rendezvous listens on every interface and unpickles
what it reads from a store that anybody may write to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_POLL_SECONDS = 0.05
_PATIENCE_SECONDS = 10.0  # between SIGTERM and SIGKILL, for ranks that are asked to end
_LOOPBACK = "lo"
_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """The launcher got a signal, and has ended the ranks."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def run_ranks(command: Sequence[str], num_ranks: int) -> dict[int, int]:
    """Run `command` once for each rank, and return the exit codes of those that failed.

    The first to fail comes first; -n stands for signal n.  When a rank fails the others are ended,
    with SIGTERM and, if that does not help, with SIGKILL.  Raises Stopped when this process is
    asked to end.
    """
    with _store(num_ranks) as port, _noting_signals() as signals:
        ranks = {
            rank: subprocess.Popen(
                command, env=_environment(rank, num_ranks, port), process_group=0
            )
            for rank in range(num_ranks)
        }
        try:
            codes: dict[int, int] = {}
            while len(codes) < num_ranks and not any(codes.values()) and not signals:
                codes |= _ended(ranks, codes)
                time.sleep(_POLL_SECONDS)
        finally:
            _end(ranks)
        # What ends a rank here is no cause of the end.
        codes |= {
            rank: code
            for rank, code in _ended(ranks, codes).items()
            if code not in (-signal.SIGTERM, -signal.SIGKILL)
        }
    if signals:
        raise Stopped(signals[0])
    return {rank: code for rank, code in codes.items() if code}


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """Return the environment of a rank: what torchrun would set, and the loopback interface."""
    ours = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 is not to listen itself
    }
    return loopback() | os.environ | ours


def loopback() -> dict[str, str]:
    """Return the settings that keep gloo and NCCL on the loopback interface, where there is one."""
    if _LOOPBACK not in (name for _, name in socket.if_nameindex()):
        return {}
    return {"GLOO_SOCKET_IFNAME": _LOOPBACK, "NCCL_SOCKET_IFNAME": _LOOPBACK}


@contextmanager
def _store(num_ranks: int) -> Iterator[int]:
    """Serve the store of a job on a port of the loopback interface."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    listening = socket.create_server(("127.0.0.1", 0))
    port: int = listening.getsockname()[1]
    store = TCPStore(
        "127.0.0.1",
        port,
        num_ranks,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    yield port
    del store


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Collect the signals that ask this process to end."""
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)

    handled = [number for number in _STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in handled}  # nohup ignores SIGHUP
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(
    ranks: Mapping[int, subprocess.Popen[bytes]], known: Mapping[int, int]
) -> dict[int, int]:
    """Return the exit codes of ranks that have ended and are not among `known`."""
    codes = {rank: process.poll() for rank, process in ranks.items() if rank not in known}
    return {rank: code for rank, code in codes.items() if code is not None}


def _end(ranks: Mapping[int, subprocess.Popen[bytes]]) -> None:
    """End the ranks that still run, and what ranks have started: each has a process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        until = time.monotonic() + _PATIENCE_SECONDS
        for process in ranks.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
