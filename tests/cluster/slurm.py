"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, on loopback."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.ranks import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
GRACE_SECONDS = 5  # between the signals of a preemption or scancel and the end
_CALL_SECONDS = 30

CONFIG = """\
ClusterName=vp_train
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.sock
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdSpoolDir={directory}/spool-%n
StateSaveLocation={directory}/state
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
SlurmdTimeout=15
KillWait={grace}
EioTimeout=5
MinJobAge=3600
NodeName=one,two NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]},{ports[2]} CPUs=4
PartitionName=low Nodes=one,two Default=YES MaxTime=INFINITE State=UP PriorityTier=1 \
GraceTime={grace} OverSubscribe=FORCE:1
PartitionName=high Nodes=one,two MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Return why no Slurm can run here, "" if one can."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"no {', '.join(absent)}: apt-get install slurm-wlm munge" if absent else ""


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Slurm:
    """A running cluster of the nodes `one` and `two`, with the partitions `low` and `high`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.chmod(0o755)
        (directory / "state").mkdir()
        key = directory / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        config = directory / "slurm.conf"
        ports = [free_port() for _ in range(3)]
        host = socket.gethostname().partition(".")[0]
        words = {"directory": directory, "ports": ports, "host": host, "grace": GRACE_SECONDS}
        config.write_text(CONFIG.format(**words))
        kept = {name: value for name, value in os.environ.items() if "SLURM" not in name}
        self.environment = {**kept, "SLURM_CONF": str(config), "PATH": _path()}
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid"}
        files |= {"log-file": "munged.log", "seed-file": "munged.seed"}
        self.call(
            "munged", "--force", *(f"--{name}={directory / file}" for name, file in files.items())
        )
        self.call("slurmctld", "-c")
        self.call("slurmd", "-N", "one")
        self.call("slurmd", "-N", "two")
        self.wait_for(
            lambda: self.call("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D") == "2"
        )

    def call(self, *words: str, check: bool = True, **variables: str) -> str:
        """Run a program of Slurm, and return what it prints."""
        done = subprocess.run(
            words,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_CALL_SECONDS,
            check=False,
            cwd=self.directory,
        )
        assert done.returncode == 0 or not check, done.stdout
        return done.stdout.strip()

    def wait_for(self, happened, seconds: float = 150.0) -> None:
        """Wait until `happened()` is true; the error shows the ends of all logs and outputs."""
        until = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < until, self._logs()
            time.sleep(0.1)

    def _logs(self) -> str:
        files = [*self.directory.glob("*.log"), *self.directory.glob("*.out")]
        return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in sorted(files))

    def submit(self, script: Path, *words: str, options: tuple[str, ...] = (), **variables: str):
        """Submit a job of both nodes, and return it."""
        common = ("--parsable", "--nodes=2", f"--output={self.directory}/%j.out")
        number = self.call("sbatch", *common, *options, str(script), *words, **variables)
        return SlurmJob(self, number)

    def stop(self) -> None:
        """End all jobs and the cluster."""
        self.call("scancel", "--user=root", "--signal=KILL", check=False)
        self.call("scontrol", "shutdown", check=False)
        for file in self.directory.glob("*.pid"):
            try:
                os.kill(int(file.read_text()), signal.SIGTERM)
            except (ProcessLookupError, ValueError, FileNotFoundError):
                continue


class SlurmJob:
    """A job that was submitted."""

    def __init__(self, slurm: Slurm, number: str) -> None:
        self.slurm, self.number = slurm, number

    @property
    def said(self) -> str:
        """Return what the job has written so far."""
        file = self.slurm.directory / f"{self.number}.out"
        return file.read_text() if file.exists() else ""

    def fact(self, name: str) -> str:
        """Return a field of `scontrol show job`."""
        shown = self.slurm.call("scontrol", "show", "job", self.number)
        found = re.search(rf"\b{name}=(\S*)", shown)
        assert found is not None, shown
        return found[1]

    def wait_for(self, words: str, seconds: float = 150.0) -> None:
        """Wait until the job has written these words."""
        self.slurm.wait_for(lambda: words in self.said, seconds)

    def wait_for_state(self, *states: str, seconds: float = 150.0) -> None:
        """Wait until the job is in one of the states."""
        self.slurm.wait_for(lambda: self.fact("JobState") in states, seconds)

    def start_again(self) -> None:
        """Let a requeued job start now; Slurm holds it back for two minutes."""
        self.wait_for_state("PENDING")
        time.sleep(2)  # in the same second the nodes refuse it: its credential is revoked
        self.slurm.call("scontrol", "update", f"jobid={self.number}", "StartTime=now")
