"""Pieces are the text, are bounded, and depend on nothing but the text."""

from __future__ import annotations

import random
import re
import time

import pytest

from vp_train.data.pieces import pieces


def plainly(text: str, longest_run: int, longest_piece: int) -> list[str]:
    """Cut a text as `pieces` promises, in time that grows with the square of its runs."""
    found = []
    while text:
        window = text[:longest_piece]
        run = re.search(rf"\S{{{longest_run}}}|\s{{{longest_run}}}", window)
        stop = len(window) if run is None else run.end()
        if run is None and len(text) > longest_piece and (blank := window.rfind(" ", 1)) > 0:
            stop = blank
        found.append(text[:stop])
        text = text[stop:]
    return found


@pytest.mark.parametrize("seed", range(20))
def test_pieces_depend_on_the_text_alone(seed: int) -> None:
    coin = random.Random(seed)
    for _ in range(20):
        letters = coin.choices("ab \n", [6, 2, 2, 1], k=coin.randrange(120))
        text = "".join(letter * coin.choice((1, 1, 1, 20)) for letter in letters)
        longest_run, longest_piece = coin.randrange(2, 30), coin.randrange(30, 80)
        cuts = sorted(coin.choices(range(len(text) + 1), k=4))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        found = list(pieces(parts, longest_run, longest_piece))
        assert found == plainly(text, longest_run, longest_piece)
        assert "".join(found) == text
        assert all(0 < len(piece) <= longest_piece for piece in found)
        runs = [run for piece in found for run in re.findall(r"\S+|\s+", piece)]
        assert all(len(run) <= longest_run for run in runs)


def test_long_text_is_cut_at_blanks() -> None:
    assert list(pieces(["one two three four"], 8, 10)) == ["one two", " three", " four"]


@pytest.mark.parametrize("word", ["a", " ", "a" * 999 + " ", "ab "], ids=len)
def test_cutting_takes_linear_time(word: str) -> None:
    """A search that goes back would take a minute for words that are just short enough."""
    text, before = word * (2_000_000 // len(word)), time.process_time()
    assert sum(map(len, pieces([text], 1_000, 1 << 18))) == len(text)
    assert time.process_time() - before < 2
