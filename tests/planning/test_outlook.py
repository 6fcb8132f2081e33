"""What comparisons ask of a step: planned whole, or from short steps."""

from __future__ import annotations

import pytest

from vp_train.planning.outlook import num_passes, outlook_of
from vp_train.planning.report import brief_report
from vp_train.settings import load_config

GPT = ["model=gpt_4b", "cluster=a100_80g_node", "parallel.pp=4", "parallel.dp=2"]


@pytest.mark.parametrize(
    "words",
    [
        ["schedule=interleaved", "num_microbatches=50"],
        ["schedule=1f1b", "num_microbatches=48", "parallel.offload_activations=1"],
        ["schedule=v_half", "num_microbatches=64", "cluster.memory_gib=8"],
    ],
)
def test_short_steps_say_of_a_long_one_what_its_plan_does(words):
    config = load_config([*GPT, *words])
    report, limit = brief_report(config), num_passes(config)
    whole, found = outlook_of(config, whole=limit), outlook_of(config, whole=limit - 1)
    assert (whole.is_planned, found.is_planned) == (True, False)
    assert (whole.seconds, whole.host) == (report.step_seconds, report.host.total)
    assert whole.memory == report.ranks[report.worst].memory.total
    assert whole.excess == report.excess
    assert whole.fits is found.fits is report.fits
    assert found.seconds == pytest.approx(whole.seconds, rel=0.015)
    assert found.memory == pytest.approx(whole.memory, rel=0.05)
    assert found.host == pytest.approx(whole.host, rel=0.1)


def test_hosts_count_too():
    words = ["num_microbatches=48", "parallel.offload_activations=1", "cluster.host_memory_gib=1"]
    for whole in (0, 1 << 14):
        found = outlook_of(load_config([*GPT, *words]), whole=whole)
        assert found.excess < 0 < found.host_excess
        assert not found.fits


def test_a_searched_order_is_planned_whole():
    words = ["schedule=auto", "num_microbatches=4", "model.num_layers=4", "parallel.dp=4"]
    config = load_config([*GPT[:2], *words, "parallel.pp=2"])
    assert outlook_of(config, whole=0).is_planned
