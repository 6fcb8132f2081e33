"""What a resumed run says when it knows which checkpoint it goes on from."""

from __future__ import annotations

from vp_train.config import ConfigError, RunConfig
from vp_train.config.typed import override
from vp_train.optim.adamw import learning_rate
from vp_train.settings import load_config
from vp_train.settings.resume import changes


def rate_words(config: RunConfig, done: int) -> str:
    """Say how the learning rate goes on from step `done`, and where its decay ends now.

    Call it in a resumed run before config.yaml is written again.  It is empty if the settings of
    this command line leave both as they would have been.
    """
    path = config.run.directory / "config.yaml"
    if done == 0 or config.run.steps <= done or not path.is_file():
        return ""
    where = [override("run.root", config.run.root), override("run.name", config.run.name)]
    try:
        names = [change.name for change in changes(config)]
        if "run.steps" not in names and not any(name.startswith("optim.") for name in names):
            return ""
        before = load_config([*where, "run.resume=true"])
    except ConfigError:  # the settings of another version
        return ""
    then, was, now = (
        f"{learning_rate(one.optim, step, one.run.steps):.2e}"
        for one, step in ((before, done), (before, done + 1), (config, done + 1))
    )
    jump = f"learning rate at step {done + 1}: {now}, was {then} at step {done}"
    decay = _decay_words(_decay_end(before), _decay_end(config))
    return "; ".join([*([jump] if was != now else []), *([decay] if decay else [])])


def _decay_end(config: RunConfig) -> int | None:
    """Return the step at which the decay of the learning rate ends, None if it has no decay."""
    optim, steps = config.optim, config.run.steps
    decays = learning_rate(optim, steps, steps) == optim.final_lr != optim.lr
    return steps if decays else None


def _decay_words(before: int | None, now: int | None) -> str:
    """Say at which step the decay ends now and before; empty if that is the same."""
    if before == now:
        return ""
    if now is None:
        return f"the decay is gone, it was to end at step {before}"
    was = "there was none" if before is None else f"was {before}"
    return f"the decay now ends at step {now}, {was}"
