"""Short forms of the campaigns; `make reliability` runs the long ones."""

from __future__ import annotations

import pytest

from tests.reliability import crafted, faults, kills, layouts, mutations


def test_every_mutation_is_named_and_the_checkpoint_before_is_used():
    assert mutations.campaign(seed=7, count=44) == []


def test_every_crafted_checkpoint_is_refused_in_one_line():
    assert crafted.campaign(seed=7, count=len(crafted.CASES)) == []


def test_a_checkpoint_that_is_not_refused_is_a_failure(monkeypatch):
    monkeypatch.setitem(crafted.CASES, "nothing", lambda body, path: None)
    monkeypatch.setattr(crafted, "CASES", {"nothing": crafted.CASES["nothing"]})
    (failure,) = crafted.campaign(seed=1, count=1)
    assert "step-00000002 was used" in failure


@pytest.mark.slow
def test_a_kill_of_a_rank_leaves_complete_checkpoints_and_the_same_losses():
    assert kills.campaign(seed=7, count=2) == []


@pytest.mark.slow
def test_a_random_layout_trains_and_goes_on_as_one_process():
    """Two replicas with ZeRO-1 and label smoothing, which reads all rows of the output layer."""
    assert layouts.campaign(seed=43, count=1) == []


@pytest.mark.slow
def test_every_fault_ends_the_job_with_its_code_and_cause_in_time():
    first = ["kill -9 of the store of the ranks", "a rank that sleeps at the start"]
    assert faults.campaign(seed=7, count=5, at_once=4, first=first) == []


@pytest.mark.slow
def test_a_job_that_ends_otherwise_is_a_failure(tmp_path):
    fault = faults.Fault(code=75, words="bug", deed="raise ValueError('bug')")
    assert faults.wrong_with(fault, tmp_path).startswith("code 70 instead of 75: ")
