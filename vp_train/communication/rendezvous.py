"""How the ranks of a job find each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]


def job_store(environment: Mapping[str, str], timeout: timedelta) -> Store:
    """Connect to the store that torchrun's variables name, with keys of this attempt alone.

    An agent that starts ranks again keeps its store, and torch would find the addresses of the dead
    ranks in it.  Rank 0 hosts the store unless an agent does.  Raises torch's DistError if the
    store cannot be reached within `timeout`, and OSError if its port is in use.
    """
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    has_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = environment["RANK"] == "0" and not has_agent
    # By itself torch listens on every interface.
    listening = _listen(port) if hosts and address in ("127.0.0.1", "localhost") else None
    store = TCPStore(
        address,
        port,
        int(environment["WORLD_SIZE"]),
        is_master=hosts,
        timeout=timeout,
        multi_tenant=listening is None,
        master_listen_fd=None if listening is None else listening.detach(),
    )
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"attempt-{attempt}", store)


def _listen(port: int) -> socket.socket:
    """Listen on the loopback interface alone.  Raises OSError if the port is in use."""
    return socket.create_server(("127.0.0.1", port), backlog=1024)


def join_world(backend: str, timeout: timedelta) -> None:
    """Initialise torch.distributed as the rank that the environment names.

    `timeout` is for the ranks to meet, and for messages of the default group.
    """
    dist.init_process_group(
        backend,
        timeout=timeout,
        store=job_store(os.environ, timeout),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
