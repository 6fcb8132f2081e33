"""The progress that rank 0 shows: live lines on a terminal, else a plain line every few steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live
from rich.text import Text

from schedules.render import duration
from vp_train.config import RunSettings
from vp_train.config.figures import BITS, LOSS, name_of, validation_key
from vp_train.units import clock, count_words, human_bytes, loss_words

_BETWEEN = "  "  # figures of a line


@dataclass(frozen=True, slots=True)
class StepReport:
    """The figures of one step that are shown and recorded.

    peak_bytes: memory of the worst rank.
    spikes, skipped_steps: how many there were since the run began.
    figures: those of `figures.figures_of`, by key.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    peak_bytes: float
    spikes: int = 0
    skipped_steps: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)

    def values(self) -> dict[str, float]:
        """Return all figures by their keys in metrics.jsonl."""
        return {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "tokens_per_second": self.tokens_per_second,
            "peak_bytes": self.peak_bytes,
            "spikes": self.spikes,
            "skipped_steps": self.skipped_steps,
            **self.figures,
        }


@dataclass(frozen=True, slots=True)
class Validation:
    """The result of one validation set; the text that is held out of training has no name.

    loss: in nats per token.
    bits_per_byte: of the text; None if its bytes are not known.
    """

    name: str
    loss: float
    bits_per_byte: float | None = None

    def values(self) -> dict[str, float]:
        """Return the figures by their keys in metrics.jsonl."""
        found = {validation_key(self.name, LOSS): self.loss}
        if self.bits_per_byte is not None:
            found[validation_key(self.name, BITS)] = self.bits_per_byte
        return found


def validation_words(found: Sequence[Validation]) -> str:
    """Return the figures of all validation sets in words; the unit of the bits is said once."""
    parts, unit = [], " bits/byte"
    for each in found:
        bits = ""
        if each.bits_per_byte is not None:
            bits, unit = f" ({each.bits_per_byte:.3f}{unit})", ""
        name = each.name or ("held out" if len(found) > 1 else "")
        parts.append(f"{name} {loss_words(each.loss)}{bits}".lstrip())
    return f"validation loss {_BETWEEN.join(parts)}"


def _words_of(key: str) -> Callable[[float], str]:
    """Return the function that puts a figure of PROGRESS in words."""
    if key.startswith("seconds/"):
        return lambda value: f"{name_of(key)} {duration(value)}"
    if key.startswith("memory/"):
        return lambda value: f"{name_of(key)} {human_bytes(value)}"
    return {
        "loss": lambda value: f"loss {loss_words(value)}",
        "grad_norm": lambda value: f"grad norm {value:{'.3f' if value < 1e6 else '.3e'}}",
        "learning_rate": lambda value: f"lr {value:.2e}",
        "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
        "interval_tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
        "tokens": lambda value: count_words(int(value), "token"),
        "passes": lambda value: f"{value:.3g} passes",
        "left": lambda value: f"{clock(value)} left",
        "peak_bytes": lambda value: f"peak {human_bytes(value)}",
        "mfu": lambda value: f"MFU {value:.1%}",
        "bubble_mean": lambda value: f"bubble {value:.1%}",
        "bubble_worst": lambda value: f"worst bubble {value:.1%}",
    }[key]


class ProgressDisplay:
    """A display of finished steps up to `settings.steps`.

    A log file gets every `log_every`-th step, the first and the last.
    """

    def __init__(self, settings: RunSettings, first_step: int, console: Console) -> None:
        self._settings, self._first_step = settings, first_step
        self._console = console
        self._words = {key: _words_of(key) for key in settings.progress}
        self._started = time.monotonic()
        self._num_shown = 0  # steps; a run that goes back to a checkpoint repeats some
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        if self._live is not None:
            self._live.start()
            # A rank may exit without `close`, which would leave the terminal without a cursor.
            console.show_cursor(True)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Show the finished `step` with its values by key.

        What is not known is left out, which the first line says.
        """
        settings = self._settings
        self._num_shown += 1
        of_one = (time.monotonic() - self._started) / self._num_shown
        left = of_one * (settings.steps - step)
        known = {**values, "left": left}
        parts = [f"step {step:>{len(str(settings.steps))}}/{settings.steps}"]
        parts += [words(known[key]) for key, words in self._words.items() if key in known]
        unknown = [key for key in self._words if key not in known]
        if self._num_shown == 1 and unknown:
            self.say(_unknown_words(unknown))
        stays = step % settings.log_every == 0 or step in (self._first_step, settings.steps)
        if self._live is not None:
            lines = [] if stays else folded(parts, self._console.width)
            # At once: a line that stays is printed above what was drawn last.
            self._live.update(Text("\n".join(lines), overflow="fold"), refresh=True)
        if stays:
            self.say(_BETWEEN.join(parts))

    def say(self, line: str) -> None:
        """Print a line that stays."""
        print_line(self._console, line)

    def close(self) -> None:
        if self._live is not None:
            self._live.update(Text(""))
            self._live.stop()


def print_line(console: Console, line: str) -> None:
    """Print a line as it is: of any length, without colours, and nothing in it is markup."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def _unknown_words(keys: Sequence[str]) -> str:
    """Return which of the chosen figures are not known, and what would make them known."""
    why = " (mfu: cluster has no peak of this device)" if "mfu" in keys else ""
    return f"run.progress: not known on this device, so left out: {', '.join(keys)}{why}"


def folded(parts: Sequence[str], width: int) -> list[str]:
    """Return `parts` in lines of at most `width` characters; a longer part has its own line."""
    lines = [parts[0]]
    for part in parts[1:]:
        if len(lines[-1]) + len(_BETWEEN) + len(part) > width:
            lines.append(part)
        else:
            lines[-1] += _BETWEEN + part
    return lines
