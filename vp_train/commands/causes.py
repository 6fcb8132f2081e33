"""Why a job ended: the root cause among the ends of its ranks and nodes."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass

from vp_train.failures import EXIT_HANG, EXIT_INTERNAL, EXIT_OK, EXIT_TIME, LOST_PEER, Ending


@dataclass(frozen=True, slots=True)
class RankEnd:
    """How one rank ended by itself.

    `code` is -n for signal n.  `words` are the rank's own, "" if it left none.  `order` grows with
    the time of the end, in seconds.
    """

    rank: int
    host: str
    code: int
    words: str
    order: float


@dataclass(frozen=True, slots=True)
class NodeLoss:
    """A node whose agent was killed, or does not answer."""

    node: int
    host: str
    is_silent: bool

    @property
    def ending(self) -> Ending:
        """The exit code of the job, and the sentence about the node."""
        name = f"node {self.node} ({self.host})"
        if self.is_silent:
            return Ending(EXIT_HANG, f"{name} does not answer any more; its ranks are lost")
        return Ending(EXIT_INTERNAL, f"the agent of {name} was killed; its ranks are lost")


def root_cause(ends: Sequence[RankEnd], losses: Sequence[NodeLoss] = ()) -> Ending:
    """Return the exit code of a job and the sentence to print.

    `ends` are those of the ranks that ended by themselves, in any order; `losses` the lost nodes.
    Causes come before consequences, in this order: a rank with an error of its own, a killed rank,
    a lost node, a rank that left with 0 too early, a rank that waited in vain, a rank that only
    lost a peer.
    """
    in_order = sorted(ends, key=lambda end: (end.order, end.rank))
    failed = [end for end in in_order if end.code not in (EXIT_OK, EXIT_TIME)]
    own = [end for end in failed if end.code > 0 and not _is_consequence(end)]
    killed = [end for end in failed if end.code < 0]
    if own:
        return _ending(own[0])
    if killed:
        return _ending(killed[0])
    if losses:
        return losses[0].ending
    if failed:
        early = [end for end in in_order if end.code == EXIT_OK and end.order <= failed[0].order]
        waited = [end for end in failed if end.code == EXIT_HANG]
        if early:
            words = f"rank {early[0].rank} on {early[0].host} exited with code 0"
            return Ending(EXIT_INTERNAL, f"{words} before the others had finished")
        return _ending((waited or failed)[0])
    if any(end.code == EXIT_TIME for end in ends):
        return Ending(EXIT_TIME, "")
    return Ending(EXIT_OK, "")


def _is_consequence(end: RankEnd) -> bool:
    """Return whether a rank only waited for another one, or lost it."""
    is_lost = end.code == EXIT_INTERNAL and (not end.words or LOST_PEER.words in end.words)
    return is_lost or end.code == EXIT_HANG


def _ending(end: RankEnd) -> Ending:
    """Return how the job ends because this rank did."""
    if end.words:
        return Ending(end.code if end.code > 0 else 128 - end.code, end.words)
    name = f"rank {end.rank} on {end.host}"
    if end.code < 0:
        number = signal.Signals(-end.code)
        words = f"{name} was killed by signal {number:d} ({number.name}); the others were stopped"
        return Ending(128 + number, words)
    return Ending(end.code, f"{name} exited with code {end.code}; the others were stopped")
