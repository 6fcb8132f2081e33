"""The command `vp-score`: log-probability and perplexity of text under the model of a run."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from vp_train.commands.command import Parser, guarded, whole_number
from vp_train.commands.opened import RunCommand, parser_of, run_opened
from vp_train.config import ConfigError, RunConfig, printable
from vp_train.inference.layout import check_context

if TYPE_CHECKING:
    from vp_train.data.documents import Document
    from vp_train.inference.opening import OpenRun


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one document, or of all.

    tokens, bytes: what was predicted: everything but the first token of each document, or
        everything where a token was put in front of it (data.begin_token).
    logprob: the sum of the log-probabilities of these tokens, in nats.
    """

    document: str
    tokens: int
    bytes: int
    logprob: float

    @property
    def perplexity(self) -> float | None:
        """exp of the mean negative log-probability of a token; None without tokens."""
        if not self.tokens:
            return None
        mean = -self.logprob / self.tokens
        return math.inf if mean >= 700 else math.exp(mean)  # NaN stays NaN

    @property
    def bits_per_byte(self) -> float | None:
        """The negative log-probability in bits for each byte of UTF-8; None without bytes."""
        return -self.logprob / math.log(2) / self.bytes if self.bytes else None

    def as_json(self) -> str:
        """Return one line of JSON, in which numbers that are not finite are null."""
        ratios = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        values = asdict(self) | ratios
        return json.dumps(
            {
                name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in values.items()
            }
        )

    def line(self) -> str:
        """Return one line of the table."""
        ratios = (self.perplexity, self.bits_per_byte)
        words = ("-" if ratio is None else f"{ratio:,.3f}" for ratio in ratios)
        name = printable(self.document)
        return "{:>9,} {:>13,.2f} {:>12} {:>9}  {}".format(self.tokens, self.logprob, *words, name)


_HEADING = "{:>9} {:>13} {:>12} {:>9}  {}".format(
    "tokens", "log-prob", "perplexity", "bits/byte", "document"
)


def main() -> None:
    """Run the command."""
    guarded("vp-score", lambda: _score(sys.argv[1:]))


def _score(arguments: Sequence[str]) -> int:
    options = _parser().parse_intermixed_args(arguments)
    options.context = whole_number({"--context": options.context}, "--context", 1, least=0)
    if not options.file.exists():
        raise ConfigError(
            f"{options.file} does not exist; give a file of text, .jsonl or a table, or a directory"
        )

    if (
        next(documents_of(options.file, options.field, by_line=options.lines, warn=True), None)
        is None
    ):
        raise ConfigError(f"{options.file} holds no text{_way_out(options.file, options.field)}")

    def body(run: OpenRun, is_first: bool) -> None:
        documents = documents_of(options.file, options.field, by_line=options.lines, warn=is_first)
        _print_scores(run, documents, options, is_first)

    def check(config: RunConfig) -> None:
        check_context(options.context, config.model.seq_length)

    hint = "one FILE goes, or one directory of files"
    return run_opened(RunCommand("vp-score", __name__, body, hint, check=check), options, arguments)


def _way_out(path: Path, field: str) -> str:
    """Return what helps where a file holds no text: a field has it, or the text is not UTF-8."""
    from vp_train.data.files import kind_to_read

    if path.is_file() and kind_to_read(path, field) == "text":
        return "; give a text in UTF-8"
    return "; --field names the field that has it"


def _print_scores(
    run: OpenRun, documents: Iterable[Document], options: argparse.Namespace, is_first: bool
) -> None:
    """Print the score of every document and of all; only the first of the ranks prints."""

    def show(score: Score) -> None:
        if is_first:
            print(score.as_json() if options.json else score.line(), flush=True)

    total = Score("all", 0, 0, 0.0)
    for number, found in enumerate(score_documents(run, documents, options.context)):
        if is_first and not options.json and not number:
            print(_HEADING, flush=True)
        show(found)
        total = Score(
            total.document,
            total.tokens + found.tokens,
            total.bytes + found.bytes,
            total.logprob + found.logprob,
        )
    show(total)


def _parser() -> Parser:
    parser = parser_of(
        "vp-score",
        "scores text with the model and the tokenizer of a run, on any layout\n\n"
        "Every token but the first of a document is scored once; the first one too if the run has\n"
        "data.begin_token, which is put in front of each document.  A document of more than\n"
        "model.seq_length tokens is scored in windows; with --context 1 a window begins with the\n"
        "last token of the one before, with more it begins earlier.",
        ("FILE", "text, .jsonl or a table, as vp-prepare reads them; or a directory of them"),
    )
    parser.add_argument(
        "--lines",
        action="store_true",
        help="each line of a text that is not blank is a document, without its LF or CR LF",
    )
    parser.add_argument(
        "--field", default="text", help="field of a .jsonl line, or column, with the text (text)"
    )
    parser.add_argument(
        "--context",
        default="1",
        metavar="N",
        help="tokens before a scored one that its window has at least, where the document has as "
        "many; more windows overlap and take longer (1)",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON for each document")
    return parser


def documents_of(path: Path, field: str, *, by_line: bool, warn: bool) -> Iterator[Document]:
    """Return the documents of a file or a directory; `warn` says what is left out."""
    from vp_train.config import DataConfig
    from vp_train.data.documents import Reading, read_documents
    from vp_train.data.files import find_files, kind_to_read
    from vp_train.data.left_out import LeftOut

    left_out = LeftOut()
    config = DataConfig(name="text", path=str(path), jsonl_field=field)
    files = [path] if path.is_file() else find_files(config, left_out)
    for document in read_documents(files, field, warn=warn, reading=Reading(left_out)):
        origin = Path(document.origin)
        if by_line and origin in files and kind_to_read(origin, field) == "text":
            yield from _lines(document)
        else:
            yield document


def _lines(document: Document) -> Iterator[Document]:
    """Yield the lines of a text that are not blank; they end with a newline or CRLF."""
    from vp_train.data.documents import Document

    number, rest = 0, ""
    for part in chain(document.parts, ("\n",)):
        *lines, rest = (rest + part).split("\n")
        for line in lines:
            number += 1
            if line.strip():
                yield Document(f"{document.origin}:{number}", (line.removesuffix("\r"),))


def score_documents(
    run: OpenRun, documents: Iterable[Document], context: int = 1
) -> Iterator[Score]:
    """Yield the score of every document.  Collective over the ranks of `run`.

    So many documents are read at a time as keep all ranks busy.  Raises ConfigError where the run
    has no tokenizer.
    """
    import torch

    from vp_train.inference.opening import encode
    from vp_train.inference.scoring import score, sequences_of

    wanted, rest = sequences_of(run), iter(documents)
    while taken := list(islice(rest, wanted)):
        texts = [document.text for document in taken]
        encodings, begin = [encode(run, text) for text in texts], run.begin_ids
        ids = [torch.tensor([*begin, *each.ids], dtype=torch.int64) for each in encodings]
        found = score(run, ids, context=context)
        for document, text, encoding, logprobs in zip(taken, texts, encodings, found, strict=True):
            first = 0 if begin or not len(logprobs) else encoding.offsets[0][1]
            predicted = text[first:] if len(logprobs) else ""
            total = float(logprobs.to(torch.float64).sum())
            yield Score(document.origin, len(logprobs), len(predicted.encode()), total)


if __name__ == "__main__":
    main()
