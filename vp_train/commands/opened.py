"""What commands share that open the model of a run: their options, and their ranks.

One process opens the whole model.  With parallel.pp, dp or tp above 1 the command starts that many
ranks on this machine; under torchrun each process is one of them already.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn

from vp_train.commands.command import Parser, check_printable, path_argument, prints
from vp_train.commands.orphans import LAUNCHER, die_with_launcher
from vp_train.commands.place import is_rank
from vp_train.config import ConfigError, RunConfig
from vp_train.config.bounds import DTYPES
from vp_train.failures import EXIT_OK, Ending, ending_of_command, peer_failure
from vp_train.inference.layout import Opening, opening_of
from vp_train.supervision.ending import PIPE, leave
from vp_train.supervision.requests import SIGNALS, held, is_ignored

if TYPE_CHECKING:
    from vp_train.inference.opening import OpenRun


@dataclass(frozen=True, slots=True)
class RunCommand:
    """A command on an opened run.

    name: of the command.
    module: that `python -m` runs it with.
    fills: as in `opening_of`.
    body: the work, which every rank does together; `is_first` says which one prints.
    hint: the way out for an argument that is not key=value.
    check: raises ConfigError for settings with which it cannot be done, before the model is opened.
    """

    name: str
    module: str
    body: Callable[[OpenRun, bool], None]
    hint: str
    fills: bool = True
    check: Callable[[RunConfig], None] = lambda _: None


def parser_of(name: str, description: str, file: tuple[str, str] | None = None) -> Parser:
    """Return a parser with the options of all these commands.

    `file` is the name of a second argument and what it is, if there is one.
    """
    parser = Parser(
        prog=name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        type=path_argument,
        help="directory of a run, of vp-import, or of one of their checkpoints",
    )
    if file is not None:
        parser.add_argument("file", metavar=file[0], type=path_argument, help=file[1])
    parser.add_argument(
        "settings",
        metavar="key=value",
        nargs="*",
        default=[],
        help="the layout, as parallel.pp=2 parallel.tp=2, whatever that of the run; without: one "
        "process, or under torchrun the run's own with as many replicas as fit",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (cpu)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what to compute in, without float8; default: as the run did",
    )
    return parser


def run_opened(command: RunCommand, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Open the run that `options` name, on as many ranks as its layout has, and do the work.

    `arguments` are those with which new processes do the same.  Returns the exit code; a rank ends
    its process instead.
    """
    for word in options.settings:
        check_printable(word)
        if "=" not in word:
            raise ConfigError(f"{word!r} is not key=value; {command.hint}")
    is_one = is_rank(os.environ)
    num_ranks = int(os.environ["WORLD_SIZE"]) if is_one else None
    opening = opening_of(
        options.run,
        options.settings,
        num_ranks=num_ranks,
        device=options.device,
        dtype=options.dtype,
        fills=command.fills,
    )
    command.check(opening.config)
    if is_one:
        _be_rank(command, opening)
    if opening.degrees.num_ranks > 1:
        return _on_ranks(command, opening, arguments)
    from vp_train.inference.opening import leaving_no_group

    with leaving_no_group():
        _open_and_do(command, opening)
    return EXIT_OK


def _open_and_do(command: RunCommand, opening: Opening) -> None:
    """Open the run and do the work, in one process or as a rank that has met the others."""
    from vp_train.inference.opening import opened
    from vp_train.tensors import compiling

    if not opening.compiles:
        compiling.turn_off(os.environ)
    is_first = os.environ.get("RANK", "0") == "0"
    run = opened(opening)
    if is_first:
        ranks = "" if opening.degrees.num_ranks == 1 else f", {opening.degrees}"
        words = f"{run.checkpoint}, {run.config.run.dtype}{ranks}"
        print(words, file=sys.stderr, flush=True)
    command.body(run, is_first)


def _be_rank(command: RunCommand, opening: Opening) -> NoReturn:
    """Do the work as the rank that the environment names, and end the process."""
    rank, ending = int(os.environ["RANK"]), Ending(EXIT_OK, "")
    try:
        die_with_launcher(int(os.environ.get(LAUNCHER, os.getppid())))
        _end_by_signals()
        _connect(opening)
        _open_and_do(command, opening)
        sys.stdout.flush()
    except BaseException as error:
        lost = peer_failure(error, opening.config.run)
        ending = ending_of_command(error, command.name)
        if lost is not None:
            ending = replace(lost, words=f"{command.name}: rank {rank}: {lost.words}")
        if PIPE not in os.environ:  # torchrun has started it
            if prints() or not isinstance(error, ConfigError):
                print(ending.words, file=sys.stderr, flush=True)
            ending = replace(ending, words="")
    leave(ending)  # a process with threads of torch must not be taken down in order


def _end_by_signals() -> None:
    """Let the signals that an agent passes on end this rank; its agent has held them back."""
    if PIPE in os.environ:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # comes before one that is passed on
        for number in SIGNALS:
            if not is_ignored(number):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held())


def _connect(opening: Opening) -> None:
    """Meet the other ranks in the default process group."""
    import torch

    from vp_train.communication.nccl import take_gpu
    from vp_train.communication.rendezvous import join_world

    settings = opening.config.run
    if settings.device == "cpu":
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_local))
    backend = take_gpu(os.environ, settings)
    join_world(backend, timedelta(seconds=settings.world_timeout_seconds))


def _on_ranks(command: RunCommand, opening: Opening, arguments: Sequence[str]) -> int:
    """Start the ranks of the layout on this machine, wait for them, and return the exit code."""
    from vp_train.commands.agent import Job, run_job
    from vp_train.commands.launch import import_for_ranks, starts_by_fork
    from vp_train.commands.local_ranks import Starter, forked, new_process, search_options
    from vp_train.commands.nodes import OneNode
    from vp_train.commands.place import Place
    from vp_train.planning.degrees import check_node
    from vp_train.planning.plan import make_plan

    num_ranks = opening.degrees.num_ranks
    check_node(num_ranks)
    make_plan(opening.config, num_ranks)  # settings that do not fit are one error, not one a rank
    by_fork = starts_by_fork(opening.config)
    if by_fork:
        import_for_ranks(opening.config)

    def starter(resumes: bool) -> Starter:
        if by_fork:
            return forked(lambda: _be_rank(command, opening))
        return new_process(
            [sys.executable, "-u", *search_options(), "-m", command.module, *arguments]
        )

    news = OneNode(Place(host=socket.gethostname()))
    job = Job(
        starter,
        num_ranks,
        settings=opening.config.run,
        way_on=lambda: "start it again",
        saves=lambda since: False,
    )
    ending = run_job(news, job)
    words, number = ending.words, ending.code - 128
    if number in SIGNALS:
        words = f"stopped by {signal.Signals(number).name}"
    if words and number != signal.SIGPIPE:  # a reader like `head` has seen enough
        prefix = "" if words.startswith(command.name) else f"{command.name}: "
        print(f"{prefix}{words}", file=sys.stderr, flush=True)
    return ending.code
