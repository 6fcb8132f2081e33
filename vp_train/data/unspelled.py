"""Text that a tokenizer cannot spell: its unknown token stands there instead, or the text vanishes.

A tokenizer that falls back on bytes spells everything.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from vp_train.config import printable
from vp_train.data.tokenizer import marks_words, spells_bytes, unknown_token, with_unknown

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from vp_train.data.encoding import Piece

_FINE, _SUSPECT, _NEW = range(3)  # what is known of a character
_LONGEST_EXAMPLE = 20  # characters
_LEAST = 1e-5  # the share of a text from which on it is a warning
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
    """Return the warning about the count of a manifest, nothing for an empty or a tiny one."""
    if not entry or int(entry["lost"]) < _LEAST * int(entry["total"]):
        return ""
    lost, total, what = int(entry["lost"]), int(entry["total"]), "characters vanish"
    percent = 100 * lost / total
    share = "below 0.01" if percent < 0.01 else "100" if percent >= 99.5 else f"{percent:.2g}"
    if "token" in entry:
        what = f"tokens are {printable(str(entry['token']))}"
    return (
        f"{lost:,} of {total:,} {what} ({share} %), "
        f"since the tokenizer cannot spell what stands there: first {entry['first']}; give a "
        "data.tokenizer that can, such as one that falls back on bytes, or leave such text out"
    )


def _joins(character: str) -> bool:
    """Return whether a normalizer may join a character to the one before it: a mark, or a jamo."""
    first = unicodedata.normalize("NFKD", character)[0]
    return unicodedata.category(first).startswith("M") or "\u1160" <= first < "\u1200"


def _example(text: str, origin: str) -> str:
    return printable(f"{text[:_LONGEST_EXAMPLE]!r} in {origin}")[:1_000]


def _encodings(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """Return what the texts become, with places.  Nothing is known of texts where that fails.

    The library may panic here where it does not without places, and at a character by itself.
    """
    try:
        found: list[Encoding] = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a panic in the library is no Exception
        return []
    return found


def _spans(encoding: Encoding, token_id: int) -> list[tuple[int, int]]:
    """Return from where to where in its text, in characters, each token `token_id` stands."""
    places = np.flatnonzero(np.array(encoding.ids, dtype=np.int64) == token_id)
    found = (encoding.token_to_chars(int(place)) for place in places)
    return [span for span in found if span is not None]


class _Unknown:
    """A count of the unknown token.  Where a text has that token itself, nothing is lost."""

    def __init__(self, tokenizer: Tokenizer, token: str) -> None:
        self._tokenizer, self._token = tokenizer, token
        self._id = tokenizer.token_to_id(token) or 0  # it is not None
        self._lost = self._total = 0
        self._first = ""

    def add(self, pieces: Sequence[Piece], ids: Sequence[np.ndarray]) -> None:
        for piece, own in zip(pieces, ids, strict=True):
            self._total += len(own)
            lost = int(np.count_nonzero(own == self._id))
            if lost and (not self._lost or self._token.lower() in piece.text.lower()):
                texts = self._unknown_texts(piece.text)
                lost = len(texts)
                if lost and not self._lost:
                    self._first = _example(texts[0], piece.origin)
            self._lost += lost

    def _unknown_texts(self, text: str) -> list[str]:
        """Return what of a text is unknown, without what is the token itself."""
        return [
            text[start:stop]
            for encoding in _encodings(self._tokenizer, [text])
            for start, stop in _spans(encoding, self._id)
            if not self._is_token(text[start:stop])
        ]

    def _is_token(self, text: str) -> bool:
        """Return whether a text, as it is normalized, is the token, once or several times."""
        normalizer = self._tokenizer.normalizer
        normal = text if normalizer is None else normalizer.normalize_str(text)
        return self._token in normal and not normal.replace(self._token, "").strip()

    def as_dict(self) -> dict[str, int | str]:
        if not self._lost:
            return {}
        words = {"first": self._first, "token": self._token}
        return {"lost": self._lost, "total": self._total, **words}


class _Vanished:
    """A count of the characters of which a BPE without an unknown token makes nothing.

    A copy of the tokenizer, the detector, has an unknown token.  It encodes the texts that may lose
    something a second time, and the characters where that token stands are lost.  So what a
    normalizer or a pre-tokenizer changes or removes is not.  A text may lose something if a
    character of it is lost between two letters, or may be joined to the one before it.
    """

    def __init__(self, tokenizer: Tokenizer, detector: Tokenizer) -> None:
        self._detector, self._has_normalizer = detector, tokenizer.normalizer is not None
        self._unknown = detector.token_to_id(_UNKNOWN) or 0  # it is not None
        self._is_marked = marks_words(tokenizer)  # what is spelled depends on the place in a word
        letters = sorted(one for one in tokenizer.get_vocab() if len(one) == 1 and one.isalnum())
        self._around = next((one for one in letters if not self._loses(one)), "")
        self._kinds = np.full(0x110000, _NEW, dtype=np.uint8)
        self._lost = self._total = 0
        self._first = ""

    def add(self, pieces: Sequence[Piece], ids: Sequence[np.ndarray]) -> None:
        whole = "".join(piece.text for piece in pieces)
        self._total += len(whole)
        if not self._may_lose(whole):
            return
        doubtful = [piece for piece in pieces if self._may_lose(piece.text)]
        encodings = _encodings(self._detector, [piece.text for piece in doubtful])
        for piece, encoding in zip(doubtful, encodings, strict=False):  # there may be none
            is_lost = np.zeros(len(piece.text), dtype=np.bool_)
            for start, stop in _spans(encoding, self._unknown):
                is_lost[start:stop] = True
            places = np.flatnonzero(is_lost)
            if len(places) and not self._lost:
                self._first = _example(piece.text[places[0]], piece.origin)
            self._lost += len(places)

    def _may_lose(self, text: str) -> bool:
        if self._is_marked:
            return True
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        kinds = self._kinds.take(codes)
        if kinds.max(initial=_FINE) == _NEW:
            for code in np.unique(codes[kinds == _NEW]):
                self._kinds[code] = _SUSPECT if self._is_suspect(chr(code)) else _FINE
            kinds = self._kinds.take(codes)
        return bool(kinds.max(initial=_FINE) == _SUSPECT)

    def _is_suspect(self, character: str) -> bool:
        is_joined = self._has_normalizer and _joins(character)
        return is_joined or self._loses(f"{self._around}{character}{self._around}")

    def _loses(self, text: str) -> bool:
        found = _encodings(self._detector, [text])
        return not found or self._unknown in found[0].ids

    def as_dict(self) -> dict[str, int | str]:
        if not self._lost:
            return {}
        return {"lost": self._lost, "total": self._total, "first": self._first}
