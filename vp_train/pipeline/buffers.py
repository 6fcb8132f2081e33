"""Named places for the tensors that travel between the operations of a program."""

from __future__ import annotations

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

    def assert_empty(self) -> None:
        """Everything produced in the step was used in it."""
        assert not self._held, f"left over after the step: {sorted(map(str, self._held))}"
