"""Curves of a run of any length in bounded memory, thinned so that no spike is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from statistics import median as middle

_MOST_BUCKETS = 500  # a curve has two points for each: its minimum and its maximum
Point = tuple[float, float]  # a step and a value


@dataclass(slots=True)
class _Cell:
    """The values of one key in some neighbouring steps."""

    low: Point
    high: Point
    total: float
    count: int

    def add(self, step: int, value: float) -> None:
        if value < self.low[1]:
            self.low = step, value
        if value > self.high[1]:
            self.high = step, value
        self.total += value
        self.count += 1

    def merged(self, later: _Cell) -> _Cell:
        """Return both; of equal values the first one counts."""
        return _Cell(
            later.low if later.low[1] < self.low[1] else self.low,
            later.high if later.high[1] > self.high[1] else self.high,
            self.total + later.total,
            self.count + later.count,
        )


@dataclass(slots=True)
class _Bucket:
    """All values of some neighbouring steps, by key; `place` is that of the bucket in the run."""

    place: int
    cells: dict[str, _Cell]

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            if (cell := self.cells.get(key)) is None:
                self.cells[key] = _Cell((step, value), (step, value), value, 1)
            else:
                cell.add(step, value)

    def merge(self, later: _Bucket) -> None:
        for key, cell in later.cells.items():
            self.cells[key] = self.cells[key].merged(cell) if key in self.cells else cell


class Curves:
    """The curves of a run by the keys of its records.

    Steps are gathered in buckets.  Where there are too many, neighbours are joined.

    num_steps: the optimizer steps that were added; step 0 is before the first one.
    first, last: the numbers of the first and the last step, 0 without any.
    """

    def __init__(self, most_buckets: int = _MOST_BUCKETS) -> None:
        self._most, self._width = most_buckets, 1
        self._buckets: list[_Bucket] = []
        self._latest: dict[str, float] = {}
        self.num_steps = self.first = self.last = 0

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the finite `values` of a step; steps that do not come in order are left out."""
        if self._buckets and step <= self.last:
            return
        self.first = self.first if self._buckets else step
        self.num_steps, self.last = self.num_steps + (step > 0), step
        self._latest.update(values)
        place = step // self._width
        if not self._buckets or self._buckets[-1].place != place:
            self._buckets.append(_Bucket(place, {}))
        self._buckets[-1].add(step, values)
        while len(self._buckets) > self._most:
            self._widen()

    def _widen(self) -> None:
        self._width *= 2
        buckets, self._buckets = self._buckets, []
        for bucket in buckets:
            bucket.place //= 2
            if self._buckets and self._buckets[-1].place == bucket.place:
                self._buckets[-1].merge(bucket)
            else:
                self._buckets.append(bucket)

    def _whole(self, key: str) -> _Cell | None:
        """Return all values of a key as one cell, None without any."""
        cells = [bucket.cells[key] for bucket in self._buckets if key in bucket.cells]
        return reduce(_Cell.merged, cells) if cells else None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that have a value."""
        return tuple(self._latest)

    def points(self, key: str) -> list[Point]:
        """Return the smallest and the largest value of every bucket, in the order of steps."""
        found = []
        for bucket in self._buckets:
            if (cell := bucket.cells.get(key)) is not None:
                found += sorted({cell.low, cell.high})
        return found

    def means(self, key: str) -> list[Point]:
        """Return the mean of every bucket that has any value, 0 where it has none of this key."""
        return [
            (
                (bucket.place + 0.5) * self._width if self._width > 1 else float(bucket.place),
                cell.total / cell.count if (cell := bucket.cells.get(key)) is not None else 0.0,
            )
            for bucket in self._buckets
        ]

    def median(self, key: str) -> float | None:
        """Return the median of the buckets' means, None without any value."""
        found = [
            cell.total / cell.count
            for bucket in self._buckets
            if (cell := bucket.cells.get(key)) is not None
        ]
        return middle(found) if found else None

    def latest(self, key: str) -> float | None:
        """Return the newest value, None without any."""
        return self._latest.get(key)

    def lowest(self, key: str) -> Point | None:
        """Return the smallest value with its step, None without any."""
        whole = self._whole(key)
        return None if whole is None else whole.low

    def highest(self, key: str) -> Point | None:
        """Return the largest value with its step, None without any."""
        whole = self._whole(key)
        return None if whole is None else whole.high

    def total(self, key: str) -> float:
        """Return the sum over all steps."""
        whole = self._whole(key)
        return 0.0 if whole is None else whole.total


def finite(values: Mapping[str, object], largest: float) -> dict[str, float]:
    """Return what is a number of at most `largest`, with either sign."""
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= largest  # as NaN is not
    }
