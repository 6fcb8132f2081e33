"""`benchmarks/rehearsal.py` runs, and a step is not shorter than its passes allow.

The benchmark itself measures how exact it is.
"""

import pytest
import torch

from benchmarks.rehearsal import Case, Setup, rehearse


@pytest.mark.slow
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
    for _ in range(5):  # a machine that does other things may hold up passes or the step
        rows = ranks(3).run(rehearse, [Case.parse(case)], setup)
        ((row,), *others) = rows
        assert all(other == [row] for other in others)
        if 0.9 < row.measured_seconds / row.simulated_seconds < 3:
            return
    pytest.fail(f"{row}")
