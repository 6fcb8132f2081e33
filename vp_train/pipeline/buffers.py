"""Named places for the tensors that travel between the operations of a program."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Buffers(Generic[Value]):
    """Values by (name, stage or barrier, microbatch), each put once and taken once.

    After a step it must be empty.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, int | str, int], Value] = {}

    def put(self, name: str, where: int | str, microbatch: int, value: Value) -> None:
        key = (name, where, microbatch)
        assert key not in self._held, f"{key} is put twice"
        self._held[key] = value

    def take(self, name: str, where: int | str, microbatch: int) -> Value:
        return self._held.pop((name, where, microbatch))

    def look(self, name: str, where: int | str, microbatch: int) -> Value | None:
        """Return what `take` will return, None if it has been taken."""
        return self._held.get((name, where, microbatch))

    def assert_empty(self) -> None:
        """Assert that every value put in the step was taken."""
        assert not self._held, f"left over after the step: {sorted(map(str, self._held))}"


class Once:
    """An action that several threads need: the first caller runs it, the others wait for it."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action
        self._lock = Lock()

    def __call__(self) -> bool:
        """Run the action unless it has run; return whether this call ran it."""
        with self._lock:
            first = self._action is not None
            if self._action is not None:
                self._action()
                self._action = None
            return first
