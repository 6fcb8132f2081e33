"""Which steps are applied: non-finite values and spikes, as the settings say."""

from __future__ import annotations

import math

import pytest

from vp_train.config import RunSettings
from vp_train.optim.adamw import StepHealth
from vp_train.optim.verdict import Judge, Verdict


def health(loss=2.0, norm=1.0, culprits=()):
    return StepHealth(loss, norm, culprits, 0.0)


NAN = health(math.nan, math.nan, ((5, "loss"), (7, "gradient")))


def experienced(replica_size=None, **settings):
    """A judge that has seen 64 ordinary steps."""
    judge = Judge(RunSettings(**settings), replica_size)
    for step in range(-43, 21):
        assert judge.judge(step, health()).verdict is Verdict.APPLY
    return judge


@pytest.mark.parametrize("verdict", ["stop", "skip", "go_back"])
def test_a_nonfinite_step_is_never_applied_and_names_ranks_and_replicas(verdict):
    judgement = experienced(4, on_nonfinite=verdict).judge(21, NAN)
    assert judgement.verdict == verdict
    assert judgement.words == (
        "non-finite loss on rank 5 (replica 1), gradient on rank 7 (replica 1)"
    )
    words = experienced(on_nonfinite=verdict).judge(21, NAN).words
    assert words == "non-finite loss on rank 5, gradient on rank 7"


def test_ranks_with_the_same_fault_are_named_together():
    both = health(math.nan, math.nan, ((0, "gradient"), (1, "gradient"), (4, "gradient")))
    judgement = experienced().judge(21, both)
    assert judgement.words == "non-finite gradient on ranks 0, 1 and 4"
    assert judgement.way_out.endswith(
        "to return to the last checkpoint and leave out the data since then"
    )


@pytest.mark.parametrize("verdict", ["apply", "stop", "skip", "go_back"])
@pytest.mark.parametrize(
    ("spike", "words"),
    [
        (health(loss=4.1), "loss 4.1, 2.0 times the median 2 of the last 64 steps"),
        (health(norm=10.1), "gradient norm 10.1, 10.1 times the median 1 of the last 64 steps"),
    ],
)
def test_a_spike_is_said_counted_and_treated_as_asked(verdict, spike, words):
    judge = experienced(on_spike=verdict)
    judgement = judge.judge(21, spike)
    assert (judgement.verdict, judgement.words) == (verdict, words)
    assert judge.spikes == 1
    assert judge.skipped == (verdict != "apply")


@pytest.mark.parametrize("usual", [health(loss=4.0), health(norm=10.0), health(0.1, 0.0)])
def test_what_is_not_above_its_factor_is_no_spike(usual):
    judgement = experienced(on_spike="stop").judge(21, usual)
    assert (judgement.verdict, judgement.words) == (Verdict.APPLY, "")


def test_the_first_steps_have_no_spikes():
    """A loss is one after 16 steps, a norm after 64: as a run begins its norms vary."""
    judge = Judge(RunSettings(on_spike="stop"))
    for step in range(1, 65):
        loss = 10.0**step if step < 17 else 1.0
        assert judge.judge(step, health(loss, 10.0**step)).verdict is Verdict.APPLY
    assert judge.judge(65, health(norm=1e70)).verdict is Verdict.STOP
    judge.restore(range(1, 17), range(1, 17), 0, 0)
    assert judge.judge(66, health(norm=1e70)).verdict is Verdict.APPLY
    assert judge.judge(67, health(loss=20)).verdict is Verdict.STOP


def test_a_spike_that_was_not_applied_does_not_move_the_median():
    judge = experienced(on_spike="skip")
    for step in range(21, 30):
        assert judge.judge(step, health(norm=50)).verdict is Verdict.SKIP
        assert judge.history[1] == (1.0,) * 64
    assert judge.judge(30, health(norm=50)).verdict is Verdict.STOP, "the tenth in a row"


def test_the_window_is_the_last_64_steps():
    judge = experienced(on_spike="stop")
    for step in range(21, 200):
        judge.judge(step, health(loss=3.9))
    assert judge.history[0] == (3.9,) * 64


def test_skips_that_are_not_in_a_row_go_on_for_ever():
    judge = experienced(on_nonfinite="skip")
    for step in range(21, 121, 2):
        assert judge.judge(step, NAN).verdict is Verdict.SKIP
        assert judge.judge(step + 1, health()).verdict is Verdict.APPLY
    assert judge.skipped == 50


def test_a_run_that_goes_back_without_getting_further_stops():
    judge = experienced(on_nonfinite="go_back")
    for _ in range(3):
        assert judge.judge(23, NAN).verdict is Verdict.GO_BACK
        assert judge.judge(21, health()).verdict is Verdict.APPLY
    assert judge.judge(22, NAN).words.endswith("after 3 returns to a checkpoint")
    judge = experienced(on_nonfinite="go_back")
    for step in range(23, 33):
        assert judge.judge(step, NAN).verdict is Verdict.GO_BACK
        assert judge.judge(step + 1, health()).verdict is Verdict.APPLY


def test_the_medians_survive_a_checkpoint():
    judge = Judge(RunSettings(on_spike="stop"))
    judge.restore(*experienced().history, 3, 2)
    assert (judge.spikes, judge.skipped) == (3, 2)
    assert judge.judge(21, health(norm=11)).verdict is Verdict.STOP
    assert (judge.spikes, judge.skipped) == (4, 3)
    judge.restore((), (), 3, 2)  # a run that goes back has seen what it has seen
    assert (judge.spikes, judge.skipped) == (4, 3)
    assert judge.judge(21, health(norm=11)).verdict is Verdict.APPLY


def test_without_a_checkpoint_a_step_is_skipped_instead_of_going_back():
    judge = experienced(on_nonfinite="go_back")
    for step in range(21, 30):
        judgement = judge.judge(step, NAN, can_go_back=False)
        assert judgement.verdict is Verdict.SKIP
        assert judgement.words.endswith("; there is no checkpoint to go back to")
    assert judge.judge(30, NAN, can_go_back=False).verdict is Verdict.STOP
    assert judge.judge(31, NAN).verdict is Verdict.GO_BACK
