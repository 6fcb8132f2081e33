"""A number of things is one thing or several, and times that are almost alike are as fast."""

from __future__ import annotations

import random
import re

import pytest

from vp_train.commands.simulate import headline
from vp_train.config import ConfigError
from vp_train.planning.degrees import split_ranks
from vp_train.settings import load_config
from vp_train.units import amount, compared, count_words, is_as_fast, is_faster

# One thing that is said as if it were several.
_ONE_OF_SEVERAL = re.compile(r"(?<![\w.,/])1 (?:ranks|microbatches|layers|steps|GPUs|replicas)\b")


@pytest.mark.parametrize(
    ("count", "name", "words"),
    [
        (1, "rank", "1 rank"),
        (0, "microbatch", "0 microbatches"),
        (1_024, "microbatch", "1,024 microbatches"),
        (2, "more rank", "2 more ranks"),
    ],
)
def test_a_number_of_things_is_one_thing_or_several(count, name, words):
    assert count_words(count, name) == words


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (7, "7 FLOP"),
        (999_499, "999,499 FLOP"),
        (3e9, "3 GFLOP"),
        (9.995e8, "1 GFLOP"),
        (70.24e9, "70.2 GFLOP"),
        (2e12, "2 TFLOP"),
        (2.31e12, "2.31 TFLOP"),
        (999.6e15, "1 EFLOP"),
        (3.9e22, "39 ZFLOP"),
    ],
)
def test_an_amount_has_three_digits_and_the_prefix_of_its_size(count, words):
    assert f"{amount(count)}FLOP" == words


def test_one_rank_is_no_ranks():
    config = load_config(["model.num_layers=1", "num_microbatches=1", "parallel.pp=1"])
    words = headline(config)
    with pytest.raises(ConfigError) as caught:
        split_ranks(load_config(["parallel.pp=1", "parallel.dp=1"]).parallel, 2)
    for said in (words, str(caught.value)):
        assert re.search("1 (rank|layer)", said)
        assert not _ONE_OF_SEVERAL.search(said)


@pytest.mark.parametrize(
    ("seconds", "faster", "as_fast", "words"),
    [
        (10.0, False, True, "as fast"),
        (9.901, False, True, "as fast"),
        (9.89, True, False, "1.1% faster"),
        (10.1, False, True, "as fast"),
        (10.11, False, False, "1.1% slower"),
        (15.0, False, False, "50.0% slower"),
    ],
)
def test_times_win_by_a_hundredth_of_the_longer_one_and_are_said_to_be_as_fast_below(
    seconds, faster, as_fast, words
):
    assert (is_faster(seconds, 10.0), is_as_fast(seconds, 10.0)) == (faster, as_fast)
    assert compared(seconds, 10.0) == words


def test_one_of_two_times_wins_or_both_are_as_fast_whichever_is_named_first():
    chosen, ties = random.Random(5), 0
    for _ in range(1000):
        one, other = chosen.uniform(9.8, 10.2), 10.0
        wins = is_faster(one, other), is_faster(other, one)
        assert is_as_fast(one, other) is is_as_fast(other, one) is not any(wins)
        said = compared(one, other), compared(other, one)
        assert [words == "as fast" for words in said] == [not any(wins)] * 2
        assert wins == tuple(words.endswith("faster") for words in said)
        ties += not any(wins)
    assert 0 < ties < 1000
