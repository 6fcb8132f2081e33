"""Buckets: groups of parameters whose gradients are summed over the replicas in one message.

All gradients of a rank lie in one flat tensor, bucket after bucket.  With ZeRO-1 the parameters
have the same layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from vp_train.config import OptimConfig
from vp_train.tensors.alignment import rounded_up

_ALIGNMENT = 64  # elements; aligns every parameter to vectors and cache lines

Runs = Sequence[Sequence[Sequence[str]]]
"""Names of parameters.

A run, such as a stage, is a list of units in order of completion.  The gradients of a unit complete
together.
"""


@dataclass(frozen=True, slots=True)
class Span:
    """Elements [start, stop) of the flat tensor whose parameters are treated the same way.

    decays: whether weight decay applies.
    counts: whether they count for the gradient norm.
    """

    start: int
    stop: int
    decays: bool
    counts: bool

    def within(self, start: int, stop: int) -> Span | None:
        """Return the part of the span in [start, stop), None if it is empty."""
        low, high = max(self.start, start), min(self.stop, stop)
        return Span(low, high, self.decays, self.counts) if low < high else None


@dataclass(frozen=True, slots=True)
class Bucket:
    """Elements [start, stop) of the flat tensor, in equal parts, one for each replica.

    Elements that no span covers are padding.
    """

    names: tuple[str, ...]
    start: int
    stop: int
    spans: tuple[Span, ...]

    def part(self, index: int, num_parts: int) -> tuple[int, int]:
        """Return the first and last element [start, stop) of part `index`."""
        size = (self.stop - self.start) // num_parts
        return self.start + index * size, self.start + (index + 1) * size


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """The place of each parameter in the flat tensor.

    `bounds` are the elements [start, stop) of each parameter.  Buckets include padding.
    `reading_order` are the indices of the buckets in the order in which forwards read them: the
    runs in order, and each from its end.
    """

    buckets: tuple[Bucket, ...]
    bounds: Mapping[str, tuple[int, int]]
    num_elements: int
    reading_order: tuple[int, ...]


def bucket_elements(optim: OptimConfig, item_bytes: int) -> int:
    """Return the maximal number of gradients in a bucket, if a gradient has `item_bytes`."""
    return (optim.bucket_mib << 20) // item_bytes


def lay_out(
    parameters: Mapping[str, nn.Parameter],
    runs: Runs,
    *,
    max_elements: int,
    num_parts: int = 1,
    min_buckets: int = 1,
    copied: frozenset[str] = frozenset(),
) -> FlatLayout:
    """Return the layout of `parameters`, with buckets of at most `max_elements`.

    A bucket contains whole units of one run; a unit that is too large has its own bucket.  A bucket
    has at most a part of 1 / `min_buckets` of its run, too.  Matrices
    decay.  Parameters in `copied`, which another rank also holds, do not count for the norm.  The
    size of every bucket is a multiple of `num_parts`.
    """
    assert sorted(name for run in runs for unit in run for name in unit) == sorted(parameters)
    buckets: list[Bucket] = []
    reading_order: list[int] = []
    bounds: dict[str, tuple[int, int]] = {}
    start = 0
    for run in runs:
        first_of_run = len(buckets)
        size = sum(parameters[name].numel() for unit in run for name in unit)
        for names in _filled(run, parameters, min(max_elements, math.ceil(size / min_buckets))):
            spans: list[Span] = []
            stop = start
            for counts, decays in ((True, True), (True, False), (False, True), (False, False)):
                first = stop
                for name in names:
                    if (name not in copied, parameters[name].dim() > 1) == (counts, decays):
                        bounds[name] = stop, stop + parameters[name].numel()
                        stop += rounded_up(parameters[name].numel(), _ALIGNMENT)
                if first < stop:
                    spans.append(Span(first, stop, decays, counts))
            stop = start + rounded_up(stop - start, num_parts * _ALIGNMENT)
            buckets.append(Bucket(tuple(names), start, stop, tuple(spans)))
            start = stop
        reading_order += reversed(range(first_of_run, len(buckets)))
    return FlatLayout(tuple(buckets), bounds, start, tuple(reading_order))


def _filled(
    run: Sequence[Sequence[str]], parameters: Mapping[str, nn.Parameter], limit: int
) -> list[list[str]]:
    """Return the names of the parameters in each bucket of a run."""
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


class Countdown:
    """Calls `start` once per step with every bucket, as soon as all its gradients are complete.

    If not `early`, all buckets start in `finish`.
    """

    def __init__(
        self, layout: FlatLayout, start: Callable[[Bucket], None], *, early: bool = True
    ) -> None:
        self._start, self._buckets, self._early = start, layout.buckets, early
        self._index_of = {
            name: index for index, bucket in enumerate(layout.buckets) for name in bucket.names
        }
        self._begin()

    def _begin(self) -> None:
        self._missing = [set(bucket.names) for bucket in self._buckets]
        self._waiting = dict.fromkeys(range(len(self._buckets)))

    def ready(self, names: Sequence[str]) -> None:
        """Record that the gradients of `names` are complete.

        Raises KeyError for a name that was recorded before in this step.
        """
        for name in names:
            index = self._index_of[name]
            self._missing[index].remove(name)
            if self._early and not self._missing[index]:
                del self._waiting[index]
                self._start(self._buckets[index])

    def finish(self) -> None:
        """Start the remaining buckets in order, and begin the next step."""
        for index in self._waiting:
            self._start(self._buckets[index])
        self._begin()
