"""Agents of several nodes meet, agree on one root cause, and refuse strangers in one line."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from tests.programs import finished
from tests.ranks import free_port, ready_context
from tests.test_local_ranks import LOST, all_begin, goes, job_of, rank_that
from vp_train.commands import agent, launch, messenger, nodes, store_server
from vp_train.commands.agent import Signals, run_job
from vp_train.commands.messenger import Heartbeats, Messenger
from vp_train.commands.nodes import JobEnded, OneNode, SeveralNodes, joined, untold, when_all_told
from vp_train.commands.place import (
    Place,
    first_host,
    is_slurm_rank,
    local_ranks_of,
    place_of,
    slurm_rank,
)
from vp_train.commands.store_server import StoreServer
from vp_train.commands.train import _serve_ranks, main
from vp_train.config import ConfigError, RunSettings
from vp_train.durable import way_on
from vp_train.failures import EXIT_HANG
from vp_train.settings import load_config


def be_agent(place, code, result, settings):
    """Run ranks with this code as the agent of a node, and write down how the job ends."""
    os.setpgid(0, 0)
    os.dup2(os.open(f"{result}.err", os.O_WRONLY | os.O_CREAT), 2)
    num_local = settings.pop("num_local", 1)
    try:
        with joined(place, num_local, settings.pop("patience", 30)) as news:
            if place.node == settings.pop("failing", None):
                raise BlockingIOError(11, "no more processes")
            ending = run_job(news, job_of(lambda resumes: rank_that(code), num_local, **settings))
            found = [ending.code, ending.words, time.time()]
    except ConfigError as error:
        found = [78, str(error), time.time()]
    except JobEnded as error:
        found = [error.ending.code, error.ending.words, time.time()]
    except OSError as error:
        found = [74, str(error), time.time()]
    with open(result, "w") as file:
        json.dump(found, file)


class Agents:
    """Agents of one job on this machine, one process per place."""

    def __init__(self, directory, code, places, **settings):
        self.results = [directory / str(number) for number in range(len(places))]
        self.processes = [
            ready_context().Process(target=be_agent, args=(place, code, result, settings))
            for place, result in zip(places, self.results, strict=True)
        ]
        for process in self.processes:
            process.start()

    def endings(self, seconds=60):
        """Return code, words and time of the end for every agent; None for a killed one."""
        for process in self.processes:
            process.join(seconds)
            process.kill()
        return [
            json.loads(result.read_text()) if result.exists() else None for result in self.results
        ]

    def errors(self):
        """Return what every agent and its ranks have written to stderr."""
        return [result.with_suffix(".err").read_text() for result in self.results]


def places(num_nodes=2, port=None, **values):
    port = port or free_port()
    return [
        Place(num_nodes, node, f"host{node}", "127.0.0.1", port, **{"run_id": "one", **values})
        for node in range(num_nodes)
    ]


@pytest.mark.parametrize(
    ("code", "expected", "words"),
    [
        ("", 0, ""),
        ("say(75, '')", 75, ""),
        ("os.kill(os.getpid(), 9) if rank == 1 else time.sleep(60)", 137, "rank 1 on host1 was"),
        (f"say(5, 'mine') if rank == 2 else (time.sleep(.2), say(70, {LOST!r}, True))", 5, "mine"),
        (
            f"rank == 1 or (time.sleep(.5), say(70, {LOST!r}, True))",
            70,
            "rank 1 on host1 left with code 0",
        ),
    ],
)
def test_agents_end_together_with_one_cause(tmp_path, code, expected, words):
    endings = Agents(tmp_path, all_begin(tmp_path, 3) + code, places(3)).endings()
    codes, said, times = zip(*endings, strict=True)
    assert set(codes) == {expected}
    assert len(set(said)) == 1
    assert said[0].startswith(words)
    assert bool(said[0]) == bool(words)
    assert max(times) - min(times) < 10  # less than 1 s on an idle machine


GONE = "the head, node 0 (host0), ended or cannot be reached ("


def test_the_death_of_an_agent_is_noticed_by_the_other_and_named(tmp_path):
    jobs, ranks = [], []
    for victim in range(2):
        directory = tmp_path / str(victim)
        directory.mkdir()
        code = f"open({str(directory)!r} + f'/pid{{rank}}', 'w').write(str(os.getpid()))\n"
        jobs.append(Agents(directory, f"{code}time.sleep(60)", places()))
    until = time.monotonic() + 60
    for victim, job in enumerate(jobs):
        files = [tmp_path / str(victim) / f"pid{rank}" for rank in range(2)]
        while not all(file.exists() and file.read_text() for file in files):
            assert time.monotonic() < until, job.errors()
            time.sleep(0.05)
        ranks.append([int(file.read_text()) for file in files])
        os.kill(job.processes[victim].pid, signal.SIGKILL)
    for victim, job in enumerate(jobs):
        endings = job.endings()
        assert endings[victim] is None
        code, words, _ = endings[1 - victim] or pytest.fail(str(job.errors()))
        os.kill(ranks[victim][victim], signal.SIGKILL)  # vp-train's rank goes by itself
        assert code == 70
        killed = f"the agent of node {victim} (host{victim}) was killed; its ranks are lost"
        # The store may end before the messenger can say who has.
        assert words == killed or (victim == 0 and words.startswith(GONE)), words
        assert all(map(goes, ranks[victim]))


@pytest.mark.parametrize(
    ("victim", "node", "own", "other"),
    [
        ("_messenger", 0, "cut", (0, "unlinked")),
        ("_messenger", 1, "cut", (1, "unlinked")),
        ("_server", 0, "store", (0, "gone")),
    ],
)
def test_the_death_of_a_messenger_and_of_the_store_is_noticed_everywhere_and_named(
    victim, node, own, other
):
    both = [SeveralNodes(place) for place in places()]
    until = time.monotonic() + 30

    def wait_for(is_over):
        while not is_over():
            assert time.monotonic() < until
            time.sleep(0.01)

    for news in both:
        news.tell("asked")
    wait_for(lambda: all(len(news.facts()) == 2 for news in both))
    process = getattr(both[node], victim)
    killed = time.monotonic()
    os.kill(getattr(process, "_process", process), signal.SIGKILL)
    wait_for(lambda: min(len(nodes.losses(news)) for news in both))
    assert time.monotonic() - killed < messenger._SILENT_SECONDS
    assert [(loss.node, loss.why) for loss in nodes.losses(both[node])] == [(0, own)]
    assert [(loss.node, loss.why) for loss in nodes.losses(both[1 - node])] == [other]
    assert all(bool(loss.reason) == (loss.why == "gone") for loss in nodes.losses(both[1 - node]))
    for news in reversed(both):
        news.leave()


def test_all_ranks_of_all_nodes_start_again_with_a_store_of_their_own(tmp_path):
    code = "os.environ['MASTER_PORT']\nopen(f'{0}/{rank}-{attempt}', 'w').write('x')\n"
    code = code.replace("{0}", str(tmp_path))
    code += "attempt == 0 and rank == 1 and os.kill(os.getpid(), 9)\nattempt or time.sleep(60)"
    endings = Agents(tmp_path, code, places(), num_restarts=2).endings()
    assert [ending[0] for ending in endings] == [0, 0]
    assert {path.name for path in tmp_path.glob("*-*")} == {"0-0", "1-0", "0-1", "1-1"}
    said = (tmp_path / "0.err").read_text()
    assert "rank 1 on host1 was killed by SIGKILL" in said
    assert (tmp_path / "1.err").read_text() == ""  # node 0 speaks for all


def test_a_signal_to_one_agent_is_the_end_of_all_restarts(tmp_path):
    code = "rank == 1 and os.kill(os.getppid(), 15)\ntime.sleep(1)\nos.kill(os.getpid(), 9)"
    endings = Agents(tmp_path, code, places(), num_restarts=9).endings()
    assert [ending[0] for ending in endings] == [137, 137]


@pytest.mark.slow
def test_a_stranger_and_a_wrong_number_are_refused_in_one_line(tmp_path):
    port = free_port()
    ours = Agents(tmp_path, "time.sleep(8)", places(2, port))
    (tmp_path / "other").mkdir()
    stranger = Place(2, 1, "host9", "127.0.0.1", port, "two")
    doubled = Place(2, 1, "host9", "127.0.0.1", port, "one")
    others = Agents(tmp_path / "other", "", [stranger], patience=20)
    code, words, _ = others.endings()[0]
    assert code == 78
    assert f"127.0.0.1:{port} belongs to another job" in words
    assert ours.processes[0].is_alive()
    until = time.monotonic() + 20
    (tmp_path / "double").mkdir()
    again = Agents(tmp_path / "double", "", [doubled], patience=20).endings()[0]
    assert time.monotonic() < until
    assert "joined already" in again[1]
    assert [ending[0] for ending in ours.endings()] == [0, 0]


@pytest.mark.slow
def test_nodes_that_count_otherwise_are_all_refused(tmp_path):
    first, second = places(2)
    third = Place(3, 1, "host1", "127.0.0.1", first.port, "one")
    endings = Agents(tmp_path, "", [first, third], patience=20).endings()
    assert [ending[0] for ending in endings] == [78, 78]
    words = "--nodes 3 on node 1 (host1), but the head says --nodes 2"
    assert [ending[1] for ending in endings] == [words, words]
    assert second.node == 1


@pytest.mark.slow
def test_a_doubled_node_ends_the_meeting_for_all(tmp_path):
    first, second, third = places(3)
    doubled = Place(3, 1, "host2", "127.0.0.1", first.port, "one")
    began = time.monotonic()
    endings = Agents(tmp_path, "", [first, second, doubled], patience=40).endings()
    assert time.monotonic() - began < 30  # 3 s on an idle machine
    assert [ending[0] for ending in endings] == [78, 78, 78]
    assert {ending[1] for ending in endings} == {
        "node 1 has joined already; --node must differ on every node"
    }
    assert third.node == 2


def test_an_agent_that_leaves_by_an_error_tells_it(tmp_path):
    agents = Agents(tmp_path, "time.sleep(60)", places(3), failing=1)
    endings = agents.endings()
    assert None not in endings, agents.errors()
    assert [ending[0] for ending in endings] == [74, 74, 74]
    for node in (0, 2):
        assert endings[node][1] == "vp-train: host1: [Errno 11] no more processes"
    times = [ending[2] for ending in endings]
    assert max(times) - min(times) < 30  # a second of grace, and the start of ranks


class Script(OneNode):
    """A log in which facts of other nodes appear at set readings."""

    has_lost_head = False

    def __init__(self, *facts, node=0, num_nodes=2, later=(), num_readings=20):
        super().__init__(Place(num_nodes, node, f"host{node}", "head"))
        self._log = [joined_fact(number) for number in range(num_nodes)] + list(facts)
        self._later, self._num_readings = list(later), num_readings

    def facts(self):
        self._num_readings -= 1
        if self._num_readings < 0:
            self._log += self._later
            self._later = []
        return self._log


def joined_fact(node, **options):
    options = {"--ranks": 1, "--max-restarts": 0, **options}
    return {"kind": "joined", "node": node, "host": f"host{node}", "options": options}


def ends_fact(node, *codes):
    ends = [
        {"rank": node, "code": code, "host": f"host{node}", "when": 0.0, "ending": None}
        for code in codes
    ]
    return {"kind": "ends", "node": node, "attempt": 0, "ends": ends}


BYE = {"kind": "bye", "node": 1}
STORE = {"kind": "store", "node": 0, "attempt": 0, "words": "the store is gone"}
FAILING = {"kind": "failing", "node": 1, "attempt": 0, "explains": True}
JOB = job_of(lambda resumes: rank_that(""), 1)


@pytest.fixture
def soon(monkeypatch):
    """Let agents wait for a short time only."""
    monkeypatch.setattr(agent, "_TOLD_SECONDS", 0.05)
    monkeypatch.setattr(agent, "_LEAVING_SECONDS", 0.05)
    monkeypatch.setattr(agent, "_POLL_SECONDS", 0.01)


@pytest.mark.parametrize("own", [(), (0,), (3,)])
@pytest.mark.parametrize(
    ("end", "patience"),
    [
        (FAILING, 60),
        ({**STORE, "saves": False}, 60),
        ({**STORE, "saves": True}, 0.05),
        ({"kind": "asked", "node": 1}, 60),
    ],
    ids=["failure", "store", "its agent hangs as ranks save", "its agent hangs after a request"],
)
def test_a_node_that_does_not_say_its_ends_is_never_left_out_of_the_cause(soon, own, end, patience):
    log = Script(ends_fact(0, *own), end)
    past = agent._when_decided(log, 0, Signals(), patience)
    expected = (70, "node 1 (host1) did not say how its ranks ended")
    for facts in (past.facts(), [*log.facts(), ends_fact(1, 5)]):  # and if it says so afterwards
        other = when_all_told(OneNode(Place(2, 1, "host1"), facts), "ends", 0)
        ending = agent._ending(other, 0, JOB)
        assert (ending.code, ending.words) == expected
        assert agent._lost(other, 0)  # so no new start


@pytest.mark.parametrize("first", [0, 1])
def test_of_several_agents_that_get_a_signal_the_first_one_answers(first, capsys):
    class Ranks:
        """Ranks that end after some looks at them."""

        looks, asked = 5, []

        @property
        def running(self):
            self.looks -= 1
            return self.looks > 0

        def request_end(self, number):
            self.asked.append(number)

        def poll(self): ...

        def ends(self):
            return []

    log = Script(*[{"kind": "asked", "node": 1}] * first)
    agent._watch(log, Ranks(), 0, Signals([(10, 0.0)]), lambda: None, "they save")
    assert Ranks.asked.pop() == signal.SIGUSR1
    assert capsys.readouterr().err == ("" if first else "vp-train: SIGUSR1: they save\n")


def test_two_live_lines_of_a_terminal_are_not_drawn_over_an_answer(monkeypatch, capsys):
    monkeypatch.setattr(agent.sys.stdout, "isatty", lambda: True)
    agent._say_beside_progress("SIGINT: they save")
    above, answer, *drawn_over = capsys.readouterr().err.split("\n")
    assert (above, answer) == ("", "vp-train: SIGINT: they save")
    assert len(drawn_over) == agent._LIVE_LINES == 2


def test_advice_is_given_only_where_a_rank_was_killed_and_hides_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(agent, "_run_attempt", lambda news, *others: news)
    unreadable = tmp_path / ("x" * 300)
    job = job_of(JOB.starter, 1, way_on=partial(way_on, unreadable))
    advice = f"; {unreadable} cannot be read now (File name too long)"
    for code in (0, 5):
        ending = run_job(Script(ends_fact(0, code), ends_fact(1, code)), job)
        assert ending.code == code
        assert advice not in ending.words
    ending = run_job(Script(ends_fact(0, -9), ends_fact(1)), job)  # the agent ended rank 1
    assert ending.code == 137
    assert ending.words.startswith("rank 0 on host0 was killed by SIGKILL (")
    assert ending.words.endswith(advice)


@pytest.mark.parametrize(
    ("saves", "ends", "code", "words"),
    [
        (False, [ends_fact(0, 0), ends_fact(1)], 70, "the store is gone; the ranks were stopped"),
        (False, [ends_fact(0, 0), ends_fact(1, 0)], 0, ""),
        (
            True,
            [ends_fact(0, 75), ends_fact(1, -9)],
            70,
            "the store is gone; the ranks were asked to save and to end; "
            "rank 1 on host1 was killed by SIGKILL (somebody, or the kernel as memory ran out)",
        ),
        (
            True,
            [ends_fact(0, 75), ends_fact(1, 70)],
            70,
            "the store is gone; the ranks were asked to save and to end",
        ),
    ],
    ids=["one was done", "all were done", "one was killed as it saved", "one missed the store"],
)
def test_a_lost_store_is_the_cause_unless_all_were_done_and_hides_no_killed_rank(
    saves, ends, code, words
):
    ending = agent._ending(Script({**STORE, "saves": saves}, *ends), 0, JOB)
    assert (ending.code, ending.words) == (code, words)


@pytest.mark.parametrize(
    ("settings", "since", "expected"),
    [
        ({}, 100.0, True),
        ({}, 101.0, False),
        ({"checkpoint_every": 0}, 100.0, False),
        ({"checkpoint_every": 0, "checkpoint_minutes": 1.0}, 100.0, True),
    ],
)
def test_ranks_save_from_their_first_step_on_if_the_run_does(tmp_path, settings, since, expected):
    run = RunSettings(name="one", root=str(tmp_path), **settings)
    run.directory.mkdir()
    (run.directory / "config.yaml").touch()
    os.utime(run.directory / "config.yaml", (100.0, 100.0))
    assert launch._saves(run, since) == expected


def test_a_node_that_leaves_without_its_ends_is_never_left_out_of_the_cause(soon):
    past = agent._when_decided(Script(ends_fact(0, 0), BYE), 0, Signals(), 60)
    ending = agent._ending(past, 0, JOB)
    assert (ending.code, ending.words) == (70, "node 1 (host1) did not say how its ranks ended")


def test_ranks_that_run_on_elsewhere_are_waited_for_as_long_as_nothing_fails(soon):
    log = Script(ends_fact(0, 0), later=[ends_fact(1, 0)], num_readings=200)
    began = time.monotonic()
    past = agent._when_decided(log, 0, Signals(), 60)
    assert time.monotonic() - began > 2 * agent._TOLD_SECONDS  # 8 times, mostly
    assert agent._ending(past, 0, JOB).code == 0


def test_a_head_that_never_starts_the_ranks_is_named_in_time(soon):
    job = job_of(JOB.starter, 1, settings=SimpleNamespace(world_timeout_seconds=0.05))
    ending = run_job(Script(node=1), job)
    assert ending.code == EXIT_HANG
    assert ending.words == "the agent of node 0 (host0) did not say that ranks may start"


def test_a_second_signal_ends_the_wait_for_ranks_elsewhere(soon):
    log = Script(ends_fact(0, 0))
    past = agent._when_decided(log, 0, Signals([(15, 0.0), (2, 9.0)]), 60)
    assert agent._insisting(past) == 2


def test_a_node_that_has_left_is_not_lost_but_a_silent_one_is(monkeypatch):
    class Store:
        def add(self, key, number):
            return 1

    clock = [0.0]
    monkeypatch.setattr(messenger.time, "monotonic", lambda: clock[0])
    beats = Heartbeats(Store(), Place(3, 0))
    assert list(beats.lost(set())) == []
    clock[0] = 60.0
    assert list(beats.lost({1})) == [2]


def test_nodes_with_other_options_are_refused(monkeypatch):
    options = {"--max-restarts": 0, "--preflight": False}
    same = {node: joined_fact(node, **options) for node in range(2)}
    nodes._check_same(same)
    for name, value, shown in (
        ("--max-restarts", 3, "0, host1 3"),
        ("--preflight", True, "no, host1 yes"),
    ):
        other = joined_fact(1, **{**options, name: value})
        with pytest.raises(ConfigError, match=f"values of {name}: host0 {shown};"):
            nodes._check_same({**same, 1: other})


def test_an_end_during_the_meeting_is_that_of_all():
    failed = {"kind": "failed", "node": 1, "code": 130, "words": "interrupted"}
    log = Script(failed, num_nodes=3)
    log._log.remove(joined_fact(2))
    with pytest.raises(JobEnded, match="interrupted") as caught:
        nodes._meet(log, {"--ranks": 1}, 5)
    assert caught.value.ending.code == 130


def test_a_messenger_has_no_limit_before_the_head_answers_but_leaves_with_its_agent(monkeypatch):
    ours, theirs = socket.socketpair()
    ours.sendall(b'{"kind": "joined", "node": 1}\n')
    limit, limits = [0], []

    def connect(address, timeout):
        limits.append(limit[0])
        if len(limits) == 2:
            ours.close()  # the agent leaves
        raise TimeoutError

    monkeypatch.setattr(messenger.socket, "create_connection", connect)
    monkeypatch.setattr(messenger.signal, "alarm", lambda seconds: limit.__setitem__(0, seconds))
    place = Place(2, 1, "host1", "head")
    foreign = Messenger(theirs, os.getpid(), place)  # not the parent: the agent was killed
    assert foreign._connect({}) is None
    assert limits == []
    assert Messenger(theirs, os.getppid(), place)._connect({}) is None
    theirs.close()
    assert limits == [0, 0]


class Killed(BaseException):
    """The end of a process, in a test with one process."""


class Watched:
    """A store that calls `before` ahead of every exchange."""

    def __init__(self, store, before):
        self._store, self._before = store, before

    def __getattr__(self, name):
        self._before()
        return getattr(self._store, name)


@pytest.fixture
def messengers(monkeypatch):
    """Return a function that makes a messenger, and the agent's end of its stream."""
    monkeypatch.setattr(messenger.signal, "alarm", lambda seconds: None)
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.2))
    streams = []

    def make(before=lambda: None):
        streams.extend(socket.socketpair())
        made = Messenger(streams[-1], os.getppid(), Place(9, 1, "host1", "head"))
        made._store = Watched(store, before)
        return made, streams[-2]

    yield make
    for stream in streams:
        stream.close()


@pytest.mark.parametrize("seed", range(20))
def test_a_log_has_one_order_and_no_hole_wherever_messengers_are_killed(messengers, seed):
    random = Random(seed)
    alive, killed, written = [], [], []

    def write(number):
        """Let a messenger write and read, while others act, until it is killed."""
        one, fact = made[number], {"kind": "asked", "node": number, "count": len(written)}
        alive.remove(number)
        try:
            one._tell(fact)
            written.append(fact)
            one._read()
            alive.append(number)
        except Killed:
            killed.append(number)

    def before():
        if alive and len(written) < 40 and random.random() < 0.3:
            write(random.choice(alive))
        if len(killed) < 6 and random.random() < 0.02:
            raise Killed

    made = [messengers(before)[0] for _ in range(9)]
    alive.extend(range(9))
    for _ in range(30):
        write(random.choice(alive))
    reader = messengers()[0]
    reader._read()
    log = reader._unsent
    facts = [json.loads(line) for line in log.splitlines()]
    assert killed
    assert all(fact in facts for fact in written)
    assert all(log.startswith(one._unsent) for one in made)


def test_a_messenger_never_waits_for_an_agent_that_does_not_read(messengers):
    one, stream = messengers()
    for count in range(2000):  # far more than a stream takes
        one._tell({"kind": "asked", "node": 1, "count": count})
        one._deliver()
    read = b""
    while not read.endswith(b"1999}\n"):
        read += stream.recv(65536)
        one._deliver()
    assert [json.loads(line)["count"] for line in read.splitlines()] == list(range(2000))


def test_what_a_messenger_has_read_reaches_its_agent_even_if_the_store_ends(
    messengers, monkeypatch
):
    def before():
        if reader._num_read == 1:
            raise RuntimeError("Connection reset")

    failed = {"kind": "failed", "node": 0, "code": 74, "words": "disk full"}
    messengers()[0]._tell(failed)
    reader, stream = messengers(before)
    stream.setblocking(False)
    monkeypatch.setattr(reader, "_connect", lambda identity: reader._store._store)
    monkeypatch.setattr("torch.distributed.PrefixStore", lambda prefix, store: reader._store)
    with pytest.raises(RuntimeError, match="Connection reset"):
        reader.run({})
    assert json.loads(stream.recv(1000)) == failed


def test_node_0_hears_at_once_who_came_for_another_run(monkeypatch, capsys):
    monkeypatch.setattr(messenger.signal, "alarm", lambda seconds: None)
    store = HashStore()  # the threads of a TCPStore would not survive a fork of this process
    monkeypatch.setattr("torch.distributed.TCPStore", lambda *_, **options: store)
    monkeypatch.setattr(
        messenger.socket, "create_connection", lambda *_: SimpleNamespace(close=int)
    )
    store.set(messenger.IDENTITY, json.dumps({"run": "ours", "nodes": 2, "nonce": ""}))
    streams = [socket.socketpair() for _ in range(2)]
    head, other = (
        Messenger(theirs, os.getppid(), Place(2, node, f"host\x1b{node}", "head"))
        for node, (_, theirs) in enumerate(streams)
    )
    assert other._connect({"run": "theirs", "nodes": 2}) is None
    head._door = store
    for _ in range(2):
        head._hear_strangers()
    (fact,) = map(json.loads, streams[0][0].recv(10_000).splitlines())
    words = "node 1 (host\\x1b1) came for another run and was refused; start it again with the run."
    assert fact["kind"] == "stranger"
    assert fact["words"].startswith(words)
    log = Script(fact, node=0)
    log._log.pop(1)
    with pytest.raises(ConfigError, match="did not come"):
        nodes._meet(log, {}, 0.0)
    assert capsys.readouterr().err == f"vp-train: node 0 (host0): {fact['words']}\n"
    for pair in streams:
        for stream in pair:
            stream.close()


def test_layers_are_compiled_before_other_nodes_wait_for_the_start(tmp_path, monkeypatch):
    """Other nodes wait for the start as long as for a message, and no longer."""
    done = []

    class Noting(OneNode):
        def tell(self, kind, **values):
            done.append(kind)
            super().tell(kind, **values)

    monkeypatch.setattr(launch, "import_for_ranks", lambda config: None)
    monkeypatch.setattr(launch, "_in_copy", lambda body: launch.Ending(0, ""))
    monkeypatch.setattr("vp_train.assembly.compile_layers", lambda _: done.append("compiled"))
    config = load_config(["model=nano", "data=synthetic", f"run.root={tmp_path}"])
    launch._checked(Noting(Place()), config, 4, trains=True)
    assert done == ["compiled", "checked"]


def test_an_agent_leaves_when_its_messenger_has_written_all(monkeypatch, tmp_path):
    def slow(stream, agent, place, identity, is_first):
        heard = b""
        while read := stream.recv(65536):
            heard += read
        time.sleep(0.3)
        (tmp_path / "heard").write_bytes(heard)
        os._exit(0)

    monkeypatch.setattr(nodes, "be_messenger", slow)
    news = SeveralNodes(Place(2, 1, "host1", "127.0.0.1", 1, "one"))
    news.tell("asked")
    news.leave()
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "heard").read_text().splitlines()]
    assert kinds == ["asked", "bye"]


def stuck(stream, agent, place, identity, is_first):
    time.sleep(60)
    os._exit(0)


def test_an_agent_ends_a_messenger_that_does_not_answer_and_says_nothing_of_it(monkeypatch):
    monkeypatch.setattr(nodes, "be_messenger", stuck)
    monkeypatch.setattr(nodes, "STORE_SECONDS", 0.1)
    news = SeveralNodes(Place(2, 1, "host1", "127.0.0.1", 1, "one"))
    news.leave()
    assert not Path(f"/proc/{news._messenger}").exists()
    assert (news._log, news._second) == ([], None)


def test_a_killed_messenger_is_named_even_if_no_other_can_start(monkeypatch):
    monkeypatch.setattr(nodes, "be_messenger", stuck)
    news = SeveralNodes(Place(2, 1, "host1", "127.0.0.1", 1, "one"))

    def fork():
        raise BlockingIOError(11, "no more processes")

    monkeypatch.setattr(nodes, "fork", fork)
    os.kill(news._messenger, signal.SIGKILL)
    nodes.wait_until(lambda: news.facts() or None, 30)
    assert [loss.why for loss in nodes.losses(news)] == ["cut"]
    news.leave()


def test_what_all_know_stands_before_what_an_agent_without_a_head_tells(monkeypatch):
    def brief(stream, agent, place, identity, is_first):
        stream.sendall(b'{"kind": "joined", "node": 0, "host": "host0"}\n')
        os._exit(1)

    monkeypatch.setattr(nodes, "be_messenger", brief)
    news = SeveralNodes(Place(2, 1, "host1", "127.0.0.1", 1, "one"))
    os.waitid(os.P_PID, news._messenger, os.WEXITED | os.WNOWAIT)
    news.tell("stopped", number=2)
    assert [fact["kind"] for fact in news.facts()] == ["joined", "lost", "stopped"]
    assert agent._insisting(news) == 2
    assert untold(news, "ends", 0) == untold(OneNode(Place(2), news.facts()), "ends", 0) == []
    news.leave()


@pytest.mark.parametrize(
    ("by", "lost", "why", "speakers"),
    [(node, 0, why, {node}) for node in range(3) for why in ("cut", "gone", "silent")]
    + [(0, node, "silent", {0, node}) for node in (1, 2)]
    + [(node, node, "killed", {0, node}) for node in (1, 2)]
    + [(0, 0, "killed", {0, 1})],
)
def test_the_first_node_that_lives_speaks_and_every_node_that_is_cut_off(
    capsys, by, lost, why, speakers
):
    fact = {"kind": "lost", "node": by, "lost": lost, "why": why}
    is_own = lost == 0 and why != "killed"  # stands in the log of that node alone
    for node in [by] if is_own else range(3):
        log = Script(fact, node=node, num_nodes=3)
        ending = nodes.losses(log)[0].ending
        assert launch._left(log, ending) == ending.code
        expected = f"vp-train: {ending.words}\n" if node in speakers else ""
        assert capsys.readouterr().err == expected


CHECKED = {"kind": "checked", "node": 1, "code": 0, "words": "", "overrides": []}


def test_a_long_wait_for_the_checks_of_other_nodes_is_said(monkeypatch, capsys):
    monkeypatch.setattr(launch, "WORDS_SECONDS", 0.0)
    launch._wait_for_checks(Script({**CHECKED, "node": 0}, later=[CHECKED]))
    words = "vp-train: node 0 (host0) waits for node 1 (host1) to check settings and prepare data\n"
    assert capsys.readouterr().err == words


def test_a_signal_ends_the_wait_for_the_checks_of_other_nodes():
    class Signalled(Script):
        def facts(self):
            os.kill(os.getpid(), signal.SIGTERM)
            return super().facts()

    with pytest.raises(JobEnded, match="stopped by SIGTERM on node 0") as caught:
        launch._wait_for_checks(Signalled({**CHECKED, "node": 0}, num_readings=10**9))
    assert caught.value.ending.code == 128 + signal.SIGTERM


def test_only_agents_of_one_run_meet():
    def id_of(place, name, root):
        return launch._run_id(place, SimpleNamespace(run=RunSettings(name=name, root=root)))

    first, second = places(2)
    expected = id_of(first, "one", "runs")
    assert id_of(second, "one", "runs") == expected
    others = [(second, "two", "runs"), (second, "one", "others"), (stranger(), "one", "runs")]
    assert expected not in {id_of(*other) for other in others}


def stranger():
    return places(2, run_id="two")[1]


def test_a_schedule_that_was_searched_replaces_a_link(monkeypatch, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "foreign").write_text("of somebody else")
    solved = tmp_path / "one" / "schedule.txt"
    solved.symlink_to(tmp_path / "foreign")
    problem = SimpleNamespace(algorithm=SimpleNamespace(name="one_barrier"))
    plan = SimpleNamespace(schedule=SimpleNamespace(text=lambda: "F0"), problem=problem)
    monkeypatch.setattr(launch, "make_plan", lambda config, num_ranks, watch: plan)
    monkeypatch.setattr(launch, "starts_by_fork", lambda config: False)
    monkeypatch.setattr(launch, "_in_copy", lambda body: launch.Ending(0, ""))
    config = load_config(
        ["schedule=auto", "data=synthetic", f"run.root={tmp_path}", "run.name=one"]
    )
    found = launch._prepare(OneNode(Place()), config, 4, trains=True)
    assert found[0].startswith("schedule.file=")
    assert not solved.is_symlink()
    assert (solved.read_text(), (tmp_path / "foreign").read_text()) == ("F0", "of somebody else")


@pytest.mark.slow
def test_a_node_that_does_not_come_is_named(tmp_path):
    first, second = places(2)
    assert (
        "node(s) 1 of --nodes 2 did not come"
        in (Agents(tmp_path, "", [first], patience=1).endings()[0][1])
    )
    words = Agents(tmp_path, "", [second], patience=1).endings()[0][1]
    assert f"the head at 127.0.0.1:{first.port} did not come within 1 s" in words


def test_a_port_in_use_is_refused_at_once(tmp_path):
    with socket.create_server(("", 0)) as busy:
        port = busy.getsockname()[1]
        words = Agents(tmp_path, "", places(2, port)[:1]).endings()[0][1]
    assert f"host0) cannot listen at port {port} (Address already in use); choose" in words


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EADDRINUSE, ConfigError),
        (errno.EACCES, ConfigError),
        (errno.EAGAIN, BlockingIOError),  # of the fork
        (errno.EMFILE, OSError),
    ],
)
def test_only_a_port_is_refused_as_one_not_what_a_new_start_may_mend(monkeypatch, number, expected):
    def fail(body):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store_server, "child", fail)
    with pytest.raises(expected) as caught:
        StoreServer.at_port("127.0.0.1", 0, "rank 0", "; choose another")
    assert type(caught.value) is expected


def test_an_unknown_head_is_refused_in_one_line_and_soon():
    words = ["--nodes", "2", "--node", "1", "--head", "no.such.host.invalid", "data=synthetic"]
    began = time.monotonic()
    done = finished(main, *words)
    assert time.monotonic() - began < 30  # 2 s on an idle machine
    assert done.returncode == 78
    assert done.stderr.startswith(
        "vp-train: the head's name no.such.host.invalid is not known here"
    )
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"--nodes": "2", "--head": "a"}, "--nodes without --node"),
        ({"--node": "1"}, "--node without --nodes"),
        ({"--nodes": "2", "--node": "2", "--head": "a"}, "--node 2 is not one of 0 to 1"),
        ({"--nodes": "2", "--node": "x", "--head": "a"}, "--node x is not a whole number"),
        ({"--nodes": "2", "--node": "1", "--head": "a:b"}, "--head a:b is not HOST or HOST:PORT"),
        ({"--nodes": "2", "--node": "1", "--head": "a:99999"}, r"must lie in \[1, 65,535\]; write"),
        ({"--nodes": "0"}, r"--nodes 0 is not a whole number in \[1, 100,000\]; write for example"),
        ({"--nodes": "2", "--node": "-1", "--head": "a"}, r"--node -1 is not .* in \[0, 100,000\]"),
    ],
)
def test_options_that_do_not_say_enough_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        place_of(options, {})


@pytest.mark.parametrize("head", ["node0", "10.0.0.7", "fe80::1"])
@pytest.mark.parametrize("port", [1, 29500, 65535])
def test_an_address_that_is_advised_can_be_given(head, port):
    def given(address):
        found = place_of({"--nodes": "2", "--node": "1", "--head": address}, {})
        return found.head, found.port

    place = Place(2, 1, "host1", head, port)
    assert given(place.address) == (head, port)
    assert given(place.next_address) == (head, port + 1 if port < 65535 else 65534)


STEP = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[07-09]",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "2",
    "SLURMD_NODENAME": "n08",
    "VP_TRAIN_HEAD": "10.0.0.7",
    "VP_TRAIN_RUN_ID": "secret",
}


def test_a_slurm_step_says_where_its_tasks_stand():
    agent = {**STEP, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    assert not is_slurm_rank(agent)
    assert place_of({}, agent) == Place(2, 1, "n08", "10.0.0.7", 20084, "secret/12.0.0")
    rank = {**STEP, "SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "8"}
    rank["SLURM_STEP_TASKS_PER_NODE"] = "4(x2)"
    assert is_slurm_rank(rank)
    assert slurm_rank(rank) == {
        "RANK": "6",
        "LOCAL_RANK": "2",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "20084",
    }
    with pytest.raises(ConfigError, match="starts 5,3 tasks on the nodes"):
        slurm_rank({**rank, "SLURM_STEP_TASKS_PER_NODE": "5,3"})
    batch = {name: agent[name] for name in ("SLURM_JOB_ID", "SLURM_NODEID", "SLURM_PROCID")}
    for environment in (batch, {**agent, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}):
        assert not is_slurm_rank(environment)
        assert place_of({}, environment).is_alone


def test_a_task_of_slurm_that_cannot_listen_says_where_and_the_way_out(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        given = {"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        monkeypatch.setattr(os, "environ", {**os.environ, **given})
        with pytest.raises(ConfigError, match=f"port {port} .*in use.*; start another step or job"):
            _serve_ranks()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a1", "a1"), ("a[1-3,7],b2", "a1"), ("a[07,09]-ib", "a07-ib"), ("x,y", "x"), ("", "")],
)
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_ranks_are_shared_by_the_nodes():
    two = Place(2, 0, "a", "a")
    assert local_ranks_of(4, Place(), 0, None) == 4
    assert local_ranks_of(4, two, 0, None) == 2
    assert local_ranks_of(4, two, 0, 8) == 8
    assert local_ranks_of(4, two, 3, 8) == 3
    with pytest.raises(ConfigError, match="5 ranks cannot be split over 2 nodes"):
        local_ranks_of(5, two, 0, None)


def test_node_0_tells_no_other_settings_than_those_of_a_search():
    found = ["schedule.file=runs/a/schedule.txt", "vocab.algorithm=one_barrier"]
    assert launch._searched_overrides(found) == found
    for forged in (["run.root=/"], "schedule.file=a", [["vocab.algorithm=none"]], None):
        with pytest.raises(ConfigError, match="node 0 tells other settings"):
            launch._searched_overrides(forged)
