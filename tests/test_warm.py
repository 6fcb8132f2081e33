"""A warm program has the words, output and signals of its client, and they end together."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tests.ranks import ready_context
from tests.warm import _listener, _serve


def start(programs, code):
    command = [programs / "python", "-u", "-c", f"import os, signal, sys, time\n{code}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_words_directory_environment_output_and_exit_code_are_its_own(programs, tmp_path):
    code = "import os, sys; print(os.getcwd(), os.environ['WORD'], sys.argv[1:]); sys.exit(7)"
    command = [programs / "python", "-u", "-P", "-c", code, "a b"]
    options = {"cwd": tmp_path, "env": {"WORD": "w"}, "capture_output": True, "text": True}
    done = subprocess.run(command, check=False, **options)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout == f"{tmp_path} w ['a b']\n"


def test_signals_reach_it_and_its_end_by_one_is_the_end_of_the_client(programs):
    asked = start(programs, "signal.signal(10, lambda *_: sys.exit(9)); print(1); time.sleep(60)")
    asked.stdout.readline()
    asked.send_signal(signal.SIGUSR1)
    assert asked.wait(20) == 9
    assert start(programs, "os.kill(os.getpid(), 9)").wait(20) == -signal.SIGKILL


def test_it_does_not_outlive_its_client(programs):
    client = start(programs, "print(os.getpid()); time.sleep(60)")
    process = int(client.stdout.readline())
    client.kill()
    until = time.monotonic() + 20
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < until
        time.sleep(0.01)


def connected(programs):
    """Return a socket to the server, as a client has it."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(re.search(r"connect\('(.*)'\)", (programs / "python").read_text()).group(1))
    return client


def test_clients_that_leave_at_any_moment_do_not_end_the_server(programs):
    asked = b'[["-c", ""], "/", {}]'
    for read in (0, 1, 2):
        for _ in range(8):
            with connected(programs) as client, open("/dev/null", "r+b") as null:
                socket.send_fds(client, [asked], [null.fileno()] * 3)
                for _ in range(read):
                    assert int(client.recv(32)) >= 0
    connected(programs).close()
    assert start(programs, "sys.exit(3)").wait(20) == 3


def serve(listener, alive):
    _serve(listener, alive.fileno())


def test_the_server_and_its_processes_end_with_the_one_that_started_it():
    place = Path(tempfile.mkdtemp())
    listener = _listener(place, place)
    context = ready_context()
    parent, alive = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(listener, parent), daemon=True)
    server.start()
    process = start(place, "print(1); time.sleep(60)")
    assert process.stdout.readline() == "1\n"
    alive.close()
    server.join(20)
    assert server.exitcode == 0
    assert not place.exists()
    assert process.wait(20) != 0
