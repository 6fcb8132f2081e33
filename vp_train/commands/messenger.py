"""The messenger of an agent: the process that keeps the log of facts with those of other nodes.

Node 0, the head, hosts a TCPStore in a process of its own (`store_server.py`).  Every agent has a
messenger.  It alone speaks with the store, so that an agent never waits for the network.  Agent and
messenger write lines of JSON to each other, one per fact.

Keys.  RUN is the id of the run; who does not know it writes elsewhere.  Nothing is unpickled.

    vp-train      the job that the store belongs to: its run, its number of nodes, a nonce
    vp-train/N    node N of those that came for another run, in words; their number is in vp-train/
    RUN/node/K    how many messengers have come as node K; all but the first are refused
    RUN/fact/N    fact N of the log
    RUN/beat/K    how many signs of life node K has given

Order.  A fact is written by one compare_set, at the first number that its messenger has not read.
If there is another fact, that one is read, and the next number is tried.  So a log has no hole,
whenever a messenger ends, and all messengers read the same facts in the same order.

Ends.  An agent that leaves says "bye" and ends its stream.  Its messenger writes what is left, and
exits.  Every other end of a process is noticed:

    process             by                                      then
    agent               its messenger, as its stream ends       it writes "lost", and exits
    messenger           its agent, as the stream ends           for this node the head is lost, and
                                                                a new messenger writes "lost"
                        the head's messenger, without beats     it writes "lost"
    store               every messenger, as it reads next       it exits, see above
    (no answer)         the kernel, after `STORE_SECONDS`       it ends the messenger, see above

An agent without its head ends its ranks and leaves.  If it is that of node 0, the store ends with
it, and then all others do the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import time
from collections.abc import Container, Sequence
from datetime import timedelta
from typing import Any, NoReturn

from vp_train.commands.place import Place
from vp_train.commands.titles import entitle
from vp_train.config import printable
from vp_train.supervision.requests import SIGNALS

_POLL_SECONDS = 0.05
_BEAT_SECONDS = 0.5
_SILENT_SECONDS = 10.0  # without a beat a node is lost
STORE_SECONDS = 15  # for one exchange with the store; then the kernel ends the messenger
_CONNECT_SECONDS = 8  # likewise, for the first one
IDENTITY = "vp-train"  # the key that says which job a store belongs to
_STRANGERS = f"{IDENTITY}/"
_MOST_STRANGERS, _MOST_CHARACTERS = 8, 200  # that are heard, and of what each says

Fact = dict[str, Any]  # has "kind" and "node"


def be_messenger(
    stream: socket.socket, agent: int, place: Place, identity: Fact, *, is_first: bool = True
) -> NoReturn:
    """Exchange facts between process `agent`, at `stream`, and the store until the agent ends.

    A messenger that is not the first of its node tells that the first was killed, and ends.
    """
    entitle("vp messenger")
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    errors = os.dup(2)  # torch writes a stack there for every error of the store, as expected here
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    messenger = Messenger(stream, agent, place)
    try:
        if is_first:
            messenger.run(identity)
        else:
            messenger.tell_loss(identity)
    except (OSError, RuntimeError) as error:  # the store's errors are RuntimeErrors
        messenger.give_reason((str(error) or repr(error)).splitlines()[0])
        os._exit(1)
    except BaseException:
        import traceback

        os.write(errors, traceback.format_exc().encode())
        os._exit(1)
    os._exit(0)


class Messenger:
    """The process that speaks with the store for the agent of a node."""

    def __init__(self, stream: socket.socket, agent: int, place: Place) -> None:
        stream.setblocking(False)
        self._stream, self._agent, self._place = stream, agent, place
        self._prefix = f"{place.run_id}/"
        self._store: Any = None
        self._door: Any = None  # the store without the prefix of this run
        self._received = b""  # what the agent has told and is not in the log
        self._unsent = b""  # what was read and the agent has not got: it may be busy for minutes
        self._agent_left = False
        self._has_said_bye = False
        self._num_read = self._num_strangers = 0
        self._joined: set[int] = set()
        self._gone: set[int] = set()  # nodes that have said "bye"

    def run(self, identity: Fact) -> None:
        """Serve the agent until it has left.  Raises OSError or RuntimeError without a store."""
        try:
            self._serve(identity)
        finally:
            self._deliver()  # what was read before the store ended may say why

    def tell_loss(self, identity: Fact) -> None:
        """Tell the other nodes that the messenger before this one was killed."""
        if self._join(identity):
            self._tell_own_loss("unlinked")

    def _serve(self, identity: Fact) -> None:
        if not self._join(identity):
            return
        if self._store.add(f"node/{self._place.node}", 1) > 1:
            self._refuse_second()
            return
        beats = Heartbeats(self._store, self._place)
        while True:
            unsent = [self._stream] if self._unsent else []
            select.select([self._stream], unsent, [], _POLL_SECONDS)
            signal.alarm(STORE_SECONDS)
            for node in beats.lost(self._gone):  # the first beat comes before the first fact
                self._tell({"kind": "lost", "node": 0, "lost": node, "why": "silent"})
            self._receive()
            *lines, self._received = self._received.split(b"\n")
            for line in lines:
                self._has_said_bye |= json.loads(line)["kind"] == "bye"
                self._write(line)
            if self._agent_left:
                break
            self._read()
            self._hear_strangers()
            self._deliver()
            signal.alarm(0)
        if not self._has_said_bye:
            self._tell_own_loss("killed")

    def _tell_own_loss(self, why: str) -> None:
        node = self._place.node
        self._tell({"kind": "lost", "node": node, "lost": node, "why": why})

    def _join(self, identity: Fact) -> bool:
        """Take the keys of this run in the store of the head; return whether there is one."""
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        store = self._connect(identity)
        if store is None:
            return False
        self._store, self._door = PrefixStore(self._prefix, store), store
        return True

    def _connect(self, identity: Fact) -> Any:
        """Return the store of the head; None if it is that of another job, or the agent left."""
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        place = self._place
        store = None
        while store is None:
            self._receive()
            if self._agent_left:
                return None
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
            found = json.loads(store.get(IDENTITY))
        except (RuntimeError, ValueError):
            found = {}
        if place.node == 0 and found.get("nonce") != identity["nonce"]:
            self._refuse(
                f"{place.address} is not node 0 ({place.host}), which is to be the head; "
                "--node differs on every node"
            )
        elif found.get("run") != identity["run"]:
            if "run" in found:
                _give_name(store, place)
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
            store.set_timeout(timedelta(seconds=STORE_SECONDS))
            return store
        return None

    def _refuse_second(self) -> None:
        """Refuse this node, because another messenger has come as the same one."""
        words = f"node {self._place.node} has joined already; --node must differ on every node"
        self._read()
        if len(self._joined) < self._place.num_nodes:  # one node will never come
            self._tell({"kind": "refused", "node": self._place.node, "words": words})
        self._refuse(words)

    def _refuse(self, words: str) -> None:
        """Tell the agent, and nothing else, that it does not belong here."""
        self._unsent = b""  # who does not belong here learns nothing of the others
        self._tell_agent("refused", words)

    def _hear_strangers(self) -> None:
        """Tell the agent of node 0 who has come for another run, until all nodes are here."""
        if self._place.node or len(self._joined) == self._place.num_nodes:
            return
        while self._num_strangers < _MOST_STRANGERS:
            key = f"{_STRANGERS}{self._num_strangers + 1}"
            if not self._door.check([key]):
                break
            self._num_strangers += 1
            who = printable(self._door.get(key)[:_MOST_CHARACTERS].decode(errors="replace"))
            self._tell_agent(
                "stranger",
                f"{who} came for another run and was refused; start it again with the run.root and "
                "run.name of this run",
            )

    def give_reason(self, words: str) -> None:
        """Tell the agent, and nothing else, why the store is lost."""
        self._tell_agent("reason", words)

    def _tell_agent(self, kind: str, words: str) -> None:
        fact = {"kind": kind, "node": self._place.node, "words": words}
        self._unsent += json.dumps(fact).encode() + b"\n"
        self._deliver()

    def _tell(self, fact: Fact) -> None:
        """Append a fact of the messenger itself to the log."""
        self._write(json.dumps(fact).encode())

    def _write(self, line: bytes) -> None:
        """Append a fact to the log."""
        while (found := self._store.compare_set(self._key, "", line.decode())) != line:
            self._take(found)
        self._take(line)

    def _read(self) -> None:
        """Take all facts that others have appended to the log."""
        while self._store.check([self._key]):
            self._take(self._store.get(self._key))

    @property
    def _key(self) -> str:
        """The key of the first fact that was not read."""
        return f"fact/{self._num_read}"

    def _take(self, line: bytes) -> None:
        """Note the next fact of the log, for the agent too."""
        signal.alarm(STORE_SECONDS)  # anew: the store answers
        self._num_read += 1
        self._unsent += line + b"\n"
        fact = json.loads(line)
        if fact["kind"] == "joined":
            self._joined.add(fact["node"])
        elif fact["kind"] == "bye":
            self._gone.add(fact["node"])

    def _receive(self) -> None:
        """Take what the agent says, and note if it says no more."""
        # The stream does not end with the agent where a process that it forked lives on.
        is_orphan = os.getppid() != self._agent
        try:
            while read := self._stream.recv(65536):
                self._received += read
            self._agent_left = True
        except BlockingIOError:
            self._agent_left |= is_orphan
        except ConnectionResetError:
            self._agent_left = True

    def _deliver(self) -> None:
        """Give the agent what was read, or as much of it as the stream takes now."""
        with contextlib.suppress(OSError):  # the stream is full, or has ended: see `_receive`
            while self._unsent:
                self._unsent = self._unsent[self._stream.send(self._unsent) :]


def _give_name(store: Any, place: Place) -> None:
    """Write the name of this node where the head of another run hears it, if there is one."""
    with contextlib.suppress(RuntimeError):  # the head has ended
        number = store.add(_STRANGERS, 1)
        store.set(f"{_STRANGERS}{number}", f"node {place.node} ({place.host})")


def _stranger(place: Place) -> str:
    return (
        f"{place.address} belongs to another job (run.root and run.name must be the same on all "
        f"nodes); choose another port, as in --head {place.next_address}, and end what an "
        "earlier job left"
    )


class Heartbeats:
    """The signs of life of all nodes.  Node 0 watches them, the others only give theirs."""

    def __init__(self, store: Any, place: Place) -> None:
        self._store, self._place = store, place
        self._last: dict[int, tuple[int, float]] = {}
        self._due = 0.0
        self._lost: set[int] = set()

    def lost(self, gone: Container[int]) -> Sequence[int]:
        """Give a sign of life if it is time, and return the nodes newly found to be silent.

        Nodes that are `gone` owe no sign.
        """
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
            if is_silent and node not in self._lost and node not in gone:
                self._lost.add(node)
                silent.append(node)
        return silent
