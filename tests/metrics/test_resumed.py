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
        (
            ("run.steps=400",),
            40,
            "learning rate at step 41: 1.96e-03, was 2.00e-04 at step 40; "
            "the decay now ends at step 400, was 40",
        ),
        (("run.steps=400",), 0, ""),  # it has not begun
        (("run.steps=400",), 3, "the decay now ends at step 400, was 40"),  # both warm up
        (("run.steps=5",), 3, "the decay is gone, it was to end at step 40"),  # all is warm-up
        (
            ("optim.warmup_steps=40",),
            5,
            "learning rate at step 6: 3.00e-04, was 2.00e-03 at step 5; "
            "the decay is gone, it was to end at step 40",
        ),
        (("run.seed=2",), 20, ""),
        (("optim.weight_decay=0.3",), 20, ""),
        (("optim.lr=4e-3",), 1, "learning rate at step 2: 1.60e-03, was 4.00e-04 at step 1"),
        (("optim.lr=4e-3",), 39, "learning rate at step 40: 4.00e-04, was 2.04e-04 at step 39"),
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
    assert rate_words(config, done) == words
    path.write_text("of: another version\n")
    assert rate_words(config, done) == ""
    path.unlink()
    assert rate_words(config, done) == ""


def test_a_decay_that_was_not_there_is_said(tmp_path):
    begun = load_config([f"run.root={tmp_path}", *BEGUN, "optim.min_lr=2e-3"])
    begun.run.directory.mkdir()
    (begun.run.directory / "config.yaml").write_text(config_text(begun))
    resumed = [f"run.root={tmp_path}", "run.name=one", "run.resume=true", "optim.min_lr=1e-3"]
    said = rate_words(load_config(resumed), 3)
    assert said == "the decay now ends at step 40, there was none"
