"""The search finds what planning everything finds, and says why the rest is not possible."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from vp_train.config import ConfigError
from vp_train.config.parallel import RECOMPUTE
from vp_train.planning import search as search_module
from vp_train.planning import short, weigh
from vp_train.planning.batch import with_batch_of
from vp_train.planning.choice import as_typed, optimizers_of
from vp_train.planning.degrees import Degrees
from vp_train.planning.found import MARGIN_OF_OFFLOADING, SAME, Limits, counted
from vp_train.planning.kept import Kept
from vp_train.planning.memory import passes_peak, rank_state
from vp_train.planning.no_choice import no_choice_words
from vp_train.planning.plan import draft_step
from vp_train.planning.report import make_report, report_of
from vp_train.planning.search import fits_on, search, simulated, without_vocabulary
from vp_train.planning.short import short_step
from vp_train.planning.space import Space, replicas_of, space_of
from vp_train.planning.weigh import Scales, TooLargeError
from vp_train.settings import load_config

SMALL = ["model=nano", "cluster.gpus_per_node=2", "num_microbatches=2", "model.num_layers=4"]
GIB = 2**30
NO_END = Limits(top=1, margin=0.0)


def config_of(*overrides):
    return load_config([*SMALL, *overrides])


def searched(config, top=1, in_time=lambda: True, **limits):
    return search(config, replace(NO_END, top=top, **limits), in_time, lambda words: None)


@pytest.fixture(scope="module", autouse=True)
def quick(little_effort):
    """Generate schedules with little effort, in the search and in what it is compared with."""
    with pytest.MonkeyPatch.context() as patched:
        little_effort(patched)
        patched.setattr(short, "WHOLE_EFFORT", 5_000)
        yield


@pytest.fixture(scope="module")
def everything():
    """Return every choice of a small space, planned: (choice, report)."""
    config = config_of()
    return [
        (choice, make_report(choice.applied(config)))
        for choice in space_of(config).choices
        if not choice.recompute_where_needed
    ]


def total(report):
    return report.ranks[report.worst].memory.total


def makes_spare(plan, choice, report):
    """Return whether a plan is another of the same split, as fast as it and no larger."""
    same = plan.choice.degrees, plan.choice.micro_batch_size, plan.choice.splits_vocabulary
    return (
        same == (choice.degrees, choice.micro_batch_size, choice.splits_vocabulary)
        and plan.report.step_seconds <= report.step_seconds * 1.005
        and total(plan.report) <= total(report) * 1.02
        and plan.report.host.total <= report.host.total * 1.02
    )


def limit_for(everything, part):
    sizes = sorted(total(report) for _, report in everything)
    return sizes[int(part * (len(sizes) - 1))] / GIB * (1 + 1e-9)


@pytest.mark.parametrize("part", [1.0, 0.4, 0.1], ids=lambda part: f"{part:.0%} fit")
def test_nothing_that_fits_is_faster_than_what_is_found(everything, part):
    limit = limit_for(everything, part)
    config = config_of(f"cluster.memory_gib={limit!r}")
    result = searched(config, 4)
    fitting = [one for one in everything if total(one[1]) <= limit * GIB]
    assert len(everything) > 100
    assert len(result.best) == 4
    last = max(plan.report.step_seconds for plan in result.best)
    for choice, report in fitting:
        if report.step_seconds * 1.001 < last:
            assert any(makes_spare(plan, choice, report) for plan in result.best), choice
    assert result.num_open == 0
    assert result.num_planned < len(everything) / 4
    for plan in result.best:
        again = make_report(plan.choice.applied(config))
        assert again.fits
        assert again.step_seconds == pytest.approx(plan.report.step_seconds)
        assert again.exposed == pytest.approx(plan.report.exposed)


def world_of(seed):
    """Return a random small model on few GPUs with a split that is kept, and its plans.

    A plan has its seconds as they are compared, its bytes and its choice.  Then comes what a GPU
    may have so that only some of them fit.
    """
    draw = Random(seed)
    pp, dp, tp = draw.choice([(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (3, 1, 1)])
    split = ("parallel.pp", pp), ("parallel.dp", dp), ("parallel.tp", tp)
    config = load_config(
        [
            *("model=nano", "cluster=a100_80g_node", f"cluster.gpus_per_node={pp * dp * tp}"),
            f"model.num_layers={draw.randint(pp, 5)}",
            f"model.vocab_size={draw.choice([512, 8_192, 65_536])}",
            f"num_microbatches={draw.choice([2, 3, 4, 6, 8, 12])}",
            *(f"{name}={value}" for name, value in split),
        ]
    )
    kept = Kept.of(config, [*(name for name, _ in split), "micro_batch_size"])
    scales, plans = Scales(config, float("inf")), []
    for choice in space_of(config, kept).choices:
        if choice.recompute_where_needed:
            continue
        step = scales.draft(choice).draft.with_named(choice.schedule)
        for optim in optimizers_of(config, dp):
            report = report_of(step, config.cluster, optim, cost=scales.cost_of(choice))
            plans.append((counted(choice, report.step_seconds), total(report), choice))
    sizes = sorted(size for _, size, _ in plans)
    limit = sizes[int(draw.choice([0.05, 0.1, 0.3, 0.6, 1]) * (len(sizes) - 1))] / GIB
    return replace(config, cluster=replace(config.cluster, memory_gib=limit)), kept, plans


@pytest.mark.parametrize("seed", [1, 3, 5, 6, 8])
def test_in_a_random_world_of_one_split_no_plan_of_all_is_faster_than_the_first(seed):
    """Where it fits with the margin of a search, and by more than an estimate may be too slow."""
    config, kept, plans = world_of(seed)
    result = search(config, NO_END, lambda: True, lambda words: None, space_of(config, kept))
    limit = config.cluster.memory_gib * GIB * (1 - Limits().margin)
    fitting = [seconds for seconds, size, _ in plans if size <= limit]
    assert result.ended == ""
    if fitting:
        assert result.best[0].counted <= min(fitting) * 1.01
        assert total(result.best[0].report) <= config.cluster.memory_gib * GIB


def test_refused_while_weighing_is_what_does_not_fit(everything):
    limit = limit_for(everything, 0.3)
    scales = Scales(config_of(), limit * GIB)
    refused = kept = 0
    for choice, report in everything[::9]:
        try:
            weight = scales.weigh(choice)
        except TooLargeError:
            refused += 1
            smallest = min(
                total(make_report(replace(choice, optimizer=optim).applied(config_of())))
                for optim in optimizers_of(config_of(), choice.degrees.dp)
            )
            assert smallest > limit * GIB, choice
        else:
            kept += 1
            assert weight.seconds <= report.step_seconds * (1 + 1e-9) or choice.degrees.dp > 1, (
                choice
            )
    assert refused > 3
    assert kept > 3


def test_a_plan_is_shown_where_the_effort_ends_although_estimates_look_alike():
    """Among plans of 10 GiB many differ by offloading alone, and the effort is that of one plan."""
    words = ["model=gpt_4b", "model.num_layers=16", "cluster=h100_80g_node", "num_microbatches=32"]
    config = load_config([*words, "cluster.gpus_per_node=4", "cluster.memory_gib=10"])
    found = search(config, Limits(top=1, effort=60_000), lambda: True, lambda words: None)
    assert found.num_planned
    assert len(found.best) == 1


def test_every_choice_uses_all_gpus_for_the_whole_batch():
    config = load_config(
        [
            *("model=nano", "cluster.gpus_per_node=4", "cluster.num_nodes=2"),
            *("num_microbatches=8", "micro_batch_size=2", "parallel.dp=2"),
        ]
    )
    found = space_of(config).choices
    assert len(set(found)) == len(found)
    for choice in found:
        assert choice.degrees.num_ranks == 8
        assert choice.degrees.dp * choice.num_microbatches * choice.micro_batch_size == 32
        assert choice.layout.num_stages <= config.model.num_layers + 2
    degrees = {choice.degrees for choice in found}
    assert {(split.dp, split.pp, split.tp) for split in degrees} == {
        (dp, pp, tp)
        for dp, pp, tp in itertools.product((1, 2, 4, 8), repeat=3)
        if dp * pp * tp == 8 and tp <= 2 and pp <= 4
    }


def test_what_experts_set_is_searched():
    config = load_config(
        ["model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=64", "parallel.tp=2"]
    )
    found = space_of(config).choices
    assert {choice.vocab for choice in found if choice.degrees.pp == 1} == {"none"}
    with_tp = {choice.sequence_parallel for choice in found if choice.degrees.tp > 1}
    without = {choice.sequence_parallel for choice in found if choice.degrees.tp == 1}
    assert (with_tp, without) == ({True, False}, {False})
    chunks = {choice.num_chunks for choice in found if choice.schedule == "interleaved"}
    assert {2, 4, 8} <= chunks
    placements = {(choice.splits_vocabulary, choice.placement) for choice in found}
    assert (False, "redistribute") in placements
    assert (True, "redistribute") not in placements
    names = [(optim.name, optim.offload) for optim in optimizers_of(config, 2)]
    assert names == [("zero1", False), ("adamw", False), ("zero1", True)]
    assert any(choice.recompute_where_needed for choice in found)


KEPT = [
    ("parallel.tp", "parallel.tp=2", lambda c: c.degrees.tp == 2),
    ("parallel.pp", "parallel.pp=2", lambda c: c.degrees.pp == 2),
    ("parallel.dp", "parallel.dp=2", lambda c: c.degrees.dp == 2),
    ("micro_batch_size", "micro_batch_size=3", lambda c: c.micro_batch_size == 3),
    ("schedule", "schedule=gpipe", lambda c: c.schedule == "gpipe"),
    ("vocab", "vocab=naive", lambda c: c.vocab == "naive"),
    ("parallel.recompute", "parallel.recompute=full", lambda c: c.recompute == "full"),
    ("parallel.placement", "parallel=redistribute", lambda c: c.placement == "redistribute"),
    (
        "parallel.sequence_parallel",
        "parallel.sequence_parallel=true",
        lambda c: c.sequence_parallel or c.degrees.tp == 1,
    ),
    (
        "schedule.num_chunks",
        "schedule.num_chunks=5",
        lambda c: c.num_chunks == 5 or c.schedule != "interleaved",
    ),
]


@pytest.mark.parametrize(("name", "word", "holds"), KEPT, ids=[name for name, *_ in KEPT])
def test_what_is_kept_is_not_searched_and_the_rest_is(name, word, holds):
    words = [word] if word.startswith(("parallel.dp", "micro")) else [word, "micro_batch_size=3"]
    config = load_config(["model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=32", *words])
    kept = Kept.of(config, [name])
    space, free = space_of(config, kept), space_of(config)
    assert space.choices
    assert all(map(holds, space.choices))
    assert {choice for choice in free.choices if holds(choice)} <= set(space.choices) | {
        choice for choice in free.choices if choice.recompute_where_needed
    }
    (words,) = [words for words in space.excluded if words.startswith("--keep")]
    assert words == f"--keep {kept.words}"
    ruled_out = set(free.choices) - set(space.choices)
    assert space.excluded[words] >= len(ruled_out) > 0
    others = Counter({w: n for w, n in space.excluded.items() if w != words})
    assert others.keys() == free.excluded.keys(), "what cannot be in any case counts as before"


def test_a_kept_optimizer_is_the_only_one_that_is_tried():
    for word, expected in (
        ("optim.name=adamw", [("adamw", False)]),
        ("optim.name=zero1", [("zero1", False), ("zero1", True)]),
    ):
        config = load_config(["model=gpt_4b", "cluster=a100_80g_node", word])
        space = space_of(config, Kept.of(config, ["optim.name"]))
        assert [(optim.name, optim.offload) for optim in space.optimizers] == expected
    both = space_of(config, Kept.of(config, ["optim"])).optimizers
    assert [(optim.name, optim.offload) for optim in both] == [("zero1", False)]


def test_a_search_with_kept_settings_is_one_of_fewer_choices():
    config = config_of("schedule=gpipe", "parallel.pp=2", "model.vocab_size=65536")
    kept = Kept.of(config, ["schedule", "parallel.pp"])
    result = search(config, NO_END, lambda: True, lambda words: None, space_of(config, kept))
    assert result.best[0].choice.schedule == "gpipe"
    assert result.kept == kept
    assert searched(config).best[0].report.step_seconds <= result.best[0].report.step_seconds
    for values, words in (
        ({"parallel.tp": 3}, r"--keep parallel.tp: no split of 2 GPUs .* has parallel.tp=3; keep"),
        ({"micro_batch_size": 7}, r"--keep micro_batch_size leaves no choice; ruled out most: "),
    ):
        nothing = replace(kept, values=values)
        with pytest.raises(ConfigError, match=words):
            search(config, NO_END, lambda: True, lambda words: None, space_of(config, nothing))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "model", "link", "batch", "known"),
    [
        # It recomputes everything, and offloads what stages start from.
        ((1, 2, 1), (11, 2048, 131_072, 2048), 50, (24, 2), "interleaved none full 1 6 balanced"),
        # Without offloading it fits with an optimizer on hosts, which takes five times as long.
        ((1, 4, 1), (8, 4096, 32_768, 2048), 25, (4, 1), "v_min one_barrier none 1 null even"),
        # Its draft, not its weight, says that it fits with such an optimizer alone.
        ((1, 2, 1), (5, 2048, 32_768, 2048), 25, (16, 1), "interleaved none full 1 3 balanced"),
        # One rank has the whole vocabulary, so its shard is never held during a backward.
        ((1, 1, 2), (8, 2048, 131_072, 8192), 25, (6, 1), "1f1b none full 0 null even"),
    ],
)
def test_a_search_finds_what_just_fits(ranks, model, link, batch, known):
    (dp, pp, tp), (layers, hidden, vocab, length) = ranks, model
    words = [
        *(f"parallel.dp={dp}", f"parallel.pp={pp}", f"parallel.tp={tp}"),
        *("model=llama3_8b", f"model.num_layers={layers}", f"model.hidden_size={hidden}"),
        *(f"model.vocab_size={vocab}", f"model.seq_length={length}"),
        *(f"num_microbatches={batch[0]}", f"micro_batch_size={batch[1]}"),
        *("cluster=h100_80g_node", "cluster.num_nodes=1", f"cluster.gpus_per_node={dp * pp * tp}"),
        f"cluster.host_bytes_per_second={link}e9",
    ]
    schedule, algorithm, recompute, offload, chunks, placement = known.split()
    of_known = [
        *(f"schedule={schedule}", f"vocab={algorithm}", f"parallel.recompute={recompute}"),
        *(f"parallel.offload_activations={offload}", f"schedule.num_chunks={chunks}"),
        *(f"parallel.placement={placement}", f"parallel.sequence_parallel={tp > 1}".lower()),
    ]
    report = make_report(load_config([*words, *of_known, "cluster.memory_gib=1000"]))
    limit = report.ranks[report.worst].memory.total / GIB * (1 + 1e-3)
    config = load_config([*words, f"cluster.memory_gib={limit!r}"])
    kept = Kept.of(config, ["parallel.dp", "parallel.pp", "parallel.tp", "micro_batch_size"])
    found = search(config, NO_END, lambda: True, lambda words: None, space_of(config, kept))
    margin = 1.0 if offload == "0" else 1 + MARGIN_OF_OFFLOADING
    assert found.best[0].counted <= report.step_seconds * margin * (1 + SAME)


def test_recomputation_where_needed_fits_and_is_faster_than_everywhere():
    config = load_config(["model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=16"])
    choice = next(
        choice
        for choice in space_of(config).choices
        if choice.degrees == Degrees(1, 8, 1)
        and (choice.schedule, choice.vocab, choice.recompute) == ("v_half", "one_barrier", "full")
        and choice.recompute_where_needed
    )
    roomy, everywhere = Scales(config, 75 * GIB), replace(choice, recompute_where_needed=False)
    least, most = (
        roomy.needs(step.draft.with_named("v_half"), [config.optim])[0][0]
        for step in (
            roomy.draft(everywhere),
            roomy.draft(replace(everywhere, recompute="none")),
        )
    )
    with pytest.raises(ConfigError, match="all stages recompute none"):
        roomy.draft(choice)
    tight = Scales(config, 0.4 * least + 0.6 * most)
    mixed = tight.draft(choice)
    kinds = mixed.choice.recompute_per_stage
    assert 0 < kinds.count("full") < len(kinds)
    assert mixed.passes < roomy.draft(everywhere).passes


def test_stages_recompute_for_the_optimizer_that_is_chosen():
    """An optimizer in host memory alone fits into so little, and needs some recomputation."""
    config = load_config(["model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=16"])
    choice = next(
        choice
        for choice in space_of(config).choices
        if choice.degrees == Degrees(1, 8, 1)
        and (choice.schedule, choice.vocab, choice.recompute) == ("1f1b", "one_barrier", "full")
        and choice.recompute_where_needed
    )
    here, there = optimizers_of(config, 1)
    assert there.offload
    assert not here.offload
    step = draft_step(choice.applied(config), 8).with_named("1f1b")
    state = max(rank_state(step, here, rank).state for rank in range(8))
    tight = Scales(config, 0.97 * state)
    candidate = tight.draft(choice)
    kinds = candidate.choice.recompute_per_stage
    assert 0 < kinds.count("full") < len(kinds)
    assert candidate.optimizers == (there,)
    assert candidate.seems_to_fit


@pytest.mark.parametrize(
    ("schedule", "vocab", "count"),
    [
        ("1f1b", "none", 48),
        ("interleaved", "one_barrier", 50),
        ("interleaved", "two_barrier", 50),
        ("zb_v", "one_barrier", 48),
        ("v_half", "one_barrier", 48),
        ("v_min", "two_barrier", 48),
    ],
)
def test_short_steps_give_the_time_and_the_memory_of_a_long_one(schedule, vocab, count):
    """They are made as the long one is, and leave as many microbatches after its full turns."""
    config = load_config(
        [
            *("model=gpt_4b", "cluster=a100_80g_node", f"num_microbatches={count}"),
            *("parallel.pp=4", "parallel.dp=2"),
            *(f"schedule={schedule}", f"vocab={vocab}"),
        ]
    )
    drafted = draft_step(config, 8)
    step, seconds, _ = short_step(drafted, schedule)
    whole = drafted.with_named(schedule)
    close = 0.015 if drafted.problem.split_backward else 0.001
    assert seconds == pytest.approx(whole.timeline.makespan, rel=close)
    scales = Scales(config, 75 * GIB)
    needs, needed = (scales.needs(one, [config.optim])[0][0] for one in (step, whole))
    assert needs == pytest.approx(needed, rel=0.05)


@pytest.mark.parametrize(("schedule", "vocab"), [("interleaved", "none"), ("v_min", "two_barrier")])
def test_short_steps_on_cpus_count_what_all_microbatches_leave_unsent(schedule, vocab):
    """It stays allocated until the end of the step, and is most of what a long step keeps."""
    words = ["model=nano", "model.num_layers=8", "cluster=laptop", "num_microbatches=200"]
    config = load_config([*words, "parallel.pp=4", f"schedule={schedule}", f"vocab={vocab}"])
    drafted = draft_step(config, 4)
    (short, _, _), whole = short_step(drafted, schedule), drafted.with_named(schedule)
    assert len(short.schedule.ranks[0]) < len(whole.schedule.ranks[0]) / 3
    for rank in range(4):
        found = [passes_peak(step, rank)[2] for step in (short, whole)]
        assert found[0] == pytest.approx(found[1], rel=0.01)


def test_short_steps_are_close_to_long_ones_with_any_layers():
    """Also where ranks wait for each other in the steady state, as in the second and third case."""
    close = {"zb_v": 0.003, "v_half": 0.006, "v_min": 0.01, "zb_h1": 0.001, "interleaved": 0.005}
    cases = [
        ("1f1b", "one_barrier", 88, (3, 5, 2, 4)),
        ("interleaved", "none", 99, (4, 5, 2, 3, 5, 3)),
        ("v_min", "two_barrier", 261, (2, 2, 3, 1, 3, 2)),
    ]
    for seed in range(4):
        draw = Random(seed)
        name, vocab = draw.choice(list(close)), draw.choice(["none", "one_barrier", "two_barrier"])
        num_stages = draw.randint(2, 4) * (1 if name == "zb_h1" else 2)
        layers = tuple(draw.randint(2, 5) for _ in range(num_stages))
        cases.append((name, vocab, draw.randint(40, 100), layers))
    for name, vocab, count, layers in cases:
        pp = len(layers) // (1 if name in ("1f1b", "zb_h1") else 2)
        drafted = draft_step(
            load_config(
                [
                    *("model=gpt_4b", "cluster=a100_80g_node", f"num_microbatches={count}"),
                    *(f"parallel.pp={pp}", f"schedule={name}", f"vocab={vocab}"),
                    f"model.num_layers={sum(layers)}",
                    f"parallel.layers_per_stage={list(layers)}".replace(" ", ""),
                ]
            ),
            pp,
        )
        whole = drafted.with_named(name).timeline.makespan
        found = short_step(drafted, name)[1]
        assert found == pytest.approx(whole, rel=close.get(name, 0.002)), (name, vocab, layers)


@pytest.mark.parametrize("count", [24, 37, 50])
@pytest.mark.parametrize("vocab", ["none", "one_barrier"])
def test_one_rank_needs_in_a_short_step_what_it_needs_in_a_long_one(vocab, count):
    """All its orders are equally fast, and the rounding of sums does not choose among them."""
    words = ["model=nano", "cluster=laptop", "cluster.gpus_per_node=1", f"num_microbatches={count}"]
    for recompute in RECOMPUTE:
        config = load_config([*words, f"vocab={vocab}", f"parallel.recompute={recompute}"])
        drafted = draft_step(config, 1)
        scales = Scales(config, float("inf"))
        found = [
            scales.needs(step, [config.optim])
            for step in (short_step(drafted, "1f1b")[0], drafted.with_named("1f1b"))
        ]
        assert found[0] == found[1]


def test_no_search_is_slower_than_what_was_typed():
    """It is estimated before anything else, so that no effort is too small for it."""
    words = ["num_microbatches=8", "parallel.pp=2", "schedule=zb_v", "vocab=two_barrier"]
    result = searched(config_of(*words), effort=1)
    assert result.ended == "effort"
    ((choice, report),) = [(found.choice, found.report) for found in result.best]
    typed = make_report(replace(config_of(*words), optim=choice.optimizer))
    assert report.step_seconds <= typed.step_seconds
    assert as_typed(config_of(*words)) in space_of(config_of(*words)).choices
    for other in (
        "schedule.file=orders.txt",
        "parallel.layers_per_stage=[1,1,1,1]",
        "vocab.algorithm=auto",
    ):
        assert as_typed(config_of(*words, other)) not in space_of(config_of(*words)).choices


def test_a_plan_that_needs_more_than_its_estimate_takes_a_leaner_optimizer():
    """GPipe keeps all microbatches, and a short step has few of them."""
    shape = ["model.num_layers=2", "model.vocab_size=512", "cluster=laptop", "num_microbatches=40"]
    words = ["model=nano", "cluster.gpus_per_node=8", *shape, "parallel.dp=2", "parallel.tp=2"]
    config = load_config([*words, "parallel.pp=2", "schedule=gpipe"])
    step = draft_step(config, 8).with_named("gpipe")
    short_one, _, _ = short_step(draft_step(config, 8), "gpipe")
    scales = Scales(config, float("inf"))
    adamw, zero1 = (replace(config.optim, name=name) for name in ("adamw", "zero1"))
    (seems, _), (needs, _), (least, _) = (
        scales.needs(one, [optim])[0]
        for one, optim in ((short_one, adamw), (step, adamw), (step, zero1))
    )
    limit = (max(seems, least) + needs) / 2
    assert max(seems, least) < limit < needs
    small = replace(config, cluster=replace(config.cluster, memory_gib=limit / GIB))
    found = search(
        small,
        NO_END,
        lambda: True,
        lambda words: None,
        Space((as_typed(small),), Counter(), (adamw, zero1)),
    )
    assert [plan.choice.optimizer for plan in found.best] == [zero1]
    assert found.without_vocabulary is None
    assert found.with_vocabulary.optim == zero1


def test_without_vocabulary_parallelism_the_own_schedule_is_looked_at_whatever_the_effort(
    monkeypatch,
):
    monkeypatch.setattr(search_module, "_EFFORT_OF_ONE_LINE", 1)
    for own in (["schedule=zb_v"], ["schedule=interleaved", "schedule.num_chunks=2"]):
        config = config_of(*own, "parallel.pp=2", "parallel.placement=balanced")
        found = without_vocabulary(config, Degrees(1, 2, 1))
        assert found.num_estimated == 2, "with layers redistributed and without"
        assert found.without_vocabulary.choice.schedule == config.schedule.name


def test_nothing_fits_and_what_is_closest():
    result = searched(config_of("cluster.memory_gib=0.001"))
    assert not result.best
    assert result.num_planned == result.num_open == 0
    assert result.leanest.needs > 0.001 * GIB
    assert "needs at least" in result.leanest.reason
    optim = result.leanest.choice.optimizer
    alone = Scales(config_of(), float("inf"), (optim,))
    assert alone.leanest(result.leanest.choice) == result.leanest.needs, "it names its optimizer"
    needs = [refusal.needs for refusal in result.refused if refusal.needs is not None]
    assert needs
    words, count = result.excluded.most_common(1)[0]
    assert words.startswith("memory, for ")
    assert 0 < count <= result.num_choices
    assert all(result.excluded.values()), "what rules out nothing is not named"
    assert fits_on(config_of("cluster.memory_gib=0.001"), 0.0) is None
    assert fits_on(config_of("cluster.memory_gib=1"), 0.0) is not None


def test_its_effort_not_the_clock_ends_a_search_and_the_answer_is_the_same():
    limits = {"effort": 20_000}
    first, second = (searched(config_of(), 3, **limits) for _ in range(2))
    assert [plan.choice for plan in first.best] == [plan.choice for plan in second.best]
    assert (first.num_estimated, first.num_open) == (second.num_estimated, second.num_open)
    more = searched(config_of(), 3)
    assert first.num_estimated < more.num_estimated
    assert more.best[0].report.step_seconds <= first.best[0].report.step_seconds


def test_a_wrong_base_order_ends_a_search_before_anything_is_weighed(monkeypatch):
    def wrong(name, problem):
        raise ConfigError(f"{name} is wrong")

    monkeypatch.setattr(weigh, "named_base_order", wrong)
    monkeypatch.setattr(Scales, "weigh", None)
    with pytest.raises(ConfigError, match="is wrong"):
        searched(config_of())


def test_the_best_without_vocabulary_parallelism_is_known_whatever_wins():
    result = searched(config_of("model.vocab_size=65536"), 2)
    assert result.best[0].choice.splits_vocabulary
    assert not result.without_vocabulary.choice.splits_vocabulary
    assert result.without_vocabulary.seconds > result.best[0].report.step_seconds
    config = config_of("model.vocab_size=65536", "parallel.pp=2")
    found = without_vocabulary(config, Degrees(1, 2, 1))
    same_split = found.without_vocabulary
    assert found.estimated == (same_split,), "the others are no answer"
    assert not found.num_planned
    assert same_split.choice.degrees == Degrees(1, 2, 1)
    report = make_report(same_split.choice.applied(config))
    assert same_split.seconds == pytest.approx(report.step_seconds, rel=0.03)


def test_a_batch_that_no_split_divides_is_told_what_would_work():
    config = load_config(
        [
            "model=llama3_8b",
            "cluster=h100_80g_node",
            "cluster.num_nodes=1024",
            "num_microbatches=500",
        ]
    )
    words = no_choice_words(config)
    assert "a batch of 500 sequences does not split over 8,192 GPUs" in words
    assert "480 or 512 sequences" in words
    with pytest.raises(ConfigError, match="does not split over 8,192 GPUs"):
        searched(config)
    nodes = int(words.split("cluster.num_nodes=")[1].split()[0])
    fewer = replace(config, cluster=replace(config.cluster, num_nodes=nodes))
    assert space_of(fewer).choices
    for count in range(nodes + 1, 1025):
        more = replace(config, cluster=replace(config.cluster, num_nodes=count))
        assert all(500 % dp for dp in replicas_of(more)), count
    assert space_of(replace(config, num_microbatches=512)).choices


@pytest.mark.parametrize(
    ("tokens", "sequences"),
    [(4_194_304, 512), (4_000_000, 512), (8_192, 1), (16_384_000, 2000)],
)
def test_a_batch_in_tokens_is_one_that_replicas_can_share(tokens, sequences):
    config = load_config(["model=llama3_8b", "parallel.dp=2"])
    changed = with_batch_of(config, tokens)
    assert changed.num_microbatches * changed.micro_batch_size == sequences
    assert changed.parallel.dp is None


def test_a_plan_that_is_found_has_the_report_that_planning_it_gives_with_measured_rates():
    config = load_config(
        [
            *("model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=8"),
            *("cost.matrix_flops_per_second=1e16", "cost.memory_bytes_per_second=1e12"),
            *("cost.attention_flops_per_second=5e13",),
        ]
    )
    choice = next(
        choice
        for choice in space_of(config).choices
        if choice.degrees == Degrees(1, 4, 2)
        and choice.schedule == "1f1b"
        and not choice.sequence_parallel
    )
    found = search(config, NO_END, lambda: True, lambda words: None, Space((choice,), Counter()))
    (plan,) = found.best
    assert plan.report.ranks == make_report(plan.choice.applied(config)).ranks


def test_a_search_offloads_where_the_best_would_recompute():
    config = config_of(
        *("run.device=cuda", "run.dtype=bfloat16", "cluster.gpus_per_node=4"),
        *("model.hidden_size=512", "model.seq_length=512", "num_microbatches=8"),
    )
    choices = space_of(config).choices
    kept = (4, "1f1b", "one_barrier", 1)
    deep = [c for c in choices if (c.degrees.pp, c.schedule, c.vocab, c.micro_batch_size) == kept]
    space = Space(tuple(deep), Counter(), (config.optim,), Kept({"schedule.name": "1f1b"}))

    def best(memory_gib, **cluster):
        changed = replace(config.cluster, memory_gib=memory_gib, **cluster)
        limits = replace(NO_END, top=3)
        narrow = replace(config, cluster=changed)
        return narrow, search(narrow, limits, lambda: True, lambda words: None, space).best[0]

    _, free = best(4.0)
    assert (free.choice.recompute, free.choice.offload) == ("none", 0)
    limit = 0.9 * total(free.report) / GIB
    narrow, first = best(limit)
    assert first.choice.offload > 0
    assert "parallel.offload_activations=" in first.choice.overrides(narrow)
    again = make_report(first.choice.applied(narrow))
    assert again.fits
    assert again.offloading is not None
    assert again.offloading.num_moved > 0
    _, without = best(limit, host_bytes_per_second=1e6)
    assert not without.choice.offload
    assert first.report.step_seconds < without.report.step_seconds


def test_what_cannot_be_fast_enough_is_not_weighed(monkeypatch):
    config = config_of()
    space = space_of(config)
    scales = Scales(config, 80 * GIB)
    (fastest,) = simulated(config, space, 10**6).estimated
    weighed, weigh = [], Scales.weigh
    monkeypatch.setattr(
        Scales, "weigh", lambda self, choice: weighed.append(choice) or weigh(self, choice)
    )
    below = 1.01 * fastest.seconds
    (found,) = simulated(config, space, 10**6, below=below).estimated
    assert found.seconds <= fastest.seconds
    assert 0 < len(weighed) < len(space.choices)
    assert all(scales.bound(choice) < below for choice in weighed)
