"""Buckets: runs of parameters whose gradients are summed over the replicas together.

All parameters of a rank lie in one flat tensor, bucket after bucket.  Gradients have that layout, and
with ZeRO-1 the parameters too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from vp_train.config import OptimConfig

_ALIGNMENT = 64  # elements, so that every parameter begins where vectors and cache lines do

Runs = Sequence[Sequence[Sequence[str]]]
"""Names of parameters: in each run, such as a stage, units that complete together, the first first."""


@dataclass(frozen=True, slots=True)
class Span:
    """Elements [start, stop) whose parameters all `decay`, or none; and all `count` for the norm, or none."""

    start: int
    stop: int
    decays: bool
    counts: bool

    def within(self, start: int, stop: int) -> Span | None:
        """The part in [start, stop), None where there is none."""
        low, high = max(self.start, start), min(self.stop, stop)
        return Span(low, high, self.decays, self.counts) if low < high else None


@dataclass(frozen=True, slots=True)
class Bucket:
    """Elements [start, stop), in as many equal parts as there are replicas; what no span covers is padding."""

    names: tuple[str, ...]
    start: int
    stop: int
    spans: tuple[Span, ...]

    def part(self, index: int, num_parts: int) -> tuple[int, int]:
        """The elements of part `index`."""
        size = (self.stop - self.start) // num_parts
        return self.start + index * size, self.start + (index + 1) * size


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """Where each parameter lies: `bounds` without, buckets with padding."""

    buckets: tuple[Bucket, ...]
    bounds: Mapping[str, tuple[int, int]]
    num_elements: int


def bucket_elements(optim: OptimConfig, item_bytes: int) -> int:
    """The gradients of a bucket, each of `item_bytes`."""
    return (optim.bucket_mib << 20) // item_bytes


def lay_out(
    parameters: Mapping[str, nn.Parameter],
    runs: Runs,
    *,
    max_elements: int,
    num_parts: int = 1,
    copied: frozenset[str] = frozenset(),
) -> FlatLayout:
    """Put units of a run into a bucket until it has `max_elements`; a larger unit is a bucket of its own.

    Matrices decay.  What is `copied` from another rank does not count for the norm.  Every bucket divides
    by `num_parts`.
    """
    assert sorted(name for run in runs for unit in run for name in unit) == sorted(parameters)
    buckets: list[Bucket] = []
    bounds: dict[str, tuple[int, int]] = {}
    start = 0
    for run in runs:
        for names in _filled(run, parameters, max_elements):
            spans: list[Span] = []
            stop = start
            for counts, decays in ((True, True), (True, False), (False, True), (False, False)):
                first = stop
                for name in names:
                    if (name not in copied, parameters[name].dim() > 1) == (counts, decays):
                        bounds[name] = stop, stop + parameters[name].numel()
                        stop += _rounded(parameters[name].numel(), _ALIGNMENT)
                if first < stop:
                    spans.append(Span(first, stop, decays, counts))
            stop = start + _rounded(stop - start, num_parts * _ALIGNMENT)
            buckets.append(Bucket(tuple(names), start, stop, tuple(spans)))
            start = stop
    return FlatLayout(tuple(buckets), bounds, start)


def _filled(
    run: Sequence[Sequence[str]], parameters: Mapping[str, nn.Parameter], limit: int
) -> list[list[str]]:
    """The names of each bucket of a run."""
    filled: list[list[str]] = []
    count = limit
    for unit in filter(None, run):
        size = sum(parameters[name].numel() for name in unit)
        if not filled or count + size > limit:
            filled.append([])
            count = 0
        filled[-1] += unit
        count += size
    return filled


def _rounded(count: int, multiple: int) -> int:
    return math.ceil(count / multiple) * multiple


class Countdown:
    """Call `start` with every bucket once a step, as soon as all of its parameters are ready."""

    def __init__(self, layout: FlatLayout, start: Callable[[Bucket], None]) -> None:
        self._start, self._buckets = start, layout.buckets
        self._index_of = {
            name: index for index, bucket in enumerate(layout.buckets) for name in bucket.names
        }
        self._begin()

    def _begin(self) -> None:
        self._missing = [set(bucket.names) for bucket in self._buckets]
        self._waiting = dict.fromkeys(range(len(self._buckets)))

    def ready(self, names: Sequence[str]) -> None:
        """The gradients of `names` are complete.  Raises KeyError for a name the second time in a step."""
        for name in names:
            index = self._index_of[name]
            self._missing[index].remove(name)
            if not self._missing[index]:
                del self._waiting[index]
                self._start(self._buckets[index])

    def finish(self) -> None:
        """Start the buckets that are left, in their order; the next step begins."""
        for index in self._waiting:
            self._start(self._buckets[index])
        self._begin()
