"""Laws of the bytes and seconds that a search computes before it simulates anything."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from schedules.generators import GENERATORS
from schedules.ir import Kind
from schedules.problem import Problem
from schedules.vocab import VOCAB_ALGORITHMS
from vp_train.config import ConfigError
from vp_train.planning import weigh
from vp_train.planning.choice import Choice, optimizers_of
from vp_train.planning.degrees import Degrees
from vp_train.planning.memory import rank_memory, rank_state
from vp_train.planning.weigh import (
    LEANEST,
    STATE,
    Peak,
    SameChoiceError,
    Scales,
    TooLargeError,
    minimum_step,
    peaks_of,
)
from vp_train.settings import load_config

WORDS = ["model=gpt_4b", "cluster=a100_80g_node", "num_microbatches=16"]


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
    needs = min(roomy.needs(step, optim)[0] for optim in optimizers_of(config, choice.degrees.dp))
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


@pytest.mark.parametrize("schedule", ["1f1b", "zb_h1", "v_half"])
def test_what_moves_to_the_host_is_weighed_by_what_the_link_carries_while_a_forward_runs(schedule):
    """At least all that may move has moved; about as much as the link takes in a warm-up."""
    for rate in (1e6, 1e9, 3e10, 1e15, None):
        config = load_config(WORDS)
        config = replace(config, cost=replace(config.cost, host_bytes_per_second=rate))
        if rate is None:
            config = replace(config, cluster=replace(config.cluster, host_bytes_per_second=1e30))
        scales = Scales(config, math.inf)
        for part in (0.0, 0.5, 1.0):
            settings = {"vocab": "none", "recompute": "none", "offload": part}
            choice = choice_of(4, schedule=schedule, **settings)
            step = scales.draft(choice).draft
            work, family = step.work, GENERATORS[schedule]
            problem = Problem(
                family.layout_of(4), 12, VOCAB_ALGORITHMS["none"], family.split_backward
            )
            peak = peaks_of(schedule, problem)[0]
            kept = of_layer = work.layer_bytes("none")
            if family.split_backward:
                kept = max(kept, step.cost.weight_bytes[0] / len(step.layers[0]))
            forward = step.cost.pass_seconds[Kind.F][1] / len(step.layers[1])
            state = refusal(Scales(config, 1.0), choice).needs
            least = about = state
            for chunk, stage in enumerate(step.problem.layout.stages_of(0)):
                layers = len(step.layers[stage])
                moved = math.floor(layers * part + 0.5)
                link = 1.0 if rate is None else min(1.0, forward * rate / of_layer)
                carried = min(moved, layers * link) if moved else 0
                least += (layers - moved) * of_layer * peak.counts[chunk]
                about += (layers - carried) * kept * peak.kept[chunk]
            assert scales.leanest(choice) == pytest.approx(least)
            assert scales.weigh(choice).needs == pytest.approx(about)
