"""Announces that the gradients of a layer are complete while the backward of others goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Completion:
    """Announces the units of a stage to `done`, each of them once and in order.

    A unit is the names of parameters whose gradients complete together.
    """

    def __init__(
        self, units: Sequence[Sequence[str]], done: Callable[[Sequence[str]], None]
    ) -> None:
        self._units, self._done, self._next = units, done, 0

    def up_to(self, unit: int) -> None:
        """Announce the units up to index `unit`, all of which are complete."""
        while self._next <= unit:
            self._next += 1
            self._done(self._units[self._next - 1])

    def finish(self) -> None:
        """Announce the rest."""
        self.up_to(len(self._units) - 1)
