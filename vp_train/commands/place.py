"""Where a process stands in a job: the launcher of one machine, the agent of a node, or a rank.

The options of `vp-train`, Slurm's variables, or torchrun's variables say so.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vp_train.commands.command import whole_number
from vp_train.config import ConfigError
from vp_train.units import count_words

RUN_ID = "VP_TRAIN_RUN_ID"  # environment variable: a random word that all nodes of a job share
HEAD = "VP_TRAIN_HEAD"  # environment variable: the address of the first node of a Slurm job
_DEFAULT_PORT = 29500
_LAST_PORT = 65_535
MOST_NODES = 100_000
# Ports of Slurm jobs, below those that Linux gives to outgoing connections (from 32768).
_FIRST_PORT, _NUM_PORTS = 20000, 12000
_SCONTROL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Place:
    """The place of an agent among the nodes of a job.

    `head` is the address of the first node, `port` the one at which its agent listens, and
    `host` the name of this node in messages.  Only agents with the same `run_id` meet.
    """

    num_nodes: int = 1
    node: int = 0
    host: str = ""
    head: str = "127.0.0.1"
    port: int = _DEFAULT_PORT
    run_id: str = ""

    @property
    def is_alone(self) -> bool:
        return self.num_nodes == 1

    @property
    def address(self) -> str:
        """The address of the head and its port, in messages."""
        return f"[{self.head}]:{self.port}" if ":" in self.head else f"{self.head}:{self.port}"

    @property
    def next_address(self) -> str:
        """Another address to try where the port is taken, in messages."""
        port = self.port + 1 if self.port < _LAST_PORT else self.port - 1
        return replace(self, port=port).address


def is_rank(environment: Mapping[str, str]) -> bool:
    """Return whether torchrun or our agent started this process as a rank."""
    return "RANK" in environment and "WORLD_SIZE" in environment


def place_of(options: Mapping[str, str], environment: Mapping[str, str]) -> Place:
    """Return the place of this agent, from the options --nodes, --node, --head or from Slurm.

    Raises ConfigError if the options do not say enough, or do not fit each other.
    """
    host = environment.get("SLURMD_NODENAME") or socket.gethostname()
    num_nodes = whole_number(options, "--nodes", 1, most=MOST_NODES)
    given = [name for name in ("--nodes", "--node", "--head") if name in options]
    if not given:
        if _num_tasks(environment) > 1:  # one per node, else this process would be a rank
            return _slurm_place(host, environment)
        return Place(host=host)
    if len(given) < 3:
        missing = next(name for name in ("--nodes", "--node", "--head") if name not in options)
        raise ConfigError(
            f"{given[0]} without {missing}; "
            "several nodes need --nodes N --node I --head HOST[:PORT]"
        )
    node = whole_number(options, "--node", 0, least=0, most=MOST_NODES)
    if node >= num_nodes:
        raise ConfigError(
            f"--node {node} is not one of 0 to {num_nodes - 1} (--nodes {num_nodes}); number the "
            "nodes from 0, or give all of them the right --nodes"
        )
    head, port = _address(options["--head"])
    if num_nodes == 1:
        return Place(host=host)
    return Place(num_nodes, node, host, head, port, environment.get(RUN_ID, ""))


def _address(word: str) -> tuple[str, int]:
    """Return host and port of HOST, HOST:PORT, or [IPv6]:PORT."""
    found = re.fullmatch(r"(?:\[(?P<six>[^\]]+)\]|(?P<host>[^:]+))(?::(?P<port>[0-9]+))?", word)
    if found is None:
        raise ConfigError(f"--head {word} is not HOST or HOST:PORT; write for example node0:29500")
    head, port = found["six"] or found["host"], found["port"] or str(_DEFAULT_PORT)
    if len(port) > 5 or not 0 < int(port) <= _LAST_PORT:
        raise ConfigError(
            f"--head {word}: the port must lie in [1, {_LAST_PORT:,}]; write for example "
            f"--head {Place(head=head).address}"
        )
    return head, int(port)


def _num_tasks(environment: Mapping[str, str]) -> int:
    """Return the number of tasks of the Slurm step that started this process, 0 outside a step."""
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return 0
    return int(environment.get("SLURM_STEP_NUM_TASKS", "1"))


def is_slurm_rank(environment: Mapping[str, str]) -> bool:
    """Return whether this process is one of several tasks per node of a Slurm step: a rank."""
    return _num_tasks(environment) > int(environment.get("SLURM_STEP_NUM_NODES", "1"))


def slurm_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """Return torchrun's variables for a rank that is a task of Slurm.

    Raises ConfigError if the nodes have different numbers of tasks.
    """
    num_tasks = _num_tasks(environment)
    num_nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    per_node = environment.get("SLURM_STEP_TASKS_PER_NODE", str(num_tasks))
    local = re.fullmatch(r"(\d+)(?:\(x\d+\))?", per_node)  # 4, or 4(x2); not 4,2
    if local is None:
        raise ConfigError(
            f"Slurm starts {per_node} tasks on the nodes; start as many on each with "
            "--ntasks-per-node"
        )
    place = _slurm_place("", environment)
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_WORLD_SIZE": local[1],
        "MASTER_ADDR": "127.0.0.1" if num_nodes == 1 else place.head,
        "MASTER_PORT": str(place.port),
    }


def _slurm_place(host: str, environment: Mapping[str, str]) -> Place:
    """Return the place of a task of a Slurm step that has one task per node."""
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    own_id = f"{job}.{step}.{environment.get('SLURM_RESTART_COUNT', '0')}"
    return Place(
        num_nodes=int(environment.get("SLURM_STEP_NUM_NODES", "1")),
        node=int(environment.get("SLURM_NODEID", "0")),
        host=host,
        head=_slurm_head(environment),
        port=_FIRST_PORT + (7 * job + step) % _NUM_PORTS,
        run_id=f"{environment.get(RUN_ID, '')}/{own_id}",
    )


def _slurm_head(environment: Mapping[str, str]) -> str:
    """Return the address of the first node of a step.

    It is that of $VP_TRAIN_HEAD, else Slurm's NodeAddr, which the names of nodes need not resolve
    to, else the node's name.
    """
    if given := environment.get(HEAD):
        return given
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    first = first_host(nodes)
    if shutil.which("scontrol") is None:  # as in a container
        return first
    command = ["scontrol", "show", "node", first, "--oneliner"]
    try:
        shown = subprocess.run(
            command, capture_output=True, text=True, timeout=_SCONTROL_SECONDS, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return first
    address = re.search(r"\bNodeAddr=(\S+)", shown)
    return address[1] if address else first


def first_host(nodes: str) -> str:
    """Return the first host of a list in Slurm's form, as a1 of a[1-3,7],b2."""
    found = re.match(r"([^\[,]+)(?:\[([^\]\-,]+)[^\]]*\]([^\[,]*))?", nodes)
    if found is None:
        return ""
    return found[1] + (found[2] or "") + (found[3] or "")


def local_ranks_of(wanted: int, place: Place, given: int, num_gpus: int | None) -> int:
    """Return how many ranks this node starts.

    That is `given` (--ranks) unless 0; with GPUs on several nodes one per GPU, else an equal share
    of the `wanted` ranks.  Raises ConfigError if there is no equal share.
    """
    if given:
        return given
    if num_gpus is not None and not place.is_alone:
        return num_gpus
    if wanted % place.num_nodes:
        raise ConfigError(
            f"{count_words(wanted, 'rank')} cannot be split over {place.num_nodes} nodes; change "
            "parallel.dp, pp or tp, or give the number of each node with --ranks"
        )
    return wanted // place.num_nodes
