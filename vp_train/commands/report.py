"""The command `vp-report`: the report of a run, or of several runs side by side, as one page.

It runs without torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from vp_train.commands.command import Parser, guarded, output_of, path_argument
from vp_train.failures import EXIT_OK
from vp_train.report.draw import NUM_STYLES
from vp_train.report.page import COMPARISON, NAME, write_comparison, write_report


def main() -> None:
    """Run the command."""
    guarded("vp-report", lambda: _report(sys.argv[1:]))


def _report(arguments: Sequence[str]) -> int:
    parser = Parser(
        "vp-report",
        description="writes a report that any browser shows, as one file: settings, curves, "
        "schedule, memory, warnings, versions and how to continue; of several runs what differs, "
        "their curves together, speed and memory",
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=path_argument, help="directory of a run"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help=f"file to write; default: {NAME} in the directory of the run, "
        f"of several runs {COMPARISON} beside the first",
    )
    options = parser.parse_args(arguments)
    runs = [run.absolute() for run in options.runs]
    if len(runs) > NUM_STYLES:
        parser.error(f"{len(runs)} runs on one page; at most {NUM_STYLES} can be told apart")
    target = None if options.out is None else output_of("--out", options.out)
    if len(runs) == 1:
        print(write_report(runs[0], target))
    else:
        print(write_comparison(runs, target or runs[0].parent / COMPARISON))
    return EXIT_OK
