"""Plans with activations in host memory: what moves, what it saves, and what the host holds."""

import functools
from dataclasses import replace

import pytest

from schedules.ir import Schedule
from vp_train.config import ConfigError
from vp_train.planning.cluster import host_bytes_per_second
from vp_train.planning.memory import check_host, rank_memory
from vp_train.planning.placement import offloaded_layers
from vp_train.planning.plan import plan_step
from vp_train.planning.report import make_report
from vp_train.settings import load_config

LLAMA = [
    *("model=llama3_8b", "cluster=h100_80g_node", "parallel.pp=8", "num_microbatches=12"),
    *("schedule=1f1b", "vocab=one_barrier"),
]


@functools.cache
def planned(*overrides):
    config = load_config([*LLAMA, *overrides])
    return config, plan_step(config, 8)


def test_halves_of_layers_round_up():
    assert [offloaded_layers(count, 0.5) for count in range(6)] == [0, 1, 1, 2, 2, 3]
    assert [offloaded_layers(7, part) for part in (0, 0.1, 0.9, 1)] == [0, 1, 6, 7]


def test_more_offloading_takes_less_memory_and_no_time():
    needs, seconds = [], []
    for part in (0.0, 0.5):
        config, step = planned(f"parallel.offload_activations={part}")
        needs.append([rank_memory(step, config.optim, rank).total for rank in range(8)])
        seconds.append(step.timeline.makespan)
    assert all(less <= more for less, more in zip(needs[1], needs[0], strict=True))
    assert needs[1][0] < 0.9 * needs[0][0]
    assert seconds[1] == pytest.approx(seconds[0], rel=1e-9)


def test_a_plan_without_offloading_has_no_transfers():
    _, step = planned()
    assert step.cost.offload_bytes == ()
    assert not step.schedule.offloads
    assert not step.timeline.transfers


def test_a_node_with_few_lanes_slows_every_gpu():
    config = load_config([*LLAMA, "cluster.host_node_bytes_per_second=2e11"])
    assert host_bytes_per_second(config.cluster) == 2e11 / 8
    wide = replace(config.cluster, host_node_bytes_per_second=1e13)
    assert host_bytes_per_second(wide) == config.cluster.host_bytes_per_second


def test_a_node_without_room_for_the_activations_of_its_ranks_is_refused():
    _, step = planned("parallel.offload_activations=0.5")
    needed = [round(step.timeline.host_bytes(rank)) for rank in range(8)]
    assert min(needed[:4]) > 0
    check_host(step, range(8), sum(needed) + 8)
    check_host(step, range(4), sum(needed[:4]) + 8)
    with pytest.raises(ConfigError, match=r"activations in host memory, and this one has .*; low"):
        check_host(step, range(4), sum(needed[:4]) - 8)
    _, without = planned()
    check_host(without, range(8), 0)


def test_a_report_counts_bytes_of_device_and_host():
    config = load_config([*LLAMA, "parallel.offload_activations=0.5"])
    found = make_report(config)
    moved = found.offloading
    assert moved is not None
    assert moved.num_moved > 0
    assert moved.exposed == 0
    assert 0 < moved.busy[0] <= 1
    whole = make_report(load_config(LLAMA))
    assert whole.offloading is None
    totals = [max(rank.memory.total for rank in one.ranks) for one in (whole, found)]
    assert moved.saved == pytest.approx(totals[0] - totals[1])
    assert found.fits
    for gib, fits in ((moved.host / 2**30 + 1, True), (moved.host / 2**30 - 1, False)):
        cluster = replace(config.cluster, host_memory_gib=gib)
        known = replace(found, cluster=cluster)
        assert known.fits is fits
        assert ("host memory" in known.binds) is not fits


def test_transfers_that_delay_passes_do_not_count_as_messages_too(tmp_path):
    _, step = planned("parallel.offload_activations=0.5")
    path = tmp_path / "schedule.txt"
    path.write_text(step.schedule.text())
    slow = f"schedule.file={path}", "cluster.host_bytes_per_second=5e9"
    found = make_report(load_config([*LLAMA, "parallel.offload_activations=0.5", *slow]))
    assert found.offloading is not None
    assert found.offloading.exposed > 0.01 * found.step_seconds
    assert found.messages == pytest.approx(make_report(load_config(LLAMA)).messages)


def test_a_stored_schedule_keeps_its_reloads_and_needs_the_setting(tmp_path):
    _, step = planned("parallel.offload_activations=0.5")
    path = tmp_path / "schedule.txt"
    fewer = replace(step.schedule, offloads=step.schedule.offloads[3:])
    path.write_text(fewer.text())
    assert Schedule.parse(path.read_text()) == fewer
    stored = f"schedule.file={path}"
    _, again = planned("parallel.offload_activations=0.5", stored)
    assert again.schedule.offloads == fewer.offloads
    with pytest.raises(ConfigError, match=r"offloads none of its layers; set parallel\.offload"):
        planned(stored)
