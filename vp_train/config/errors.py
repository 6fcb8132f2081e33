"""ConfigError, and what is said about a value that is not known."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

# Characters that a terminal obeys instead of showing them, among them those that turn the
# direction of writing, and halves of surrogate pairs, which stand for bytes that are not UTF-8.
CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
_LONGEST_MESSAGE = 1_500  # characters


def printable(text: str) -> str:
    """Return `text` with control characters escaped as in Python, so that no terminal obeys them.

    Nothing that others wrote (names of files, texts in them) is printed otherwise.
    """
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class ConfigError(ValueError):
    """A value that the user must change.

    The command line prints the message without a traceback and exits with code 78.  It is one
    printable line, and the middle of a very long one is left out.
    """

    def __init__(self, message: str) -> None:
        words = printable(message)
        if len(words) > _LONGEST_MESSAGE:
            half = _LONGEST_MESSAGE // 2
            words = f"{words[:half]} ... {len(words):,} characters ... {words[-half:]}"
        super().__init__(words)


# Values of settings under the names that they have elsewhere.
_ALSO_CALLED = {
    **dict.fromkeys(("fp16", "half", "16", "16-mixed"), "float16"),
    **dict.fromkeys(("bf16", "bf16-mixed"), "bfloat16"),
    **dict.fromkeys(("fp32", "float", "32", "tf32"), "float32"),
    **dict.fromkeys(("fp64", "double"), "float64"),
    **dict.fromkeys(("gpu", "nvidia"), "cuda"),
    **dict.fromkeys(("interleaved_1f1b", "vpp"), "interleaved"),
    "adam": "adamw",
}


def unknown(words: str, value: object, choices: Sequence[str]) -> str:
    """Return the message about a value that is none of the choices, with one that looks like it.

    words: how the message names the value.
    """
    word = str(value).lower()
    close = [choice for choice in choices if choice in (word, _ALSO_CALLED.get(word))]
    close = close or difflib.get_close_matches(str(value), choices, n=1, cutoff=0.8)
    close = close or [choice for choice in choices if len(word) > 1 and choice.startswith(word)][:3]
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    return f"{words} is not known{hint}; choose one of {', '.join(choices)}"
