"""Two nodes on one machine: each has its own network, host name and mounts, and one cable.

A node is a set of Linux namespaces that a waiting process holds, so nothing is left when the tests
end, however they end.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Thread
from typing import IO, Any

from tests.programs import Program

_TOOLS = ("ip", "unshare", "nsenter", "mount")
_KINDS = ("net", "uts", "mnt")


@dataclass
class Job:
    """A program on a node, and the lines it has written so far."""

    program: Program
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        streams = (self.program.stdout, self.program.stderr)
        self._readers = [Thread(target=self._read, args=(one,), daemon=True) for one in streams]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append(line.rstrip())

    def wait_for(self, pattern: str, seconds: float) -> str:
        """Return the first line with `pattern`.  Raises AssertionError if there is none in time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for line in list(self.lines):
                if re.search(pattern, line):
                    return line
            if not any(reader.is_alive() for reader in self._readers):
                break
            time.sleep(0.05)
        raise AssertionError(f"no line with {pattern!r} within {seconds} s:\n{self.text}")

    def wait(self, seconds: float) -> int:
        """Return the exit code.  Raises TimeoutExpired if the process runs on."""
        code = self.program.wait(seconds)
        for reader in self._readers:
            reader.join(seconds)
        return code

    @property
    def text(self) -> str:
        """Return the last lines."""
        return "\n".join(self.lines[-60:])


@dataclass
class Node:
    """A node: its name, its address, and the process that holds its namespaces."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    jobs: list[Job] = field(default_factory=list)

    def _command(self, words: Sequence[str]) -> list[str]:
        return ["nsenter", f"--target={self.holder.pid}", "--net", "--uts", "--mount", "--", *words]

    def run(self, *words: str) -> None:
        """Run a command on the node, within seconds."""
        subprocess.run(self._command(words), check=True, capture_output=True, timeout=20)

    def start(self, main: Callable[[], Any], words: Sequence[str], directory: Path) -> Job:
        """Start an importable `main`, which reads sys.argv, on the node, in `directory`."""
        on_node = partial(_on_node, self.holder.pid, str(directory), main)
        program = Program(on_node, words, variables={"OMP_NUM_THREADS": "1"})
        self.jobs.append(Job(program))
        return self.jobs[-1]

    def hide(self, path: Path) -> None:
        """Put an empty directory in memory over `path`, on this node only."""
        self.run("mount", "-t", "tmpfs", "tmpfs", str(path))

    def replace(self, path: Path, other: Path) -> None:
        """Put the directory or file `other` over `path`, on this node only."""
        self.run("mount", "--bind", str(other), str(path))

    def cut_link(self) -> None:
        """Take the cable out of the node."""
        self.run("ip", "link", "set", "eth0", "down")

    def stop(self) -> None:
        """Kill what still runs on the node."""
        for job in self.jobs:
            job.program.kill()


def _on_node(pid: int, directory: str, main: Callable[[], Any]) -> None:
    """Move this process, which has one thread, into the namespaces of `pid` and call `main`."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in _KINDS:
        with open(f"/proc/{pid}/ns/{kind}") as file:
            if libc.setns(file.fileno(), 0):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number), file.name)
    platform._uname_cache = None  # type: ignore[attr-defined]  # this node has another name
    os.chdir(directory)
    main()


def why_not() -> str:
    """Return why this machine cannot make nodes, "" if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "nodes are Linux namespaces, and need root"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} not on the PATH (Debian: iproute2, util-linux)"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "ip", "link", "add", "eth0", "type", "veth"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return "" if tried.returncode == 0 else f"no namespaces here: {tried.stderr.strip()}"


@contextmanager
def two_nodes(directory: Path) -> Iterator[tuple[Node, Node]]:
    """Make two nodes with a cable between them; `directory` is for their /etc/hosts."""
    holders = [
        subprocess.Popen(["unshare", "--net", "--uts", "--mount", "cat"], stdin=subprocess.PIPE)
        for _ in range(2)
    ]
    first, second = (
        Node(f"vpnode{number}", f"10.77.0.{10 + number}", holder)
        for number, holder in enumerate(holders, 1)
    )
    try:
        hosts = directory / "hosts"
        hosts.write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"{node.address} {node.name}\n" for node in (first, second))
        )
        for node in (first, second):
            _wait_until(lambda node=node: _is_apart(node.holder.pid), 10)  # type: ignore[misc]
            node.run("hostname", node.name)
            node.run("ip", "link", "set", "lo", "up")
            node.replace(Path("/etc/hosts"), hosts)
        pair = ["type", "veth", "peer", "name", "eth0", "netns", str(second.holder.pid)]
        first.run("ip", "link", "add", "eth0", *pair)
        for node in (first, second):
            node.run("ip", "addr", "add", f"{node.address}/24", "dev", "eth0")
            node.run("ip", "link", "set", "eth0", "up")
        yield first, second
    finally:
        for node in (first, second):
            node.stop()
            node.holder.kill()
            node.holder.wait()


def _is_apart(pid: int) -> bool:
    """Return whether process `pid` has left our namespaces."""
    return all(
        os.readlink(f"/proc/{pid}/ns/{kind}") != os.readlink(f"/proc/self/ns/{kind}")
        for kind in _KINDS
    )


def _wait_until(holds: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"not within {seconds} s"
        time.sleep(0.01)
