"""What the agents of several nodes tell each other.

The agents keep one log: every agent reads the same facts in the same order, so that all come to the
same conclusion.  `agent.py` lists the kinds of facts, and `messenger.py` says how the log is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vp_train.commands.local_ranks import fork
from vp_train.commands.messenger import IDENTITY, STORE_SECONDS, Fact, be_messenger
from vp_train.commands.place import Place
from vp_train.commands.store_server import StoreServer
from vp_train.config import ConfigError
from vp_train.failures import EXIT_HANG, EXIT_INTERNAL, Ending, ending_of_command
from vp_train.supervision.ending import write_stderr
from vp_train.supervision.requests import SIGNALS

_POLL_SECONDS = 0.05
WORDS_SECONDS = 6.0  # of waiting for other nodes, before a line says so
_ADDRESS_SECONDS = 6.0  # to resolve the head's name, and for node 0 to reach itself
_LATE_SECONDS = 3.0  # that the head's store stays for nodes that have not joined yet
_LEAVE_SECONDS = 10.0  # likewise, for those that have: they may read slowly
_TELL_SECONDS = 3.0  # to tell the other nodes that this one is cut off
_DECISIVE = {"lost", "failed", "bye"}  # facts after which a node need not be waited for


# Why a node is lost, with the exit code of the job and the sentence about the node.
_LOSSES = {
    "killed": (EXIT_INTERNAL, "the agent of {} was killed; its ranks are lost"),
    "silent": (EXIT_HANG, "{} does not answer any more; its ranks are lost"),
    "gone": (EXIT_INTERNAL, "the head, {}, ended or cannot be reached"),
    "cut": (EXIT_INTERNAL, "a process that links this node to the head, {}, was killed"),
    "store": (EXIT_INTERNAL, "the store of the agents, a process on {}, was killed"),
    "unlinked": (
        EXIT_INTERNAL,
        "the process that links {} to the other nodes was killed; its ranks are lost",
    ),
    "mute": (EXIT_HANG, "the agent of {} did not say that ranks may start"),
    "unheard": (EXIT_INTERNAL, "{} did not say how its ranks ended"),
}


@dataclass(frozen=True, slots=True)
class NodeLoss:
    """A node that takes no part in the job any more, or whose agent does not say what it should.

    why: a key of `_LOSSES`, or "failed" for an agent that left by the error `failure`.
    reason: what the system said, "" if it said nothing.
    """

    node: int
    host: str
    why: str
    failure: Ending | None = None
    reason: str = ""

    @property
    def ending(self) -> Ending:
        """The exit code of the job, and the sentence about the node."""
        if self.failure is not None:
            return self.failure
        code, words = _LOSSES[self.why]
        reason = f" ({self.reason})" if self.reason else ""
        return Ending(code, words.format(f"node {self.node} ({self.host})") + reason)

    @property
    def is_cause(self) -> bool:
        """Return whether the job ends with `ending` whatever is known of the ends of ranks."""
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

        Raises ConfigError if the head's name is not known, and like `StoreServer.at_port`.
        """
        self.place = place
        self._server: StoreServer | None = None
        self._log: list[Fact] = []
        self._rest = b""
        self.has_lost_head = False
        _check_name(place.head)
        self._identity = {
            "run": hashlib.sha256(place.run_id.encode()).hexdigest(),
            "nodes": place.num_nodes,
            "nonce": secrets.token_hex(8) if place.node == 0 else "",
        }
        if place.node == 0:
            self._server = StoreServer.at_port(
                "",
                place.port,
                f"node 0 ({place.host})",
                f"; choose another: --head {place.next_address}",
                {IDENTITY: json.dumps(self._identity)},
            )
        self._messenger, self._socket = self._start_messenger()
        self._second: tuple[int, socket.socket] | None = None

    def _start_messenger(self, *, is_first: bool = True) -> tuple[int, socket.socket]:
        """Return the process id of a new messenger, and this end of the stream to it."""
        ours, theirs = socket.socketpair()
        agent = os.getpid()
        process = fork()
        if not process:
            ours.close()
            be_messenger(theirs, agent, self.place, self._identity, is_first=is_first)
        theirs.close()
        ours.setblocking(False)
        return process, ours

    def tell(self, kind: str, **values: Any) -> None:
        """Add a fact of this node to the log, or without a head to what this node alone knows."""
        fact = {"kind": kind, "node": self.place.node, **values}
        self._socket.setblocking(True)
        try:
            self._socket.sendall(json.dumps(fact).encode() + b"\n")
        except ConnectionError:
            self.facts()  # to the end of the stream: what all know stands before it
            self._log.append(fact)
        self._socket.setblocking(False)

    def facts(self) -> list[Fact]:
        while not self.has_lost_head:
            try:
                read = self._socket.recv(65536)
            except BlockingIOError:
                break
            except ConnectionError:
                read = b""
            if not read:
                self._lose_head()
                break
            *lines, self._rest = (self._rest + read).split(b"\n")
            self._log += map(json.loads, lines)
        return self._log

    def _lose_head(self) -> None:
        """Note that the messenger has ended, and with it all that is heard of other nodes."""
        self.has_lost_head = True
        _, status = os.waitpid(self._messenger, 0)
        code = os.waitstatus_to_exitcode(status)
        why = "gone" if code >= 0 else "cut"
        if code == -signal.SIGALRM:
            why = "silent"
        elif self._server is not None and self._server.poll() is not None:
            why = "store"
        lost = {"kind": "lost", "node": self.place.node, "lost": 0, "why": why}
        reasons = [fact["words"] for fact in self._log if fact["kind"] == "reason"]
        self._log.append({**lost, "reason": reasons[-1]} if reasons and why == "gone" else lost)
        if why == "cut":
            with contextlib.suppress(OSError):  # no more processes: the others miss the beats
                self._second = self._start_messenger(is_first=False)

    def leave(self) -> None:
        """Say goodbye; the head waits until the others have, since its store ends with it."""
        self.tell("bye")
        if self._server is not None:
            self._wait_for_others()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)  # the messenger ends when all is in the log
        self._socket.settimeout(STORE_SECONDS)
        try:
            self.facts()  # to the end of the stream
        except TimeoutError:  # it does not answer, and this node has nothing more to hear
            os.kill(self._messenger, signal.SIGKILL)
            os.waitpid(self._messenger, 0)
        self._socket.close()
        if self._second is not None:
            self._end_second(*self._second)
        if self._server is not None:
            self._server.close()

    def _end_second(self, process: int, stream: socket.socket) -> None:
        """Wait until the other nodes have been told why this one is cut off, or for seconds."""
        if wait_until(lambda: os.waitpid(process, os.WNOHANG)[0] or None, _TELL_SECONDS) is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        stream.close()

    def _wait_for_others(self) -> None:
        """Wait until the other nodes have left or are lost, or for some seconds."""
        began = time.monotonic()
        while not self.has_lost_head:
            gone = {fact["node"] for fact in self.facts() if fact["kind"] == "bye"}
            gone |= {loss.node for loss in losses(self)}
            waited = time.monotonic() - began
            is_early = waited < _LATE_SECONDS
            expected = range(self.place.num_nodes) if is_early else hosts(self)
            if gone.issuperset(expected) or waited > _LEAVE_SECONDS:
                break
            time.sleep(_POLL_SECONDS)


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
    place, began, has_said, num_strangers = news.place, time.monotonic(), False, 0
    news.tell("joined", host=place.host, options=dict(options))
    while True:
        here = _joined_nodes(news.facts(), place.num_nodes)
        if len(here) == place.num_nodes:
            break
        if news.has_lost_head:
            raise ConfigError(
                f"{place.address} does not answer as the head of this run; does another program "
                "listen there, or has the head ended?"
            )
        if lost := losses(news):
            raise JobEnded(lost[0].ending)
        strangers = [fact["words"] for fact in news.facts() if fact["kind"] == "stranger"]
        for words in strangers[num_strangers:]:
            _print(f"node 0 ({place.host}): {words}")
        num_strangers = len(strangers)
        waited = time.monotonic() - began
        missing = [str(node) for node in range(place.num_nodes) if node not in here]
        words = f"node(s) {', '.join(missing)} of --nodes {place.num_nodes}"
        if place.node not in here:
            words = f"the head at {place.address}"
            if place.node == 0 and waited > _ADDRESS_SECONDS:
                raise ConfigError(
                    f"node 0 ({place.host}) does not reach itself at {place.address}; --head "
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
    _print(f"node {place.node} ({place.host}) waits for {words}")


def _print(words: str) -> None:
    write_stderr(f"vp-train: {words}\n")


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
            host, reason = names.get(node, news.place.head), fact.get("reason", "")
            loss = NodeLoss(node, host, fact["why"], reason=reason)
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
    if 0 in gone:
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


def wait_until(ready: Callable[[], Any], patience_seconds: float = float("inf")) -> Any:
    """Return the first value of `ready` that is not None; None after `patience_seconds`."""
    until = time.monotonic() + patience_seconds
    while (found := ready()) is None and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    return found
