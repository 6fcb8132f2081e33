"""`benchmarks/rehearsal.py` runs, and a step is not shorter than its passes allow.

The benchmark itself measures how exact it is.
"""

import pytest
import torch

from benchmarks.rehearsal import Case, Setup, rehearse


@pytest.mark.parametrize("case", ["1f1b/none", "1f1b", "zb_v/naive"])
def test_a_rehearsed_step_takes_about_as_long_as_simulated(ranks, case):
    setup = Setup(
        microbatches=4,
        layer_seconds=0.01,
        head_in_layers=2.4,
        embedding_seconds=0.001,
        tokens=16,
        hidden=8,
        dtype=torch.float32,
        steps=1,
    )
    rows = ranks(3).run(rehearse, [Case.parse(case)], setup)
    ((row,), *others) = rows
    assert all(other == [row] for other in others)
    assert 0.9 * row.simulated_seconds < row.measured_seconds < 3 * row.simulated_seconds, row
