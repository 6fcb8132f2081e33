"""What searches know of choices: bounds, and the short steps that were simulated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from vp_train.planning.choice import Choice
from vp_train.planning.plan import StepPlan
from vp_train.planning.short import short_step
from vp_train.planning.weigh import Candidate, Scales


@dataclass(slots=True)
class Shared:
    """What a search knows of choices, and others that share it, see `keeps_steps`.

    keeps_steps: whether a later search may ask for the same short steps.
    steps: the short steps of choices, with the seconds of their passes and the nodes placed.
    passes: the seconds of the passes of choices without offloading, which delays none of them.
    """

    scales: Scales
    keeps_steps: bool = True
    steps: dict[Choice, tuple[StepPlan, float, int]] = field(default_factory=dict)
    passes: dict[Choice, float] = field(default_factory=dict)

    def beside(self, scales: Scales) -> Shared:
        """Return what searches share with other `scales`, which differ in memory only."""
        return replace(self, scales=scales)

    def short_step(self, candidate: Candidate) -> tuple[StepPlan, float, int]:
        """Return what `short_step` does for a candidate."""
        key = replace(candidate.choice, optimizer=None)
        if key in self.steps:
            return self.steps[key]
        found = short_step(candidate.draft, candidate.choice.schedule)
        self.passes.setdefault(replace(key, offload=0.0), found[1])
        if self.keeps_steps:
            self.steps[key] = found
        return found

    def least(self, candidate: Candidate) -> float | None:
        """Return the least seconds of a step that offloads, None if no step without is known."""
        passes = self.passes.get(replace(candidate.choice, optimizer=None, offload=0.0))
        if not candidate.choice.offload or passes is None:
            return None
        return candidate.seconds - candidate.passes + passes
