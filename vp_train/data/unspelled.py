"""Text that a tokenizer cannot spell: its unknown token stands there instead, or the text vanishes.

A tokenizer that falls back on bytes spells everything.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vp_train.config import printable
from vp_train.data.tokenizer import spells_bytes, unknown_token, with_unknown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from vp_train.data.encoding import Piece

_FINE, _LOST, _NEW = range(3)  # what is known of a character
_LONGEST_EXAMPLE = 20  # characters
_UNKNOWN = "\0unknown"  # a token that no vocabulary has


class Tally(Protocol):
    """A count of what a tokenizer could not spell of a text."""

    def add(self, pieces: Sequence[Piece], ids: Sequence[np.ndarray]) -> None:
        """Count the pieces of a text, whose tokens are `ids`."""
        ...

    def as_dict(self) -> dict[str, int | str]:
        """Return the count as a manifest keeps it, {} if all was spelled.

        lost, total: tokens that are unknown, or characters that vanished, and of how many.
        first: the first text that was lost, and where.
        token: the unknown token; no such entry where the text vanished.
        """
        ...


def tally_of(tokenizer: Tokenizer) -> Tally | None:
    """Return a count for texts of a corpus, None if its tokenizer spells everything.

    tokenizer: as `worker.open_tokenizer` gives it.
    """
    if spells_bytes(tokenizer):
        return None
    if (unknown := unknown_token(tokenizer)) is not None:
        return _Unknown(tokenizer, unknown)
    detector = with_unknown(tokenizer, _UNKNOWN)
    return None if detector is None else _Vanished(tokenizer, detector)


def unspelled_words(entry: Mapping[str, int | str]) -> str:
    """Return the warning about the count of a manifest, nothing for an empty one."""
    if not entry:
        return ""
    lost, total, what = int(entry["lost"]), int(entry["total"]), "characters vanish"
    if "token" in entry:
        what = f"tokens are {printable(str(entry['token']))}"
    return (
        f"{lost:,} of {total:,} {what} ({100 * lost / total:.2g} %), "
        f"since the tokenizer cannot spell what stands there: first {entry['first']}; give a "
        "data.tokenizer that can, such as one that falls back on bytes, or leave such text out"
    )


def _depends(code: int) -> bool:
    """Return whether what a normalizer makes of a character may depend on those beside it.

    That is a mark or a jamo, which are joined to others, and a blank, which may be stripped.
    """
    character = chr(code)
    is_joined = unicodedata.combining(character) > 0 or 0x1100 <= code < 0x1200
    return is_joined or character.isspace()


def _example(text: str, origin: str) -> str:
    return printable(f"{text[:_LONGEST_EXAMPLE]!r} in {origin}")[:1_000]


class _Unknown:
    """A count of the unknown token."""

    def __init__(self, tokenizer: Tokenizer, token: str) -> None:
        self._tokenizer, self._token = tokenizer, token
        self._id = tokenizer.token_to_id(token) or 0  # it is not None
        self._lost = self._total = 0
        self._first = ""

    def add(self, pieces: Sequence[Piece], ids: Sequence[np.ndarray]) -> None:
        whole = np.concatenate(ids)
        self._total += len(whole)
        lost = int(np.count_nonzero(whole == self._id))
        if lost and not self._lost:
            number = next(number for number, own in enumerate(ids) if self._id in own)
            self._first = self._example(pieces[number])
        self._lost += lost

    def _example(self, piece: Piece) -> str:
        encoding = self._tokenizer.encode(piece.text, add_special_tokens=False)
        start, stop = encoding.offsets[encoding.ids.index(self._id)]
        return _example(piece.text[start:stop], piece.origin)

    def as_dict(self) -> dict[str, int | str]:
        if not self._lost:
            return {}
        words = {"first": self._first, "token": self._token}
        return {"lost": self._lost, "total": self._total, **words}


class _Vanished:
    """A count of the characters of which a BPE without an unknown token makes nothing.

    Each character is judged once, between two letters: whether an unknown token stands there if the
    tokenizer gets one.  So what a normalizer or a pre-tokenizer changes or removes is not lost.
    """

    def __init__(self, tokenizer: Tokenizer, detector: Tokenizer) -> None:
        self._normalizer, self._detector = tokenizer.normalizer, detector
        self._unknown = detector.token_to_id(_UNKNOWN)
        letters = sorted(one for one in tokenizer.get_vocab() if len(one) == 1 and one.isalnum())
        self._around = next((one for one in letters if not self._loses(one)), "")
        self._kinds = np.full(0x110000, _NEW, dtype=np.uint8)
        self._lost = self._total = 0
        self._first = ""

    def add(self, pieces: Sequence[Piece], ids: Sequence[np.ndarray]) -> None:
        text = "".join(piece.text for piece in pieces)
        self._total += len(text)
        lost = self._find(text)
        if self._normalizer is not None and any(map(_depends, np.unique(lost))):
            normal = (self._normalizer.normalize_str(piece.text) for piece in pieces)
            lost = self._find("".join(normal))
        if len(lost) and not self._lost:
            character = chr(lost[0])
            origins = (piece.origin for piece in pieces if character in piece.text)
            self._first = _example(character, next(origins, pieces[0].origin))
        self._lost += len(lost)

    def _find(self, text: str) -> np.ndarray:
        """Return the characters of a text that are lost, uint32 [n]."""
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        kinds = self._kinds.take(codes)
        if kinds.max(initial=_FINE) == _NEW:
            for code in np.unique(codes[kinds == _NEW]):
                is_lost = self._loses(f"{self._around}{chr(code)}{self._around}")
                self._kinds[code] = _LOST if is_lost else _FINE
            kinds = self._kinds.take(codes)
        lost: np.ndarray = codes[kinds == _LOST]
        return lost

    def _loses(self, text: str) -> bool:
        return self._unknown in self._detector.encode(text, add_special_tokens=False).ids

    def as_dict(self) -> dict[str, int | str]:
        if not self._lost:
            return {}
        return {"lost": self._lost, "total": self._total, "first": self._first}
