"""Curves of a run of any length in bounded memory, thinned so that no spike is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_MOST_BUCKETS = 500  # a curve has two points for each: its minimum and its maximum
Point = tuple[float, float]  # a step and a value


@dataclass(slots=True)
class _Cell:
    """The values of one key in some neighbouring steps."""

    low: Point
    high: Point
    total: float
    count: int

    def merge(self, other: _Cell) -> None:
        self.low = min(self.low, other.low, key=lambda point: point[1])
        self.high = max(self.high, other.high, key=lambda point: point[1])
        self.total += other.total
        self.count += other.count


@dataclass(slots=True)
class _Bucket:
    """All values of some neighbouring steps, by key; `place` is that of the bucket in the run."""

    place: int
    cells: dict[str, _Cell]

    def merge(self, other: _Bucket) -> None:
        for key, cell in other.cells.items():
            if key in self.cells:
                self.cells[key].merge(cell)
            else:
                self.cells[key] = cell


class Curves:
    """The curves of a run by the keys of its records.

    Steps are gathered in buckets.  Where there are too many, neighbours are joined.

    num_steps: the steps that were added.
    first, last: their numbers, 0 without any.
    """

    def __init__(self, most_buckets: int = _MOST_BUCKETS) -> None:
        self._most, self._width = most_buckets, 1
        self._buckets: list[_Bucket] = []
        self._latest: dict[str, float] = {}
        self._totals: dict[str, _Cell] = {}
        self.num_steps = self.first = self.last = 0

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the finite `values` of a step; steps that do not come in order are left out."""
        if self.num_steps and step <= self.last:
            return
        self.first = self.first if self.num_steps else step
        self.num_steps, self.last = self.num_steps + 1, step
        cells = {
            key: _Cell((step, value), (step, value), value, 1) for key, value in values.items()
        }
        for key, value in values.items():
            self._latest[key] = value
            whole = self._totals.setdefault(key, _Cell((step, value), (step, value), 0.0, 0))
            whole.merge(cells[key])
        self._put(_Bucket(step // self._width, cells))
        while len(self._buckets) > self._most:
            self._widen()

    def _put(self, bucket: _Bucket) -> None:
        if self._buckets and self._buckets[-1].place == bucket.place:
            self._buckets[-1].merge(bucket)
        else:
            self._buckets.append(bucket)

    def _widen(self) -> None:
        self._width *= 2
        buckets, self._buckets = self._buckets, []
        for bucket in buckets:
            bucket.place //= 2
            self._put(bucket)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that have a value."""
        return tuple(self._totals)

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
        found = sorted(
            cell.total / cell.count
            for bucket in self._buckets
            if (cell := bucket.cells.get(key)) is not None
        )
        return found[len(found) // 2] if found else None

    def latest(self, key: str) -> float | None:
        """Return the newest value, None without any."""
        return self._latest.get(key)

    def lowest(self, key: str) -> Point | None:
        """Return the smallest value with its step, None without any."""
        return self._totals[key].low if key in self._totals else None

    def highest(self, key: str) -> Point | None:
        """Return the largest value with its step, None without any."""
        return self._totals[key].high if key in self._totals else None

    def total(self, key: str) -> float:
        """Return the sum over all steps."""
        return self._totals[key].total if key in self._totals else 0.0


def finite(values: Mapping[str, object], largest: float) -> dict[str, float]:
    """Return what is a number of at most `largest`, with either sign."""
    found = {}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if abs(value) <= largest:  # neither has NaN
            found[key] = float(value)
    return found
