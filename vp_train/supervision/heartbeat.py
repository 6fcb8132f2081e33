"""Where every rank stands in its program, so that the one that hangs can be named.

A thread of every rank writes a line about its rank into the store of the job, once a second.  A
rank that has waited for another one in vain reads the lines of all ranks.  A stopped or dead
process no longer counts up; of ranks that do, the one that is not waiting keeps the others waiting.
"""

from __future__ import annotations

import json
import platform
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import Any

from vp_train.config import printable

_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 2.5  # between two looks at the beats: long enough for a living rank to count up
_STORE_SECONDS = 5.0  # the store answers within milliseconds if its host is there
_MOST_BYTES, _MOST_CHARACTERS = 2000, 200  # of a beat, and of a word in it
_WORDS = ("host", "doing")
_NEVER = "has never begun: its process hangs before its first beat, or was not started"


@dataclass(frozen=True, slots=True)
class Activity:
    """Where a rank stands: what it does, and whether it waits for another rank."""

    doing: str
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank has last said of itself; `count` grows with every beat."""

    count: int
    host: str
    doing: str
    waits: bool

    @classmethod
    def parse(cls, text: bytes) -> Beat | None:
        """Return the beat in `text`, None if it is none: a store takes values from anybody."""
        try:
            values: Any = json.loads(text[:_MOST_BYTES])
            host, doing = (printable(str(values[name]))[:_MOST_CHARACTERS] for name in _WORDS)
            return cls(int(values["count"]), host, doing, bool(values["waits"]))
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None


class Heartbeat:
    """The beats of one rank, and a look at those of all ranks.

    `address` is host and port of the store of the job.  If it cannot be reached there are no beats,
    and a rank that hangs stays without a name.
    """

    def __init__(self, address: tuple[str, int], rank: int, attempt: str = "0") -> None:
        self._address, self._rank, self._attempt = address, rank, attempt
        self._activity: Callable[[], Activity] = lambda: Activity("starts")
        self._stopped = Event()
        Thread(target=self._beat, daemon=True, name="heartbeat").start()

    @classmethod
    def of_job(cls, environment: Mapping[str, str], rank: int) -> Heartbeat | None:
        """Return the heartbeat of a rank of torchrun or of our agent, None for any other."""
        if not {"MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            return None
        address = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        return cls(address, rank, environment.get("TORCHELASTIC_RESTART_COUNT", "0"))

    def follow(self, activity: Callable[[], Activity]) -> None:
        """Say from now on what `activity` returns; the thread calls it."""
        self._activity = activity

    def stop(self) -> None:
        """End the beats."""
        self._stopped.set()

    def _beat(self) -> None:
        count, host, store = 0, platform.node(), None
        while not self._stopped.is_set():
            try:
                store = store or self._store()
                activity = self._activity()
                beat = Beat(count, host, activity.doing, activity.waits)
                store.set(self._key(self._rank), json.dumps(asdict(beat)))
                count += 1
            except (OSError, RuntimeError):  # there is no store yet, or the connection broke
                store = None
            self._stopped.wait(_BEAT_SECONDS)

    def _key(self, rank: int) -> str:
        return f"vp_train/{self._attempt}/beat/{rank}"

    def _store(self) -> Any:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        # Where nobody listens torch would try for long, and write a stack of C++ frames.
        socket.create_connection(self._address, _STORE_SECONDS).close()
        timeout = timedelta(seconds=_STORE_SECONDS)  # to connect, and of every request that waits
        return TCPStore(*self._address, is_master=False, wait_for_workers=False, timeout=timeout)

    def look(self, num_ranks: int) -> Stall | None:
        """Return where all ranks stand, None if the store does not answer or knows of no rank.

        It takes 2.5 s, because it looks twice, and at most 7.5 s.
        """
        found: list[Stall] = []
        # Over a cut link a request to the store never returns, so a thread makes it.
        looking = Thread(target=self._look, args=(num_ranks, found), daemon=True)
        looking.start()
        looking.join(_LOOK_SECONDS + _STORE_SECONDS)
        return found[0] if found else None

    def _look(self, num_ranks: int, found: list[Stall]) -> None:
        try:
            store = self._store()
            before = self._beats(store, num_ranks)
            time.sleep(_LOOK_SECONDS)
            after = self._beats(store, num_ranks)
            if any(after):
                found.append(Stall.of(before, after))
        except (OSError, RuntimeError):
            return

    def _beats(self, store: Any, num_ranks: int) -> list[Beat | None]:
        keys = list(map(self._key, range(num_ranks)))
        if store.check(keys):  # two requests instead of two for each rank
            return list(map(Beat.parse, store.multi_get(keys)))
        return [Beat.parse(store.get(key)) if store.check([key]) else None for key in keys]


@dataclass(frozen=True, slots=True)
class Stall:
    """Where all ranks stand while some wait in vain.

    beats: by rank, None for a rank that has never begun.
    silent: the ranks that no longer beat.
    """

    beats: Sequence[Beat | None]
    silent: frozenset[int]

    @classmethod
    def of(cls, before: Sequence[Beat | None], after: Sequence[Beat | None]) -> Stall:
        """Return the stall that two looks show."""
        silent = (
            rank
            for rank, (first, second) in enumerate(zip(before, after, strict=True))
            if second is None or (first is not None and second.count == first.count)
        )
        return cls(after, frozenset(silent))

    @property
    def culprits(self) -> list[int]:
        """The ranks that keep the others waiting: those without beat, else those that compute."""
        busy = [rank for rank, beat in enumerate(self.beats) if beat is None or not beat.waits]
        return sorted(self.silent) or busy

    def words(self) -> str:
        """Return who keeps the others waiting, in one sentence."""
        if not self.culprits:
            return "all ranks wait for each other, see the log for where"
        rank = self.culprits[0]
        more = len(self.culprits) - 1
        others = f" (and {more} more, see the log)" if more else ""
        return f"rank {rank}{others} {self._state(rank)}"

    def _state(self, rank: int) -> str:
        beat = self.beats[rank]
        if beat is None:
            return _NEVER
        if rank in self.silent:
            return f"on {beat.host} no longer beats: it is stopped or dead, last {beat.doing}"
        return f"on {beat.host} {'waits' if beat.waits else 'is busy'}: {beat.doing}"

    def table(self) -> str:
        """Return one line for every rank."""
        return "".join(f"rank {rank} {self._state(rank)}\n" for rank in range(len(self.beats)))
