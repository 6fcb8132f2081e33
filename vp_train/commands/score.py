"""The command `vp-score`: log-probability and perplexity of text under the model of a run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from vp_train.commands.command import Parser, guarded, path_of
from vp_train.config import ConfigError, printable
from vp_train.failures import EXIT_OK

if TYPE_CHECKING:
    from vp_train.data.documents import Document
    from vp_train.scoring import OpenRun


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one document, or of all.

    tokens, bytes: what was predicted: everything but the first token of each document.
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
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The negative log-probability in bits for each byte of UTF-8; None without bytes."""
        return -self.logprob / math.log(2) / self.bytes if self.bytes else None

    def as_json(self) -> str:
        """Return one line of JSON."""
        ratios = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        return json.dumps(asdict(self) | ratios)

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
    options = _parser().parse_args(arguments)
    documents = _documents(options.file, options.field, by_line=options.lines)
    from vp_train.scoring import open_run

    run = open_run(options.run, device=options.device, dtype=options.dtype)
    print(f"{run.checkpoint}, {run.config.run.dtype}", file=sys.stderr, flush=True)
    if not options.json:
        print(_HEADING, flush=True)
    total = Score("all", 0, 0, 0.0)
    for document in documents:
        found = score_document(run, document)
        total = Score(
            total.document,
            total.tokens + found.tokens,
            total.bytes + found.bytes,
            total.logprob + found.logprob,
        )
        print(found.as_json() if options.json else found.line(), flush=True)
    print(total.as_json() if options.json else total.line(), flush=True)
    return EXIT_OK


def _parser() -> Parser:
    parser = Parser(
        "vp-score",
        description="scores text with the model and the tokenizer of a run, in one process, "
        "whatever the layout of the run",
    )
    parser.add_argument(
        "run", metavar="RUN", type=path_of, help="directory of a run or of one of its checkpoints"
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        type=path_of,
        help=".jsonl, .parquet: one document a line or row; else a text; also .gz, .zst",
    )
    parser.add_argument(
        "--lines", action="store_true", help="each line of a text that is not blank is a document"
    )
    parser.add_argument(
        "--field", default="text", help="field of a .jsonl line with the text (text)"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON for each document")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (cpu)")
    parser.add_argument(
        "--dtype",
        choices=("float64", "float32", "float16", "bfloat16"),
        help="what to compute in; default: as the run did",
    )
    return parser


def _documents(path: Path, field: str, *, by_line: bool) -> Iterator[Document]:
    """Return the documents of a file.  Raises ConfigError if it is not a file, or has none."""
    from vp_train.data.documents import read_documents
    from vp_train.data.files import kind_of

    if not path.is_file():
        raise ConfigError(f"{path} is not a file; give a text or a .jsonl file")
    found = read_documents([path], field, warn=True)
    first = next(found, None)  # before the model is loaded
    if first is None:
        raise ConfigError(f"{path} holds no text; --field names the field that has it")
    whole = chain([first], found)
    if not by_line or kind_of(path) != "text":
        return whole
    return _lines(whole)


def _lines(documents: Iterator[Document]) -> Iterator[Document]:
    from vp_train.data.documents import Document

    for document in documents:
        for number, line in enumerate(document.text.splitlines(), start=1):
            if line.strip():
                yield Document(f"{document.origin}:{number}", line)


def score_document(run: OpenRun, document: Document) -> Score:
    """Return the score of a document.  Raises ConfigError where the run has no tokenizer."""
    import torch

    from vp_train.scoring import encode, score

    encoding = encode(run, document.text)
    if len(encoding.ids) < 2:
        return Score(document.origin, 0, 0, 0.0)
    (logprobs,) = score(run, [torch.tensor(encoding.ids)])
    predicted = document.text[encoding.offsets[0][1] :]
    total = float(logprobs.to(torch.float64).sum())
    return Score(document.origin, len(logprobs), len(predicted.encode()), total)
