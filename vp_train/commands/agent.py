"""The agent of a node: it runs the ranks of this node, attempt after attempt, until the job ends.

The agents of all nodes read the same log (`nodes.py`), find the same root cause and leave with the
same exit code, unless a node is cut off.  The facts in it, besides "kind" and "node", in the order
of a job:

    kind     by                                when, with values
    joined   every agent                       as it comes: host, options
    refused  a messenger                       its node does not fit the others: words
    checked  every agent                       settings and data are looked at: code, words,
                                               overrides of a search
    start    the agent of node 0               ranks may start: attempt, port of their store
    asked    an agent                          its first signal: ranks are to save and end
    store    the agent of node 0               the store of the ranks has ended: attempt, words,
                                               whether they save
    stopped  an agent                          its second signal: ranks are to end now: number
    failing  an agent                          one of its ranks has failed: attempt, explains
    ends     every agent                       its ranks have ended: attempt, ends
    lost     a messenger                       its agent was killed: lost, why
             a messenger                       another one of its node was killed
             the messenger of node 0           a node is silent
             an agent                          a node has not told "ends", long after a failure or
                                               its own ranks, or node 0 has not told "start"
             an agent, in its own log alone    its messenger has ended
    reason   a messenger, to its agent alone   why the head is lost: words
    stranger the messenger of node 0,          a node of another run has come: words
             to its agent alone
    failed   an agent                          it leaves by an error: code, words
    bye      every agent                       it leaves; its last fact
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any

from vp_train.commands.local_ranks import LocalRanks, Starter
from vp_train.commands.messenger import Fact
from vp_train.commands.nodes import (
    News,
    NodeLoss,
    hosts,
    losses,
    told,
    untold,
    wait_until,
    when_all_told,
)
from vp_train.commands.store_server import LOOPBACK_ADDRESS, StoreServer, loopback
from vp_train.config import RunSettings
from vp_train.failures import (
    EXIT_CONFIG,
    EXIT_HANG,
    EXIT_INTERNAL,
    EXIT_IO,
    EXIT_OK,
    EXIT_TIME,
    Ending,
    RankEnd,
    end_of_process,
    root_cause,
)
from vp_train.supervision.ending import write_stderr
from vp_train.supervision.requests import SIGNALS, is_ignored

_POLL_SECONDS = 0.03
_LIVE_LINES = 2  # of rank 0 on a terminal of 60 columns or more
_GRACE_SECONDS = 1.0  # after a failure, for the messages of other ranks: theirs may be the cause
# Likewise, while no failure so far explains the others.  A rank that has waited in vain looks for
# the one that hangs, which takes 2.5 s.
_LOOKING_SECONDS = 4.0
_TOLD_SECONDS = 15.0  # after a failure, for the ends of ranks on other nodes
_REPORT_SECONDS = 300.0  # for what rank 0 does when all ranks have agreed that the run has ended
_LEAVING_SECONDS = 60.0  # for what other ranks do then: their processes give memory back
# Two signals that arrive together are one request: Slurm signals a step and its batch script.
_TOGETHER_SECONDS = 1.0
# A new start cannot mend these, or is not needed.
_FINAL = (EXIT_OK, EXIT_IO, EXIT_TIME, EXIT_CONFIG)


@dataclass
class Signals:
    """The signals that asked this process to end, with their times in seconds.

    told: the kinds of facts with which the other agents know of them.
    """

    noted: list[tuple[int, float]] = field(default_factory=list)
    told: set[str] = field(default_factory=set)

    @property
    def has_request(self) -> bool:
        """Return whether ranks are to finish their step, save and end."""
        return bool(self.noted)

    @property
    def insisting(self) -> int | None:
        """The second request, which ends the ranks at once."""
        later = [
            number for number, when in self.noted if when > self.noted[0][1] + _TOGETHER_SECONDS
        ]
        return later[0] if later else None


@contextmanager
def noting_signals() -> Iterator[Signals]:
    """Note the signals that ask this process to end, instead of ending it."""
    signals = Signals()

    def note(number: int, frame: Any) -> None:
        signals.noted.append((number, time.monotonic()))

    handled = [number for number in SIGNALS if not is_ignored(number)]
    before = {number: signal.signal(number, note) for number in handled}  # nohup ignores SIGHUP
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True, slots=True)
class Job:
    """What the agents run: `num_local` ranks on every node.

    `starter` returns how to start a rank, of a run that begins (False) or resumes (True).
    `record_of` returns the flight recorder's file of a rank if NCCL's watchdog wrote it.  `way_on`
    returns how a job goes on that was stopped at once or starts again, or of which a rank was
    killed.  `saves` returns whether ranks that started at a time, in seconds of `time.time`, save
    if they are asked to end.  `answer` is what ranks do that a signal has asked to end, in words
    that are said at once; empty if they end at once themselves.
    """

    starter: Callable[[bool], Starter]
    num_local: int
    _: KW_ONLY
    way_on: Callable[[], str]
    saves: Callable[[float], bool]
    answer: str = ""
    num_restarts: int = 0
    settings: RunSettings = field(default_factory=RunSettings)
    record_of: Callable[[int], Path | None] = lambda rank: None


def run_job(news: News, job: Job) -> Ending:
    """Run the ranks of this node until the job ends, and return how it ends, equal on all nodes.

    After a failure that a new start can mend, all ranks start again from the newest checkpoint, at
    most `job.num_restarts` times.
    """
    with noting_signals() as signals:
        attempt = 0
        while True:
            past = _run_attempt(news, job, attempt, signals)
            if (number := _insisting(past)) is not None:
                words = f"stopped by {signal.Signals(number).name}; {job.way_on()}"
                return Ending(128 + number, words)
            is_last = attempt == job.num_restarts or bool(_lost(past, attempt)) or _wants_end(past)
            ending = _ending(past, attempt, job, job.way_on if is_last else str)
            if is_last or ending.code in _FINAL:
                return ending
            attempt += 1
            if news.place.node == 0:
                say(ending.words)
                words = f"start {attempt} of {job.num_restarts} after a failure"
                say(f"{words}; {job.way_on()}")


def say(words: str) -> None:
    """Print `words` to stderr in a single write."""
    if words:
        prefix = "" if words.startswith("vp-train: ") else "vp-train: "
        write_stderr(f"{prefix}{words}\n")


def _say_beside_progress(words: str) -> None:
    """Print `words` like `say`, and on a terminal where rank 0 does not draw over them.

    Its cursor stands at the end of the last live line, and it clears as many lines as it has drawn.
    """
    if sys.stdout.isatty():  # a sweep passes on what comes on stderr
        write_stderr("\n")
        words += "\n" * (_LIVE_LINES - 1)
    say(words)


def _insisting(news: News) -> int | None:
    """Return the second signal that an agent got, which ended all ranks at once."""
    numbers = [fact["number"] for fact in news.facts() if fact["kind"] == "stopped"]
    return numbers[0] if numbers else None


def _wants_end(news: News) -> bool:
    """Return whether any agent was asked to end."""
    return _first_asked(news) is not None


def _first_asked(news: News) -> int | None:
    """Return the node whose agent was the first to be asked to end; None if none was."""
    nodes = [fact["node"] for fact in news.facts() if fact["kind"] == "asked"]
    return nodes[0] if nodes else None


def _run_attempt(news: News, job: Job, attempt: int, signals: Signals) -> News:
    """Start the ranks of this node once, and wait until the ranks of all nodes have ended.

    Returns the log up to the fact that decides how they ended, the same facts on every node.
    """
    place, server, patience = news.place, None, job.settings.world_timeout_seconds
    if place.node == 0:
        server = StoreServer(LOOPBACK_ADDRESS if place.is_alone else "")
        news.tell("start", attempt=attempt, port=server.port)
    try:
        port = wait_until(lambda: _start_port(news, attempt, signals), patience)
        if port is None:
            news.tell("lost", lost=0, why="mute")
        if port:
            environments = _environments(news, job.num_local, port, attempt)
            began = time.time()
            ranks = LocalRanks(job.starter(attempt > 0), environments, place.host)

            def tell_end_of_store() -> None:
                if server is not None and (end := server.poll()) is not None:
                    words = f"the store of the ranks on {place.host} {end}"
                    news.tell("store", attempt=attempt, words=words, saves=job.saves(began))

            try:
                _watch(news, ranks, attempt, signals, tell_end_of_store, job.answer)
                ranks.poll()
                own = [asdict(end) | {"when": when} for end, when in ranks.ends()]
                news.tell("ends", attempt=attempt, ends=own)  # to end a rank may take long
            finally:
                for words in ranks.kill():
                    say(words)
        else:
            news.tell("ends", attempt=attempt, ends=[])
        return _when_decided(news, attempt, signals, patience + _REPORT_SECONDS)
    finally:
        if server is not None:
            server.close()


def _when_decided(news: News, attempt: int, signals: Signals, patience_seconds: float) -> News:
    """Wait until all nodes have told how their ranks ended, and return the log until then.

    All ranks agree that they have done their last step and save, so those elsewhere end within
    `patience_seconds` of those here, and after a failure or a request much sooner.  A node that has
    told nothing by then, as one whose agent is stopped, is told of as lost, so that all nodes agree
    on that.
    """
    until, has_failed, has_asked = time.monotonic() + patience_seconds, False, False
    while (past := when_all_told(news, "ends", attempt)) is None:
        _tell_requests(news, signals)
        now = time.monotonic()
        if not has_failed and (_failures(news, attempt) or _ends_at_once(news, attempt)):
            until, has_failed = min(until, now + _TOLD_SECONDS), True
        if not has_asked and _wants_end(news):
            leaving = _REPORT_SECONDS if news.place.node else _LEAVING_SECONDS
            until, has_asked = min(until, now + leaving), True
        if now > until:
            until = now + _TOLD_SECONDS
            for node in untold(news, "ends", attempt):
                if node != news.place.node:
                    news.tell("lost", lost=node, why="unheard")
        time.sleep(_POLL_SECONDS)
    return past


def _ends_at_once(news: News, attempt: int) -> bool:
    """Return whether all agents end their ranks at once.

    That is after a second signal, and without a store for ranks that do not save.
    """
    store = _end_of_store(news, attempt)
    return _insisting(news) is not None or (store is not None and not store["saves"])


def _ending(past: News, attempt: int, job: Job, advice: Callable[[], str] = str) -> Ending:
    """Return how the ranks of all nodes ended, from the log that `_run_attempt` returns.

    What `advice` returns is added where a rank was killed.
    """
    facts = told(past, "ends", attempt).values()
    ends = sorted((end for fact in facts for end in fact["ends"]), key=lambda end: end["when"])
    lost = _lost(past, attempt)
    ranks = [_rank_end(**end) for end in ends]
    cause = _cause(ranks, lost, job, advice)
    store = _end_of_store(past, attempt)
    is_own = cause.code in _FINAL
    if cause.code == EXIT_OK:  # if some ranks have an end, the others were stopped
        is_own = len(ranks) == job.num_local * past.place.num_nodes
    elif cause.code == EXIT_TIME:
        is_own = _wants_end(past)
    if store is None or lost or is_own:
        return cause
    asked = "asked to save and to end" if store["saves"] else "stopped"
    # A rank that was killed as it saved has no words itself.
    mute = [end for end in ranks if end.ending is None and _explains(end)]
    killed = [f"{end.name} {end_of_process(end.code)}" for end in mute[:1]]
    said = (store["words"], f"the ranks were {asked}", *killed, advice())
    return Ending(EXIT_INTERNAL, "; ".join(filter(None, said)))


def _end_of_store(news: News, attempt: int) -> Fact | None:
    """Return the fact that the store of the ranks has ended before any rank failed, if it is so."""
    for fact in news.facts():
        if fact.get("attempt") == attempt:
            if fact["kind"] == "store":
                return fact
            if fact["kind"] == "failing" and fact["explains"]:
                break
    return None


def _lost(past: News, attempt: int) -> list[NodeLoss]:
    """Return the nodes that are lost, and those that have left without telling their ends."""
    lost = losses(past)
    gone = {loss.node for loss in lost}
    if 0 in gone:  # then nobody hears what the others tell
        return lost
    missing = set(range(past.place.num_nodes)) - gone - told(past, "ends", attempt).keys()
    return lost + [NodeLoss(node, hosts(past).get(node, ""), "unheard") for node in sorted(missing)]


def _rank_end(ending: Mapping[str, Any] | None, when: float, **values: Any) -> RankEnd:
    """Return the end of a rank as the agent of its node has told it."""
    return RankEnd(**values, ending=None if ending is None else Ending(**ending))


def _explains(end: RankEnd) -> bool:
    """Return whether the end of this rank can be the reason for that of the others.

    NCCL aborts a rank that has waited in vain, as others may still find out for whom.
    """
    if end.code in (EXIT_OK, EXIT_TIME, EXIT_HANG, -signal.SIGABRT):
        return False
    if end.ending is None:
        return end.code != EXIT_INTERNAL
    return not end.ending.follows


def _cause(
    ends: Sequence[RankEnd],
    lost: Sequence[NodeLoss],
    job: Job,
    advice: Callable[[], str] = str,
) -> Ending:
    """Return how the job ends; a lost node is the cause unless a rank explains the others.

    A rank explains nothing where an agent has failed, or has not said how its ranks ended.
    """
    for loss in lost:
        if loss.is_cause:
            return loss.ending
    if lost and not any(map(_explains, ends)):
        return lost[0].ending
    cause = root_cause(ends, job.settings, job.record_of, advice)
    if cause.words or cause.code in (EXIT_OK, EXIT_TIME):
        return cause
    first = next(end for end in ends if end.code == cause.code)
    return Ending(cause.code, f"{first.name} {end_of_process(first.code)} and said nothing")


def _start_port(news: News, attempt: int, signals: Signals) -> int | None:
    """Return the port of the ranks' store; None before the head says it, 0 if no ranks start."""
    _tell_requests(news, signals)
    facts = news.facts()
    if losses(news) or any(fact["kind"] in ("bye", "stopped") for fact in facts):
        return 0
    if _end_of_store(news, attempt) is not None:
        return 0
    ports = [
        fact["port"] for fact in facts if fact["kind"] == "start" and fact["attempt"] == attempt
    ]
    return ports[0] if ports else None


def _tell_requests(news: News, signals: Signals) -> None:
    """Tell the other agents that this one was asked to end, and then that it must end at once."""
    if signals.has_request and "asked" not in signals.told:
        signals.told.add("asked")
        news.tell("asked")
    if (number := signals.insisting) is not None and "stopped" not in signals.told:
        signals.told.add("stopped")
        news.tell("stopped", number=number)


def _watch(
    news: News,
    ranks: LocalRanks,
    attempt: int,
    signals: Signals,
    tell_end_of_store: Callable[[], None],
    answer: str = "",
) -> None:
    """Wait until the ranks have ended, or until their time after a failure anywhere is over.

    Ranks need their store to connect, and not to save.  So without it, ranks that save are asked to
    save and to end; others would try to reach it for long.  Of the agents that a signal asks to
    end, the first one says the `answer`: a step may take minutes.
    """
    since: dict[bool, float] = {}  # when a failure was first seen, and one that explains others
    said: set[bool] = set()
    has_asked, has_answered = False, not answer
    while ranks.running:
        _tell_requests(news, signals)
        if not has_answered and signals.has_request and _wants_end(news):
            has_answered = True
            if _first_asked(news) == news.place.node:
                _say_beside_progress(f"{signal.Signals(signals.noted[0][0]).name}: {answer}")
        tell_end_of_store()
        if _ends_at_once(news, attempt):
            return
        if not has_asked and (signals.has_request or _end_of_store(news, attempt) is not None):
            has_asked = True
            ranks.request_end(signals.noted[0][0] if signals.has_request else signal.SIGTERM)
        ranks.poll()
        ends = [end for end, _ in ranks.ends() if end.code not in (EXIT_OK, EXIT_TIME)]
        for explains in {_explains(end) for end in ends} - said:
            said.add(explains)
            news.tell("failing", attempt=attempt, explains=explains)
        now = time.monotonic()
        for explains in _failures(news, attempt) - since.keys():
            since[explains] = now
        if now > since.get(True, now) + _GRACE_SECONDS:
            return
        if now > since.get(False, now) + _LOOKING_SECONDS:
            return
        time.sleep(_POLL_SECONDS)


def _failures(news: News, attempt: int) -> set[bool]:
    """Return whether failures on any node explain others (True), or not (False); both if both."""
    found = {True for fact in news.facts() if fact["kind"] in ("lost", "failed")}
    return found | {
        fact["explains"]
        for fact in news.facts()
        if fact["kind"] == "failing" and fact["attempt"] == attempt
    }


def _environments(
    news: News, num_local: int, port: int, attempt: int
) -> dict[int, Mapping[str, str]]:
    """Return what torchrun would set, for every rank of this node."""
    place = news.place
    first = place.node * num_local
    common = {
        "WORLD_SIZE": str(num_local * place.num_nodes),
        "LOCAL_WORLD_SIZE": str(num_local),
        "GROUP_RANK": str(place.node),
        "MASTER_ADDR": LOOPBACK_ADDRESS if place.node == 0 else place.head,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 is not to listen itself
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }
    interfaces = loopback() if place.is_alone else {}
    given = {name: value for name, value in interfaces.items() if name not in os.environ}
    return {
        first + local: {**given, **common, "RANK": str(first + local), "LOCAL_RANK": str(local)}
        for local in range(num_local)
    }
