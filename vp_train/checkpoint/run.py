"""The checkpoints of one run: saved beside its steps, and restored when it resumes or goes back."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from vp_train.assembly import RankModel
from vp_train.batches import Batches
from vp_train.checkpoint.saver import Saver, set_aside
from vp_train.checkpoint.store import Damage, find
from vp_train.checkpoint.training import (
    Progress,
    begin_save,
    latest_of_run,
    load_weights,
    restore_run,
)
from vp_train.config import RunConfig
from vp_train.durable import checkpoint_name
from vp_train.mesh import Mesh
from vp_train.optim.adamw import StepHealth
from vp_train.optim.verdict import Judge
from vp_train.supervision.requests import NOTHING, Requests


class RunCheckpoints:
    """Saves and restores what the steps of one rank change.

    That is the model and its optimizer, the place in the data, and the history that steps are
    judged by.

    saved_step: that of the newest checkpoint that was begun, 0 for none.

    Methods are collective, except `take_notices`.  `say` prints a warning once for all ranks.  The
    run goes on after a save that failed.
    """

    def __init__(
        self,
        config: RunConfig,
        mesh: Mesh,
        model: RankModel,
        *,
        batches: Batches,
        judge: Judge,
        requests: Requests,
    ) -> None:
        self._config, self._mesh, self._model = config, mesh, model
        self._batches, self._judge, self._requests = batches, judge, requests
        self._saver = Saver(
            config.run.checkpoints,
            mesh.steps,
            config.run.keep_checkpoints,
            device=config.run.device,
            patience_seconds=config.run.world_timeout_seconds,
        )
        self._notices: list[str] = []
        self.saved_step = 0

    @property
    def is_ready(self) -> bool:
        """Return whether a save is under way and this rank's part of its phase is done."""
        return self._saver.is_ready

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that was begun, None for none."""
        directory = self._config.run.checkpoints
        return directory / checkpoint_name(self.saved_step) if self.saved_step else None

    def save_if_due(
        self, step: int, health: StepHealth, say: Callable[[str], None], *, leaves: bool
    ) -> None:
        """Go on with the checkpoint that is being written, and begin one if it is due.

        Returns when its tensors are copied; it is written beside the next steps.  One that is still
        being written is awaited first.  `leaves` says whether the run leaves after this step.
        """
        settings = self._config.run
        if health.saved:
            self._saver.advance()
        is_last = step == settings.steps
        wanted = settings.saves and (is_last or health.request != NOTHING)
        is_due = wanted or settings.is_due(step, settings.checkpoint_every)
        if is_due and step != self.saved_step:
            self.settle(say)
            self._requests.saved()
            self._begin(step)
        if not is_last and not leaves:
            self._warn(say)

    def _begin(self, step: int) -> None:
        judge, contents = self._judge, self._batches.contents
        tokens = self._batches.tokens_until(step)
        progress = Progress(tokens, *judge.history, judge.spikes, judge.skipped)
        begin_save(self._saver, step, self._config, self._model, self._mesh, contents, progress)
        self.saved_step = step

    def settle(self, say: Callable[[str], None]) -> None:
        """Return when no save is under way; warn if the newest one failed."""
        self._saver.finish()
        self._warn(say)

    def finish(self) -> None:
        """Return when the newest checkpoint that was begun is complete.

        Raises CheckpointError on all ranks if it could not be written.
        """
        self._saver.finish()
        if (failure := self._saver.take_failure()) is not None:
            raise failure

    def _warn(self, say: Callable[[str], None]) -> None:
        if (failure := self._saver.take_failure()) is not None:
            say(f"{failure}; going on, the checkpoints before it are untouched")

    def restore(self) -> int:
        """Load the newest undamaged checkpoint and return its step, 0 if there is none."""
        path, damaged = latest_of_run(self._config.run.checkpoints, self._mesh.world)
        if path is None:
            return 0
        self._saver.leave_uncounted([each.name for each in damaged])
        if self._mesh.rank == 0:
            self._notices += [self._passed_over(each) for each in damaged]
        contents = self._batches.contents
        step, progress = restore_run(path, self._config, self._model, self._mesh, contents)
        self._batches.seek(step, progress.tokens)
        self._judge.restore(progress.losses, progress.norms, progress.spikes, progress.skipped)
        self.await_others()
        return step

    def go_back(self, step: int) -> int:
        """Restore, and let the data that the steps up to `step` have used be left out."""
        tokens = self._batches.tokens_until(step)
        if done := self.restore():
            self.saved_step = done
            self._batches.seek(done, tokens)
        return done

    def initialise(self, source: str) -> None:
        """Load the weights of another run or of an import."""
        path = find(Path(source).expanduser(), self._mesh.world)
        load_weights(path, self._config, self._model)

    def await_others(self) -> None:
        """Return when all ranks have compiled their kernels and loaded their parameters.

        A slow disk or compiler may take longer than a step's timeout.
        """
        self._mesh.world.barrier()

    def take_notices(self) -> list[str]:
        """Return the notices about checkpoints that were passed over, and forget them."""
        notices, self._notices = self._notices, []
        return notices

    def _passed_over(self, damage: Damage) -> str:
        """Set a checkpoint aside if its bytes were altered, and return a line for the notices.

        Only the first rank does so.  What else is wrong may be right again, as on a disk that did
        not answer.
        """
        directory, words = self._config.run.checkpoints, f"checkpoint passed over: {damage.words}"
        aside = set_aside(directory, damage.name) if damage.is_altered else None
        if aside is None:
            return words
        print(f"{directory / damage.name} is {aside.name} now", file=sys.stderr, flush=True)
        return f"{words}; it is {aside.name} now"
