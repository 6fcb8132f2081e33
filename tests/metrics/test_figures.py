"""The figures of a step are means over ranks that add up, and each has its words in the docs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vp_train.config import ClusterConfig
from vp_train.config.figures import PROGRESS
from vp_train.metrics.figures import RankFigures, Spent, figures_of
from vp_train.pipeline.stopwatch import Part
from vp_train.planning.cluster import known_peak_flops
from vp_train.settings import load_config

PAGE = Path(__file__).parents[2] / "docs" / "monitoring.md"


def rank_of(reserved=0.0, allocated=100.0, **seconds):
    return RankFigures({part: seconds.get(part.value, 0.0) for part in Part}, allocated, reserved)


RANKS = [
    rank_of(forward_backward=5.0, vocabulary=1.0, waiting=2.0, checkpoint=2.0, allocated=80.0),
    rank_of(forward_backward=3.0, vocabulary=1.0, waiting=4.0, validation=2.0, reserved=7.0),
]


def test_the_parts_add_up_to_the_step():
    values = figures_of(RANKS)
    parts = {key: value for key, value in values.items() if key.startswith("seconds/")}
    step, worst = parts.pop("seconds/step"), parts.pop("seconds/waiting_worst")
    assert sum(parts.values()) == step == 10.0
    assert (worst, parts["seconds/waiting_mean"]) == (4.0, 3.0)
    assert len(parts) == len(Part)


def test_a_bubble_is_the_waiting_in_the_time_of_the_passes():
    values = figures_of(RANKS)
    assert values["bubble_worst"] == 0.5
    assert values["bubble_mean"] == pytest.approx((0.25 + 0.5) / 2)
    assert figures_of([rank_of(data=1.0)])["bubble_mean"] == 0.0


def test_mfu_counts_neither_saves_nor_validations_and_is_left_out_where_no_peak_is_known():
    assert "mfu" not in figures_of(RANKS)
    assert figures_of(RANKS, best_seconds=4.0)["mfu"] == pytest.approx(4.0 / 8.0)
    assert known_peak_flops(ClusterConfig(), "bfloat16") is None
    h100 = load_config(["cluster=h100_80g_node"]).cluster
    assert known_peak_flops(h100, "bfloat16") == 9.89e14


def test_memory_is_that_of_the_worst_and_the_mean_rank():
    values = figures_of(RANKS)
    assert (values["memory/allocated_worst"], values["memory/allocated_mean"]) == (100.0, 90.0)
    assert (values["memory/reserved_worst"], values["memory/reserved_mean"]) == (7.0, 3.5)
    assert not [key for key in figures_of([rank_of()]) if "reserved" in key]


def test_figures_survive_the_message_that_carries_them():
    assert [RankFigures.of(rank.numbers()) for rank in RANKS] == RANKS
    with pytest.raises(ValueError, match="shorter"):
        RankFigures.of(RANKS[0].numbers()[:-1])


def test_the_last_words_say_where_the_time_went():
    spent = Spent()
    assert spent.words() == ""
    for _ in range(2):
        spent.add(figures_of(RANKS))
    assert spent.words() == (
        "the time: forward backward 40.0%, waiting 30.0%, vocabulary 10.0%, checkpoint 10.0%, "
        "validation 10.0%"
    )


def test_the_page_of_metrics_has_every_key_and_no_other():
    table, _, _ = PAGE.read_text().partition("## The traced step")
    cells = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    keys = {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}
    known = figures_of(RANKS, best_seconds=1.0).keys() | {"step", "spikes", "skipped_steps"}
    known |= set(PROGRESS)
    known |= {"validation_loss", "bubble_measured", "bubble_predicted"}
    known |= {"validation_bits_per_byte"}
    known |= {f"validation/NAME/{name}" for name in ("loss", "bits_per_byte")}
    assert keys == known | {"gap_measured", "gap_predicted"}
    assert figures_of(RANKS, best_seconds=1.0).keys() <= set(PROGRESS)
