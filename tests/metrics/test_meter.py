"""The memory of a stage is that of its worst rank."""

from __future__ import annotations

from vp_train.metrics.meter import worst_of_stages
from vp_train.planning.degrees import Degrees


def test_the_worst_rank_of_every_stage_counts():
    degrees = Degrees(dp=2, pp=3, tp=2)
    peaks = [7.0, 8.0, 1.0, 2.0, 4.0, 3.0, 9.0, 5.0, 1.0, 1.0, 6.0, 2.0]
    assert worst_of_stages(peaks, degrees) == [9.0, 2.0, 6.0]
