"""Named places for the tensors that travel between the operations of a program."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Buffers(Generic[Value]):
    """Each value is put once under (name, stage or barrier, microbatch) and taken once; nothing may be left after a step."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, int | str, int], Value] = {}

    def put(self, name: str, where: int | str, microbatch: int, value: Value) -> None:
        key = (name, where, microbatch)
        assert key not in self._held, f"{key} is put twice"
        self._held[key] = value

    def take(self, name: str, where: int | str, microbatch: int) -> Value:
        return self._held.pop((name, where, microbatch))

    def look(self, name: str, where: int | str, microbatch: int) -> Value | None:
        """What `take` will give; None where it was taken."""
        return self._held.get((name, where, microbatch))

    def assert_empty(self) -> None:
        """Everything produced in the step was used in it."""
        assert not self._held, f"left over after the step: {sorted(map(str, self._held))}"


class Once:
    """An action that two threads need done: the first to call does it, the other waits until it is done."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action
        self._lock = Lock()

    def __call__(self) -> bool:
        """Return whether this call did it."""
        with self._lock:
            first = self._action is not None
            if self._action is not None:
                self._action()
                self._action = None
            return first
