"""What a resumed run says when it knows which checkpoint it goes on from."""

from __future__ import annotations

from vp_train.config import ConfigError, RunConfig
from vp_train.optim.adamw import learning_rate
from vp_train.settings import load_config
from vp_train.settings.resume import changes
from vp_train.settings.words import override


def rate_words(config: RunConfig, done: int) -> str:
    """Say how the learning rate of a resumed run goes on from step `done`.

    Call it before config.yaml is written again.  It is empty if the settings of this command line
    leave the rate as it would have been.
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
    if was == now:
        return ""
    return (
        f"learning rate at step {done + 1}: {now}, was {then} at step {done}; "
        f"the decay now ends at step {config.run.steps}"
    )
