"""Cutting a text into the pieces that are tokenized, in bounded memory and linear time.

The time of a tokenizer grows faster than the length of a word, and its memory by some 100 bytes for
each character.  So a text is cut inside runs without a blank that are too long, and at a blank
where it is long itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache

LONGEST_PIECE = 1 << 20  # characters that are tokenized together, in 160 MB


def pieces(parts: Iterable[str], longest_run: int, longest_piece: int) -> Iterator[str]:
    """Yield the pieces of a text that comes in `parts`.

    The pieces together are the text.  They depend on the text alone, not on how it is parted.  A
    piece has at most `longest_piece` characters, and at most `longest_run` in a row with or without
    a blank.  At most two pieces and a part are kept.
    """
    text, start = "", 0
    for part in parts:
        text, start = text[start:] + part, 0
        while len(text) - start > longest_piece:
            stop = _end_of_piece(text, start, longest_run, longest_piece)
            yield text[start:stop]
            start = stop
    while start < len(text):
        stop = _end_of_piece(text, start, longest_run, longest_piece)
        yield text[start:stop]
        start = stop


def _end_of_piece(text: str, start: int, longest_run: int, longest_piece: int) -> int:
    """Return where the piece that begins at `start` ends."""
    window = min(len(text), start + longest_piece)
    short = _short_runs(longest_run).match(text, start, window)
    long_run = start if short is None else short.end()
    if long_run + longest_run <= window:  # what stopped the match has so many characters
        return long_run + longest_run
    if window == len(text):
        return window
    blank = text.rfind(" ", start + 1, window)
    return blank if blank > 0 else window


@cache
def _short_runs(longest: int) -> re.Pattern[str]:
    """Return the pattern of many runs of fewer than `longest` characters.

    Possessive repetition never goes back, so a match takes linear time.
    """
    counts = f"{{1,{max(1, longest - 1)}}}"
    return re.compile(rf"(?:\S{counts}+(?!\S)|\s{counts}+(?!\s))*+")
