"""`vp-import` and `vp-export`: conversion from and to the format of Hugging Face."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vp_train.commands.command import Parser, guarded, path_argument
from vp_train.config import ConfigError, RunSettings
from vp_train.config.bounds import DTYPES
from vp_train.config.optim import SMALLEST, usual_rate
from vp_train.config.typed import for_shell, typed
from vp_train.durable import meant_run
from vp_train.failures import EXIT_OK
from vp_train.metrics.run_directory import is_original
from vp_train.settings.saved import run_of, started_from

if TYPE_CHECKING:
    from vp_train.hf.convert import Imported

_SILENT_SECONDS = 10.0  # between two lines of progress


def import_model() -> None:
    """Run `vp-import`: convert a model in the format of Hugging Face to an initial checkpoint."""
    guarded("vp-import", lambda: _import(sys.argv[1:]))


def export_model() -> None:
    """Run `vp-export`: convert a checkpoint to a model in the format of Hugging Face."""
    guarded("vp-export", lambda: _export(sys.argv[1:]))


def _import(arguments: Sequence[str]) -> int:
    parser = Parser(
        "vp-import",
        description="converts a model in the format of Hugging Face to an initial checkpoint",
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        type=path_argument,
        help="directory with config.json and safetensors files",
    )
    parser.add_argument("target", metavar="DST", type=path_argument, help="directory to make")
    parser.add_argument(
        "--data",
        type=path_argument,
        metavar="PATH",
        help="text for the command that is printed; default: Python's standard library",
    )
    options = parser.parse_args(arguments)
    if options.data is not None and not options.data.exists():
        raise ConfigError(f"--data {options.data} is not there; give a file or a directory of text")
    from vp_train.data.tokenizer import end_of
    from vp_train.hf.convert import import_checkpoint

    imported = import_checkpoint(options.source, options.target, progress=_NowAndThen())
    print(f"{imported.num_parameters:,} parameters in {imported.checkpoint}")
    if imported.untied:
        print(
            "lm_head.weight is not the embedding, whatever tie_word_embeddings says; imported with "
            "model.tied_embeddings=false, as transformers reads it"
        )
    if imported.tokenizer is None:
        print(
            f"{options.source} has no tokenizer.json; put the path of the model's own for "
            f"{_OWN_TOKENIZER} (transformers makes one: "
            "AutoTokenizer.from_pretrained(SRC).save_pretrained(DIR))"
        )
    elif (error := _unreadable(imported.tokenizer)) is not None:
        print(f"{error}; put the path of the model's own there")
    elif end_of(imported.tokenizer, imported.end_token) is None:
        print(
            f"{options.source} does not say which token ends a text; add data.end_token=TOKEN, a "
            "token of its tokenizer, to the command"
        )
    if imported.begin_token is not None:
        print(
            f"the tokenizer puts {imported.begin_token} in front of a text; the command puts it in "
            "front of each document too"
        )
    words = _words_to_continue(imported, options.target, options.data)
    print(" ".join(map(for_shell, ("vp-train", *words))))
    print(f"{_rate_words(imported.num_parameters)}; run.steps is the default")
    if options.data is None:
        print(
            "data=pystdlib is the standard library of Python, to try the command with; "
            "data=text data.path=PATH in its place trains on text of your own"
        )
    return EXIT_OK


def _rate_words(num_parameters: int) -> str:
    """Say where the rate in the command comes from."""
    size = "a model of this size"
    if num_parameters < SMALLEST:
        size = f"its smallest model, of {SMALLEST / 1e6:g} M parameters,"
    return f"optim.lr is a suggestion, a tenth of what GPT-3 trained {size} with"


_OWN_TOKENIZER = "TOKENIZER.json"


def _words_to_continue(imported: Imported, target: Path, data: Path | None) -> list[str]:
    """Return the overrides that train an import further, with a rate for its size."""
    rate = usual_rate(imported.num_parameters)
    tokenizer = _OWN_TOKENIZER if imported.tokenizer is None else str(imported.tokenizer)
    text = ["data=pystdlib"] if data is None else ["data=text", typed("data.path", str(data))]
    ends = {"data.begin_token": imported.begin_token, "data.end_token": imported.end_token}
    return [
        f"model={imported.model_file}",
        typed("run.init_from", str(target)),
        typed("run.name", target.resolve().name),
        *text,
        typed("data.tokenizer", tokenizer),
        *(typed(name, token) for name, token in ends.items() if token is not None),
        f"model.seq_length={imported.model.seq_length}",
        f"optim.lr={rate / 10:g}",
        f"run.steps={RunSettings().steps}",
        f"parallel.pp={min(2, imported.model.num_layers)}",
        "parallel.placement=balanced",
    ]


def _export(arguments: Sequence[str]) -> int:
    parser = Parser(
        "vp-export", description="converts a checkpoint to a model in the format of Hugging Face"
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        type=path_argument,
        help="directory of a run, of vp-import, or of one checkpoint",
    )
    parser.add_argument("target", metavar="DST", type=path_argument, help="directory to make")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype of the weights; default: as stored",
    )
    parser.add_argument(
        "--max-shard-gb",
        type=float,
        default=5.0,
        metavar="GB",
        help="largest size of a file that holds more than one tensor (5)",
    )
    parser.add_argument(
        "--tokenizer",
        type=path_argument,
        metavar="DIR",
        help="directory of the tokenizer's files; default: found with the data of the run",
    )
    options = parser.parse_args(arguments)
    shard_bytes = options.max_shard_gb * 1e9
    if not 1 <= shard_bytes < math.inf:
        raise ConfigError(
            f"--max-shard-gb={options.max_shard_gb} must be above 0 and finite, for example 5"
        )
    if not options.source.is_dir():
        place = f"{options.source} is not a directory{meant_run(options.source)}"
        raise ConfigError(f"{place}; give that of a run, of vp-import, or of one checkpoint")
    from vp_train.hf.convert import export_checkpoint

    exported = export_checkpoint(
        options.source,
        options.target,
        dtype=options.dtype,
        shard_bytes=shard_bytes,
        tokenizer=options.tokenizer,
        origins=_origins(options.source),
        follows=is_original(run_of(options.source)),
        progress=_NowAndThen(),
    )
    print(f"{options.target}: {', '.join(exported.files)}")
    for words in exported.unfollowed:
        print(
            f"{words} was not looked at, since {run_of(options.source)} was copied here and may be "
            "somebody else's; --tokenizer DIR copies a tokenizer"
        )
    if exported.end is not None:
        print(f"the run ends its documents with token {exported.end}; so does the exported model")
    if exported.begin is not None:
        print(
            f"the run begins its documents with {exported.begin}; so does the tokenizer its texts"
        )
    if exported.strange is not None:
        print(
            f"the tokenizer puts {exported.strange} in front of a text, but the documents of the "
            "run have none; give add_special_tokens=False to it"
        )
    if not exported.knows_reach:
        print(
            f"max_position_embeddings={exported.reach} is model.seq_length; "
            "write more into config.json if the model was trained for longer sequences"
        )
    if "tokenizer.json" not in exported.files and "tokenizer.model" not in exported.files:
        print("without a tokenizer; --tokenizer DIR copies one")
    if "tokenizer.json" in exported.files:
        error = _unreadable(options.target / "tokenizer.json")
        if error is not None:
            print(f"{error}; --tokenizer DIR copies another into another DST")
    return EXIT_OK


def _unreadable(tokenizer: Path) -> str | None:
    """Return what is wrong with a tokenizer.json that was copied, None if it can be read."""
    from vp_train.data.tokenizer import load_tokenizer

    try:
        load_tokenizer(tokenizer, None)
    except ConfigError as error:
        return str(error)
    return None


def _origins(source: Path) -> list[Path]:
    """Return the directories that the run of `source` descends from, the nearest first.

    A run names the directory it started from by run.init_from, and that may be a run too.
    """
    found: list[Path] = []
    origin = started_from(source)
    while origin is not None and origin not in found:
        found.append(origin)
        origin = started_from(origin) if is_original(run_of(origin)) else None
    return found


class _NowAndThen:
    """Progress on stderr: at most one line every ten seconds, the first after ten seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _SILENT_SECONDS

    def __call__(self, words: str) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _SILENT_SECONDS
            print(words, file=sys.stderr, flush=True)
