"""`vp-import` and `vp-export`: conversion from and to the format of Hugging Face."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vp_train.commands.command import Parser, guarded, path_of
from vp_train.config import ConfigError
from vp_train.failures import EXIT_OK
from vp_train.metrics.run_directory import is_original
from vp_train.settings import run_of, started_from

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
        type=path_of,
        help="directory with config.json and safetensors files",
    )
    parser.add_argument("target", metavar="DST", type=path_of, help="directory to make")
    options = parser.parse_args(arguments)
    from vp_train.hf.convert import import_checkpoint

    imported = import_checkpoint(options.source, options.target, progress=_NowAndThen())
    tokenizer = "" if imported.tokenizer is None else f" data.tokenizer={imported.tokenizer}"
    print(
        f"{imported.num_parameters:,} parameters in {imported.checkpoint}\n"
        f"vp-train model={imported.model_file} run.init_from={options.target}{tokenizer} ..."
    )
    return EXIT_OK


def _export(arguments: Sequence[str]) -> int:
    parser = Parser(
        "vp-export", description="converts a checkpoint to a model in the format of Hugging Face"
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        type=path_of,
        help="directory of a run, of vp-import, or of one checkpoint",
    )
    parser.add_argument("target", metavar="DST", type=path_of, help="directory to make")
    parser.add_argument(
        "--dtype",
        choices=("float64", "float32", "float16", "bfloat16"),
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
        type=path_of,
        metavar="DIR",
        help="directory of the tokenizer's files; default: found with the data of the run",
    )
    options = parser.parse_args(arguments)
    shard_bytes = options.max_shard_gb * 1e9
    if not 1 <= shard_bytes < math.inf:
        raise ConfigError(
            f"--max-shard-gb={options.max_shard_gb} must be above 0 and finite, for example 5"
        )
    from vp_train.hf.convert import export_checkpoint

    exported = export_checkpoint(
        options.source,
        options.target,
        dtype=options.dtype,
        shard_bytes=int(shard_bytes),
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
    if exported.reach_from is None:
        print(
            f"max_position_embeddings={exported.reach} is model.seq_length; "
            "where it reaches further, change config.json"
        )
    if "tokenizer.json" not in exported.files and "tokenizer.model" not in exported.files:
        print("without a tokenizer; --tokenizer DIR copies one")
    return EXIT_OK


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
