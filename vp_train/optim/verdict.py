"""The decision whether a step applies its gradients: values that are not finite, and spikes.

All ranks see the same health of a step, so all come to the same verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from vp_train.config import RunSettings
from vp_train.optim.adamw import StepHealth
from vp_train.units import plural

_WINDOW = 64  # steps whose median is compared with
# Steps before which a loss or a norm is no spike.  As a run begins its norms have no usual value
# yet, and those of a healthy run vary by more than ten times.
_FEWEST_LOSSES, _FEWEST_NORMS = 16, _WINDOW
_MOST_SKIPS = 10  # in a row
_MOST_RETURNS = 3  # to a checkpoint, until a later step than before is applied


class Verdict(StrEnum):
    """What becomes of a step.  The values are those of run.on_spike."""

    APPLY = "apply"
    SKIP = "skip"  # leave the parameters as they are
    GO_BACK = "go_back"  # to the last checkpoint, and leave out the data since then
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict.

    words: why; "" if nothing is wrong with the step.
    way_out: what the user may do about it.
    """

    verdict: Verdict
    words: str = ""
    way_out: str = ""


class Judge:
    """Judges the steps of a run.

    replica_size: the number of ranks in a replica, None if there is one replica.
    spikes, skipped: the spikes seen and the steps not applied since the run began.
    """

    def __init__(self, settings: RunSettings, replica_size: int | None = None) -> None:
        self._settings, self._replica_size = settings, replica_size
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._skips_in_a_row = self._returns = self._furthest = 0
        self.spikes = self.skipped = 0

    def judge(self, step: int, health: StepHealth, *, can_go_back: bool = True) -> Judgement:
        """Return the verdict on `step`, and count it.

        Without a checkpoint to go back to, the step is skipped instead.
        """
        if health.culprits:
            what = f"non-finite {self._names(health.culprits)}"
            return self._refused("on_nonfinite", step, what, can_go_back=can_go_back)
        if what := self._spike(health):
            self.spikes += 1
            if self._settings.on_spike != Verdict.APPLY:
                return self._refused("on_spike", step, what, can_go_back=can_go_back)
        self._losses = [*self._losses, health.loss][-_WINDOW:]
        self._norms = [*self._norms, health.grad_norm][-_WINDOW:]
        self._skips_in_a_row = 0
        if step > self._furthest:
            self._furthest, self._returns = step, 0
        return Judgement(Verdict.APPLY, what)

    def overflowed(self) -> None:
        """Count a step that is skipped because its gradients overflow float16."""
        self.skipped += 1

    def _names(self, culprits: Sequence[tuple[int, str]]) -> str:
        """Return what is not finite and on which ranks, for example `gradient on ranks 0 and 1`."""
        found: dict[str, list[str]] = {}
        for rank, what in culprits:
            size = self._replica_size
            replica = "" if size is None else f" (replica {rank // size})"
            found.setdefault(what, []).append(f"{rank}{replica}")
        return ", ".join(
            f"{what} on {plural(len(ranks), 'rank')} {_listed(ranks)}"
            for what, ranks in found.items()
        )

    def _spike(self, health: StepHealth) -> str:
        """Return what is far above its median, in words; "" if nothing is."""
        settings = self._settings
        loss, norm = settings.spike_loss_factor, settings.spike_norm_factor
        for name, value, values, fewest, factor in (
            ("loss", health.loss, self._losses, _FEWEST_LOSSES, loss),
            ("gradient norm", health.grad_norm, self._norms, _FEWEST_NORMS, norm),
        ):
            if len(values) >= fewest and value > factor * (usual := median(values)) > 0:
                return (
                    f"{name} {value:.4g}, {value / usual:.1f} times the median {usual:.4g} "
                    f"of the last {len(values)} steps"
                )
        return ""

    def _refused(self, setting: str, step: int, what: str, *, can_go_back: bool) -> Judgement:
        self.skipped += 1
        verdict, way_out = Verdict(getattr(self._settings, setting)), "Lower optim.lr"
        if verdict is Verdict.STOP:
            way_out += (
                f", or set run.{setting}=skip to leave such steps out, or run.{setting}=go_back "
                "to return to the last checkpoint and leave out the data since then"
            )
        if verdict is Verdict.GO_BACK and not can_go_back:
            verdict, what = Verdict.SKIP, f"{what}; there is no checkpoint to go back to"
        if verdict is Verdict.SKIP:
            self._skips_in_a_row += 1
            if self._skips_in_a_row >= _MOST_SKIPS:
                verdict, what = Verdict.STOP, f"{what}, {_MOST_SKIPS} steps in a row"
        if verdict is Verdict.GO_BACK:
            self._furthest = max(self._furthest, step)
            self._returns += 1
            if self._returns > _MOST_RETURNS:
                returns = f"after {_MOST_RETURNS} returns to a checkpoint"
                verdict, what = Verdict.STOP, f"{what}, {returns}"
        return Judgement(verdict, what, way_out)

    @property
    def history(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The losses and gradient norms of the last steps, for a checkpoint."""
        return tuple(self._losses), tuple(self._norms)

    def restore(
        self, losses: Sequence[float], norms: Sequence[float], spikes: int, skipped: int
    ) -> None:
        """Take the history and counts of a checkpoint; a run that goes back keeps its counts."""
        self._losses, self._norms = list(losses), list(norms)
        self.spikes, self.skipped = max(self.spikes, spikes), max(self.skipped, skipped)


def _listed(words: Sequence[str]) -> str:
    """Return `a`, `a and b`, or `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
