"""What `vp-simulate --jitter` and `--straggler` show: how steps vary, and what is robust."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from schedules.jitter import Disturbance, Steps, disturbed_steps
from schedules.render import duration
from vp_train.commands.command import whole_number
from vp_train.config import ConfigError
from vp_train.planning.plan import StepPlan
from vp_train.units import count_words

OPTIONS = {
    "--jitter": ("X", "how steps vary if every pass takes its time up to a deviation of X, as 0.1"),
    "--straggler": ("X", "how they vary if one rank, each in turn, is slower by X, as 0.25"),
    "--samples": ("N", "with these: steps to draw (50); with --straggler a multiple of the ranks"),
    "--seed": ("N", "with --jitter or --straggler: the seed of what is drawn (0)"),
}
_MOST = 1.0  # of both: a pass, or a rank, may take twice as long
_QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True, slots=True)
class Draws:
    """What to draw: a disturbance, how many samples, from which seed."""

    disturbance: Disturbance
    samples: int
    seed: int

    @classmethod
    def of(cls, options: Mapping[str, str]) -> Draws | None:
        """Return what the options ask for; None if they ask for nothing.  Raises ConfigError."""
        asked = [name for name in ("--jitter", "--straggler") if name in options]
        if not asked:
            for name in ("--samples", "--seed"):
                if name in options:
                    raise ConfigError(f"{name} belongs to --jitter or --straggler")
            return None
        jitter, straggler = (_fraction(options, name) for name in ("--jitter", "--straggler"))
        return cls(
            Disturbance(jitter, straggler),
            whole_number(options, "--samples", 50, most=10_000),
            whole_number(options, "--seed", 0, least=0),
        )

    def on(self, num_ranks: int) -> Draws:
        """Return these draws with so many samples that each of the ranks is slow equally often."""
        if not self.disturbance.straggler:
            return self
        return replace(self, samples=num_ranks * math.ceil(self.samples / num_ranks))

    def steps(self, plan: StepPlan) -> Steps:
        """Return the disturbed steps of a plan."""
        return disturbed_steps(
            plan.schedule, plan.problem, plan.cost, self.disturbance, self.samples, self.seed
        )

    @property
    def words(self) -> str:
        """Return in words what is drawn."""
        parts = []
        if self.disturbance.jitter:
            parts.append(f"passes and collectives vary by {self.disturbance.jitter:.3g} each")
        if self.disturbance.straggler:
            parts.append(
                f"one rank, each in turn, is slower by {100 * self.disturbance.straggler:.3g}%"
            )
        drawn = " and ".join(parts) or "nothing varies"
        return f"{count_words(self.samples, 'step')} of every schedule, seed {self.seed}: {drawn}"


def _fraction(options: Mapping[str, str], name: str) -> float:
    """Return the value of an option that takes a fraction, 0 if it was not given."""
    word = options.get(name, "0")
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= _MOST:
        raise ConfigError(
            f"{name} {word} is not a fraction in [0, {_MOST:g}]; for 10 % write {name} 0.1"
        )
    return value


def table_head(widths: tuple[int, int]) -> str:
    """Return the header of `table_line`.  `widths`: characters of a schedule, of an algorithm."""
    figures = " ".join(
        f"{word:>9}" for word in ("planned", "mean", "5%", "median", "95%", "worst", "longer")
    )
    return f"{'schedule':<{widths[0]}} {'vocab':<{widths[1]}} {figures}"


def table_line(schedule: str, vocab: str, steps: Steps, widths: tuple[int, int]) -> str:
    """Return one line: the planned step, and the distribution of the disturbed ones."""
    seconds = (
        steps.planned,
        steps.mean,
        *map(steps.quantile, _QUANTILES),
        max(steps.seconds),
    )
    figures = " ".join(f"{duration(value):>9}" for value in seconds)
    return f"{schedule:<{widths[0]}} {vocab:<{widths[1]}} {figures} {steps.longer:>+9.2%}"


def verdict(found: Mapping[tuple[str, str], Steps]) -> list[str]:
    """Return two lines: the fastest schedule as it runs, and the one that suffers least."""
    fastest, robust = (
        min(found, key=key) for key in (lambda n: found[n].mean, lambda n: found[n].longer)
    )
    lines = []
    for words, name in (("fastest on average", fastest), ("least disturbed", robust)):
        steps = found[name]
        lines.append(
            f"{words:<19} {' with '.join(name)}: {duration(steps.mean)}, {steps.longer:+.2%}"
        )
    return lines


def record(steps: Steps) -> dict[str, Any]:
    """Return what table.json says of the disturbed steps, in seconds."""
    return {
        "mean_seconds": steps.mean,
        "longer": steps.longer,
        "quantiles_seconds": {f"{fraction:g}": steps.quantile(fraction) for fraction in _QUANTILES},
        "worst_seconds": max(steps.seconds),
        "seconds": list(steps.seconds),
    }
