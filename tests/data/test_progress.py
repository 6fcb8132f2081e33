"""Progress says how far work is and how long it still takes, ever more rarely."""

from __future__ import annotations

import pytest

from vp_train.data import progress
from vp_train.data.progress import far, reported

MIB = 1 << 20


@pytest.mark.parametrize(
    ("done", "total", "seconds", "words"),
    [
        (0, 100 * MIB, 10, "0 B of 100.0 MiB, 10 s"),
        (50 * MIB, 150 * MIB, 10, "50.0 MiB of 150.0 MiB, 5.0 MiB/s, 20 s left"),
        (50 * MIB, 150 * MIB, 100, "50.0 MiB of 150.0 MiB, 512.0 KiB/s, 3 min left"),
        (50 * MIB, 150 * MIB, 4_500, "50.0 MiB of 150.0 MiB, 11.4 KiB/s, 2.5 h left"),
        (150 * MIB, 150 * MIB, 10, "150.0 MiB of 150.0 MiB, 15.0 MiB/s, 0 s left"),
    ],
)
def test_what_is_left_takes_its_share_of_the_time_so_far(
    done: int, total: int, seconds: float, words: str
) -> None:
    assert far(done, total, seconds) == words


def test_plain_lines_come_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pauses: list[float] = []

    class Event:
        def wait(self, seconds: float) -> bool:
            pauses.append(seconds)
            return len(pauses) > 6

        def set(self) -> None:
            pass

    monkeypatch.setattr(progress, "Event", Event)
    with reported("working", lambda seconds: f"after {len(pauses)}"):
        pass
    assert pauses == [10, 20, 40, 60, 60, 60, 60]
    said = capsys.readouterr().err.splitlines()
    assert said == ["working", *(f"working: after {number}" for number in range(1, 7))]
    pauses.clear()
    with reported("working", lambda seconds: f"after {len(pauses)}", at_once=False):
        pass
    assert capsys.readouterr().err.splitlines() == said[1:]
