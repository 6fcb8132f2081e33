"""Plans with activations in host memory: what moves, what it saves, and what the host holds."""

import functools
import itertools
import math
import re
from dataclasses import replace

import pytest

from schedules.ir import Schedule
from schedules.render import duration
from tests.searched import shown_lines
from vp_train.commands import plan_remedies
from vp_train.commands.plan_remedies import remedies
from vp_train.commands.plan_words import plan_lines, remedies_of, remedy_lines
from vp_train.commands.search_beside import LeastLink
from vp_train.config import ConfigError, OptimConfig
from vp_train.model.shape import num_parameters
from vp_train.optim.adamw import learning_rate
from vp_train.planning import short
from vp_train.planning.choice import Choice, changes_of, choice_of
from vp_train.planning.cluster import MARGIN, host_bytes_per_second, limit_of, with_margin
from vp_train.planning.compare import helps_of
from vp_train.planning.degrees import Degrees
from vp_train.planning.found import Limits
from vp_train.planning.kept import Kept
from vp_train.planning.memory import (
    HostUsage,
    check_host,
    host_bytes,
    most_host_bytes,
    rank_memory,
    rank_parameters,
)
from vp_train.planning.moves import offloading
from vp_train.planning.placement import nothing_offloaded_words, offloaded_layers, split_layers
from vp_train.planning.plan import plan_step
from vp_train.planning.report import make_report
from vp_train.planning.search import search
from vp_train.planning.short import short_step
from vp_train.planning.slow_link import SlowLink, link_of, with_link
from vp_train.planning.space import space_of
from vp_train.planning.weigh import Scales
from vp_train.settings import load_config
from vp_train.tensors.alignment import HOST_BLOCK_BYTES
from vp_train.units import human_bytes, large_bytes

GIB = 2.0**30
LLAMA = [
    *("model=llama3_8b", "cluster=h100_80g_node", "parallel.pp=8", "num_microbatches=12"),
    *("schedule=1f1b", "vocab=one_barrier"),
]


@pytest.fixture(autouse=True)
def quick(quick_search, monkeypatch):
    """Generate schedules with little effort, in plans and in searches."""
    monkeypatch.setattr(short, "WHOLE_EFFORT", 5_000)


@functools.cache
def planned(*overrides):
    config = load_config([*LLAMA, *overrides])
    return config, plan_step(config, 8)


def test_halves_of_layers_round_up():
    assert [offloaded_layers(count, 0.5) for count in range(6)] == [0, 1, 1, 2, 2, 3]
    assert [offloaded_layers(7, part) for part in (0, 0.1, 0.9, 1)] == [0, 1, 6, 7]


def test_a_part_is_the_number_that_was_typed():
    """0.29 * 50 is 14.499999999999998 in binary."""
    assert offloaded_layers(50, 0.29) == 15
    for count, hundredths in itertools.product(range(1, 130), range(101)):
        assert offloaded_layers(count, hundredths / 100) == (count * hundredths + 50) // 100
    optim = OptimConfig(schedule="wsd", decay_fraction=0.29, warmup_steps=0)
    falls = [step for step in range(1, 151) if learning_rate(optim, step, 150) < optim.lr]
    assert len(falls) == 44  # half a step to the even one


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
    config, step = planned("parallel.offload_activations=0.5")
    optim = config.optim
    needed = [round(host_bytes(step, optim, rank).total) for rank in range(8)]
    assert min(needed[:4]) > 0
    assert all(count % HOST_BLOCK_BYTES == 0 for count in needed)
    check_host(step, optim, range(8), sum(needed))
    check_host(step, optim, range(4), sum(needed[:4]))
    words = r"of activations in host memory, 8 B more than its .*; lower parallel\.offload_act"
    with pytest.raises(ConfigError, match=words):
        check_host(step, optim, range(4), sum(needed[:4]) - 8)
    _, without = planned()
    check_host(without, optim, range(8), 0)


def test_an_optimizer_in_host_memory_counts_there_by_replicas_and_nodes():
    """A parameter takes 18 bytes in bfloat16: 16 in fp32, and weights on their way back."""
    config = load_config([*LLAMA, "optim.name=zero1", "optim.offload=true"])
    for dp, pp in ((1, 8), (2, 4)):
        parallel = replace(config.parallel, dp=dp, pp=pp)
        step = plan_step(replace(config, parallel=parallel), 8)
        counts = [rank_parameters(step, rank) for rank in range(pp)]
        assert most_host_bytes(step, config.optim, 8).total == 18 * sum(counts)
        needed = 18 * max(sum(counts[:2]), sum(counts[2:4]))  # of two ranks on a node
        if pp == 4:
            assert most_host_bytes(step, config.optim, 2).total == needed / dp
    found = make_report(config)
    lines = plan_lines(config, found)
    assert any(line.startswith("host RAM  holds up to 134") for line in lines)
    known = replace(found, cluster=replace(config.cluster, host_memory_gib=100.0))
    assert not known.fits
    assert "of optimizer state in host memory" in known.binds
    assert "parallel.offload_activations" not in known.binds


def test_what_a_node_keeps_too_much_of_is_named_with_its_way_out():
    gib = 2.0**30
    moved, state = HostUsage(activations=3 * gib), HostUsage(optimizer=2 * gib)
    both = HostUsage(3 * gib, 2 * gib)
    begins = "the ranks of a node keep"
    lower, drop = "lower parallel.offload_activations", "set optim.offload=false"
    for held, words in (
        (moved, f"{begins} 3.00 GiB of activations in host memory, 2.00 GiB more {{}}; {lower}"),
        (state, f"{begins} 2.00 GiB of optimizer state in host memory, 1.00 GiB more {{}}; {drop}"),
        (
            both,
            f"{begins} 3.00 GiB of activations and 2.00 GiB of optimizer state in host memory, "
            f"4.00 GiB more {{}}; {lower}, {drop}",
        ),
    ):
        expected = words.format("than its 1.00 GiB") + ", or use more nodes"
        assert held.excess_words(gib) == expected


@pytest.mark.parametrize(("dp", "tp", "per_node"), [(1, 2, 4), (3, 1, 4), (1, 1, 8), (2, 2, 3)])
def test_ranks_fill_the_nodes_in_their_order_and_the_fullest_node_counts(dp, tp, per_node):
    words = [f"parallel.dp={dp}", f"parallel.tp={tp}", "parallel.pp=4", "run.device=cuda"]
    words += ["parallel.offload_activations=1.0", "optim.name=zero1", "optim.offload=true"]
    config = load_config([*LLAMA, *words, "num_microbatches=9"])
    step = plan_step(config, 4 * dp * tp)
    ranks = [host_bytes(step, config.optim, rank) for rank in range(4)]
    assert ranks[0].activations > ranks[3].activations
    places = [step.degrees.place(rank)[1] for rank in range(4 * dp * tp)]
    nodes = [places[first : first + per_node] for first in range(0, len(places), per_node)]
    sums = [
        (sum(ranks[p].activations for p in node), sum(ranks[p].optimizer for p in node))
        for node in nodes
    ]
    found = most_host_bytes(step, config.optim, per_node)
    assert (found.activations, found.optimizer) == max(sums, key=sum)
    needed = round(sum(sums[-1]))
    last = range(len(places) - len(nodes[-1]), len(places))
    check_host(step, config.optim, last, needed)
    with pytest.raises(ConfigError, match=f"1 B more than its {human_bytes(needed - 1)}"):
        check_host(step, config.optim, last, needed - 1)


@pytest.mark.slow
def test_a_search_does_not_offload_more_than_hosts_have():
    """The optimizer state of 30B takes 539 GiB; 5 % of host memory stay free."""
    words = ["model=gpt_30b", "cluster=h100_80g_node", "num_microbatches=16"]
    kept = {"optim.name": "zero1", "optim.offload": True, "parallel.pp": 8}
    kept |= {"schedule.name": "1f1b", "vocab.algorithm": "one_barrier"}
    kept |= {"micro_batch_size": 1, "parallel.recompute": "full"}
    for gib, fits in ((600, True), (550, False)):
        config = load_config([*words, f"cluster.host_memory_gib={gib}"])
        space = space_of(config, Kept(kept))
        result = search(config, Limits(top=1), lambda: True, str, space)
        assert bool(result.best) is fits
        assert any("host_memory_gib" in words for words in result.excluded) is not fits
        state = 18 * num_parameters(config.model) / GIB
        lines = "\n".join(shown_lines(config, Limits(), result))
        if fits:
            need = f"the first needs {result.best[0].report.host.total / GIB:.0f} GiB per node"
            left = "a plan may use 570 of the 600 GiB of cluster.host_memory_gib"
            assert f"host RAM: {need}; {left}" in lines
            assert "SPENT" not in lines
            (first,) = result.best
            more = replace(first, report=replace(first.report, host=HostUsage(0.0, 550 * GIB)))
            both = "\n".join(shown_lines(config, Limits(), replace(result, best=(first, more))))
            assert f"host RAM: {need}, others up to 550 GiB; {left}" in both
        else:
            assert result.num_estimated == result.num_open == 0, "arithmetic says so"
            words = (
                f"needs {state:.2f} GiB of host memory per node, {state - 522.5:.2f} GiB more than"
            )
            assert words in lines
            assert "would help: GPUs" not in lines
            assert re.search(r"^NOTHING FITS.  Closest: .* optim.offload=true$", lines, re.M)
            assert "would help: cluster.num_nodes=2, where dp=1 x pp=8 x tp=2 with" in lines
        ended = replace(result, num_open=1, ended="effort")
        assert shown_lines(config, Limits(), ended)[0] == (
            "THE EFFORT IS SPENT with 1 choice left that might be faster; raise --effort to 20000 "
            "(now 10000)"
        )


def needs_of(report):
    return report.ranks[report.worst].memory.total


def words_of(config, report):
    """Return what would save memory in words."""
    return [one.words for one in remedies(config, report)]


@pytest.mark.parametrize("more", [[], ["optim.name=zero1", "optim.offload=true"]])
def test_the_slowest_link_is_the_one_with_which_the_whole_plan_just_fits(more):
    config = load_config([*LLAMA, "parallel.offload_activations=1", *more])
    link = SlowLink(config, choice_of(config, Degrees(1, 8, 1)))
    now, found = link_of(config), set()
    whole = {part: make_report(with_link(config, now * part / 64)) for part in (64, 32, 1)}
    for share in (0.1, 0.5, 0.9):
        limit = share * needs_of(whole[64]) + (1 - share) * needs_of(whole[1])
        least = link.least(limit)
        fits, misses = (make_report(with_link(config, least - part * now / 64)) for part in (0, 1))
        assert needs_of(fits) <= limit < needs_of(misses)
        assert link.later(least) == pytest.approx(fits.step_seconds - whole[64].step_seconds)
        found.add(least)
    assert len(found) == 3
    assert link.later(now / 2) > 0 or not more
    node = 8 * now / 2
    shared = replace(config, cluster=replace(config.cluster, host_node_bytes_per_second=node))
    typed = replace(config, cost=replace(config.cost, host_bytes_per_second=now / 4))
    for one, part in ((shared, 2), (typed, 4)):
        assert link_of(one) == now / part
        slow = SlowLink(one, link.choice)
        assert slow.later(link_of(one)) == 0
        assert slow.later(now / 8) > 0 or not more
        assert link_of(with_link(one, now / 8)) == now / 8


def test_a_slow_link_is_judged_by_the_short_step_of_any_length():
    words = ["vocab.algorithm=two_barrier", "schedule.name=v_min", "parallel.pp=4"]
    words += ["num_microbatches=168"]
    config = load_config([*LLAMA, *words, "parallel.offload_activations=1"])
    link = SlowLink(config, choice_of(config, Degrees(2, 4, 1)))
    slow = link_of(config) / 8
    report = make_report(with_link(config, slow))
    assert link.needs(slow) == pytest.approx(needs_of(report), rel=0.05)


@pytest.mark.slow
def test_what_does_not_fit_is_never_told_to_stay_as_it_is():
    config = load_config([*LLAMA, "parallel.offload_activations=1"])
    for part in (0.99, 0.999):
        gib = part * needs_of(make_report(config)) / GIB
        small = replace(config, cluster=replace(config.cluster, memory_gib=gib))
        helps = helps_of(small, make_report(small))
        assert helps
        assert all(one.overrides for one in helps)


def test_the_line_on_the_link_leaves_the_margin_free_and_names_a_plan_that_fits_with_half():
    kept = {"parallel.pp": 8, "micro_batch_size": 1, "schedule.name": "1f1b", "optim.name": "adamw"}
    kept |= {"vocab.algorithm": "one_barrier", "parallel.offload_activations": 1.0}
    config = load_config([*LLAMA, "parallel.offload_activations=1"])
    half, now = (make_report(with_link(config, link_of(config) / part)) for part in (2, 1))
    assert needs_of(now) < 0.98 * needs_of(half)
    for gib, fits in ((needs_of(half) / 0.95, True), (needs_of(half) / 0.96, False)):
        cluster = replace(config.cluster, memory_gib=gib / GIB)
        config = replace(config, cluster=cluster)
        space = space_of(config, Kept(kept | {"parallel.recompute": "none"}))
        result = search(config, Limits(top=1), lambda: True, str, space)
        (first,) = result.best
        again = replace(first, choice=replace(first.choice, offload=0.0))  # counts as faster
        for best, words in (
            ((first,), "; with half of them, 25, nothing named here fits"),
            ((first, again), "; with half of them, 25, the fastest named here that fits is row 1"),
        ):
            lines = shown_lines(config, Limits(), replace(result, best=best))
            (line,) = (line for line in lines if line.startswith("link: "))
            assert line.startswith("link: the first fits down to about ")
            assert " of the 50 GB/s per GPU by short steps, and is as fast" in line
            assert line.endswith(words) is not fits
            assert (float(line.split()[7]) <= 25) is fits
    assert result.with_vocabulary is not None
    candidate = result.with_vocabulary.candidate
    still = replace(candidate, choice=replace(candidate.choice, offload=0.0))
    slower = replace(result.with_vocabulary, candidate=still, seconds=99.0, host=0.0)
    report = slower.report
    slower = replace(slower, report=None)
    for again in (report, None):
        other = replace(slower, report=again)
        lines = shown_lines(config, Limits(), replace(result, without_offloading=other))
        rows = [line for line in lines if line[:2] in ("1 ", "2 ")]
        bubble = f" {report.bubble:.1%} "
        assert [bubble in row for row in rows] == [True, again is not None], "a plan has it"
        assert ["~" in row for row in rows] == [" - " in row for row in rows] == [False, not again]
    assert [row[-2:] for row in rows] == [" *", " 0"], "rows that depend on hosts are marked"
    assert "~99.00 s" in rows[1]
    assert any(line.startswith("* depends on links to hosts and on their m") for line in lines)
    (line,) = (line for line in lines if "without offloaded activations: " in line)
    assert line.endswith(": row 2")


def test_json_has_the_slowest_link_and_what_fits_with_half_of_it():
    for with_half, fits, said in (
        (None, True, ""),
        ("", False, "; with half of them, 25, nothing named here fits"),
        ("row 2", False, "; with half of them, 25, the fastest named here that fits is row 2"),
    ):
        overrides = "a=1" if with_half else None
        found = LeastLink(50e9, 46e9, 1.02, 1.0, with_half, overrides)
        assert found.words == (
            "link: the first fits down to about 46 of the 50 GB/s per GPU by short steps, and is "
            f"2.0% slower then{said}"
        )
        assert found.record() == {
            "bytes_per_second": 50e9,
            "least_bytes_per_second": 46e9,
            "step_seconds_with_least": 1.02,
            "fits_with_half": fits,
            "fastest_with_half": overrides,
        }


def test_a_report_counts_bytes_of_device_and_host():
    config = load_config([*LLAMA, "parallel.offload_activations=0.5"])
    found = make_report(config)
    moved = found.offloading
    assert moved is not None
    assert moved.num_moved > 0
    assert moved.exposed == 0
    assert 0 < moved.busy[0] <= 1
    _, step = planned("parallel.offload_activations=0.5")
    of_ranks = [0.0] * 8
    for offload in step.schedule.offloads:
        of_ranks[offload.item.stage] += step.cost.offload_bytes[offload.item.stage]
    assert moved.moved == max(of_ranks) > min(of_ranks)
    assert moved.num_moved == len(step.schedule.offloads)
    assert moved.num_kept == 8 * 12 - moved.num_moved > 0
    links = [step.timeline.link_busy(rank) for rank in range(8)]
    assert moved.busy == max(links, key=sum)
    whole = make_report(load_config(LLAMA))
    assert whole.offloading is None
    totals = [max(rank.memory.total for rank in one.ranks) for one in (whole, found)]
    assert moved.saved == pytest.approx(totals[0] - totals[1])
    assert found.fits
    for gib, fits in ((found.host.total / 2**30 + 1, True), (found.host.total / 2**30 - 1, False)):
        cluster = replace(config.cluster, host_memory_gib=gib)
        known = replace(found, cluster=cluster)
        assert known.fits is fits
        assert ("host memory" in known.binds) is not fits


def test_a_part_of_less_than_half_a_layer_says_that_it_moves_nothing():
    config, step = planned("parallel.offload_activations=0.1")  # of stages of four layers
    words = "nothing: parallel.offload_activations is less than half a layer of every stage"
    assert not step.schedule.offloads
    assert f"offload   {words}" in plan_lines(config, make_report(config))
    assert nothing_offloaded_words(has_layers=any(step.cost.offload_bytes)) == words
    assert "live long enough" in nothing_offloaded_words(has_layers=True)


def test_a_search_rules_out_a_part_that_rounds_to_no_layer():
    """A tenth of the layers is nothing of four, and one of eight."""
    words = ["model=llama3_8b", "cluster=h100_80g_node", "num_microbatches=16"]
    config = load_config(words)
    kept = {"parallel.offload_activations": 0.1, "parallel.dp": 1, "schedule.name": "1f1b"}
    space = space_of(config, Kept(kept | {"vocab.algorithm": "one_barrier"}))
    assert space.excluded["parallel.offload_activations=0.1 is less than half a layer of a stage"]
    assert {choice.layout.num_stages for choice in space.choices} == {2, 4}
    moved = [layers for choice in space.choices for layers in moved_layers(choice, config)]
    assert min(moved) == 1
    for choice in space.choices:
        assert all(sum(moved_layers(one, config)) for one in offloading(choice, 32))


def moved_layers(choice, config):
    """Return how many layers each stage of a choice offloads."""
    stages = split_layers(config.model, choice.parallel(config.parallel), choice.layout)
    return [offloaded_layers(len(layers), choice.offload) for layers in stages]


def test_more_offloading_is_among_what_would_help():
    config = load_config([*LLAMA, "parallel.offload_activations=0.25", "cluster.memory_gib=25"])
    report = make_report(config)
    assert report.excess > 0
    (line,) = (
        line
        for line in remedy_lines(remedies_of(config, report))
        if "offload_activations=1" in line
    )
    whole = replace(config, parallel=replace(config.parallel, offload_activations=1.0))
    moved = make_report(whole)
    saved = human_bytes(needs_of(report) - needs_of(moved))
    words = f"{saved} less, step {duration(moved.step_seconds)}, "
    words += f"{large_bytes(moved.host.total)} host RAM of a node"
    assert line.startswith(f"would help: parallel.offload_activations=1: {words}")
    assert not any("offload_activations=1" in line for line in words_of(whole, report))


def test_what_waits_on_the_hosts_is_not_saved_on_the_gpus():
    """Recomputation saves the difference of two plans; it is enough if it leaves the margin."""
    typed = [*LLAMA, "parallel.offload_activations=1"]
    config, again = (
        load_config(typed),
        make_report(load_config([*typed, "parallel.recompute=full"])),
    )
    report, needs = make_report(config), needs_of(again)
    saved = needs_of(report) - needs
    assert 0 < saved < report.ranks[report.worst].memory.activations
    for part, is_enough in ((1 - 0.9 * MARGIN, False), (1 - 1.1 * MARGIN, True)):
        cluster = replace(config.cluster, memory_gib=needs / part / GIB)
        small, known = replace(config, cluster=cluster), replace(report, cluster=cluster)
        assert saved > known.excess > 0
        (line,) = (one for one in words_of(small, known) if "recompute=full:" in one)
        words = f"parallel.recompute=full: {human_bytes(saved)} less, step "
        words += f"{duration(again.step_seconds)}, {large_bytes(again.host.total)} host RAM of a "
        words += "node"
        lacks = ", which leaves less than 5% of the memory free"
        assert line == words + lacks * (not is_enough)


def test_the_optimizer_is_sent_to_hosts_that_have_the_margin_left_and_their_need_is_said():
    """The node with most activations is not the one with most of the optimizer."""
    typed = [*LLAMA, "parallel.pp=4", "cluster.gpus_per_node=2", "cluster.num_nodes=4"]
    typed += ["parallel.layers_per_stage=[6,6,10,10]", "cluster.memory_gib=25"]
    typed += ["parallel.offload_activations=1"]
    moved = make_report(load_config([*typed, "optim.name=zero1", "optim.offload=true"]))
    hosts = [rank.host for rank in moved.ranks]
    assert hosts[0].activations > hosts[3].activations
    assert hosts[0].optimizer < hosts[3].optimizer
    for part, fits in ((0.999, False), (1.001, True)):
        gib = part * moved.host.total / GIB / (1 - MARGIN)
        config = load_config([*typed, f"cluster.host_memory_gib={gib}"])
        found = [one for one in words_of(config, make_report(config)) if "offload=true" in one]
        words = f" less, step {duration(moved.step_seconds)}, {large_bytes(moved.host.total)} host "
        words += "RAM of a node, which is not enough"
        assert [words in one for one in found] == [True] * fits


def test_what_a_plan_has_is_not_tried_again(monkeypatch):
    typed = ["parallel.pp=4", "optim.name=zero1", "parallel.recompute=full"]
    config = load_config([*LLAMA, *typed, "parallel.offload_activations=1"])
    tried = []
    real = plan_remedies.outlook_of
    monkeypatch.setattr(
        plan_remedies, "outlook_of", lambda one, **of: tried.append(one) or real(one, **of)
    )
    found = words_of(config, make_report(config))
    changed = ["optim.offload=true", "parallel.recompute=selective", "vocab.balance=true"]
    assert [changes_of(config, one) for one in tried] == changed
    assert sum("optim.offload=true" in one for one in found) == 1
    assert not any("zero1" in one for one in found)


@pytest.mark.parametrize(
    ("typed", "advised"),
    [
        (
            ["parallel.offload_activations=1", "schedule.name=interleaved", "num_microbatches=8"],
            [
                "parallel.recompute=full",
                "schedule.name=1f1b",
                "parallel.offload_activations=0.5",
                "parallel.recompute=selective",
            ],
        ),
        (
            ["optim.name=zero1", "optim.offload=true", "cluster.memory_gib=45"],
            ["optim.offload=false"],
        ),
    ],
)
def test_where_hosts_lack_memory_what_is_advised_saves_theirs(typed, advised):
    """The advice saves as many bytes as said, and enough unless that is said."""
    typed = [*LLAMA, *typed]
    whole = make_report(load_config(typed)).host.total
    config = load_config([*typed, f"cluster.host_memory_gib={0.7 * whole / GIB}"])
    report = make_report(config)
    assert report.excess < 0 < report.host_excess
    missing = report.host_excess + MARGIN * 0.7 * whole
    helps = [
        line for line in remedy_lines(remedies_of(config, report)) if line.startswith("would help")
    ]
    assert helps.pop().endswith(" GiB of host memory per node (cluster.host_memory_gib)")
    settings = []
    for line in helps:
        assert " less in host memory per node" in line
        words = line.removeprefix("would help: ").partition(":")[0].partition(",")[0]
        changed = make_report(load_config([*typed, *words.split()]))
        saved = report.host.total - changed.host.total
        assert f": {human_bytes(saved)} less in host memory per node, step " in line
        assert f", step {duration(changed.step_seconds)}" in line
        assert ("not enough" in line) is (saved < report.host_excess)
        assert ("leaves less than" in line) is (report.host_excess <= saved < missing)
        lean = replace(changed, cluster=with_margin(changed.cluster))
        misses = f"{human_bytes(lean.excess)} more than the {lean.limit / GIB:.4g} GiB that a prop"
        assert (misses in line) is ("but then a GPU needs" in line) is (lean.excess > 0)
        settings.append(words)
    assert settings == advised
    assert ("but then" in helps[-1]) is ("cluster.memory_gib=45" in typed)


def test_a_wait_for_transfers_counts_once(tmp_path):
    _, step = planned("parallel.offload_activations=0.5")
    path = tmp_path / "schedule.txt"
    path.write_text(step.schedule.text())
    typed = ["parallel.offload_activations=0.5", f"schedule.file={path}"]
    whole = make_report(load_config([*LLAMA, *typed]))
    slow = make_report(load_config([*LLAMA, *typed, "cluster.host_bytes_per_second=1e9"]))
    assert slow.offloading.exposed > 0.1 * whole.passes
    assert slow.messages == pytest.approx(whole.messages)
    assert slow.passes - whole.passes == pytest.approx(slow.offloading.exposed)


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


@pytest.mark.parametrize("offloads_state", [False, True])
def test_what_seems_to_fit_counts_what_goes_to_the_fullest_host(offloads_state):
    """The first ranks keep most microbatches; nodes have two GPUs."""
    config, step = planned("parallel.offload_activations=0.5")
    optim = replace(config.optim, name="zero1", offload=offloads_state)
    choice = Choice(Degrees(1, 8, 1), 1, 12, "1f1b", "one_barrier", "none", offload=0.5)
    needed = most_host_bytes(step, optim, 2)
    assert (needed.optimizer > 0) is offloads_state
    for part, fits in ((1.1, True), (0.9, False)):
        cluster = replace(config.cluster, gpus_per_node=2, num_nodes=4)
        cluster = replace(cluster, host_memory_gib=part * needed.total / GIB)
        scales = Scales(replace(config, cluster=cluster), 75 * GIB, (optim,))
        assert scales.weigh(choice).seems_to_fit is fits
        assert scales.weigh(replace(choice, offload=0.0)).seems_to_fit, "without activations"


def test_offloading_that_hosts_cannot_hold_costs_no_plan_that_needs_none():
    """The effort is as little as a search has for a large cluster; such a plan was once lost."""
    words = ["model=llama3_70b", "cluster=h100_80g_node", "cluster.num_nodes=8"]
    words += ["parallel.tp=4", "parallel.sequence_parallel=true", "vocab=none"]
    config = load_config([*words, "num_microbatches=32", "cluster.host_memory_gib=200"])
    names = ("micro_batch_size", "parallel.tp", "parallel.sequence_parallel", "vocab")
    space = space_of(config, Kept.of(config, names))
    said = []
    (first,) = search(config, Limits(1, effort=100_000), lambda: True, said.append, space).best
    counts = [int(words.split()[0]) for words in said if "looked at" in words]
    assert counts == list(range(1, len(counts) + 1)), "also what offloads, in a queue of its own"
    assert counts
    plain = ["num_microbatches=8", "parallel.pp=4", "schedule=interleaved", "schedule.num_chunks=5"]
    plain += ["parallel.dp=4", "optim.name=zero1", "parallel.recompute=selective"]
    known = make_report(load_config([*words, *plain]))
    assert known.fits
    assert known.host.total == 0
    assert first.report.step_seconds <= known.step_seconds


def test_no_number_of_stages_is_faster_than_what_is_found_where_memory_is_tight():
    """No stage is smaller with 5 stages on a rank than with 4, but a rank keeps less."""
    words = ["model=qwen2_5_7b", "model.num_layers=46", "cluster=a100_80g_node"]
    words += ["cluster.memory_gib=24", "parallel.pp=4", "parallel.tp=2", "vocab=none"]
    words += ["parallel.placement=redistribute", "parallel.sequence_parallel=true"]
    words += ["parallel.recompute=none", "micro_batch_size=2", "schedule=interleaved"]
    config = load_config([*words, "num_microbatches=20"])
    space = space_of(config, Kept.of(config, [word.partition("=")[0] for word in words[4:]]))
    (best,) = search(config, Limits(1, margin=0.05), lambda: True, str, space).best
    limit = limit_of(config.cluster, 0.05)
    fitting = []
    for chunks in range(3, 9):
        choice = replace(best.choice, num_chunks=chunks, offload=1.0)
        report = make_report(choice.applied(config))
        if report.ranks[report.worst].memory.total <= limit:
            fitting.append(report.step_seconds)
    assert fitting
    assert best.seconds <= min(fitting) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("schedule", "num_chunks", "part"), [("interleaved", 4, 0.5), ("zb_v", None, 0.8)]
)
def test_where_the_link_carries_too_little_one_more_round_of_stages_recomputes(
    schedule, num_chunks, part
):
    """They are on the ranks that need too much."""
    words = ["model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=16"]
    config = load_config([*words, "cluster.host_bytes_per_second=10e9"])
    choice = Choice(
        *(Degrees(1, 8, 1), 1, 16, schedule, "one_barrier", "full"),
        num_chunks=num_chunks,
        offload=1.0,
    )
    optim, layout = config.optim, choice.layout
    roomy = Scales(config, math.inf, (optim,))

    def needs_of(candidate):
        step, *_ = short_step(candidate.draft, schedule)
        return step, [rank_memory(step, optim, rank).total for rank in range(8)]

    least = max(needs_of(roomy.draft(choice))[1])
    most = max(needs_of(roomy.draft(replace(choice, recompute="none")))[1])
    tight, rounds = Scales(config, least + part * (most - least), (optim,)), 0
    candidate = tight.draft(replace(choice, recompute_where_needed=True))
    while True:
        step, needs = needs_of(candidate)
        excess = {rank for rank in range(8) if needs[rank] > tight.limit}
        if not excess:
            break
        more = tight.with_more_recompute(candidate, step)
        kinds = candidate.choice.recompute_per_stage, more.choice.recompute_per_stage
        changed = {
            stage for stage in range(layout.num_stages) if kinds[0][stage] != kinds[1][stage]
        }
        assert {layout.rank_of(stage) for stage in changed} == excess
        assert {kinds[1][stage] for stage in changed} == {"full"}
        candidate, rounds = more, rounds + 1
    assert rounds == 1
    assert "none" in candidate.choice.recompute_per_stage


def test_stages_stop_recomputing_where_a_rank_has_as_much_to_spare():
    """The bytes that they save are exact without offloading, so the step still fits."""
    config = load_config(["model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=16"])
    choice = Choice(*(Degrees(1, 8, 1), 1, 16, "interleaved", "one_barrier", "full"), num_chunks=4)
    kinds = ("full",) * 16 + ("none",) * 16
    optim, mixed = config.optim, replace(choice, recompute_per_stage=kinds)
    roomy = Scales(config, math.inf, (optim,))
    candidate = roomy.draft(mixed)
    step, *_ = short_step(candidate.draft, "interleaved")
    needs = [rank_memory(step, optim, rank).total for rank in range(8)]
    assert roomy.with_fewer_recompute(candidate, step, optim) is None, "none would recompute"
    tight = Scales(config, 1.3 * max(needs), (optim,))
    fewer = tight.with_fewer_recompute(candidate, step, optim)
    stopped = [s for s in range(32) if fewer.choice.recompute_per_stage[s] != kinds[s]]
    assert stopped
    assert set(stopped) <= set(range(16))
    step, *_ = short_step(fewer.draft, "interleaved")
    assert max(rank_memory(step, optim, rank).total for rank in range(8)) <= tight.limit
    assert fewer.passes < candidate.passes


def test_where_nothing_recomputes_and_a_little_is_missing_the_first_stages_recompute_selectively():
    config = load_config(["model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=16"])
    choice = Choice(Degrees(1, 8, 1), 1, 16, "1f1b", "one_barrier", "none")
    candidate = Scales(config, math.inf, (config.optim,)).draft(choice)
    step, *_ = short_step(candidate.draft, "1f1b")
    needs = [rank_memory(step, config.optim, rank).total for rank in range(8)]
    scarce, far_too_little = (
        Scales(config, part * max(needs), (config.optim,)) for part in (0.99, 0.85)
    )
    more = scarce.with_more_recompute(candidate, step)
    excess = {rank for rank in range(8) if needs[rank] > scarce.limit}
    kinds = more.choice.recompute_per_stage
    assert {rank for rank in range(8) if kinds[rank] == "selective"} == excess
    assert {kinds[rank] for rank in range(8) if rank not in excess} == {"none"}
    assert far_too_little.with_more_recompute(candidate, step) is None


def test_no_more_stages_recompute_where_all_or_none_do_or_a_rank_has_none_left():
    config = load_config(["model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=4"])
    choice = Choice(Degrees(1, 8, 1), 1, 4, "1f1b", "one_barrier", "full", offload=1.0)
    roomy, tight = (Scales(config, limit, (config.optim,)) for limit in (math.inf, 1.0))
    mixed = replace(choice, recompute_per_stage=("full", *("none",) * 7))
    for one in (choice, replace(choice, recompute="none"), replace(mixed, offload=0.0), mixed):
        candidate = roomy.draft(one)
        step, *_ = short_step(candidate.draft, "1f1b")
        assert tight.with_more_recompute(candidate, step) is None


def test_hosts_without_room_are_not_helped_by_more_recomputation_on_the_gpus():
    """Hosts hold less of the stages that recompute, and that is counted stage by stage."""
    config = load_config(["model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=4"])
    choice = Choice(Degrees(1, 8, 1), 1, 4, "1f1b", "one_barrier", "full", offload=1.0)
    mixed = replace(choice, recompute_per_stage=("full", *("none",) * 7))
    roomy = Scales(config, math.inf, (config.optim,))
    candidate = roomy.draft(mixed)
    step, *_ = short_step(candidate.draft, "1f1b")
    assert roomy.with_more_recompute(candidate, step) is None
    moved = most_host_bytes(step, config.optim, 8).activations / GIB
    cluster = replace(config.cluster, host_memory_gib=moved / 2)
    tight = Scales(replace(config, cluster=cluster), math.inf, (config.optim,))
    assert tight.weigh(choice).seems_to_fit
    assert not tight.weigh(mixed).seems_to_fit


def test_what_is_saved_is_found_whole_where_the_backward_is_split(monkeypatch):
    """Short steps keep more or less by some percent; another optimizer saves its state."""
    typed = ["model=gpt_4b", "cluster=a100_80g_node", "parallel.pp=4", "parallel.dp=2"]
    typed += ["num_microbatches=50", "schedule=zb_v", "parallel.offload_activations=1"]
    config = load_config([*typed, "cluster.memory_gib=2"])
    report = make_report(config)
    monkeypatch.setattr(plan_remedies, "MOST_AT_ONCE", 0)
    found = words_of(config, report)
    for words in ("parallel.recompute=full", "optim.name=zero1"):
        changed = make_report(load_config([*typed, words]))
        saved = human_bytes(needs_of(report) - needs_of(changed))
        figures = f"{saved} less, step {duration(changed.step_seconds)}, "
        figures += f"{large_bytes(changed.host.total)} host RAM of a node"
        assert f"{words}: {figures}, which is not enough alone" in found


def test_balanced_rows_are_proposed_where_they_alone_let_a_plan_fit():
    """Ranks have five or six of the 33 layers, so their shards may differ too."""
    typed = ["model=llama3_8b", "cluster=a100_80g_node", "cluster.gpus_per_node=6"]
    typed += ["model.num_layers=33", "model.vocab_size=256000", "parallel.placement=balanced"]
    typed += ["parallel.pp=6", "num_microbatches=12", "schedule=v_half", "vocab=one_barrier"]
    config = load_config(typed)
    report, balanced = (
        make_report(load_config([*typed, *more])) for more in ((), ["vocab.balance=true"])
    )
    limit = (needs_of(report) + needs_of(balanced)) / 2 / GIB / (1 - Limits().margin)
    small = replace(config, cluster=replace(config.cluster, memory_gib=limit))
    saved = human_bytes(needs_of(report) - needs_of(balanced))
    figures = f"{saved} less, step {duration(balanced.step_seconds)}"
    assert f"vocab.balance=true: {figures}" in words_of(small, make_report(small))
    assert not any(
        "balance" in words
        for words in words_of(
            replace(small, vocab=replace(small.vocab, balance=True)), make_report(small)
        )
    )
