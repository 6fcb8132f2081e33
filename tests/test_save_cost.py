"""`benchmarks/save_cost.py` says what to change where it has nothing to compare with."""

from __future__ import annotations

import pytest


def test_a_run_in_which_every_step_saves_or_writes_is_told_to_save_less_often(monkeypatch):
    import save_cost

    rows = [["save", 1.0, 1.0], *([["beside", 1.0, 1.0]] * 3)]
    rank = [rows, [0.1], 8, 8]
    monkeypatch.setattr(save_cost, "result_of_job", lambda *_: [rank, rank])
    with pytest.raises(SystemExit, match=r"^--every 4: .* for example --every 8$"):
        save_cost.measure(2, 4, 1)
    rank[0] = [*rows, ["plain", 0.5, 0.5]]
    assert save_cost.measure(2, 5, 1)["cost"] == {"save": 1.0, "beside": 1.0}
