"""What the agents of several nodes tell each other.

The head's agent hosts a TCPStore.  In it the agents keep one log: every agent reads the same facts
in the same order, so that all come to the same conclusion.  Nothing is unpickled.

A second process of every agent, its messenger, speaks with the store.  An agent therefore never
waits for the network.  A messenger notices that its agent was killed and writes so into the log.
A messenger that waits too long for the store is ended by the kernel.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

from vp_train.commands.local_ranks import fork
from vp_train.commands.place import Place
from vp_train.commands.store_server import StoreServer
from vp_train.config import ConfigError
from vp_train.failures import EXIT_HANG, EXIT_INTERNAL, Ending, ending_of_command
from vp_train.supervision.requests import SIGNALS

_POLL_SECONDS = 0.05
_BEAT_SECONDS = 0.5
_SILENT_SECONDS = 10.0  # without a beat a node is lost
_STORE_SECONDS = 15  # for one exchange with the store; then the kernel ends the messenger
_CONNECT_SECONDS = 8  # likewise, for the first one
WORDS_SECONDS = 6.0  # of waiting for other nodes, before a line says so
_ADDRESS_SECONDS = 6.0  # to resolve the head's name, and for node 0 to reach itself
_LEAVE_SECONDS = 3.0  # that the head's store stays for the others
_DECISIVE = {"lost", "failed", "bye"}  # facts after which a node need not be waited for
_IDENTITY = "vp-train"  # the key that says which job a store belongs to

Fact = dict[str, Any]  # has "kind" and "node"


# Why a node is lost, with the exit code of the job and the sentence about the node.
_LOSSES = {
    "killed": (EXIT_INTERNAL, "the agent of {} was killed; its ranks are lost"),
    "silent": (EXIT_HANG, "{} does not answer any more; its ranks are lost"),
    "unheard": (EXIT_INTERNAL, "{} did not say how its ranks ended"),
}


@dataclass(frozen=True, slots=True)
class NodeLoss:
    """A node that takes no part in the job any more, or whose agent does not say what it should.

    why: a key of `_LOSSES`, or "failed" for an agent that left by the error `failure`.
    """

    node: int
    host: str
    why: str
    failure: Ending | None = None

    @property
    def ending(self) -> Ending:
        """The exit code of the job, and the sentence about the node."""
        if self.failure is not None:
            return self.failure
        code, words = _LOSSES[self.why]
        return Ending(code, words.format(f"node {self.node} ({self.host})"))

    @property
    def is_cause(self) -> bool:
        """Whether the job ends with `ending` whatever is known of the ends of ranks."""
        return self.why in ("failed", "unheard")


class JobEnded(Exception):
    """The job ends before it has ranks.  `ending` says how, on this node."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.words)
        self.ending = ending


class News(Protocol):
    """The log of facts that all agents of a job read."""

    place: Place

    def tell(self, kind: str, **values: Any) -> None:
        """Add a fact of this node to the log."""
        ...

    def facts(self) -> list[Fact]:
        """Return the log so far."""
        ...


@dataclass
class OneNode:
    """The log of a job on one node, or the first facts of another log."""

    place: Place
    _log: list[Fact] = field(default_factory=list)

    def tell(self, kind: str, **values: Any) -> None:
        self._log.append({"kind": kind, "node": self.place.node, **values})

    def facts(self) -> list[Fact]:
        return self._log


class SeveralNodes:
    """The log of a job on several nodes, as this node's agent sees it."""

    def __init__(self, place: Place) -> None:
        """Connect to the head; node 0 is the head, and begins to listen.

        Raises ConfigError if the head's name is not known or the port is in use.
        """
        self.place = place
        self._server: StoreServer | None = None
        self._log: list[Fact] = []
        self._rest = b""
        self.has_lost_head = False
        _check_name(place.head)
        identity = {
            "run": hashlib.sha256(place.run_id.encode()).hexdigest(),
            "nodes": place.num_nodes,
            "nonce": secrets.token_hex(8) if place.node == 0 else "",
        }
        if place.node == 0:
            values = {_IDENTITY: json.dumps(identity)}
            try:
                self._server = StoreServer("", place.port, values)
            except OSError as error:
                raise ConfigError(
                    f"node 0 ({place.host}) cannot listen at port {place.port} "
                    f"({os.strerror(error.errno or 0)}); choose another: "
                    f"--head {place.head}:{place.port + 1}"
                ) from None
        ours, theirs = socket.socketpair()
        self._messenger = fork()
        if not self._messenger:
            ours.close()
            _be_messenger(theirs, place, identity)
        theirs.close()
        ours.setblocking(False)
        self._socket = ours

    def tell(self, kind: str, **values: Any) -> None:
        fact = {"kind": kind, "node": self.place.node, **values}
        line = json.dumps(fact).encode() + b"\n"
        self._socket.setblocking(True)
        try:
            self._socket.sendall(line)
        except OSError:
            self._lose_head()
        self._socket.setblocking(False)

    def facts(self) -> list[Fact]:
        while not self.has_lost_head:
            try:
                read = self._socket.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                read = b""
            if not read:
                self._lose_head()
                break
            *lines, self._rest = (self._rest + read).split(b"\n")
            self._log += map(json.loads, lines)
        return self._log

    def _lose_head(self) -> None:
        """Note that the messenger has ended: the head does not answer any more."""
        if not self.has_lost_head:
            self.has_lost_head = True
            _, status = os.waitpid(self._messenger, 0)
            silent = os.waitstatus_to_exitcode(status) == -signal.SIGALRM
            lost = {"lost": 0, "why": "silent" if silent else "killed"}
            self._log.append({"kind": "lost", "node": self.place.node, **lost})

    def leave(self) -> None:
        """Say goodbye; the head waits until the others have, since its store ends with it."""
        self.tell("bye")
        until = time.monotonic() + _LEAVE_SECONDS
        expected = range(self.place.num_nodes) if self.place.node == 0 else [self.place.node]
        while time.monotonic() < until and not self.has_lost_head:
            gone = {fact["node"] for fact in self.facts() if fact["kind"] == "bye"}
            gone |= {loss.node for loss in losses(self)}
            if gone.issuperset(expected):
                break
            time.sleep(_POLL_SECONDS)
        self._socket.close()
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._messenger, signal.SIGKILL)
            os.waitpid(self._messenger, 0)
        if self._server is not None:
            self._server.close()


@contextlib.contextmanager
def joined(
    place: Place,
    num_local: int,
    patience_seconds: float,
    options: Mapping[str, int | bool] | None = None,
) -> Iterator[News]:
    """Meet the agents of the other nodes, and part from them at the end.

    `num_local` is the number of ranks here, and `options` has the values of other options; both
    must be the same on every node.  The other nodes are told of an error that leaves the context.
    Raises ConfigError if the nodes do not fit together, or if one does not come within
    `patience_seconds`, and JobEnded if the agent of another node ends meanwhile.
    """
    if place.is_alone:
        yield OneNode(place)
        return
    news = SeveralNodes(place)
    try:
        try:
            _meet(news, {"--ranks": num_local, **(options or {})}, patience_seconds)
            yield news
        except BaseException as error:
            _ignore_signals()
            failure = _failure(error, place)
            news.tell("failed", code=failure.code, words=failure.words)
            raise
    finally:
        _ignore_signals()
        news.leave()


def _ignore_signals() -> None:
    """Let nothing end this process while it leaves: srun ends a step when its first task fails."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _failure(error: BaseException, place: Place) -> Ending:
    """Return how the job ends since the agent of this node leaves by `error`."""
    if isinstance(error, JobEnded):
        return error.ending
    ending = ending_of_command(error, f"vp-train: {place.host}")
    agent = f"the agent of node {place.node} ({place.host})"
    if ending.code == EXIT_INTERNAL:  # its words are a traceback, which the agent itself prints
        last = ending.words.strip().rpartition("\n")[2]
        return Ending(ending.code, f"{agent} failed: {last}")
    if isinstance(error, KeyboardInterrupt):
        return Ending(ending.code, f"{agent} was interrupted")
    return Ending(ending.code, ending.words or f"{agent} left with code {ending.code}")


def _meet(news: SeveralNodes, options: Mapping[str, int | bool], patience_seconds: float) -> None:
    """Wait until every node has joined; see `joined` for what is raised."""
    place, began, has_said = news.place, time.monotonic(), False
    news.tell("joined", host=place.host, options=dict(options))
    while True:
        here = _joined_nodes(news.facts(), place.num_nodes)
        if len(here) == place.num_nodes:
            break
        if news.has_lost_head:
            raise ConfigError(
                f"{_head(place)} does not answer as the head of this run; does another program "
                "listen there, or has the head ended?"
            )
        if lost := losses(news):
            raise JobEnded(lost[0].ending)
        waited = time.monotonic() - began
        missing = [str(node) for node in range(place.num_nodes) if node not in here]
        words = f"node(s) {', '.join(missing)} of --nodes {place.num_nodes}"
        if place.node not in here:
            words = f"the head at {_head(place)}"
            if place.node == 0 and waited > _ADDRESS_SECONDS:
                raise ConfigError(
                    f"node 0 ({place.host}) does not reach itself at {_head(place)}; --head "
                    "must be an address of node 0, and --node differs on every node"
                )
        if waited > patience_seconds:
            raise ConfigError(
                f"{words} did not come within {patience_seconds:g} s (run.world_timeout_seconds)"
            )
        if waited > WORDS_SECONDS and not has_said:
            has_said = True
            say_waiting(news, words)
        time.sleep(_POLL_SECONDS)
    _check_same(here)


def _joined_nodes(facts: Sequence[Fact], num_nodes: int) -> dict[int, Fact]:
    """Return what the nodes that have joined say of themselves.

    Raises ConfigError if one was refused before all had joined; later it does not concern them.
    """
    here: dict[int, Fact] = {}
    for fact in facts:
        if fact["kind"] == "joined":
            here[fact["node"]] = fact
        elif fact["kind"] == "refused" and len(here) < num_nodes:
            raise ConfigError(fact["words"])
    return here


def _check_same(here: Mapping[int, Fact]) -> None:
    """Raise ConfigError if the nodes have different options."""
    for name in here[0]["options"]:
        values = {node: here[node]["options"].get(name) for node in sorted(here)}
        if len(set(values.values())) > 1:
            words = ", ".join(f"{here[node]['host']} {_shown(values[node])}" for node in values)
            if name == "--ranks":
                raise ConfigError(f"nodes start different numbers of ranks: {words}; see --ranks")
            raise ConfigError(
                f"nodes have different values of {name}: {words}; give all nodes the same options"
            )


def _shown(value: int | bool) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def say_waiting(news: News, words: str) -> None:
    """Print that this node waits, and for what."""
    place = news.place
    sys.stderr.write(f"vp-train: node {place.node} ({place.host}) waits for {words}\n")
    sys.stderr.flush()


def _head(place: Place) -> str:
    return f"{place.head}:{place.port}"


def hosts(news: News) -> dict[int, str]:
    """Return the names of the nodes that have joined."""
    names = {f["node"]: f["host"] for f in news.facts() if f["kind"] == "joined"}
    return {news.place.node: news.place.host} | names


def losses(news: News) -> list[NodeLoss]:
    """Return the nodes that are lost, in the order in which that was noticed."""
    names = hosts(news)
    found: dict[int, NodeLoss] = {}
    for fact in news.facts():
        if fact["kind"] == "lost":
            node = fact["lost"]
            loss = NodeLoss(node, names.get(node, news.place.head), fact["why"])
            found.setdefault(node, loss)
        elif fact["kind"] == "failed":
            node = fact["node"]
            failure = Ending(fact["code"], fact["words"])
            found.setdefault(node, NodeLoss(node, names.get(node, ""), "failed", failure))
    return list(found.values())


def told(news: News, kind: str, attempt: int) -> dict[int, Fact]:
    """Return the fact of this kind of every node that has told it."""
    return {
        fact["node"]: fact
        for fact in news.facts()
        if fact["kind"] == kind and fact.get("attempt", attempt) == attempt
    }


def untold(news: News, kind: str, attempt: int) -> list[int]:
    """Return the nodes that have not told this fact yet and still can."""
    gone = {loss.node for loss in losses(news)}
    if gone and news.place.node != 0 and 0 in gone:
        return []  # what others tell cannot arrive any more
    gone |= {fact["node"] for fact in news.facts() if fact["kind"] == "bye"}
    return sorted(set(range(news.place.num_nodes)) - gone - told(news, kind, attempt).keys())


def when_all_told(news: News, kind: str, attempt: int) -> News | None:
    """Return the log up to the fact with which all nodes have told, None if one still has not.

    Every node that reads the log finds the same part, and so comes to the same conclusion from it.
    """
    if untold(news, kind, attempt):
        return None
    facts = news.facts()
    for number, fact in enumerate(facts, 1):
        is_told = fact["kind"] == kind and fact.get("attempt", attempt) == attempt
        if is_told or fact["kind"] in _DECISIVE:
            part = OneNode(news.place, facts[:number])
            if not untold(part, kind, attempt):
                return part
    return None


def _check_name(head: str) -> None:
    """Raise ConfigError if the head's name does not resolve to an address within some seconds."""
    ours, theirs = socket.socketpair()
    process = fork()
    if not process:
        try:
            socket.getaddrinfo(head, None)
            theirs.sendall(b"known")
        except OSError as error:
            theirs.sendall(str(error.strerror or error).encode())
        finally:
            os._exit(0)
    theirs.close()
    ours.settimeout(_ADDRESS_SECONDS)
    try:
        said = ours.recv(1000).decode()
    except TimeoutError:
        said = f"no answer within {_ADDRESS_SECONDS:g} s"
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    ours.close()
    if said != "known":
        raise ConfigError(
            f"the head's name {head} is not known here ({said}); see --head and $VP_TRAIN_HEAD"
        )


# The messenger


def _be_messenger(agent: socket.socket, place: Place, identity: Fact) -> None:
    """Exchange facts between the agent and the store until the agent says goodbye or ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    errors = os.dup(2)  # torch writes a stack there for every error of the store, as expected here
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        _Messenger(agent, place).run(identity)
    except (OSError, RuntimeError):  # the store's errors are RuntimeErrors; the agent sees the end
        os._exit(1)
    except BaseException:
        import traceback

        os.write(errors, traceback.format_exc().encode())
        os._exit(1)
    os._exit(0)


class _Messenger:
    """The process that speaks with the store for the agent of a node."""

    def __init__(self, agent: socket.socket, place: Place) -> None:
        self._agent, self._place = agent, place
        self._prefix = f"{place.run_id}/"  # who does not know it writes elsewhere
        self._has_said_bye = False

    def run(self, identity: Fact) -> None:
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        store = self._connect(identity)
        if store is None:
            return
        self._store = PrefixStore(self._prefix, store)
        if self._store.add(f"node/{self._place.node}", 1) > 1:
            words = f"node {self._place.node} has joined already; --node must differ on every node"
            here = {fact["node"] for fact in self._log() if fact["kind"] == "joined"}
            if len(here) < self._place.num_nodes:  # one node will never come
                self._tell({"kind": "refused", "node": self._place.node, "words": words})
            self._refuse(words)
            return
        beats = _Beats(self._store, self._place)
        read = 0
        while True:
            ready = bool(select.select([self._agent], [], [], _POLL_SECONDS)[0])
            signal.alarm(_STORE_SECONDS)
            if ready and not self._pass_on():
                return
            lines = self._lines(read)
            read += len(lines)
            for line in lines:
                fact = json.loads(line)
                if fact["kind"] == "bye":
                    beats.expect_no_more(fact["node"])
                self._agent.sendall(line + b"\n")
            for node in beats.lost():
                self._tell({"kind": "lost", "node": 0, "lost": node, "why": "silent"})
            signal.alarm(0)

    def _connect(self, identity: Fact) -> Any:
        """Return the store of the head; None if it is that of another job."""
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        place = self._place
        store = None
        while store is None:
            if select.select([self._agent], [], [], 0)[0] and not self._agent.recv(
                1, socket.MSG_PEEK
            ):
                return None  # the agent is gone
            with contextlib.suppress(OSError):  # an address that does not answer takes 5 s
                socket.create_connection((place.head, place.port), 5).close()
                signal.alarm(_CONNECT_SECONDS)
                try:
                    store = TCPStore(
                        place.head, place.port, None, is_master=False, timeout=timedelta(seconds=5)
                    )
                except RuntimeError:
                    self._refuse(_stranger(place))
                    return None
            signal.alarm(0)
            time.sleep(_POLL_SECONDS)
        signal.alarm(_CONNECT_SECONDS)
        try:
            found = json.loads(store.get(_IDENTITY))
        except (RuntimeError, ValueError):
            found = {}
        if place.node == 0 and found.get("nonce") != identity["nonce"]:
            self._refuse(
                f"{_head(place)} is not node 0 ({place.host}), which is to be the head; "
                "--node differs on every node"
            )
        elif found.get("run") != identity["run"]:
            self._refuse(_stranger(place))
        elif found.get("nodes") != identity["nodes"]:
            words = (
                f"--nodes {place.num_nodes} on node {place.node} ({place.host}), but the head says "
                f"--nodes {found.get('nodes')}"
            )
            self._store = PrefixStore(self._prefix, store)
            self._tell({"kind": "refused", "node": place.node, "words": words})
            self._refuse(words)
        else:
            store.set_timeout(timedelta(seconds=_STORE_SECONDS))
            return store
        return None

    def _refuse(self, words: str) -> None:
        fact = {"kind": "refused", "node": self._place.node, "words": words}
        with contextlib.suppress(OSError):
            self._agent.sendall(json.dumps(fact).encode() + b"\n")

    def _lines(self, first: int) -> list[bytes]:
        """Return the facts of the log from number `first` on, in JSON."""
        number = self._store.add("facts", 0)
        return [self._store.get(f"fact/{each}") for each in range(first, number)]

    def _log(self) -> list[Fact]:
        return [json.loads(line) for line in self._lines(0)]

    def _tell(self, fact: Fact) -> None:
        """Append a fact to the log."""
        number = self._store.add("facts", 1) - 1
        self._store.set(f"fact/{number}", json.dumps(fact))

    def _pass_on(self) -> bool:
        """Append what the agent tells to the log.  Returns False if the agent has left."""
        lines = b""
        while not lines.endswith(b"\n"):
            try:
                read = self._agent.recv(65536)
            except ConnectionResetError:
                read = b""
            if not read:
                if not self._has_said_bye:
                    lost = {"lost": self._place.node, "why": "killed"}
                    self._tell({"kind": "lost", "node": self._place.node, **lost})
                return False
            lines += read
        for line in lines.splitlines():
            fact = json.loads(line)
            self._has_said_bye |= fact["kind"] == "bye"
            self._tell(fact)
        return True


def _stranger(place: Place) -> str:
    return (
        f"{_head(place)} belongs to another job (run.root and run.name must be the same on all "
        f"nodes); choose another port, as in --head {place.head}:{place.port + 1}, and end what an "
        "earlier job left"
    )


class _Beats:
    """The signs of life of all nodes.  Node 0 watches them, the others only give theirs."""

    def __init__(self, store: Any, place: Place) -> None:
        self._store, self._place = store, place
        self._last: dict[int, tuple[int, float]] = {}
        self._due = 0.0
        self._lost: set[int] = set()
        self._has_left: set[int] = set()

    def expect_no_more(self, node: int) -> None:
        """Note that a node has left, so that its silence is no loss."""
        self._has_left.add(node)

    def lost(self) -> Sequence[int]:
        """Give a sign of life if it is time, and return the nodes newly found to be silent."""
        now = time.monotonic()
        if now < self._due:
            return ()
        self._due = now + _BEAT_SECONDS
        self._store.add(f"beat/{self._place.node}", 1)
        if self._place.node:
            return ()
        silent = []
        for node in range(1, self._place.num_nodes):
            count = self._store.add(f"beat/{node}", 0)
            last, since = self._last.get(node, (0, now))
            if count != last:
                since = now
            self._last[node] = count, since
            is_silent = bool(count) and now - since > _SILENT_SECONDS
            if is_silent and node not in self._lost | self._has_left:
                self._lost.add(node)
                silent.append(node)
        return silent


def wait_until(ready: Callable[[], Any], patience_seconds: float = float("inf")) -> Any:
    """Return the first value of `ready` that is not None; None after `patience_seconds`."""
    until = time.monotonic() + patience_seconds
    while (found := ready()) is None and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    return found
