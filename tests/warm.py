"""Programs that others start by name, as Slurm does, in forked processes that have their imports.

A small client takes the place of the program.  It asks a server for the process, passes signals on
to it, and ends as it does.  If the client is killed, so is the process.

`WarmWorkers` starts the workers of pytest-xdist in this way.  One process makes the imports of a
whole session: the workers and the ranks of all their tests are its copies.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from contextlib import chdir, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import parent_process
from pathlib import Path

import pytest

_MOST_BYTES = 1 << 17  # of the words and the environment of a process

_CLIENT = """\
#!{interpreter} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
passed_on = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)
asked = [{words!r} + sys.argv[1:], os.getcwd(), dict(os.environ)]
socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
process = int(server.recv(32))
for number in passed_on:
    signal.signal(number, lambda number, frame: os.kill(process, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
code = int(server.recv(32))
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class WarmPrograms:
    """The directory `place` with the programs `python` and `vp-train`, and the server behind it."""

    def __init__(self, place: Path) -> None:
        from tests.ranks import ready_context

        self.place = place
        self._address = Path(tempfile.mkdtemp())  # a short path, as the address of a socket must be
        listener = _listener(place, self._address)
        self._server = ready_context().Process(
            target=_serve_programs, args=(listener,), daemon=True
        )
        self._server.start()
        listener.close()

    def stop(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.join()
        shutil.rmtree(self._address, ignore_errors=True)


class WarmWorkers:
    """A process with the imports of tests and ranks, and `python`, which starts copies of it.

    It has imported the modules of `tests` too, the words of a pytest that runs in `directory`:
    pytest rewrites their asserts, which takes longer than all that is left to its workers.

    Its copies share one fork server for their ranks.  It starts as cold as any other Python where
    there is a GPU, because CUDA does not survive a fork.
    """

    def __init__(self, directory: Path, tests: Sequence[str]) -> None:
        self._place = Path(tempfile.mkdtemp())
        self.python = self._place / "python"
        listener = _listener(self._place, self._place)
        parent, self._alive = os.pipe()
        words = listener.fileno(), parent, str(directory), list(tests)
        self._server = subprocess.Popen(
            [sys.executable, "-c", f"from tests.warm import _serve_workers as run; run(*{words})"],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # ranks write there, as where execnet starts the workers
            pass_fds=[listener.fileno(), parent],
            start_new_session=True,  # Ctrl-C is for pytest, which ends its workers
        )
        listener.close()
        os.close(parent)

    def stop(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.wait()
        os.close(self._alive)
        shutil.rmtree(self._place, ignore_errors=True)


def _serve_workers(listener: int, parent: int, directory: str, tests: list[str]) -> None:
    from tests.ranks import share_fork_server

    for name in ("pytest", "hypothesis.strategies", "xdist.remote", "tests.hf.models"):
        with suppress(ImportError):  # what is missing is not tested
            import_module(name)
    server = socket.socket(fileno=listener)
    share_fork_server(str(Path(server.getsockname()).with_name("ranks")))
    with chdir(directory):
        _import_tests(tests)
    _serve(server, parent)


def _import_tests(tests: list[str]) -> None:
    """Import the test modules that pytest finds by the words `tests`.

    Meanwhile another process begins with the last of them, for their bytecode.
    """
    words = ["--collect-only", "-n0", "-p", "no:cacheprovider"]
    files = sorted(str(file) for word in tests for file in Path(word).rglob("test_*.py"))
    helper = os.fork() if files else None
    if helper == 0:
        pytest.main([*words, *reversed(files)])
        os._exit(0)
    pytest.main([*words, *tests])
    if helper:
        _kill(helper)
        os.waitpid(helper, 0)


def _serve_programs(listener: socket.socket) -> None:
    parent = parent_process()
    assert parent is not None
    _serve(listener, parent.sentinel)


def _listener(place: Path, address: Path) -> socket.socket:
    """Return a socket of a server in the directory `address`, and write its clients to `place`."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(address / "server"))
    listener.listen(16)
    for name, words in (("python", []), ("vp-train", ["-m", "vp_train"])):
        client = place / name
        client.write_text(
            _CLIENT.format(interpreter=sys.executable, address=str(address / "server"), words=words)
        )
        client.chmod(0o755)
    return listener


@dataclass
class _Job:
    """A client, and the process that it stands for."""

    client: socket.socket
    process: int
    end: int  # a descriptor that can be read when the process has ended


def _serve(listener: socket.socket, parent: int) -> None:
    """Serve clients until `parent` can be read, because the process that started this has ended.

    This process never has another thread, so copies of it can do anything.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(parent, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj: key.data for key, _ in selector.select()}
            if parent in ready:
                jobs = {key.data.process for key in selector.get_map().values() if key.data}
                for process in jobs:
                    _kill(process)
                shutil.rmtree(Path(listener.getsockname()).parent, ignore_errors=True)
                return
            for job in {job.process: job for job in ready.values() if job is not None}.values():
                if job.end in ready:
                    _end(job, selector)
                else:  # its client was killed
                    selector.unregister(job.client)
                    _kill(job.process)
            if listener in ready:
                _start(listener.accept()[0], selector)


def _kill(process: int) -> None:
    for kill in (os.kill, os.killpg):  # it may not have become the leader of its group yet
        with suppress(ProcessLookupError):
            kill(process, signal.SIGKILL)


def _end(job: _Job, selector: selectors.BaseSelector) -> None:
    """Tell the client how its process has ended."""
    _, status = os.waitpid(job.process, 0)
    with suppress(OSError):
        job.client.send(str(os.waitstatus_to_exitcode(status)).encode())
    selector.unregister(job.end)
    with suppress(KeyError):  # the client was killed before
        selector.unregister(job.client)
    os.close(job.end)
    job.client.close()


def _start(client: socket.socket, selector: selectors.BaseSelector) -> None:
    """Start the process that a client asks for."""
    message, descriptors, _, _ = socket.recv_fds(client, _MOST_BYTES, 3)
    if not message:  # it was killed
        client.close()
        return
    process = os.fork()
    if not process:
        for key in list(selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
            else:
                os.close(key.fd)
        selector.close()
        client.close()
        _become(descriptors, *json.loads(message))
    for descriptor in descriptors:
        os.close(descriptor)
    with suppress(OSError):  # it was killed, which can be read from it
        client.send(str(process).encode())
    job = _Job(client, process, os.pidfd_open(process))
    selector.register(client, selectors.EVENT_READ, job)
    selector.register(job.end, selectors.EVENT_READ, job)


def _become(
    descriptors: Sequence[int], words: list[str], directory: str, environment: Mapping[str, str]
) -> None:
    from tests.programs import python

    code: object = 1
    try:
        os.setsid()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tempfile.tempdir = None  # found anew, from TMPDIR
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        sys.argv = ["python", *words]
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the descriptor is open already
        python()
        code = 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
