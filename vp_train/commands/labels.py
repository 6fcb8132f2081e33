"""Places for the labels of a picture: near their marks, on nothing else.

All lengths are pixels, and y grows upwards. Nothing here draws.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Point = tuple[float, float]

_APART = 2.0  # pixels between a label and what it must not cover
_NEAR = 16.0  # a label closer to its mark than this needs no leader line
_RING, _DIRECTIONS = 12, 16  # pixels from a circle of places to the next, and places on each
_DOUBTFUL = 40.0  # what a place costs, in pixels of distance, that is as near to another mark
_CROSSING = 1e4  # what a leader line costs that crosses a curve, in pixels of distance


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle with sides along the axes."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, points: Sequence[Point], margin: float = 0.0) -> Box:
        """Return the smallest rectangle around `points`, with a margin."""
        xs, ys = zip(*points, strict=True)
        return cls(min(xs) - margin, min(ys) - margin, max(xs) + margin, max(ys) + margin)

    def overlaps(self, other: Box) -> bool:
        """Return whether the two share an area."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )

    def is_within(self, frame: Box) -> bool:
        """Return whether no part lies outside `frame`."""
        return (
            frame.left <= self.left
            and self.right <= frame.right
            and frame.bottom <= self.bottom
            and self.top <= frame.top
        )

    def padded(self, margin: float) -> Box:
        """Return the rectangle with a margin on all sides."""
        return Box(self.left - margin, self.bottom - margin, self.right + margin, self.top + margin)

    def nearest(self, point: Point) -> Point:
        """Return the point of the rectangle that is closest to `point`."""
        return (
            min(max(point[0], self.left), self.right),
            min(max(point[1], self.bottom), self.top),
        )

    @property
    def middle(self) -> Point:
        """The centre of the rectangle."""
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2

    def is_crossed(self, start: Point, end: Point) -> bool:
        """Return whether the straight line from `start` to `end` enters the rectangle."""
        first, last = 0.0, 1.0  # the part of the line that is inside all sides so far
        for axis, low, high in ((0, self.left, self.right), (1, self.bottom, self.top)):
            at, along = start[axis], end[axis] - start[axis]
            if along == 0:
                if not low < at < high:
                    return False
                continue
            enters, leaves = sorted(((low - at) / along, (high - at) / along))
            first, last = max(first, enters), min(last, leaves)
        return first < last


@dataclass(frozen=True, slots=True)
class Wish:
    """A label that wants a place: beside the mark `own` around `at`, or beside one of several.

    width, height: of the text. farthest: how far from its mark it may be.
    """

    at: tuple[Point, ...]
    width: float
    height: float
    own: Box | None = None
    farthest: float = 0.0


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a label, and the leader line from its mark; None if they are neighbours."""

    box: Box
    leader: tuple[Point, Point] | None


@dataclass(slots=True)
class Ground:
    """The area in which labels are placed, and what is drawn there.

    frame: the area. marks: the rectangles of all marks. curves: those of the parts of all curves.
    grid: those of lines that only a leader line may cross. is_strict: whether a label stays away
    whose leader line would cross another label or mark. placed: the labels that have a place.
    """

    frame: Box
    marks: Sequence[Box]
    curves: Sequence[Box] = ()
    grid: Sequence[Box] = ()
    is_strict: bool = True
    placed: list[Place] = field(default_factory=list)

    def place(self, wish: Wish) -> Place | None:
        """Return the place next to its mark where a label covers nothing; None if there is none.

        Its leader line crosses another thing only if it must, and no label or mark if that is
        strict.
        """
        best, least = None, math.inf
        for cost, box, at in sorted(self._candidates(wish), key=lambda candidate: candidate[0]):
            if cost >= least:
                break
            if not self._is_free(box):
                continue
            end = box.nearest(at)
            is_far = wish.own is not None and math.dist(end, wish.own.nearest(end)) > _NEAR
            place = Place(box, (at, end) if is_far else None)
            cost += _DOUBTFUL * self._is_doubtful(place, wish.own)
            crossed = self._crossed(place, wish.own)
            if crossed is not None and cost + _CROSSING * crossed < least:
                best, least = place, cost + _CROSSING * crossed
        if best is not None:
            self.placed.append(best)
        return best

    def _candidates(self, wish: Wish) -> Iterator[tuple[float, Box, Point]]:
        """Yield how far a place is from the best one, its rectangle, and the mark of it."""
        for rank, at in enumerate(wish.at):
            for right, up in _around(wish):
                x, y = at[0] + right, at[1] + up
                box = Box(x, y, x + wish.width, y + wish.height)
                yield rank + math.dist(at, box.nearest(at)), box, at

    def _is_free(self, box: Box) -> bool:
        if not box.is_within(self.frame):
            return False
        wide = box.padded(_APART)
        taken = (*self.marks, *self.curves, *self.grid, *(place.box for place in self.placed))
        return not any(wide.overlaps(other) for other in taken)

    def _is_doubtful(self, place: Place, own: Box | None) -> bool:
        """Return whether a label without a leader line may be taken for that of another mark."""
        if own is None or place.leader is not None:
            return False
        distances = {
            mark: math.dist(place.box.nearest(mark.middle), mark.middle)
            for mark in (own, *self.marks)
        }
        return any(distances[mark] < 1.6 * distances[own] for mark in distances if mark != own)

    def _crossed(self, place: Place, own: Box | None) -> int | None:
        """Return how often a leader line and something else cross; None if it may not.

        `own` is the mark of the label.
        """
        leaders = [other.leader for other in self.placed if other.leader is not None]
        bad = sum(place.box.padded(_APART).is_crossed(*line) for line in leaders)
        crossed = 0
        if place.leader is not None:
            marks = [box for box in self.marks if box != own]
            solid = [*marks, *(other.box for other in self.placed)]
            bad += sum(box.is_crossed(*place.leader) for box in solid)
            # A mark may lie on a curve, which its leader line then leaves and does not cross.
            curves = [box for box in self.curves if own is None or not box.overlaps(own)]
            thin = [*curves, *(Box.around(line, 1.0) for line in leaders)]
            crossed = sum(box.is_crossed(*place.leader) for box in thin)
        return None if bad and self.is_strict else bad + crossed


def _around(wish: Wish) -> Iterator[Point]:
    """Yield where the lower left corner of a label may be, relative to its mark.

    The sides come first, then above and below, then circles.
    """
    width, height = wish.width, wish.height
    away = 8.0 if wish.own is None else (wish.own.right - wish.own.left) / 2 + _APART + 1
    if wish.own is None:
        yield from ((-width / 2, away), (-width / 2, -away - height))
        return
    for up in (-height / 2, 0.1 * height, -1.1 * height):
        yield away, up
    for up in (-height / 2, 0.1 * height, -1.1 * height):
        yield -away - width, up
    yield from ((-width / 2, away), (-width / 2, -away - height))
    for distance in range(int(away), int(wish.farthest), _RING):
        for step in range(_DIRECTIONS):
            angle = math.tau * step / _DIRECTIONS
            yield (
                (distance + width / 2) * math.cos(angle) - width / 2,
                (distance + height / 2) * math.sin(angle) - height / 2,
            )
