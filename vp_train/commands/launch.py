"""What an agent does before and after its ranks: checks, data, imports, and the last words.

It checks the settings before the ranks start, and turns their ends into one exit code.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import NoReturn

from vp_train.commands.agent import Job, noting_signals, run_job, say
from vp_train.commands.local_ranks import (
    Starter,
    default_signals,
    fork,
    forked,
    new_process,
    search_options,
)
from vp_train.commands.nodes import (
    WORDS_SECONDS,
    JobEnded,
    News,
    hosts,
    joined,
    losses,
    say_waiting,
    told,
    untold,
    wait_until,
)
from vp_train.commands.orphans import die_with_launcher
from vp_train.commands.place import Place, local_ranks_of
from vp_train.commands.searching import Searching
from vp_train.commands.titles import entitle
from vp_train.communication import flight_recorder
from vp_train.config import ConfigError, RunConfig, RunSettings
from vp_train.config.typed import override
from vp_train.durable import is_fresh, way_on, write_all
from vp_train.durable import replace as replace_file
from vp_train.failures import (
    EXIT_INTERNAL,
    EXIT_OK,
    EXIT_TIME,
    Ending,
    end_of_process,
    ending_of_command,
)
from vp_train.metrics.run_directory import (
    make_directory,
    refuse_running,
    refuse_used,
    removed_if_unused,
)
from vp_train.metrics.trackers import end_failed, require_trackers
from vp_train.planning.degrees import check_node, wanted_ranks
from vp_train.planning.memory import check_host, check_machine, machine_bytes
from vp_train.planning.plan import SEARCHING, RunPlan, check_ramp, make_plan
from vp_train.quiet import quiet_deprecations, quiet_megatron
from vp_train.settings import load_config
from vp_train.settings.files import expanded
from vp_train.supervision.requests import SIGNALS, is_ignored

# What ranks import on their way to the first step, in the order of their needs.
_IMPORTS = ("vp_train.train", "megatron.core.models.gpt.gpt_layer_specs")
_COMPILER = ("torch._dynamo", "torch._inductor.compile_fx")  # 3 s of CPU time

_OF_SEARCH = ("schedule.file=", "vocab.algorithm=")  # what a search of the schedule sets
_CONCLUDE_SECONDS = 60  # at most, for the report of a failed run and for the services it used

RankBody = Callable[[RunConfig], None]


def launch(
    config: RunConfig,
    overrides: Sequence[str],
    body: RankBody,
    place: Place | None = None,
    *,
    num_ranks: int = 0,
    num_restarts: int = 0,
    only_preflight: bool = False,
) -> int:
    """Check the plan, prepare the data and run the ranks of this node.

    `body` trains one rank in a process that is a copy of this one.  `num_ranks` is the number of
    ranks on this node, 0 for as many as the degrees ask for.  `only_preflight` says whether ranks
    stop before step 1; they know it themselves, and nodes must not differ in it.  Returns the exit
    code of the job: 0, or that of the root cause, the same on every node.
    """
    entitle("vp-train")
    place = place or Place()
    num_local = num_local_ranks(config, place, num_ranks)
    if not place.is_alone:
        import_module("torch.distributed")  # for the processes that speak with the store
    place = replace(place, run_id=_run_id(place, config))
    options = {"--max-restarts": num_restarts, "--preflight": only_preflight}
    tidied = _tidied(config.run, only_preflight) if place.node == 0 else nullcontext()
    try:
        with tidied, joined(place, num_local, config.run.world_timeout_seconds, options) as news:
            job = (num_local, num_restarts)
            return _launch(news, config, overrides, body, *job, trains=not only_preflight)
    except JobEnded as error:
        say(error.ending.words)
        return error.ending.code


@contextmanager
def _tidied(settings: RunSettings, only_preflight: bool) -> Iterator[None]:
    """Remove the schedule that a preflight has searched, and the directory if nothing is in it."""
    with removed_if_unused(settings):
        try:
            yield
        finally:
            if only_preflight:
                with suppress(OSError):
                    _solved_file(settings, trains=False).unlink()


def num_local_ranks(config: RunConfig, place: Place, num_ranks: int) -> int:
    """Return the number of ranks of this node: `num_ranks` unless it is 0."""
    gpus = _num_gpus(config, place)
    return local_ranks_of(wanted_ranks(config.parallel), place, num_ranks, gpus)


def _run_id(place: Place, config: RunConfig) -> str:
    """Return what keeps jobs apart that have the same head and port: also the run they are for."""
    words = json.dumps([place.run_id, str(config.run.root), config.run.name])
    return hashlib.sha256(words.encode()).hexdigest()


def _launch(
    news: News,
    config: RunConfig,
    overrides: Sequence[str],
    body: RankBody,
    num_local: int,
    num_restarts: int,
    *,
    trains: bool,
) -> int:
    """Run the ranks of this node; all agents that have joined call this together."""
    overrides = expanded(overrides)  # ranks that start again later must not read another file
    with _stopped_by_signals(news.place):
        found, unfit = _checked(news, config, num_local, trains=trains)
        if unfit is not None:
            return _left(news, unfit)
        if found:
            overrides = [*overrides, *found]
            schedule = load_config(overrides)
            config = replace(config, schedule=schedule.schedule, vocab=schedule.vocab)
    started = time.time()

    def starter(resumes: bool) -> Starter:
        run = replace(config.run, resume=config.run.resume or resumes)
        if starts_by_fork(config):
            return forked(lambda: body(replace(config, run=run)))
        resumed = ["run.resume=true"] if resumes else []
        return new_process(
            [sys.executable, "-u", *search_options(), "-m", "vp_train", *overrides, *resumed]
        )

    def record_of(rank: int) -> Path | None:
        """Return the flight recorder's file of `rank` if this run wrote it."""
        record = flight_recorder.file_of(os.environ, config.run.directory, rank)
        return record if is_fresh(record, started) else None

    settings = config.run
    job = Job(
        starter,
        num_local,
        num_restarts=num_restarts,
        settings=settings,
        record_of=record_of,
        way_on=partial(way_on, settings.checkpoints),
        saves=partial(_saves, settings),
        answer=_answer(settings, trains=trains),
    )
    code = _left(news, run_job(news, job))
    has_failed = code not in (EXIT_OK, EXIT_TIME) and code - 128 not in SIGNALS
    if news.place.node == 0 and has_failed and _has_begun(settings, started):
        _in_copy(lambda: _conclude(settings))
    return code


def _has_begun(settings: RunSettings, since: float) -> bool:
    """Return whether ranks that started at `since` or later have come to their first step."""
    return is_fresh(settings.directory / "config.yaml", since)


def _saves(settings: RunSettings, since: float) -> bool:
    """Return whether ranks that started at `since` or later save if they are asked to end."""
    return settings.saves and _has_begun(settings, since)


def _answer(settings: RunSettings, *, trains: bool) -> str:
    """Return what ranks do after a first signal, and what a second one does."""
    if not trains:
        return "the preflight goes on to its end; once more ends it at once"
    if settings.saves:
        return "the ranks finish their step, save and leave; once more ends the run without saving"
    return "the ranks finish their step and leave; once more ends the run at once"


def _conclude(settings: RunSettings) -> None:
    """Write the report of a run whose ranks have failed, and tell its trackers that it has.

    This process ends if that takes long: a service may not answer.
    """
    signal.alarm(_CONCLUDE_SECONDS)
    try:
        refuse_running(settings)
    except ConfigError:  # another process has taken the directory
        return
    from vp_train.metrics.reporter import write_report

    write_report(settings)
    end_failed(settings)


def _left(news: News, ending: Ending) -> int:
    """Say why the job ends, on the first node that still lives, and return the exit code.

    A node that is lost to others, or that has lost the head, speaks for itself.
    """
    own = news.place.node
    lost = {loss.node for loss in losses(news)} - {own}
    is_cut_off = any(
        fact["lost"] == own or (fact["node"], fact["lost"]) == (own, 0)
        for fact in news.facts()
        if fact["kind"] == "lost"
    )
    if is_cut_off or own == min(set(range(news.place.num_nodes)) - lost):
        say(ending.words)
    return ending.code


def starts_by_fork(config: RunConfig) -> bool:
    """Return whether ranks are copies of their agent: CUDA and macOS' libraries survive no fork."""
    return config.run.device == "cpu" and sys.platform == "linux"


def _num_gpus(config: RunConfig, place: Place) -> int | None:
    """Return the number of GPUs of this node if ranks use them and the job has several nodes."""
    if config.run.device != "cuda" or place.is_alone:
        return None
    import torch

    from vp_train.communication.nccl import require_gpu

    require_gpu(config.run)
    return torch.cuda.device_count()


def _checked(
    news: News, config: RunConfig, num_local: int, *, trains: bool
) -> tuple[list[str], Ending | None]:
    """Check and prepare what the run needs, here and on all nodes.

    Returns the overrides that a search of the schedule adds, and how the job ends if a node cannot
    run it.  On one node the errors of `ending_of_command` are raised instead.
    """
    ending, found = Ending(EXIT_OK, ""), []
    try:
        found = _prepare(news, config, num_local * news.place.num_nodes, trains=trains)
    except (ConfigError, OSError) as error:
        if news.place.is_alone:
            raise
        ending = ending_of_command(error, f"vp-train: {news.place.host}")
    except _Unprepared as error:
        ending = error.ending
    news.tell("checked", code=ending.code, words=ending.words, overrides=found)
    _wait_for_checks(news)
    for loss in losses(news):
        return found, loss.ending
    facts = told(news, "checked", 0)
    unfit = [facts[node] for node in sorted(facts) if facts[node]["code"]]
    if unfit:
        return found, Ending(unfit[0]["code"], unfit[0]["words"])
    for node in sorted(set(range(news.place.num_nodes)) - facts.keys()):
        words = f"node {node} ({hosts(news)[node]}) has left without checking its settings"
        return found, Ending(EXIT_INTERNAL, words)
    return _searched_overrides(facts[0]["overrides"]), None


def _searched_overrides(values: object) -> list[str]:
    """Return the overrides of a search that node 0 has told.  Raises ConfigError for any other."""
    found = (
        [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
    )
    if found != values or not all(value.startswith(_OF_SEARCH) for value in found):
        raise ConfigError(f"node 0 tells other settings than those of a search: {values!r:.200}")
    return found


def _wait_for_checks(news: News) -> None:
    """Wait until no node is missing that has still to check its settings and its data.

    A line says which nodes are missing if that takes long.  Raises JobEnded after a signal.
    """
    began, has_said = time.monotonic(), False

    def is_over() -> bool | None:
        nonlocal has_said
        missing = untold(news, "checked", 0)
        if missing and not has_said and time.monotonic() - began > WORDS_SECONDS:
            has_said = True
            names = ", ".join(f"node {node} ({hosts(news).get(node, '')})" for node in missing)
            say_waiting(news, f"{names} to check settings and prepare data")
        return True if signals.has_request or not missing or losses(news) else None

    with noting_signals() as signals:
        wait_until(is_over)
    if signals.has_request:
        raise _stopped(signals.noted[0][0], news.place)


def _stopped(number: int, place: Place) -> JobEnded:
    """Return the end of a job by a signal that this node got before ranks started."""
    node = "" if place.is_alone else f" on node {place.node} ({place.host})"
    words = f"stopped by {signal.Signals(number).name}{node} before ranks started"
    return JobEnded(Ending(128 + number, words))


class _Signalled(BaseException):
    """A signal that asks this process to end; libraries catch what is an Exception."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def _stopped_by_signals(place: Place) -> Iterator[None]:
    """Raise JobEnded after a signal that would end this process.

    A KeyboardInterrupt with words says more, and passes.
    """

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise _Signalled(number)

    numbers = [n for n in SIGNALS if n != signal.SIGINT and not is_ignored(n)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    except _Signalled as error:
        raise _stopped(error.number, place) from None
    except KeyboardInterrupt as error:
        if error.args:
            raise
        raise _stopped(signal.SIGINT, place) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Unprepared(Exception):
    """The process that prepared the data has failed."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.words)
        self.ending = ending


def _prepare(news: News, config: RunConfig, num_ranks: int, *, trains: bool) -> list[str]:
    """Check the plan and the directory, import what ranks need, prepare the data, compile layers.

    Node 0 prints what will run where if the run `trains`.  Returns the overrides that the search of
    a schedule adds.  Raises ConfigError for what the user must change.
    """
    check_node(num_ranks // news.place.num_nodes)
    plan = None if config.schedule.is_solved else make_plan(config, num_ranks)
    if plan is not None:
        check_ramp(config, plan)
        if config.run.device == "cuda":
            num_local = num_ranks // news.place.num_nodes
            first = news.place.node * num_local
            check_host(plan, config.optim, range(first, first + num_local), machine_bytes())
        elif news.place.is_alone:
            check_machine(plan, config.optim, machine_bytes())
    found: list[str] = []
    if news.place.node == 0:
        require_trackers(config.run)
        make_directory(config.run)
        refuse_running(config.run)
        try:
            refuse_used(config.run)
        except ConfigError as error:
            if trains:
                raise
            say(f"{error}; the preflight changes nothing there")
    origin = config.run.init_from
    if origin is not None and not Path(origin).expanduser().is_dir():
        raise ConfigError(
            f"run.init_from={origin} is not a directory; give that of a run or of vp-import"
        )
    if plan is None and news.place.node == 0:  # the search runs once, for all ranks
        print(SEARCHING, flush=True)
        plan = _searched(config, num_ranks)
        solved = _solved_file(config.run, trains=trains)
        solved.parent.mkdir(parents=True, exist_ok=True)
        replace_file(solved, plan.schedule.text())
        found = [
            override("schedule.file", str(solved)),
            f"vocab.algorithm={plan.problem.algorithm.name}",
        ]
    if starts_by_fork(config):
        import_for_ranks(config)
    from vp_train.communication.nccl import require_gpu

    require_gpu(config.run)
    introduced = plan if trains and news.place.node == 0 else None
    ending = _in_copy(lambda: _prepare_data(config, introduced))
    if ending.code:
        raise _Unprepared(ending)
    if trains and starts_by_fork(config):  # now, as other nodes wait less long for a start
        from vp_train.assembly import compile_layers
        from vp_train.tensors.compiling import announced

        with announced(("layers",) if news.place.node == 0 else ()):
            compile_layers(config)
    return found


def _solved_file(settings: RunSettings, *, trains: bool) -> Path:
    """Return where this process writes the schedule of a search; a preflight removes its own."""
    return settings.directory / ("schedule.txt" if trains else f".preflight-{os.getpid()}.txt")


def _searched(config: RunConfig, num_ranks: int) -> RunPlan:
    """Return the plan of the fastest schedule that the search finds."""
    try:
        with Searching(keeps_best=False) as searching:
            return make_plan(config, num_ranks, searching.watch)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            "stopped while it searched for a schedule, before ranks started"
        ) from None


def _prepare_data(config: RunConfig, plan: RunPlan | None) -> None:
    """Prepare and open the data, and with a `plan` print the first lines of the run."""
    from vp_train.checkpoint.text import advising_kept_text
    from vp_train.data import open_source
    from vp_train.metrics.header import introduce

    entitle("vp data")
    with advising_kept_text(config):
        source = open_source(config, progress=True)
    if plan is not None:
        introduce(config, plan, source)


def import_for_ranks(config: RunConfig) -> None:
    """Import once what every rank needs, for ranks that are copies of this process."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # as ranks on a CPU do, before torch looks
    quiet_deprecations()
    with quiet_megatron():
        for name in _IMPORTS:
            import_module(name)
        from vp_train.assembly import fuse_of_layers  # vp_train.train has imported it
        from vp_train.model.elementwise import plain
        from vp_train.tensors import compiling

        if fuse_of_layers(config) is not plain:
            compiling.prepare_inductor()
            for name in _COMPILER:
                import_module(name)


def _in_copy(body: Callable[[], None]) -> Ending:
    """Call `body` in a copy of this process: it may start threads, which must not be here.

    Returns how it ended: with 0, or with the error that it raised.
    """
    ours, theirs = os.pipe()
    agent = os.getpid()
    process = fork()
    if not process:
        _end_copy(agent, body, theirs)
    os.close(theirs)
    try:
        with open(ours, "rb") as pipe:
            line = pipe.read()
    except BaseException:  # a signal, after which this process may take seconds to end
        os.kill(process, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(process, 0)
    try:
        return Ending(*json.loads(line))
    except ValueError:  # it was killed before it had written its line
        code = os.waitstatus_to_exitcode(status)
    words = f"vp-train: the preparation of the data {end_of_process(code)}"
    if code >= 0:
        return Ending(EXIT_INTERNAL, f"{words} and said nothing")
    return Ending(128 - code, words)


def _end_copy(agent: int, body: Callable[[], None], pipe: int) -> NoReturn:
    """Call `body`, write how it ended, and end this process: the stack above is the agent's."""
    try:
        ending = Ending(EXIT_OK, "")
        try:
            default_signals()
            die_with_launcher(agent)
            body()
        except BaseException as error:  # also SystemExit, and a panic of a library in Rust
            ending = ending_of_command(error, "vp-train")
        write_all(pipe, json.dumps([ending.code, ending.words]).encode())
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(EXIT_OK)
