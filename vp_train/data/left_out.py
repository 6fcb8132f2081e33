"""What a corpus leaves out of its files: counted, with the first place of each kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vp_train.config import printable
from vp_train.units import count_words, human_bytes

# The kinds, as they are named behind a number.
NOT_UTF8 = "texts that are not UTF-8"
NOT_JSON = "lines that are not JSON in UTF-8"
TOO_LONG = "lines or values that are too long"
NO_OBJECT = "lines that hold no JSON object"
NO_FIELD = "documents without the text field"
NULL = "null texts"
NOT_TEXT = "text fields that hold no text"
EMPTY = "empty documents"
HIDDEN = "hidden files and directories"
OTHER_ENDING = "files with other endings"
JSON_RECORDS = "JSON files with records that are not on lines (jq -c '.[]' FILE > FILE.jsonl)"
JSON_TEXTS = "JSON files of texts without names (give one as data.path to see the command)"
NO_LINES = "packed JSON files that are not on lines"
ABOUT = "files about the data beside it (README, LICENSE and the like)"
NO_FILE = "pipes, sockets and devices"
LINKED_DIRECTORY = "links to directories (name them in data.path or data.blend)"
LINK_TO_NOTHING = "links to nothing"

_OF_DOCUMENTS = (NOT_UTF8, NOT_JSON, TOO_LONG, NO_OBJECT, NO_FIELD, NULL, NOT_TEXT, EMPTY)
OF_FIELDS = (NO_FIELD, NULL, NOT_TEXT)  # which another data.jsonl_field may mend
_OF_FILES = (JSON_RECORDS, JSON_TEXTS, NO_LINES, OTHER_ENDING)
_MUCH = 0.1  # of the documents


@dataclass(slots=True)
class LeftOut:
    """A count for each kind, the first place with what was found there, and bytes if known."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    num_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, origin: str, found: str = "", num_bytes: int = 0) -> None:
        """Count one of so many bytes, 0 if they are not known.  `found` is what is there instead.

        Bytes of a file or of a packed one are those that it takes; those of a line are unpacked.
        """
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.num_bytes[kind] = self.num_bytes.get(kind, 0) + num_bytes
        if kind not in self.first:
            words = f"{origin} ({found})" if found else origin
            self.first[kind] = printable(words)[:1_000]

    def as_dict(self) -> dict[str, list[int | str]]:
        """Return count, first place and bytes of every kind, as a manifest keeps them."""
        return {
            kind: [count, self.first[kind], self.num_bytes[kind]]
            for kind, count in self.counts.items()
        }


def words_of(left_out: Mapping[str, list[int | str]]) -> list[str]:
    """Return one line for every kind."""
    return [
        f"left out, {kind}: {entry[0]:,}; first {printable(str(entry[1]))}{_bytes_words(entry)}"
        for kind, entry in left_out.items()
    ]


def _bytes_words(*entries: list[int | str]) -> str:
    """Return the bytes of entries of a manifest in words; those of earlier versions have none."""
    num_bytes = sum(int(number) for entry in entries for number in entry[2:])
    return f", {human_bytes(num_bytes)} in all" if num_bytes else ""


def much_left_out(left_out: Mapping[str, list[int | str]], num_documents: int) -> str:
    """Return a warning that a tenth of the documents or more is left out, else an empty text.

    num_documents: that were kept.
    """
    counts = {kind: int(left_out[kind][0]) for kind in _OF_DOCUMENTS if kind in left_out}
    number = sum(counts.values())
    total = number + num_documents
    if not number or number < _MUCH * total:
        return ""
    most = max(counts, key=lambda kind: counts[kind])
    mostly = "mostly " if len(counts) > 1 else ""
    way_out = "; data.jsonl_field names the field that has the text" if most in OF_FIELDS else ""
    size = _bytes_words(*(left_out[kind] for kind in counts))
    return (
        f"{number:,} of {count_words(total, 'document')} were left out{size}: {mostly}{most}, "
        f"first {printable(str(left_out[most][1]))}{way_out}"
    )


def outweighed(left_out: Mapping[str, list[int | str]], kept_bytes: int) -> str:
    """Return a warning if left-out files are larger than those that were read, else nothing.

    kept_bytes: of the files that were read.
    """
    kinds = {kind: left_out[kind] for kind in _OF_FILES if kind in left_out}
    if sum(int(number) for entry in kinds.values() for number in entry[2:]) <= kept_bytes:
        return ""
    return (
        f"files that were left out are larger than the {human_bytes(kept_bytes)} that were read: "
        f"{'; '.join(words_of(kinds))}"
    )
