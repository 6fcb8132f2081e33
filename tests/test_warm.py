"""A warm program has the words, output and signals of its client, and they end together."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path


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
