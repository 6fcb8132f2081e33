"""The ranks of a job meet in one store, which one of them hosts, and each attempt anew."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from tests.ranks import free_port
from vp_train.commands.store_server import StoreServer
from vp_train.communication import rendezvous
from vp_train.communication.rendezvous import job_store, join_world

TIMEOUT = timedelta(seconds=30)
ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def test_ranks_that_start_again_see_nothing_of_the_attempt_before():
    server = StoreServer()
    try:
        environment = ENVIRONMENT | {
            "MASTER_PORT": str(server.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        first = job_store({**environment, "TORCHELASTIC_RESTART_COUNT": "0"}, TIMEOUT)
        again = job_store({**environment, "TORCHELASTIC_RESTART_COUNT": "1"}, TIMEOUT)
        first.set("address", "of a dead rank")
        assert job_store(environment, TIMEOUT).get("address") == b"of a dead rank"
        assert not again.check(["address"])
    finally:
        server.close()


def test_a_store_of_ranks_on_one_node_listens_on_loopback_alone():
    port = free_port()
    store = job_store(ENVIRONMENT | {"MASTER_PORT": str(port)}, TIMEOUT)
    store.set("key", "value")
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()]
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]
    with pytest.raises(OSError, match="in use"):
        job_store(ENVIRONMENT | {"MASTER_PORT": str(port)}, TIMEOUT)


@pytest.fixture
def made(monkeypatch):
    """Return what is asked of torch: the stores, and the groups of all ranks."""
    asked = []
    socket = SimpleNamespace(detach=lambda: 77)
    monkeypatch.setattr(rendezvous, "_listen", lambda port: asked.append(port) or socket)
    monkeypatch.setattr(
        rendezvous, "TCPStore", lambda *places, **options: asked.append((places, options))
    )
    monkeypatch.setattr(rendezvous, "PrefixStore", lambda prefix, store: (prefix, store))
    monkeypatch.setattr(
        dist, "init_process_group", lambda *words, **options: asked.append((words, options))
    )
    return asked


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "node1"])
@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("agent", [None, "True", "False"])
def test_the_first_rank_hosts_the_store_unless_an_agent_does(made, address, rank, agent):
    environment = {
        "MASTER_ADDR": address,
        "MASTER_PORT": "2900",
        "RANK": str(rank),
        "WORLD_SIZE": "4",
    }
    if agent is not None:
        environment["TORCHELASTIC_USE_AGENT_STORE"] = agent
    hosts = rank == 0 and agent != "True"
    listens = hosts and address != "node1"
    assert job_store(environment, TIMEOUT) == ("attempt-0", None)
    *listened, (places, options) = made
    assert listened == [2900] * listens
    assert places == (address, 2900, 4)
    assert options == {
        "is_master": hosts,
        "timeout": TIMEOUT,
        "multi_tenant": not listens,
        "master_listen_fd": 77 if listens else None,
    }


def test_a_rank_joins_the_world_as_the_environment_names_it(made, monkeypatch):
    environment = {
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "2900",
        "RANK": "2",
        "WORLD_SIZE": "4",
        "TORCHELASTIC_RESTART_COUNT": "7",
    }
    for name, value in environment.items():
        monkeypatch.setitem(os.environ, name, value)
    monkeypatch.delitem(os.environ, "TORCHELASTIC_USE_AGENT_STORE", raising=False)
    join_world("gloo", TIMEOUT)
    _, (words, options) = made
    assert words == ("gloo",)
    assert options == {
        "timeout": TIMEOUT,
        "store": ("attempt-7", None),
        "rank": 2,
        "world_size": 4,
    }
