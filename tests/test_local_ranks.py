"""The launcher on one machine: nothing listens beyond it, and all ranks end with the job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vp_train.commands.local_ranks import Stopped, loopback, run_ranks

LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


def children_of(pid):
    """Return the processes below `pid`."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *children_of(child)]
    return found


def listening(pids):
    """Return the addresses, as /proc/net has them, at which these processes listen."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(descriptor)
            except OSError:
                continue
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                found.add(fields[1].partition(":")[0])
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
def test_a_job_of_one_machine_listens_on_loopback_alone(tmp_path):
    words = ["model=nano", "data=synthetic", "parallel.pp=2", "run.steps=1000", "run.name=one"]
    job = subprocess.Popen(
        [sys.executable, "-m", "vp_train", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert job.stdout is not None
        lines = iter(job.stdout.readline, "")
        said = next((line for line in lines if line.startswith("step ")), None)
        assert said is not None
        addresses = listening([job.pid, *children_of(job.pid)])
        assert addresses  # gloo and the store do listen
        assert addresses <= LOOPBACK
        job.send_signal(signal.SIGTERM)
        rest, _ = job.communicate(timeout=60)
        assert "vp-train: stopped by SIGTERM; no checkpoint was written yet" in rest
        assert job.returncode == 128 + signal.SIGTERM
    finally:
        job.kill()
        job.wait()


def rank_that(code):
    return [
        sys.executable,
        "-c",
        f"import os, signal, sys, time; rank = int(os.environ['RANK'])\n{code}",
    ]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", {}),
        ("sys.exit(3 if rank == 1 else 0)", {1: 3}),
        (
            "os.kill(os.getpid(), signal.SIGKILL) if rank == 2 else time.sleep(60)",
            {2: -9, 0: -15, 1: -15},
        ),
    ],
)
def test_the_codes_of_failed_ranks_come_back_the_first_first(code, expected):
    began = time.monotonic()
    codes = run_ranks(rank_that(code), 3)
    assert codes == expected
    assert list(codes)[:1] == list(expected)[:1]
    assert time.monotonic() - began < 30


def test_a_rank_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr("vp_train.commands.local_ranks._PATIENCE_SECONDS", 1.0)
    code = "signal.signal(signal.SIGTERM, signal.SIG_IGN) if rank == 0 else time.sleep(1)\n"
    code += "time.sleep(60) if rank == 0 else sys.exit(5)"
    assert run_ranks(rank_that(code), 2) == {1: 5, 0: -15}  # our SIGKILL is no cause


def test_what_a_rank_has_started_ends_with_it(tmp_path):
    code = "import subprocess\nchild = subprocess.Popen(['sleep', '60'])\n"
    code += f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').write(str(child.pid))\n"
    code += f"while rank and not os.path.exists({str(tmp_path / '0')!r}): time.sleep(0.01)\n"
    code += "sys.exit(4) if rank else time.sleep(60)"
    assert set(run_ranks(rank_that(code), 2)) == {0, 1}
    for rank in range(2):
        assert ends((tmp_path / str(rank)).read_text())


def ends(pid):
    """Return whether process `pid` ends within some seconds."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split()[2] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_signal_to_the_launcher_ends_the_ranks():
    code = "time.sleep(0.3)\nrank or os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(60)"
    given = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    try:
        with pytest.raises(Stopped, match="SIGINT") as stopped:
            run_ranks(rank_that(code), 2)
        assert stopped.value.number == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, given)


def test_ranks_get_what_torchrun_would_set_and_what_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    checks = [
        f"[os.environ[name] for name in {names}] == [str(rank), str(rank), '2', '2', '127.0.0.1']",
        "os.environ['NCCL_SOCKET_IFNAME'] == 'eth7'",
        f"os.environ.get('GLOO_SOCKET_IFNAME') == {loopback().get('GLOO_SOCKET_IFNAME')!r}",
    ]
    assert run_ranks(rank_that(f"sys.exit(0 if all([{', '.join(checks)}]) else 9)"), 2) == {}
