"""Dynamic loss scaling for float16, whose gradients underflow without a large factor on the loss.

If the factor is too large, they overflow.
"""

from __future__ import annotations

from dataclasses import dataclass

_FIRST, _GROWTH_STEPS = 2.0**16, 1000


@dataclass(slots=True)
class LossScale:
    """The factor `value` on the loss, which is constant unless `active`.

    It doubles after 1,000 finite steps in a row, and halves after a step that is not finite.
    """

    active: bool
    value: float = 1.0
    finite_steps: int = 0

    @classmethod
    def of(cls, dtype: str) -> LossScale:
        """Return the loss scale for compute in `dtype`; only that of float16 is active."""
        return cls(True, _FIRST) if dtype == "float16" else cls(False)

    def passed(self) -> None:
        """Record a finite step."""
        if self.active:
            self.finite_steps += 1
            if self.finite_steps == _GROWTH_STEPS:
                self.value, self.finite_steps = 2 * self.value, 0

    def failed(self) -> bool:
        """Record a step that was not finite; return whether a smaller scale may help."""
        may_help = self.active and self.value > 1
        if may_help:
            self.value, self.finite_steps = self.value / 2, 0
        return may_help
