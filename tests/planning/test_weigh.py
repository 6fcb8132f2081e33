"""Laws of the bytes and seconds that a search computes before it simulates anything."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from operator import add
from types import SimpleNamespace

import pytest

from schedules.bound import step_bound
from schedules.generators import GENERATORS
from schedules.ir import Kind
from schedules.layout import Layout
from schedules.problem import Problem
from schedules.vocab import VOCAB_ALGORITHMS
from vp_train.config import ConfigError
from vp_train.model import shape
from vp_train.planning import weigh
from vp_train.planning.choice import Choice, optimizers_of
from vp_train.planning.cluster import gradient_seconds
from vp_train.planning.degrees import Degrees
from vp_train.planning.memory import rank_memory, rank_state, state_of
from vp_train.planning.overlap import exchange
from vp_train.planning.peaks import Peak, at_peak, peaks_of
from vp_train.planning.plan import draft_step
from vp_train.planning.report import optimizer_seconds
from vp_train.planning.short import short_step
from vp_train.planning.space import space_of
from vp_train.planning.weigh import (
    LEANEST,
    STATE,
    SameChoiceError,
    Scales,
    TooLargeError,
)
from vp_train.settings import load_config

WORDS = ["model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=16"]


def minimum_step(schedule, draft):
    """Return a step whose ranks do no more than reach their peak."""
    return at_peak(draft, schedule, peaks_of(schedule, draft.problem))


def choice_of(pp, tp=1, schedule="1f1b", vocab="one_barrier", **settings):
    dp = 8 // (pp * tp)
    return Choice(
        Degrees(dp, pp, tp), 1, 16 // dp, schedule, vocab, **{"recompute": "full"} | settings
    )


def refusal(scales, choice):
    """Return the error of weighing a choice, None without one."""
    try:
        scales.weigh(choice)
    except TooLargeError as error:
        return error
    return None


@pytest.mark.parametrize("name", sorted(GENERATORS))
@pytest.mark.parametrize(("p", "m"), [(1, 1), (3, 2), (4, 9)])
def test_a_peak_is_where_a_rank_first_has_most_microbatches_in_flight(name, p, m):
    """Each until its B or I for the least, and until its W for what a whole step keeps."""
    family, algorithm = GENERATORS[name], VOCAB_ALGORITHMS["one_barrier"]
    problem = Problem(family.layout_of(p), m, algorithm, family.split_backward)
    for rank, order in enumerate(family.base_order(problem)):
        stages, found = problem.layout.stages_of(rank), []
        for last in (problem.backward, problem.stage_kinds[-1]):
            counts, most = dict.fromkeys(stages, 0), (0, ())
            for item in order:
                counts[item.stage] += (item.kind is Kind.F) - (item.kind is last)
                if sum(counts.values()) > most[0]:
                    most, rest = (sum(counts.values()), tuple(counts.values())), iter(order)
                    assert any(one is item for one in rest)
                    backward = next(one.stage for one in rest if one.kind is last)
            found.append(most[1])
        assert peaks_of(name, problem)[rank] == Peak(*found, backward)


def test_more_microbatches_than_fill_a_pipeline_raise_no_peak_but_that_of_gpipe():
    for name, family in GENERATORS.items():
        few, many = (
            Problem(family.layout_of(3), m, VOCAB_ALGORITHMS["none"], family.split_backward)
            for m in (11, 40)
        )
        assert (peaks_of(name, few) == peaks_of(name, many)) == (name != "gpipe")
    scales = Scales(load_config(WORDS), math.inf)
    of_choice = [
        scales.leanest(replace(choice_of(4, schedule="gpipe"), num_microbatches=count))
        for count in (10, 20, 40)
    ]
    assert of_choice[2] - of_choice[1] == 2 * (of_choice[1] - of_choice[0]) > 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "choice",
    [
        choice_of(4),
        choice_of(4, vocab="none"),
        choice_of(4, tp=2, vocab="none"),
        choice_of(8, schedule="v_half", vocab="none"),
        choice_of(1),
        choice_of(4, schedule="interleaved", num_chunks=2),
    ],
    ids=lambda choice: f"{choice.schedule}, {choice.vocab}, pp={choice.degrees.pp}",
)
def test_bytes_at_least_are_those_of_the_first_rank_and_nearly_exact(choice, tied):
    """Small parameters and what is no activation of a layer are left out."""
    config = load_config([*WORDS, f"model.tied_embeddings={str(tied).lower()}"])
    roomy = Scales(config, math.inf)
    step = minimum_step(choice.schedule, roomy.draft(choice).draft)
    optimizers = optimizers_of(config, choice.degrees.dp)
    state = min(rank_state(step, optim, 0).state for optim in optimizers)
    found = refusal(Scales(config, 1.0), choice)
    assert found.constraint.endswith(STATE)
    assert 0.99 * state <= found.needs <= state
    kept = roomy.leanest(choice) - found.needs
    count = len(step.schedule.ranks[0]) - 1  # the pass that runs at the peak is a backward
    of_layer = step.work.layer_bytes(choice.recompute)
    layers = len(step.layers[0])
    assert kept == count * layers * of_layer
    assert kept <= rank_memory(step, optimizers[0], 0).activations


@pytest.mark.parametrize("choice", [choice_of(4), choice_of(8, schedule="zb_h1", recompute="none")])
def test_a_choice_may_need_all_the_memory_and_no_byte_more(choice):
    config = load_config(WORDS)
    roomy = Scales(config, math.inf)
    state, least = refusal(Scales(config, 1.0), choice).needs, roomy.leanest(choice)
    assert 0 < state < least <= roomy.weigh(choice).needs
    for limit, words in (
        (math.nextafter(state, 0), STATE),
        (state, LEANEST),
        (math.nextafter(least, 0), LEANEST),
        (least, None),
    ):
        found = refusal(Scales(config, limit), choice)
        assert (found is None) == (words is None), limit
        assert found is None or found.constraint.endswith(words)
    step = minimum_step(choice.schedule, roomy.draft(choice).draft)
    needs = min(roomy.needs(step, optimizers_of(config, choice.degrees.dp)))[0]
    assert Scales(config, needs).draft(choice)
    with pytest.raises(TooLargeError):
        Scales(config, math.nextafter(needs, 0)).draft(choice)


@pytest.mark.parametrize("schedule", ["1f1b", "v_half"])
def test_no_stage_recomputes_where_all_that_is_kept_fits_to_the_byte(schedule):
    config = load_config(WORDS)
    choice = choice_of(8, schedule=schedule, recompute_where_needed=True)
    nothing = replace(choice, recompute="none", recompute_where_needed=False)
    (optim,) = optimizers_of(replace(config, run=replace(config.run, device="cpu")), 1)
    only = (optim,)
    step = minimum_step(schedule, Scales(config, math.inf, only).draft(nothing).draft)
    needs = [
        rank_memory(step, optim, rank).total + step.cost.shard_bytes[rank] for rank in range(8)
    ]
    with pytest.raises(SameChoiceError, match="all stages recompute none"):
        Scales(config, max(needs), only).draft(choice)
    found = Scales(config, math.nextafter(max(needs), 0), only).draft(choice)
    again = {
        choice.layout.rank_of(stage)
        for stage, kind in enumerate(found.choice.recompute_per_stage)
        if kind == "full"
    }
    assert again == {rank for rank, bytes_ in enumerate(needs) if bytes_ == max(needs)}


def test_every_base_order_is_checked_once_in_a_small_step_and_a_wrong_one_is_named(monkeypatch):
    checked = []

    def named(name, problem):
        checked.append((name, problem.layout.num_ranks, problem.num_microbatches))
        if name == "gpipe":
            raise ConfigError("gpipe is wrong")

    monkeypatch.setattr(weigh, "named_base_order", named)
    scales = Scales(load_config(WORDS), math.inf)
    many, few = replace(choice_of(2), num_microbatches=100), choice_of(4, schedule="zb_h1")
    scales.check([choice_of(8), many, choice_of(4), replace(few, num_microbatches=3)])
    assert sorted(checked) == [("1f1b", 2, 2 * 2), ("zb_h1", 4, 3)]
    with pytest.raises(ConfigError, match="gpipe is wrong"):
        scales.check([choice_of(2, schedule="gpipe")])


@pytest.mark.parametrize(("schedule", "seems"), [("1f1b", [1, 0, 0]), ("v_half", [1, 1, 0])])
def test_a_split_backward_may_need_a_tenth_less_than_its_base_order(schedule, seems):
    config = load_config([*WORDS, "model.seq_length=8192", "cost.host_bytes_per_second=1e9"])
    settings = {"vocab": "none", "recompute": "none", "offload": 1.0}
    choice = choice_of(4, schedule=schedule, **settings)
    only = (config.optim,)
    needs = Scales(config, math.inf, only).weigh(choice).needs
    limits = [needs / above for above in (0.99, 1.09, 1.11)]
    found = [Scales(config, limit, only).weigh(choice).seems_to_fit for limit in limits]
    assert found == list(map(bool, seems))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "v_half"])
def test_what_moves_to_the_host_is_weighed_by_what_the_link_carries_in_two_forwards(
    schedule, recompute
):
    """All that may move has moved at least; about as much as the link takes in a warm-up.

    What waits for its W does not move.  That is all at most, or where stages recompute what two
    microbatches keep for it.
    """
    few = recompute == "full" and GENERATORS[schedule].split_backward
    for rate in (1e9, 3e10, None):
        config = load_config(WORDS)
        config = replace(config, cost=replace(config.cost, host_bytes_per_second=rate))
        if rate is None:
            config = replace(config, cluster=replace(config.cluster, host_bytes_per_second=1e30))
        scales = Scales(config, math.inf)
        for part in (0.0, 0.5, 1.0):
            settings = {"vocab": "none", "recompute": recompute, "offload": part}
            choice = choice_of(4, schedule=schedule, **settings)
            step = scales.draft(choice).draft
            work, family = step.work, GENERATORS[schedule]
            problem = Problem(
                family.layout_of(4), 12, VOCAB_ALGORITHMS["none"], family.split_backward
            )
            peak = peaks_of(schedule, problem)[0]
            of_layer = work.layer_bytes(recompute)
            waits = step.cost.weight_bytes[0] / len(step.layers[0]) if family.split_backward else 0
            forward = step.cost.pass_seconds[Kind.F][1] / len(step.layers[1])
            state = refusal(Scales(config, 1.0), choice).needs
            least, about, waiting = state, state, 0.0
            for chunk, stage in enumerate(step.problem.layout.stages_of(0)):
                layers = len(step.layers[stage])
                moved = math.floor(layers * part + 0.5)
                link = 1.0 if rate is None else min(1.0, 2 * forward * rate / of_layer)
                carried = min(moved, layers * link) if moved else 0
                least += (layers - moved) * of_layer * peak.counts[chunk]
                kept = (layers - carried) * of_layer
                if few:
                    about += kept * peak.counts[chunk]
                    waiting = max(waiting, 2 * layers * waits)
                else:
                    about += max(kept, layers * waits) * peak.kept[chunk]
            about += waiting
            assert scales.leanest(choice) == pytest.approx(least)
            assert scales.weigh(choice).needs == pytest.approx(about)


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", None), ("interleaved", 2)])
def test_what_offloads_seems_to_fit_if_also_what_is_on_its_way_to_the_host_does(schedule, chunks):
    """Over a fast link a short step needs that within a tenth, whatever the micro-batch size."""
    config = load_config([*WORDS, "parallel.pp=4"])
    config = replace(config, cost=replace(config.cost, host_bytes_per_second=1e12))
    for size in (1, 4):
        settings = {"vocab": "none", "recompute": "none", "offload": 1.0, "num_chunks": chunks}
        choice = replace(choice_of(4, schedule=schedule, **settings), micro_batch_size=size)
        step, _, _ = short_step(Scales(config, math.inf).draft(choice).draft, schedule)
        ((needs, _),) = Scales(config, math.inf).needs(step, [config.optim])
        for part, fits in ((0.9, False), (1.1, True)):
            scales = Scales(config, part * needs, (config.optim,))
            assert scales.draft(choice).seems_to_fit is fits, (size, part)


CHOICES = [
    choice_of(4),
    choice_of(4, vocab="none"),
    choice_of(4, tp=2, vocab="none", recompute="selective"),
    choice_of(8, schedule="v_half", recompute="none"),
    choice_of(2, schedule="zb_h1", vocab="two_barrier", recompute="none"),
    choice_of(8, schedule="zb_h1", vocab="none"),
    choice_of(4, schedule="interleaved", num_chunks=2),
    choice_of(1, vocab="none", recompute="none"),
    choice_of(8, vocab="none", placement="redistribute"),
    replace(choice_of(4, vocab="none"), recompute_where_needed=True),
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.schedule}, {choice.vocab}")
@pytest.mark.parametrize("layers", [32, 35])
def test_a_step_takes_the_fill_the_work_and_the_drain_of_the_slowest_rank_at_least(choice, layers):
    """W and T need not be waited for in the drain.  Then comes the fastest optimizer."""
    alone = ["optim.overlap_sums=false", "optim.overlap_gathers=false", "cluster.contention=0"]
    config = load_config([*WORDS, *alone, f"model.num_layers={layers}"])
    placement = "balanced" if choice.placement != "redistribute" else choice.placement
    choice = replace(choice, placement=placement)
    scales = Scales(config, math.inf)
    plain = replace(choice, recompute_where_needed=False)
    if choice.recompute_where_needed:  # the least is that nothing recomputes
        plain = replace(plain, recompute="none")
    step = scales.draft(plain).draft
    layout, cost, m = step.problem.layout, step.cost, choice.num_microbatches
    stage = next(stage for stage in range(1 % layout.num_stages, layout.num_stages))
    one = {
        kind: cost.pass_seconds[kind][stage] / len(step.layers[stage])
        for kind in (Kind.F, Kind.B, Kind.I, Kind.W)
    }
    split = step.problem.split_backward
    backward = one[Kind.I] + one[Kind.W] if split else one[Kind.B]
    back = one[Kind.I] if split else one[Kind.B]
    counts = [sum(map(len, of_rank)) for of_rank in ranks_of(step)]
    most = max(rank for rank, count in enumerate(counts) if count == max(counts))
    bounds = []
    for rank in {0, most, layout.num_ranks - 1}:
        before = sum(len(step.layers[stage]) for stage in range(rank))
        s, t = (cost.pass_seconds[kind][rank] for kind in (Kind.S, Kind.T))
        n = counts[rank]
        bounds.append(before * one[Kind.F] + m * (n * (one[Kind.F] + backward) + s + t))
        bounds.append(before * (one[Kind.F] + back) + m * (n * (one[Kind.F] + back) + s))
    after = []
    rows = -(-config.model.vocab_size // choice.degrees.tp)
    sharded = step.problem.algorithm.sharded
    root = layout.rank_of(layout.num_stages - 1)
    ends = 2 if sharded or root == 0 else 1
    rows = rows // layout.num_ranks if sharded else rows
    parameters = counts[0] * shape.layer_parameters(step.work.share)
    parameters += ends * rows * config.model.hidden_size
    for optim in optimizers_of(config, choice.degrees.dp):
        held = state_of(step.work, optim, parameters)
        after.append(
            gradient_seconds(step.work, config.cluster, optim, parameters)
            + optimizer_seconds(choice.degrees, config.cluster, optim, held)
        )
    assert scales.weigh(choice).seconds == pytest.approx(max(bounds) + min(after))
    assert scales.bound(choice) == pytest.approx(max(bounds))


def ranks_of(step):
    layout = step.problem.layout
    return [
        [step.layers[stage] for stage in layout.stages_of(rank)] for rank in range(layout.num_ranks)
    ]


@pytest.mark.parametrize(("gib", "offloads"), [(1000, True), (0, False)])
def test_the_leanest_optimizer_is_one_that_hosts_can_hold(gib, offloads):
    """What is said to need least then fits once GPUs have so much memory."""
    config = load_config(
        ["model=gpt_4b", "cluster=h100_80g_node", f"cluster.host_memory_gib={gib}"]
    )
    scales, choice = Scales(config, math.inf), choice_of(4)
    optim = scales.leanest_optimizer(choice)
    assert optim.offload is offloads
    needs = scales.leanest(choice)
    least = Scales(config, needs * (1 - 1e-9), (optim,))
    with pytest.raises(TooLargeError):
        least.weigh(choice)
    assert Scales(config, needs * (1 + 1e-9), (optim,)).weigh(choice).optimizer == optim


def test_a_draft_depends_on_no_other_draft():
    """The order of one microbatch is kept where costs do not change it, and only there."""
    words = ["model=nano", "cluster=h100_80g_node", "num_microbatches=8", "cluster.num_nodes=1"]
    config = load_config([*words, "run.device=cuda"])
    choices = [one for one in space_of(config).choices if one.degrees.dp > 1][::5]

    def drafts(order):
        scales, found = Scales(config, math.inf), {}
        for choice in order:
            with suppress(ConfigError):
                found[choice] = scales.draft(choice).seconds
        return found

    found = drafts(choices)
    assert found == drafts(choices[::-1])
    schedules = {choice.schedule for choice in found}
    assert {GENERATORS[name].split_backward for name in schedules} == {False, True}


@pytest.mark.parametrize("pp", [2, 4])
def test_a_candidate_takes_its_passes_and_the_least_after_them(pp):
    config = load_config(WORDS)
    scales = Scales(config, math.inf)
    found = scales.draft(choice_of(pp))
    step = minimum_step("1f1b", found.draft)
    step = replace(step, timeline=scales._alone("1f1b", found.draft))
    after = [scales.after(step, optim, 0.9) for optim in found.optimizers]
    assert len(after) == 3
    assert min(after) < max(after)
    assert found.seconds == found.passes + min(after)
    assert found.passes == step_bound(found.draft.problem, found.draft.cost).seconds
    counts = [rank_state(step, config.optim, rank).parameters for rank in range(pp)]
    for optim, seconds in zip(found.optimizers, after, strict=True):
        states = [rank_state(step, optim, rank) for rank in range(pp)]
        updates = [
            optimizer_seconds(step.degrees, config.cluster, optim, state) for state in states
        ]
        least = gradient_seconds(step.work, config.cluster, optim, max(counts))
        alone = exchange(step, config.cluster, optim, counts, updates).exposed
        assert seconds == pytest.approx(max(least, 0.9 * alone) + max(updates))


def test_a_microbatch_alone_says_about_how_much_of_an_exchange_stays_exposed():
    """Bounds without it are of no use where the GPUs of a node share one port."""
    words = ["model=gpt_4b", "cluster=h100_80g_node", "cluster.num_nodes=4", "cluster.rails=1"]
    config = load_config([*words, "num_microbatches=64"])
    scales = Scales(config, math.inf, (replace(config.optim, name="zero1"),))
    for schedule, vocab, num_chunks, (dp, pp, tp) in (
        ("1f1b", "none", None, (16, 2, 1)),
        ("1f1b", "one_barrier", None, (4, 4, 2)),
        ("interleaved", "none", 4, (8, 4, 1)),
        ("interleaved", "two_barrier", 2, (8, 2, 2)),
        ("zb_h1", "one_barrier", None, (4, 8, 1)),
        ("zb_v", "none", None, (8, 4, 1)),
        ("v_half", "one_barrier", None, (16, 2, 1)),
    ):
        choice = Choice(
            Degrees(dp, pp, tp), 1, 64 // dp, schedule, vocab, "none", num_chunks=num_chunks
        )
        found, weight = scales.draft(choice), scales.weigh(choice)
        step, passes, _ = short_step(found.draft, schedule)
        after = scales.after(step, found.optimizers[0])
        assert after > 0.1 * passes, "it counts"
        assert 0.75 * after < found.seconds - found.passes <= after
        assert weight.seconds <= passes + after
        assert weight.seconds > 0.9 * found.seconds


@pytest.mark.parametrize(
    ("ranks", "layers", "looked_at"),
    [
        (16, (1,) * 16, list(range(16))),
        (17, (1, 1, 1, 2, *(1,) * 13), [0, 3, 8, 16]),
        (20, (3, *(1,) * 19), [0, 10, 19]),
    ],
)
def test_of_many_ranks_the_ends_the_middle_and_the_largest_are_looked_at(ranks, layers, looked_at):
    starts = [sum(layers[:stage]) for stage in range(ranks)]
    step = SimpleNamespace(
        problem=SimpleNamespace(layout=Layout("linear", ranks)),
        layers=[range(s, s + c) for s, c in zip(starts, layers, strict=True)],
        recompute=["none"] * ranks,
    )
    assert weigh._looked_at(step) == looked_at
    step.recompute[1:6] = ["full"] * 5
    firsts = {1, 6} if ranks > 16 else set()
    assert weigh._looked_at(step) == sorted({*looked_at, *firsts})


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1"])
def test_no_stage_keeps_more_for_an_optimizer_that_hosts_do_not_hold(schedule):
    limit, choice = 8 * 2**30, choice_of(4, tp=2, schedule=schedule, recompute_where_needed=True)
    roomy, none = (load_config([*WORDS, f"cluster.host_memory_gib={gib}"]) for gib in (500, 0))
    found = Scales(roomy, limit).draft(choice).choice.recompute_per_stage
    assert found == ("full", "none", "none", "none")
    with pytest.raises(SameChoiceError, match="all stages recompute full"):
        Scales(none, limit).draft(choice)


def test_of_stages_that_recompute_where_needed_what_seems_to_fit_comes_before_what_is_faster(
    monkeypatch,
):
    """The refusal that needs least is raised where none may fit."""
    choice = choice_of(4, recompute_where_needed=True)
    scales = Scales(load_config(WORDS), math.inf)
    monkeypatch.setattr(Scales, "_where_needed", lambda *_: {"a": "x", "b": "y", "c": "z"})
    for fits, expected in (
        ({"a": False, "b": True, "c": True}, "c"),
        ({"a": False, "b": False, "c": False}, "a"),
        ({"a": True, "b": None, "c": False}, "a"),
    ):
        seconds = {"a": 1.0, "b": 3.0, "c": 2.0}

        def drafted(self, mixed, some, fits=fits, seconds=seconds):
            if fits[mixed] is None:
                raise TooLargeError(5.0, 4.0, STATE)
            return SimpleNamespace(mixed=mixed, seems_to_fit=fits[mixed], seconds=seconds[mixed])

        monkeypatch.setattr(Scales, "_drafted", drafted)
        assert scales.draft(choice).mixed == expected
    needs = {"a": 9.0, "b": 7.0, "c": 8.0}

    def refused(self, mixed, some):
        raise TooLargeError(needs[mixed], 4.0, STATE)

    monkeypatch.setattr(Scales, "_drafted", refused)
    with pytest.raises(TooLargeError) as raised:
        scales.draft(choice)
    assert raised.value.needs == 7.0


@pytest.mark.parametrize(
    ("schedule", "vocab", "as_if"),
    [
        ("zb_h1", "two_barrier", ("zb_h1", "two_barrier")),
        ("auto", "two_barrier", ("1f1b", "two_barrier")),
        ("auto", "auto", ("1f1b", "one_barrier")),
        ("gpipe", "none", ("gpipe", "none")),
    ],
)
def test_about_how_many_bytes_a_step_needs_counts_a_held_shard_on_the_worst_rank(
    schedule, vocab, as_if
):
    """A schedule that is searched or read from a file counts as 1f1b, without a cap.

    A whole vocabulary on one rank is held between S and T, and never during a backward.
    """
    words = [*WORDS, "parallel.pp=8"]
    config = load_config(words)
    typed = replace(
        config,
        schedule=replace(
            config.schedule, name=schedule, cap_gib=1.0 if schedule == "auto" else None
        ),
        vocab=replace(config.vocab, algorithm=vocab),
    )
    if schedule == "zb_h1":
        named = replace(typed, schedule=replace(typed.schedule, file="x.txt"))
        plain = replace(typed, schedule=replace(typed.schedule, name="1f1b"))
        assert weigh.about_bytes(named) == weigh.about_bytes(plain)
    name, algorithm = as_if
    known = replace(
        config,
        schedule=replace(config.schedule, name=name),
        vocab=replace(config.vocab, algorithm=algorithm),
    )
    drafted = draft_step(known, 8)
    step = minimum_step(name, drafted)
    without = [rank_memory(step, config.optim, rank).total for rank in range(8)]
    found = weigh.about_bytes(typed)
    if step.problem.algorithm.sharded:
        assert found == max(map(add, without, step.cost.shard_bytes))
    else:
        whole = drafted.with_named(name)
        most = max(rank_memory(whole, config.optim, rank).total for rank in range(8))
        assert max(without) <= found <= most
        holding = at_peak(drafted, name, peaks_of(name, drafted.problem), holds=True)
        needs = rank_memory(holding, config.optim, 7).total
        assert without[7] <= needs < without[7] + step.cost.shard_bytes[7]


def test_an_error_for_memory_says_what_is_needed_where_and_how_much_that_is_too_much():
    gib = 2.0**30
    error = TooLargeError(3.5 * gib, 2.0 * gib, LEANEST)
    assert str(error) == "needs at least 3.50 GiB, 1.50 GiB more than the 2 GiB that a plan may use"
    assert (error.needs, error.constraint) == (3.5 * gib, f"memory, for {LEANEST}")
    error = TooLargeError(3.5 * gib, 2.25 * gib, weigh.SIMULATED, 0)
    assert (
        str(error)
        == "needs 3.50 GiB on rank 0, 1.25 GiB more than the 2.25 GiB that a plan may use"
    )


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("schedule", ["zb_v", "v_half", "v_min"])
def test_what_fits_is_not_refused_and_takes_no_less_than_its_bound_where_w_may_follow_sooner(
    schedule, recompute
):
    """The base order would let all microbatches wait for W; a step need not."""
    words = ["model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=64"]
    config = load_config(words)
    choice = Choice(Degrees(1, 4, 2), 16, 4, schedule, "none", recompute, placement="even")
    roomy = Scales(config, math.inf)
    step = roomy.draft(choice).draft.with_named(schedule)
    for optim in optimizers_of(config, 1):
        ((needs, _),) = roomy.needs(step, [optim])
        scales = Scales(config, 1.001 * needs, (optim,))
        seconds = step.timeline.makespan + scales.after(step, optim)
        assert scales.weigh(choice).seconds <= seconds * (1 + 1e-9)
        assert scales.draft(choice).seconds <= seconds * (1 + 1e-9)
