"""A resumed run says how its learning rate goes on, where it is not what it would have been."""

from __future__ import annotations

import pytest

from vp_train.metrics.resumed import rate_words
from vp_train.settings import load_config
from vp_train.settings.files import config_text

BEGUN = ("run.name=one", "run.steps=40", "optim.lr=2e-3", "optim.warmup_steps=5")


@pytest.mark.parametrize(
    ("given", "done", "words"),
    [
        (("run.steps=400",), 40, "step 41: 1.96e-03, was 2.00e-04 at step 40; the decay now ends"),
        (("run.steps=400",), 0, ""),  # it has not begun
        (("run.steps=400",), 3, ""),  # both warm up
        (("run.seed=2",), 20, ""),
        (("optim.weight_decay=0.3",), 20, ""),
        (("optim.lr=4e-3",), 1, "step 2: 1.60e-03, was 4.00e-04 at step 1; the decay now ends"),
        (("optim.lr=4e-3",), 39, "step 40: 4.00e-04, was 2.04e-04 at step 39; the decay now ends"),
        (("optim.lr=4e-3",), 40, ""),  # no step is left
    ],
)
def test_a_learning_rate_that_jumps_is_said(tmp_path, given, done, words):
    begun = load_config([f"run.root={tmp_path}", *BEGUN])
    resumed = [f"run.root={tmp_path}", "run.name=one", "run.resume=true", *given]
    begun.run.directory.mkdir()
    path = begun.run.directory / "config.yaml"
    path.write_text(config_text(begun))
    config = load_config(resumed)
    said = rate_words(config, done)
    if words:
        assert said == f"learning rate at {words} at step {config.run.steps}"
    else:
        assert said == ""
    path.write_text("of: another version\n")
    assert rate_words(config, done) == ""
    path.unlink()
    assert rate_words(config, done) == ""
