"""Dynamic loss scaling: gradients of float16 underflow unless the loss is multiplied by much, and overflow if by too much."""

from __future__ import annotations

from dataclasses import dataclass

_FIRST, _GROWTH_STEPS = 2.0**16, 1000


@dataclass(slots=True)
class LossScale:
    """`value` doubles after a thousand finite steps in a row, and halves after one that is not.  Constant unless `active`."""

    active: bool
    value: float = 1.0
    finite_steps: int = 0

    @classmethod
    def of(cls, dtype: str) -> LossScale:
        """For compute in `dtype`."""
        return cls(True, _FIRST) if dtype == "float16" else cls(False)

    def passed(self) -> None:
        """A step was finite."""
        if self.active:
            self.finite_steps += 1
            if self.finite_steps == _GROWTH_STEPS:
                self.value, self.finite_steps = 2 * self.value, 0

    def failed(self) -> bool:
        """A gradient was not finite; true if a smaller scale may help."""
        may_help = self.active and self.value > 1
        if may_help:
            self.value, self.finite_steps = self.value / 2, 0
        return may_help
