"""Ranks have one place each, open degrees fill the ranks, and what does not divide is named."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from vp_train.config import ConfigError, ModelConfig, ParallelConfig
from vp_train.planning.degrees import (
    MOST_ON_A_NODE,
    Degrees,
    check_float8_split,
    check_node,
    check_tensor_split,
    split_ranks,
    wanted_ranks,
)

MODEL = ModelConfig(
    hidden_size=96, num_heads=6, num_query_groups=3, head_size=32, ffn_hidden_size=48, seq_length=10
)


def test_a_rank_has_one_place_and_a_place_one_rank():
    """Tensor-parallel ranks are neighbours, then come those of a pipeline, then replicas."""
    for dp, pp, tp in product((1, 2, 3), (1, 2, 5), (1, 4)):
        degrees = Degrees(dp, pp, tp)
        assert degrees.num_ranks == dp * pp * tp
        places = list(product(range(dp), range(pp), range(tp)))
        assert [degrees.place(rank) for rank in range(degrees.num_ranks)] == places
        assert [degrees.rank(*place) for place in places] == list(range(len(places)))
        assert str(degrees) == f"dp={dp} x pp={pp} x tp={tp}"


@pytest.mark.parametrize(
    ("dp", "pp", "tp", "num_ranks", "expected"),
    [
        (None, None, 1, 6, (1, 6, 1)),
        (None, None, 2, 6, (1, 3, 2)),
        (2, None, 1, 6, (2, 3, 1)),
        (None, 2, 1, 6, (3, 2, 1)),
        (None, 2, 3, 6, (1, 2, 3)),
        (3, 2, 1, 6, (3, 2, 1)),
        (1, 1, 1, 1, (1, 1, 1)),
        (3, 1, 2, 6, (3, 1, 2)),
    ],
)
def test_degrees_that_are_open_follow_from_the_ranks(dp, pp, tp, num_ranks, expected):
    assert split_ranks(ParallelConfig(dp=dp, pp=pp, tp=tp), num_ranks) == Degrees(*expected)


@pytest.mark.parametrize(
    ("dp", "pp", "tp", "num_ranks", "words"),
    [
        (None, 4, 1, 6, "parallel.pp=4 needs a multiple of 4 ranks, but 6 "),
        (2, 2, 1, 8, "parallel.dp=2 x parallel.pp=2 needs 4 ranks, but 8 "),
        (2, 2, 1, 2, "parallel.dp=2 x parallel.pp=2 needs 4 ranks, but 2 "),
        (1, 1, 1, 2, "parallel.pp=1 needs 1 rank, but 2 "),
        (None, None, 4, 6, "parallel.tp=4 needs a multiple of 4 ranks, but 6 "),
        (3, None, 2, 8, "parallel.dp=3 x parallel.tp=2 needs a multiple of 6 ranks, but 8 "),
    ],
)
def test_ranks_that_do_not_split_are_refused_with_all_numbers(dp, pp, tp, num_ranks, words):
    parallel = ParallelConfig(dp=dp, pp=pp, tp=tp)
    with pytest.raises(ConfigError) as raised:
        split_ranks(parallel, num_ranks)
    assert str(raised.value).startswith(f"{words}were started; start as many (--ranks or torchrun")
    with pytest.raises(ConfigError) as raised:
        split_ranks(parallel, num_ranks, otherwise="are there")
    assert str(raised.value) == f"{words}are there"


def test_ranks_that_are_wanted_are_four_stages_unless_degrees_say_otherwise():
    assert wanted_ranks(ParallelConfig()) == 4
    assert wanted_ranks(ParallelConfig(tp=2)) == 8
    assert wanted_ranks(ParallelConfig(dp=3, pp=2, tp=2)) == 12
    assert wanted_ranks(ParallelConfig(dp=3)) == 12


def test_a_machine_starts_so_many_ranks_and_no_more():
    assert MOST_ON_A_NODE == 256
    check_node(256)
    with pytest.raises(ConfigError, match="1,000 ranks on one machine, where at most 256 start"):
        check_node(1_000)
    with pytest.raises(ConfigError, match="257 ranks"):
        check_node(257)


def test_a_tensor_parallel_degree_divides_heads_groups_and_widths():
    for name in ("num_heads", "num_query_groups", "ffn_hidden_size"):
        for tp in (1, 2, 3, 5, 6):
            sizes = {"num_heads": 30, "num_query_groups": 30, "ffn_hidden_size": 30}
            if name == "num_heads":
                sizes |= {"num_query_groups": 6, "num_heads": 6}
            else:
                sizes[name] = 6
            model, value = replace(MODEL, **sizes), 6
            if value % tp:
                first = "num_heads" if name == "num_heads" else name
                words = f"model.{first}=6 does not split over parallel.tp={tp}; "
                words += "use parallel.tp=1, 2, 3 or 6"
                with pytest.raises(ConfigError) as raised:
                    check_tensor_split(model, tp)
                assert str(raised.value) == words
            else:
                check_tensor_split(model, tp)


@pytest.mark.parametrize(
    ("num_ranks", "more", "tp", "words"),
    [
        (
            8,
            {},
            8,
            "model.num_heads=28 does not split over parallel.tp=8; use parallel.tp=1, 2 or 4",
        ),
        (6, {}, 3, "parallel.tp=3; use parallel.tp=1 or 2"),
        (3, {}, 3, "parallel.tp=3; use parallel.tp=1"),
        (8, {"seq_length": 6}, 8, "parallel.tp=8; use parallel.tp=2"),
        (8, {"seq_length": 7}, 8, "8; drop parallel.sequence_parallel, and use parallel.tp=1"),
        (
            8,
            {"seq_length": 6},
            4,
            "model.seq_length=6 does not split over parallel.tp=4; use parallel.tp=2, or drop "
            "parallel.sequence_parallel",
        ),
        (8, {"seq_length": 7}, 4, "over parallel.tp=4; drop parallel.sequence_parallel"),
    ],
)
def test_degrees_are_named_that_divide_all_that_is_split_and_all_ranks(num_ranks, more, tp, words):
    model = replace(MODEL, hidden_size=28 * 64, num_heads=28, num_query_groups=4)
    model = replace(model, ffn_hidden_size=1024, **more)
    with pytest.raises(ConfigError) as raised:
        check_tensor_split(model, tp, sequences=bool(more), num_ranks=num_ranks)
    assert str(raised.value).endswith(words)


def test_sequences_split_only_where_that_is_asked_and_over_several_ranks():
    model = replace(MODEL, num_heads=6, num_query_groups=6)
    check_tensor_split(model, 3)
    check_tensor_split(model, 2, sequences=True)
    with pytest.raises(ConfigError, match=r"model\.seq_length=10 does not split over parallel"):
        check_tensor_split(model, 3, sequences=True)
    with pytest.raises(ConfigError, match=r"nothing to split over with parallel\.tp=1; drop it"):
        check_tensor_split(model, 1, sequences=True)
    check_tensor_split(model, 1)


def test_a_norm_over_all_heads_needs_them_on_one_rank():
    whole = replace(MODEL, qk_norm=True, qk_norm_whole=True)
    check_tensor_split(whole, 1)
    with pytest.raises(ConfigError, match=r"qk_norm_whole=true does not go with parallel\.tp=3"):
        check_tensor_split(whole, 3)
    check_tensor_split(replace(whole, qk_norm_whole=False), 3)


@pytest.mark.parametrize(
    ("changes", "tp", "words"),
    [
        ({}, 1, None),
        ({}, 3, None),
        ({"head_size": 8}, 1, None),
        ({"head_size": 8}, 3, None),
        ({"hidden_size": 88}, 1, "model.hidden_size is 88, and"),
        ({"head_size": 28}, 1, "the width of the queries is 168, and"),
        ({"head_size": 4}, 3, "the width of the queries is 8 on each of parallel.tp=3 ranks"),
        ({"ffn_hidden_size": 40}, 1, "model.ffn_hidden_size is 40, and"),
        ({"ffn_hidden_size": 24}, 3, "model.ffn_hidden_size is 8 on each of parallel.tp=3 ranks"),
    ],
)
def test_a_scaled_product_needs_widths_that_sixteen_divides(changes, tp, words):
    model = replace(MODEL, **changes)
    if words is None:
        check_float8_split(model, tp)
        return
    with pytest.raises(ConfigError) as raised:
        check_float8_split(model, tp)
    assert str(raised.value).startswith(f"run.linear_dtype=float8: {words}")


def test_queries_keys_and_values_are_one_product():
    """Queries of 16 with keys and values of 8 each are 32 wide; of 16 and 4 each 24."""
    one = replace(MODEL, hidden_size=96, num_heads=4, num_query_groups=2, head_size=4)
    check_float8_split(replace(one, num_heads=4, num_query_groups=2, head_size=8), 1)
    with pytest.raises(ConfigError, match="the width of queries, keys and values is 24,"):
        check_float8_split(replace(one, num_query_groups=1), 1)
