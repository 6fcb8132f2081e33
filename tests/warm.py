"""Programs that others start by name, as Slurm does, in forked processes that have their imports.

A small client takes the place of the program.  It asks a server for the process, passes signals on
to it, and ends as it does.  If the client is killed, so is the process.

`WarmWorkers` starts the workers of pytest-xdist in this way.  One process makes the imports of a
whole session: the workers and the ranks of all their tests are its copies.
"""

from __future__ import annotations

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
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

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
        listener = _listener(place)
        self._server = ready_context().Process(target=_serve, args=(listener,))
        self._server.start()
        listener.close()

    def stop(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.join()


class WarmWorkers:
    """A process with the imports of tests and ranks, and `python`, which starts copies of it.

    Its copies share one fork server for their ranks.  It starts as cold as any other Python where
    there is a GPU, because CUDA does not survive a fork.
    """

    def __init__(self) -> None:
        self._place = Path(tempfile.mkdtemp())
        self.python = self._place / "python"
        listener = _listener(self._place)
        code = f"from tests.warm import _serve_workers; _serve_workers({listener.fileno()})"
        self._server = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # ranks write there, as where execnet starts the workers
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is for pytest, which ends its workers
        )
        listener.close()

    def stop(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.wait()
        shutil.rmtree(self._place)


def _serve_workers(listener: int) -> None:
    from tests.ranks import share_fork_server

    for name in ("pytest", "hypothesis.strategies", "xdist.remote", "tests.hf.models"):
        with suppress(ImportError):  # what is missing is not tested
            import_module(name)
    share_fork_server()
    _serve(socket.socket(fileno=listener))


def _listener(place: Path) -> socket.socket:
    """Return a socket for a server, after writing its clients to the directory `place`."""
    address = os.path.join(tempfile.mkdtemp(), "server")  # short, as an address must be
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(16)
    for name, words in (("python", []), ("vp-train", ["-m", "vp_train"])):
        client = place / name
        client.write_text(_CLIENT.format(interpreter=sys.executable, address=address, words=words))
        client.chmod(0o755)
    return listener


@dataclass
class _Job:
    """A client, and the process that it stands for."""

    client: socket.socket
    process: int
    end: int  # a descriptor that can be read when the process has ended


def _serve(listener: socket.socket) -> None:
    """Serve clients; this process never has another thread, so copies of it can do anything."""
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    job = _started(listener.accept()[0])
                    selector.register(job.client, selectors.EVENT_READ, job)
                    selector.register(job.end, selectors.EVENT_READ, job)
                elif key.fileobj is key.data.client:  # it was killed
                    selector.unregister(key.fileobj)
                    with suppress(ProcessLookupError):
                        os.killpg(key.data.process, signal.SIGKILL)
                else:
                    selector.unregister(key.fileobj)
                    os.close(key.data.end)
                    _, status = os.waitpid(key.data.process, 0)
                    with suppress(OSError):
                        key.data.client.send(str(os.waitstatus_to_exitcode(status)).encode())
                    with suppress(KeyError):
                        selector.unregister(key.data.client)
                    key.data.client.close()


def _started(client: socket.socket) -> _Job:
    message, descriptors, _, _ = socket.recv_fds(client, _MOST_BYTES, 3)
    process = os.fork()
    if not process:
        _become(descriptors, *json.loads(message))
    for descriptor in descriptors:
        os.close(descriptor)
    client.send(str(process).encode())
    return _Job(client, process, os.pidfd_open(process))


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
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
