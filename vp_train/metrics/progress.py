"""The progress that rank 0 shows: a live line on a terminal, else a plain line every few steps."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.text import Text

from vp_train.units import clock, human_bytes


@dataclass(frozen=True, slots=True)
class StepReport:
    """The figures of one step that are shown.

    peak_bytes: memory of the worst rank.
    spikes, skipped_steps: how many there were since the run began.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens_per_second: float
    peak_bytes: float
    spikes: int = 0
    skipped_steps: int = 0


class Progress:
    """A display of finished steps up to `num_steps`.

    A log file gets every `log_every`-th step, the first and the last.
    """

    def __init__(self, num_steps: int, first_step: int, log_every: int, console: Console) -> None:
        self._num_steps, self._first_step = num_steps, first_step
        self._log_every, self._console = log_every, console
        self._started = time.monotonic()
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        if self._live is not None:
            self._live.start()
            # A rank may exit without `close`, which would leave the terminal without a cursor.
            console.show_cursor(True)

    def step(self, report: StepReport) -> None:
        """Show a finished step."""
        line = self._line(report)
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        if report.step % self._log_every == 0 or report.step in (self._first_step, self._num_steps):
            self.say(line)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.update(Text(""))
            self._live.stop()

    def _line(self, report: StepReport) -> str:
        done = report.step - self._first_step + 1
        left = (time.monotonic() - self._started) / done * (self._num_steps - report.step)
        return (
            f"step {report.step:>{len(str(self._num_steps))}}/{self._num_steps}  "
            f"loss {report.loss:.4f}  grad norm {report.grad_norm:.3f}  "
            f"lr {report.learning_rate:.2e}  {report.tokens_per_second:,.0f} tokens/s  "
            f"{clock(left)} left  peak {human_bytes(report.peak_bytes)}"
        )
