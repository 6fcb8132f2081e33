"""A space has every way to run a batch, each once, and says what rules out the others."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest

from schedules.generators import GENERATORS, searched_schedules
from schedules.layout import Layout
from schedules.vocab import VOCAB_ALGORITHMS, searched_algorithms
from vp_train.config import ConfigError
from vp_train.config.parallel import RECOMPUTE
from vp_train.model import shape
from vp_train.planning import space as space_module
from vp_train.planning.batch import batch_of, with_batch_of, with_replicas
from vp_train.planning.choice import Choice, as_typed, changes_of, choice_of, optimizers_of, word_of
from vp_train.planning.degrees import Degrees
from vp_train.planning.kept import Kept, searched_words, settings_of
from vp_train.planning.moves import in_the_same_stages, neighbours, offloading, with_other_chunks
from vp_train.planning.placement import redistribute
from vp_train.planning.space import (
    TOO_LONG,
    counts_of_chunks,
    fitting_batches,
    most_chunks,
    replicas_of,
    space_of,
    splits_of,
    without_vocabulary_of,
)
from vp_train.settings import load_config

NANO = load_config(["model=nano"])
REDIS = "redistribute"


def config_of(nodes=1, per_node=4, batch=12, device="cuda", **model):
    return replace(
        NANO,
        model=replace(NANO.model, **{"num_layers": 6} | model),
        cluster=replace(NANO.cluster, num_nodes=nodes, gpus_per_node=per_node),
        num_microbatches=batch,
        run=replace(NANO.run, device=device),
    )


def variants(config, pp, tp):
    """Yield (schedule, chunks, vocab, placement, recompute, needed, sequences) of one split."""
    layers, head = config.model.num_layers, shape.head_in_layers(config.model)
    tried = {place: counts_of_chunks(pp, layers, at) for place, at in (("", None), (REDIS, head))}
    splits = tp > 1 and config.run.device == "cuda" and config.model.seq_length % tp == 0
    for name in GENERATORS:
        if name not in (searched_schedules() if pp > 1 else ("1f1b", "interleaved")):
            continue
        layout = GENERATORS[name].layout
        counts = [None] if layout != "loop" else range(2, 100)
        if pp == 1 and layout == "loop":
            counts = [layers]  # every layer may recompute or not
        for chunks in counts:
            stages = pp * {"linear": 1, "v": 2, "loop": chunks}[layout]
            even = layers % stages == 0
            empty = max(0, stages - layers)  # two stages of one layer may lack it
            if empty > 2 or (empty and (layout != "loop" or empty >= pp)):
                continue
            for vocab in searched_algorithms() if pp > 1 else ("none",):
                places = ["even" if even else "balanced"]
                if pp > 1 and not VOCAB_ALGORITHMS[vocab].sharded:
                    places.append(REDIS)
                for recompute, needed in (
                    *(("none", False), ("selective", False), ("full", False)),
                    *(("selective", True), ("full", True)),
                ):
                    if needed if stages == 1 else pp == 1 and not needed:
                        continue
                    for place, split in itertools.product(places, {False, splits}):
                        known = tried[REDIS * (place == REDIS)]
                        if layout == "loop" and pp > 1 and chunks not in known:
                            continue
                        yield name, chunks, vocab, place, recompute, needed, split


@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        config_of(per_node=6, batch=36, num_layers=12),
        config_of(nodes=2, per_node=2, batch=16, device="cpu"),
        config_of(nodes=3, per_node=4, batch=24, num_layers=5, seq_length=63),
        config_of(nodes=1, per_node=2, batch=64, num_layers=96),
    ],
    ids=["4", "6", "2 x 2", "3 x 4", "deep"],
)
def test_a_space_is_every_split_size_schedule_and_setting(config):
    cluster, layers, batch = config.cluster, config.model.num_layers, config.num_microbatches
    num_gpus, expected, excluded = cluster.num_gpus, set(), Counter()
    for dp, pp, tp in itertools.product(range(1, num_gpus + 1), repeat=3):
        if dp * pp * tp != num_gpus or cluster.gpus_per_node % tp:
            continue
        every = list(variants(config, pp, tp))
        reason = None
        if pp > layers:
            reason = f"model.num_layers={layers}, which pp cannot exceed"
        elif 4 % tp or 2 % tp:
            name, value = ("num_heads", 4) if 4 % tp else ("num_query_groups", 2)
            reason = f"model.{name}={value} does not split over parallel.tp={tp}; "
            fitting = [n for n in (1, 2) if num_gpus % n == 0]
            reason += f"use parallel.tp={' or '.join(map(str, fitting))}"
        elif batch % dp:
            reason = f"the batch: dp must divide its {batch:,} sequences"
        sizes = [n for n in range(1, 17) if batch % n == 0]
        if reason:
            excluded[reason] += len(sizes) * len(every)
            continue
        for size in sizes:
            if batch % (dp * size) == 0:
                expected |= {(dp, pp, tp, size, batch // dp // size, *one) for one in every}
    space = space_of(config)
    found = [
        (
            *(c.degrees.dp, c.degrees.pp, c.degrees.tp, c.micro_batch_size, c.num_microbatches),
            *(c.schedule, c.num_chunks, c.vocab, c.placement, c.recompute),
            *(c.recompute_where_needed, c.sequence_parallel),
        )
        for c in space.choices
    ]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert +space.excluded == +excluded
    assert {(c.offload, c.optimizer, c.recompute_per_stage) for c in space.choices} == {
        (0.0, None, None)
    }
    assert {(split.dp, split.pp, split.tp) for split in splits_of(config)} >= {
        one[:3] for one in expected
    }
    assert (space.optimizers, space.kept) == (None, Kept())


def test_a_batch_is_its_microbatches_in_all_replicas():
    config = config_of(batch=5)
    assert batch_of(config) == 5
    config = replace(config, micro_batch_size=3, parallel=replace(config.parallel, dp=2))
    assert batch_of(config) == 30
    config = config_of(batch=5, nodes=3)
    for typed, batch in (({}, 5), ({"pp": 3}, 20), ({"pp": 3, "tp": 2}, 10), ({"pp": 7}, 5)):
        run = replace(config, parallel=replace(config.parallel, **typed))
        assert batch_of(with_replicas(run)) == batch, "as the run infers them"


def test_the_replicas_of_a_cluster_are_those_that_the_model_allows():
    """Six layers and tp of at most two leave one of twelve GPUs at least."""
    assert replicas_of(config_of(nodes=3)) == [1, 2, 3, 4, 6, 12]
    assert replicas_of(config_of(nodes=3, num_layers=2)) == [3, 6, 12]
    assert replicas_of(config_of(nodes=3, num_layers=2, num_query_groups=1)) == [6, 12]


@pytest.mark.parametrize("batch", [1, 5, 7, 12, 13])
def test_the_nearest_batches_and_the_most_nodes_that_have_a_split_are_found(batch):
    config = config_of(nodes=3, batch=batch, num_layers=2)
    batches, nodes = fitting_batches(config)
    replicas = replicas_of(config)
    below = [size for size in range(1, batch + 1) if any(size % dp == 0 for dp in replicas)]
    above = next(s for s in itertools.count(batch) if any(s % dp == 0 for dp in replicas))
    assert batches == ([below[-1]] if below else []) + [above]
    fewer = [
        count
        for count in (3, 2, 1)
        if any(batch % dp == 0 for dp in replicas_of(config_of(nodes=count, num_layers=2)))
    ]
    assert nodes == fewer[:1]


def test_a_batch_in_tokens_is_the_one_near_it_that_powers_of_two_divide_best():
    for tokens in (64, 65, 1_000, 4_097, 6_400, 63 * 64 + 1, 100_001):
        config = with_batch_of(replace(NANO, micro_batch_size=4), tokens)
        count = config.num_microbatches
        assert config.micro_batch_size == 1
        assert (config.parallel.dp, config.parallel.pp, config.parallel.tp) == (None, None, 1)
        if tokens % 64 == 0:
            assert count == tokens // 64
            continue
        near = [n for n in range(1, 5_000) if 0.95 * tokens / 64 <= n <= 1.05 * tokens / 64]
        if not near:
            assert count == max(1, tokens // 64)
            continue
        power = max(n & -n for n in near)
        best = [n for n in near if n & -n == power]
        assert count == min(best, key=lambda n: abs(n - tokens / 64))


@pytest.mark.parametrize("layers", [2, 3])
def test_what_offloads_recomputes_at_most_as_much_and_a_stage_of_a_layer_all_or_nothing(layers):
    for index, strongest in enumerate(("none", "selective", "full")):
        one = Choice(
            *(Degrees(1, 2, 1), 1, 4, "1f1b", "none", strongest),
            recompute_where_needed=True,
            recompute_per_stage=("none", strongest),
            optimizer=NANO.optim,
        )
        kinds = [("none", False), *(("selective", again) for again in (False, True))]
        kinds = [*kinds, *(("full", again) for again in (False, True))][: 2 * index + 1]
        parts = (0.5, 1.0) if layers > 2 else (1.0,)
        plain = replace(one, recompute_where_needed=False, recompute_per_stage=None, optimizer=None)
        expected = [
            replace(plain, recompute=kind, recompute_where_needed=needed, offload=part)
            for kind, needed in kinds
            for part in parts
        ]
        assert offloading(one, layers, where_needed=True) == expected
        everywhere = [choice for choice in expected if not choice.recompute_where_needed]
        assert offloading(one, layers) == everywhere


def test_one_rank_offloads_with_stages_of_a_layer_or_of_two_of_which_one_moves():
    """Such stages keep activations long enough for both ways of the link."""
    one = Choice(Degrees(4, 1, 2), 1, 4, "1f1b", "none", "none")
    whole = [replace(one, offload=0.5), replace(one, offload=1.0)]
    split = replace(one, schedule="interleaved", num_chunks=7, placement="even", offload=1.0)
    two = replace(split, num_chunks=4, placement="balanced", offload=0.5)
    assert offloading(one, 7) == [*whole, two, split]
    assert split.layout.num_stages == 7
    assert offloading(split, 7) == [split, two], "each once"
    assert offloading(one, 2) == [*whole, replace(split, num_chunks=2)]
    assert offloading(one, 1) == [replace(one, offload=1.0)]


def test_on_one_rank_recomputation_of_some_layers_is_next_to_that_of_all():
    config = config_of(num_layers=4)
    choices = [one for one in space_of(config).choices if one.degrees == Degrees(4, 1, 1)]
    everywhere = next(one for one in choices if one.recompute == "full" and not one.num_chunks)
    beside = neighbours(everywhere, choices)
    assert any(one.recompute == "full" and one.recompute_where_needed for one in beside)


def test_chunks_are_tried_where_stages_shrink_and_where_all_are_alike():
    for pp, layers, head in itertools.product((2, 3, 4, 7), (8, 30, 64, 126), (None, 0.4, 1.3)):
        counts = range(2, most_chunks(pp, layers) + 1)
        largest = {
            count: -(-layers // (pp * count))
            if head is None
            else max(redistribute(layers, Layout("loop", pp, count), head))
            for count in counts
        }
        tried = counts_of_chunks(pp, layers, head)
        for count in counts:
            assert any(one <= count and largest[one] <= largest[count] for one in tried)
            assert count in tried or layers % (pp * count)
        assert len(tried) <= 2 * (2 * layers / pp) ** 0.5 + 1


def test_one_stage_more_or_less_is_beside_a_choice():
    choice = next(c for c in space_of(config_of()).choices if c.num_chunks == 2)
    assert [one.num_chunks for one in with_other_chunks(choice, 6 * choice.degrees.pp)] == [3]
    wide = replace(choice, num_chunks=5, placement="balanced")
    found = with_other_chunks(wide, 6 * choice.degrees.pp)
    assert [(one.num_chunks, one.placement) for one in found] == [(4, "balanced"), (6, "even")]
    assert with_other_chunks(replace(choice, num_chunks=None), 6) == []


@pytest.mark.parametrize(
    "word",
    [
        "micro_batch_size=3",
        "schedule=gpipe",
        "parallel.placement=redistribute",
        "parallel.offload_activations=0.5",
    ],
)
def test_what_was_typed_is_a_choice_with_values_that_no_search_tries(word):
    words = ["model=nano", "parallel.pp=2", "parallel.dp=2", "vocab=none", "num_microbatches=6"]
    config = load_config([*words, "run.device=cuda", "model.num_layers=8", word])
    space = space_of(config)
    assert space.choices.count(as_typed(config)) == 1
    assert as_typed(config) not in space_of(config, Kept({"parallel.pp": 4})).choices


def test_what_was_typed_is_no_choice_where_it_is_of_another_batch_or_moves_to_the_same_memory():
    words = ["model=nano", "cluster=laptop", "cluster.gpus_per_node=4", "parallel.pp=2"]
    assert as_typed(load_config([*words, "num_microbatches=7"])) is None
    typed = as_typed(config := load_config([*words, "num_microbatches=8", "parallel.dp=2"]))
    assert typed.num_microbatches == 8
    offloading = replace(config, parallel=replace(config.parallel, offload_activations=0.5))
    assert as_typed(offloading) not in space_of(offloading).choices
    whole = load_config([*words[:3], "num_microbatches=8", "parallel.pp=1", "vocab=one_barrier"])
    assert as_typed(whole).vocab == "none"


def test_what_has_too_many_passes_to_be_planned_is_ruled_out_and_counted(monkeypatch):
    config = config_of(batch=24)
    every = space_of(config).choices
    monkeypatch.setattr(space_module, "MOST_FORWARD_PASSES", 48)
    space = space_of(config)
    passes = [one.layout.num_stages * one.num_microbatches for one in every]
    assert space.choices == tuple(
        one for one, count in zip(every, passes, strict=True) if count <= 48
    )
    assert space.excluded[TOO_LONG] == sum(count > 48 for count in passes) > 0


def test_stages_that_recompute_alike_are_typed_as_runs():
    typed = "parallel.recompute_per_stage=[3*full,none,selective,2*none]"
    config = load_config(["model=nano", "parallel.pp=7", typed])
    whole = (*3 * ("full",), "none", "selective", "none", "none")
    assert config.parallel.recompute_per_stage == whole
    choice = replace(space_of(NANO).choices[0], recompute_per_stage=whole)
    assert typed in choice.overrides(NANO).split()
    assert typed in choice.changes(NANO).split()
    assert choice.changes(choice.applied(NANO)) == ""
    with pytest.raises(ConfigError, match="'2x\\*full' is not known"):
        load_config(["model=nano", "parallel.recompute_per_stage=[2x*full]"])


def test_neighbours_differ_in_one_thing_and_lead_from_any_choice_to_all_others():
    choices = space_of(config_of(per_node=2, batch=2)).choices
    (start,) = (
        choice
        for choice in choices
        if (choice.degrees.pp, choice.schedule, choice.num_chunks) == (2, "interleaved", 3)
        and (choice.vocab, choice.recompute, choice.placement) == ("none", "full", "even")
        and (choice.micro_batch_size, choice.recompute_where_needed) == (1, False)
    )
    near = neighbours(start, choices)
    assert start not in near
    assert replace(start, recompute="none") in near
    assert replace(start, placement="redistribute") in near
    assert replace(start, vocab="one_barrier", placement="redistribute") not in choices
    assert replace(start, vocab="one_barrier") in near
    assert replace(start, num_chunks=2, placement="balanced") in near
    assert replace(start, num_chunks=2, placement="balanced", recompute="none") not in near
    for other in near:
        assert start in neighbours(other, choices) or other.degrees.pp == 1
    same = start.micro_batch_size, start.recompute, start.recompute_where_needed
    for other in choices:  # one rank has no choice of the schedule and the algorithm
        if other.degrees == Degrees(2, 1, 1) and not other.sequence_parallel:
            settings = other.micro_batch_size, other.recompute, other.recompute_where_needed
            assert (other in near) is (settings == same)
    further = neighbours(start, choices, 2)
    assert not {start, *near} & set(further)
    assert replace(start, num_chunks=2, placement="balanced", recompute="none") in further
    some = [other for other in further[::20] if other.degrees.pp > 1]
    assert all(start in neighbours(other, choices, 2) for other in some)
    moving = neighbours(replace(start, offload=0.5), choices)
    assert moving == [replace(one, offload=0.5) for one in near]
    reached, waiting = {start}, [start]
    while waiting:
        new = set(neighbours(waiting.pop(), choices)) - reached
        reached |= new
        waiting += new
    assert reached == set(choices)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("name", ["adamw", "zero1", "offload"])
def test_optimizers_are_sharded_whole_and_on_gpus_in_host_memory(device, dp, name):
    typed = replace(NANO.optim, name="zero1" if name == "offload" else name)
    typed = replace(typed, offload=name == "offload", lr=0.5)
    found = optimizers_of(replace(config_of(device=device), optim=typed), dp)
    kinds = [(optim.name, optim.offload) for optim in found]
    alone = [(typed.name, False)] if name != "offload" else [("adamw", False)]
    expected = [("zero1", False), ("adamw", False)] if dp > 1 else alone
    assert kinds == expected + [("zero1", True)] * (device == "cuda")
    assert {optim.lr for optim in found} == {0.5}


def test_what_has_no_vocabulary_parallelism_is_otherwise_as_it_was_typed():
    config = config_of(batch=3)
    parallel = replace(
        config.parallel, recompute="selective", offload_activations=0.5, sequence_parallel=False
    )
    config = replace(config, parallel=parallel, micro_batch_size=2)
    for per_stage, strongest in ((None, "selective"), (("none", "full"), "full")):
        recompute = "none" if per_stage else "selective"
        other = replace(parallel, recompute=recompute, recompute_per_stage=per_stage)
        typed = replace(config, parallel=other)
        space = without_vocabulary_of(typed, Degrees(1, 2, 2))
        expected = {
            (name, chunks, place, needed)
            for name, chunks, vocab, place, kind, needed, split in variants(config, 2, 2)
            if vocab == "none" and kind == strongest and not split
            if per_stage or not needed
        }
        found = [
            (c.schedule, c.num_chunks, c.placement, c.recompute_where_needed) for c in space.choices
        ]
        assert len(found) == len(set(found))
        assert set(found) == expected
        for choice in space.choices:
            assert (choice.micro_batch_size, choice.num_microbatches) == (2, 3)
            assert (choice.offload, choice.vocab) == (0.5, "none")
            assert choice.degrees == Degrees(1, 2, 2)
        assert space.optimizers == (config.optim,)
    whole = without_vocabulary_of(
        replace(config, parallel=replace(parallel, sequence_parallel=True)), Degrees(1, 2, 2)
    )
    assert {choice.sequence_parallel for choice in whole.choices} == {True}


def test_the_choices_of_a_setting_are_those_that_are_searched_and_the_one_that_is_kept():
    kept = Kept({"micro_batch_size": 3})
    assert kept.with_value("micro_batch_size", (1, 2)) == (1, 2, 3)
    assert kept.with_value("micro_batch_size", (1, 3)) == (1, 3)
    assert kept.with_value("schedule.name", ("a",)) == ("a",)
    sizes = {choice.micro_batch_size for choice in space_of(config_of(), kept).choices}
    assert sizes == {3}


def kept_of(*names, **changes):
    return Kept.of(replace(config_of(), **changes), names)


def test_what_is_kept_has_the_values_that_are_typed():
    schedule = replace(NANO.schedule, name="gpipe")
    found = kept_of("schedule", "vocab.algorithm", "optim", "micro_batch_size", schedule=schedule)
    assert found.values == {
        "schedule.name": "gpipe",
        "vocab.algorithm": NANO.vocab.algorithm,
        "optim.name": "adamw",
        "optim.offload": False,
        "micro_batch_size": 1,
    }
    assert found.words.startswith("schedule.name=gpipe, vocab.algorithm=")
    assert found.words.endswith("optim.name=adamw, optim.offload=false, micro_batch_size=1")
    assert found.has_word("optim.name=zero1")
    assert found.has_word("+schedule=gpipe")
    assert not found.has_word("parallel.tp=2")
    assert (settings_of("~vocab=none"), settings_of("parallel.tp=2")) == (
        ("vocab.algorithm",),
        ("parallel.tp",),
    )


@pytest.mark.parametrize(
    ("names", "changes", "words"),
    [
        (("parallel",), {}, "--keep parallel: name its settings, as in --keep parallel.tp"),
        (("num_microbatches",), {}, "--keep num_microbatches: a search sets it and cannot keep"),
        (("vocab.shards",), {}, "--keep vocab.shards: a search sets it and cannot keep it"),
        (("parallel.pp",), {}, "--keep parallel.pp: it is not set; add parallel.pp=8, for ex"),
        (("schedul",), {}, "--keep schedul is not known (did you mean schedule?)"),
        (("run.steps",), {}, "--keep run.steps is not known"),
        (
            ("schedule",),
            {"schedule": replace(NANO.schedule, name="auto")},
            "--keep schedule.name: a search keeps one of ",
        ),
        (
            ("schedule",),
            {"schedule": replace(NANO.schedule, name="gpipe", file="x.txt")},
            "--keep schedule.name: a search keeps one of ",
        ),
        (
            ("vocab",),
            {"vocab": replace(NANO.vocab, algorithm="auto")},
            "--keep vocab.algorithm: vocab=auto is any; drop one of the two",
        ),
    ],
)
def test_what_cannot_be_kept_is_named(names, changes, words):
    with pytest.raises(ConfigError) as raised:
        kept_of(*names, **changes)
    assert str(raised.value).startswith(words)
    if "schedule" in changes:
        assert str(raised.value).endswith("x.txt" if changes["schedule"].file else "auto")


def test_a_file_or_any_algorithm_may_be_typed_where_it_is_not_kept():
    schedule = replace(NANO.schedule, name="auto", file="x.txt")
    vocab = replace(NANO.vocab, algorithm="auto")
    found = kept_of("micro_batch_size", schedule=schedule, vocab=vocab)
    assert found.values == {"micro_batch_size": 1}


@pytest.mark.parametrize(
    ("name", "value", "having", "lacking"),
    [
        ("schedule.num_chunks", 3, ({"num_chunks": 3}, {"num_chunks": None}), ({"num_chunks": 2},)),
        (
            "parallel.placement",
            "even",
            ({"placement": "even"}, {"placement": "balanced"}),
            ({"placement": "redistribute"},),
        ),
        (
            "parallel.placement",
            "redistribute",
            ({"placement": "redistribute"},),
            ({"placement": "even"}, {"placement": "balanced"}),
        ),
        (
            "parallel.recompute",
            "full",
            ({"recompute": "full"},),
            ({"recompute": "none"}, {"recompute": "full", "recompute_where_needed": True}),
        ),
        (
            "parallel.sequence_parallel",
            True,
            ({"sequence_parallel": True}, {"degrees": Degrees(1, 2, 1)}),
            ({"sequence_parallel": False},),
        ),
        ("parallel.tp", 2, ({},), ({"degrees": Degrees(2, 2, 1)},)),
        ("parallel.offload_activations", 0.5, ({"offload": 0.5},), ({},)),
        ("optim.name", "zero1", ({},), ()),
    ],
)
def test_a_choice_has_what_is_kept_or_the_words_against_it(name, value, having, lacking):
    choice = Choice(Degrees(1, 2, 2), 1, 4, "interleaved", "none", "none")
    kept = Kept({"micro_batch_size": 1, name: value})
    for changes in having:
        assert kept.against(replace(choice, **changes)) is None, changes
    for changes in lacking:
        word = str(value).lower() if isinstance(value, bool) else value
        assert kept.against(replace(choice, **changes)) == f"--keep {name}={word}", changes
    assert kept.against(replace(choice, micro_batch_size=2)) == "--keep micro_batch_size=1"


def test_a_choice_is_applied_whole_and_its_overrides_are_what_differs():
    choice = Choice(
        *(Degrees(2, 4, 1), 3, 7, "interleaved", "one_barrier", "full"),
        num_chunks=2,
        offload=0.5,
        balance=True,
        optimizer=replace(NANO.optim, name="zero1"),
    )
    typed = replace(
        config_of(),
        schedule=replace(NANO.schedule, file="x.txt", cap_gib=None),
        vocab=replace(NANO.vocab, shards=(1, 2)),
        parallel=replace(NANO.parallel, layers_per_stage=(3, 3), tp=2, recompute="none"),
    )
    found = choice.applied(typed)
    assert (found.schedule.name, found.schedule.num_chunks) == ("interleaved", 2)
    assert (found.schedule.file, found.vocab.shards, found.vocab.balance) == (None, None, True)
    parallel = found.parallel
    assert (parallel.dp, parallel.pp, parallel.tp) == (2, 4, 1)
    assert (parallel.layers_per_stage, parallel.recompute) == (None, "full")
    assert (parallel.offload_activations, found.optim.name) == (0.5, "zero1")
    assert (found.micro_batch_size, found.num_microbatches) == (3, 7)
    words = choice.overrides(typed).split()
    assert words == [
        *("parallel.dp=2", "parallel.pp=4", "parallel.tp=1", "schedule.name=interleaved"),
        *("vocab.algorithm=one_barrier", "parallel.recompute=full", "micro_batch_size=3"),
        *("num_microbatches=7", "schedule.num_chunks=2", "parallel.placement=balanced"),
        *("parallel.layers_per_stage=null", "parallel.offload_activations=0.5"),
        *("optim.name=zero1", "vocab.shards=null", "vocab.balance=true", "schedule.file=null"),
    ]
    assert not replace(choice, vocab="none").applied(typed).vocab.balance, "has no rows to balance"
    mixed = replace(choice, recompute_per_stage=("full", "none"), optimizer=None)
    found = mixed.applied(typed)
    assert (found.parallel.recompute, found.parallel.recompute_per_stage) == (
        "none",
        ("full", "none"),
    )
    assert found.optim == typed.optim
    assert "parallel.recompute_per_stage=[full,none]" in mixed.overrides(typed)
    assert (mixed.splits_vocabulary, replace(mixed, vocab="none").splits_vocabulary) == (
        True,
        False,
    )
    assert not replace(mixed, degrees=Degrees(8, 1, 1)).splits_vocabulary
    assert mixed.layout.num_stages == 8


def test_what_is_typed_and_searched_is_told():
    words = ["model=nano", "+parallel.tp=2", "schedule=gpipe", "num_microbatches=3"]
    words += ["~vocab.shards", "optim.lr=1", "micro_batch_size=2", "parallel=redistribute"]
    assert searched_words(words) == [
        *("+parallel.tp=2", "schedule=gpipe", "~vocab.shards", "micro_batch_size=2"),
        "parallel=redistribute",
    ]


def test_numbers_and_lists_are_written_as_they_are_typed():
    """One number has one spelling, whether it is proposed alone or by a choice."""
    for value, word in ((None, "null"), (True, "true"), (3, "3"), (0.5, "0.5"), ((1, 2), "[1,2]")):
        assert word_of(value) == word
    for value in (0.0, 0.05, 1.0, 40.0, 40.25, 1e-5, 1e20):
        assert float(word_of(value)) == value
        assert not word_of(value).endswith(".0")
    config = NANO
    whole = replace(config, parallel=replace(config.parallel, offload_activations=1.0))
    assert changes_of(config, whole) == "parallel.offload_activations=1"
    choice = replace(choice_of(config, Degrees(1, 4, 1)), offload=1.0)
    assert choice.changes(config).split().count("parallel.offload_activations=1") == 1


def test_other_passes_in_the_same_stages_differ_in_the_schedule_or_the_algorithm():
    for schedule, num_chunks in (("v_half", None), ("interleaved", 2), ("1f1b", None)):
        for vocab in ("one_barrier", "none"):
            choice = Choice(
                *(Degrees(1, 4, 2), 1, 16, schedule, vocab, "full"),
                num_chunks=num_chunks,
                recompute_per_stage=("full", "none") * (2 if schedule == "1f1b" else 4),
                balance=vocab != "none",
            )
            found = in_the_same_stages(choice)
            schedules = {other.schedule for other in found if other.vocab == vocab}
            vocabs = {other.vocab for other in found if other.schedule == schedule}
            assert len(found) == len(set(found)) == len(schedules) + len(vocabs)
            assert vocabs == (
                set(searched_algorithms()) - {"none", vocab} if choice.balance else set()
            )
            assert schedules == {
                name
                for name in set(searched_schedules()) - {schedule}
                if GENERATORS[name].layout == choice.layout.name
            }
            for other in found:
                assert replace(other, schedule=schedule, vocab=vocab) == choice


def test_single_stages_recompute_less_or_more_and_the_rest_stays():
    choice = Choice(Degrees(1, 4, 2), 1, 16, "1f1b", "one_barrier", "full")
    mixed = replace(choice, recompute_per_stage=("none", "selective", "full", "selective"))

    def others(choice, **which):
        found = choice.with_other_stage(**which)
        return {(one.recompute, one.recompute_per_stage) for one in found}

    kinds = {"n": "none", "s": "selective", "f": "full"}

    def of(words):
        return {tuple(kinds[letter] for letter in word) for word in words.split()}

    assert others(mixed, fewer=True) == {
        (max(one, key=RECOMPUTE.index), one) for one in of("nnfs nsns nsss nsfn")
    }
    assert others(mixed, fewer=False) == {("full", one) for one in of("ssfs fsfs nffs nsff")}
    assert others(mixed, fewer=False, rank=0) == {("full", one) for one in of("ssfs fsfs")}
    folded = replace(mixed, schedule="v_half", degrees=Degrees(1, 2, 2))
    assert others(folded, fewer=True, rank=1) == {
        (max(one, key=RECOMPUTE.index), one) for one in of("nnfs nsss nsns")
    }
    none = replace(mixed, recompute="none", recompute_per_stage=None)
    assert others(none, fewer=True) == set()
    assert others(none, fewer=False) == {
        (max(one, key=RECOMPUTE.index), one)
        for one in of("snnn nsnn nnsn nnns fnnn nfnn nnfn nnnf")
    }
    last = replace(mixed, recompute_per_stage=("selective", "none", "none", "none"))
    assert others(last, fewer=True) == {("none", None)}
