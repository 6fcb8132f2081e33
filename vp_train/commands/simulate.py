"""The command `vp-simulate`: time and memory of a step, in words, numbers and pictures.

It runs without torch.
"""

from __future__ import annotations

import json
import shutil
import statistics
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from schedules.bound import Bound, step_bound
from schedules.generators import GENERATORS, searched_schedules
from schedules.generators.auto import Option, Solution, Watch
from schedules.generators.frontier import FrontierPoint
from schedules.ir import Kind
from schedules.jitter import Steps
from schedules.lower import lower
from schedules.render import chrome_trace, duration, svg, text_grid
from schedules.replay import RUNTIMES, Replay, Runtime, late_starts, replay
from schedules.simulate import simulate_order
from schedules.timeline import Timeline
from schedules.vocab import VOCAB_ALGORITHMS, End, searched_algorithms
from vp_train.commands import disturbed
from vp_train.commands.command import (
    OF_A_STEP,
    Command,
    collect_rarely,
    output_directory_of,
    run,
    typed,
)
from vp_train.commands.disturbed import Draws
from vp_train.commands.frontier import curves, files_words, write
from vp_train.commands.plot import Marker, comparison_png, schedule_png
from vp_train.commands.searching import Searching
from vp_train.config import ConfigError, RunConfig, printable
from vp_train.config.errors import unknown
from vp_train.failures import EXIT_OK
from vp_train.planning.cluster import assumed_costs
from vp_train.planning.degrees import split_ranks, wanted_ranks
from vp_train.planning.placement import nothing_offloaded_words
from vp_train.planning.plan import (
    SEARCHING,
    StepPlan,
    in_its_memory_words,
    plan_step,
    row_advice,
)
from vp_train.settings.files import config_text
from vp_train.tensors.alignment import HOST_BLOCK_BYTES
from vp_train.units import count_words, human_bytes

_GRID_RANKS = 32
_LABEL = 13  # columns of a label in front of a figure
_LEAST_COLUMNS = 40  # that a line of figures has on any terminal
_MOST_NAMES = 8  # of files of others that are shown
_LATE_STARTS = 5  # how many of the longest waits are shown


_EXAMPLES = """\
  vp-simulate schedule=v_half parallel.pp=8 num_microbatches=32 cost=a100_4b run.dtype=float16
  vp-simulate --out shown schedule=zb_h1         also as pictures and as a trace for Perfetto
  vp-simulate --runtime cuda schedule=zb_v       also as CUDA's streams would execute it
  vp-simulate --compare 1f1b,zb_h1,v_half --vocab none,one_barrier --out compared \\
      parallel.pp=8 cost=a100_4b run.dtype=float16
  vp-simulate --frontier --out frontier parallel.pp=8 num_microbatches=64 cost=a100_4b \\
      run.dtype=float16                          bubble against memory for every cap
  vp-simulate --jitter 0.1 --straggler 0.1       how steps vary with every schedule
  vp-simulate --jitter 0.1 schedule=v_half       and with this one alone"""


def main() -> None:
    """Run `vp-simulate`: predict time and memory of a step without running it."""
    collect_rarely()
    options = {
        "--out": ("DIR", "write pictures, trace and figures there"),
        "--compare": (
            "A,B,...",
            "one line for each of these schedules, auto among them, or for all",
        ),
        "--frontier": (
            "",
            "the best bubble under every cap on memory; 8 ranks, 64 microbatches: 2 to 3 minutes",
        ),
        "--vocab": ("A,B,...", "with several steps: these algorithms instead of vocab=, or all"),
        "--runtime": ("NAME", "also replay the program as cuda or gloo executes it"),
        "--program": ("", "print the program of every rank instead, one line per rank"),
        **disturbed.OPTIONS,
    }
    purpose = "simulates one step: time, bubble and memory of a schedule"
    run(Command("vp-simulate", purpose, _simulate, _EXAMPLES, options, OF_A_STEP))


def _simulate(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> int:
    directory = output_directory_of("--out", options["--out"]) if "--out" in options else None
    draws = Draws.of(options)
    compares = "--compare" in options or "--frontier" in options or draws is not None
    if "--vocab" in options and not compares:
        first = options["--vocab"].split(",")[0]
        raise ConfigError(
            "--vocab belongs to --compare, --frontier, --jitter and --straggler; "
            f"for one algorithm write vocab={'one_barrier' if first == 'all' else first}"
        )
    for name in ("--runtime", "--jitter", "--straggler"):
        if "--frontier" in options and name in options:
            raise ConfigError(f"--frontier goes without {name}; drop one of the two")
    if draws is not None and "--runtime" in options:
        raise ConfigError("--runtime goes without --jitter and --straggler; drop one of them")
    runtime = None
    if "--runtime" in options:
        runtime = _runtime_called(options["--runtime"], config.run.device)
    if "--program" in options:
        if others := [name for name in options if name != "--program"]:
            raise ConfigError(f"--program prints the program alone; drop {' and '.join(others)}")
        with Searching() as searching:
            plan = plan_step(config, wanted_ranks(config.parallel), searching.watch)
        tied = config.model.tied_embeddings
        print(lower(plan.schedule, plan.problem, plan.cost, tied=tied).text(), end="")
        return EXIT_OK
    schedule_words = typed(overrides, "schedule", "schedule.name", "schedule.file")
    if "--frontier" in options:
        _check_frontier(config, schedule_words)
        names, algorithms = options.get("--compare"), options.get("--vocab")
        if algorithms is None and typed(overrides, "vocab", "vocab.algorithm"):
            algorithms = None if config.vocab.algorithm == "auto" else config.vocab.algorithm
        return draw_frontier(
            config, names, algorithms, directory=directory, config_yaml=config_text(config)
        )
    if compares:
        names, algorithms = options.get("--compare"), options.get("--vocab")
        if names is None and not schedule_words:
            names = "all"
        compare(
            config,
            names,
            algorithms,
            directory=directory,
            config_yaml=config_text(config),
            runtime=runtime,
            draws=draws,
        )
    else:
        return show(config, directory, config_text(config), runtime)
    return EXIT_OK


def show(
    config: RunConfig, directory: Path | None, config_yaml: str, runtime: Runtime | None = None
) -> int:
    """Simulate one step, print the results, and write files and pictures to `directory` if given.

    With a `runtime` the step's program is replayed too.  Returns the exit code.  Raises
    ConfigError.
    """
    name = config.schedule.file or config.schedule.name
    heading = f"{name} with {config.vocab.algorithm}, {headline(config)}\n"
    if config.schedule.is_solved:  # it takes long, so say first what is searched for
        print(f"{heading}\n{SEARCHING}", flush=True)
    started = time.perf_counter()
    with Searching() as searching:
        outcome = simulate_step(config, runtime, searching.watch)
    taken = time.perf_counter() - started
    if not config.schedule.is_solved:
        print(heading)
    columns = shutil.get_terminal_size((120, 24)).columns
    lines = [report(outcome, columns)]
    lines += wrapped([f"costs        {cost_words(config, outcome.plan)}"], columns)
    lines += searching.words
    print("\n".join(lines))
    if advice := row_advice(config, outcome.plan):
        print(f"\n{advice}")
    print(f"\nsimulated in {duration(taken)}", flush=True)
    if directory is None:
        return searching.exit_code
    timeline, title = outcome.timeline, f"{outcome.name}, simulated"
    before = _names_in(directory)
    _write(directory, "config.yaml", config_yaml)
    _write(directory, "schedule.txt", outcome.plan.schedule.text())
    _write(directory, "schedule.svg", svg(timeline, title))
    timelines = {outcome.name: timeline}
    names = [
        "config.yaml",
        "schedule.txt",
        "schedule.svg",
        "schedule.png",
        "trace.json",
        "table.json",
    ]
    if outcome.replayed is not None:
        timelines[outcome.replayed.title] = outcome.replayed.timeline
        _write(directory, "replay.svg", svg(outcome.replayed.timeline, outcome.replayed.title))
        names.append("replay.svg")
    _write(directory, "trace.json", json.dumps(chrome_trace(timelines)))
    _write_table(directory, [outcome])
    schedule_png(timeline, title, directory / "schedule.png")
    _say_written(directory, names, before)
    return searching.exit_code


def _check_frontier(config: RunConfig, schedule_words: Sequence[str]) -> None:
    """Raise ConfigError for settings that have no meaning where schedules are searched for."""
    if schedule_words and not config.schedule.is_solved:
        name = config.schedule.name
        instead = (
            "" if config.schedule.file is not None else f", or compare with it: --compare {name}"
        )
        raise ConfigError(
            f"--frontier searches for schedules by itself; drop {schedule_words[0]}{instead}"
        )
    for setting in ("cap_gib", "cap_microbatches"):
        if (cap := getattr(config.schedule, setting)) is not None:
            raise ConfigError(
                f"--frontier searches under every cap on memory; drop schedule.{setting}={cap:g}"
            )


def compare(
    config: RunConfig,
    schedules: str | None,
    vocabs: str | None,
    *,
    directory: Path | None,
    config_yaml: str,
    runtime: Runtime | None = None,
    draws: Draws | None = None,
) -> None:
    """Simulate several schedules with several algorithms and print one line for each pair.

    `schedules` and `vocabs` are lists with commas, or `all`.  `auto` is searched for
    once with every algorithm.  Without `schedules` there is one line for the step of `config`,
    without `vocabs` the algorithm is that of `config`.  With `draws` the lines have the
    distribution of disturbed steps.  With a `directory` a table and a picture of all are written
    there.  Raises ConfigError for a name that is not known, or if no pair is possible.
    """
    if schedules is None:
        names: tuple[str, ...] = (config.schedule.file or config.schedule.name,)
    else:
        _refuse_file(config)
        names = _names("--compare", schedules, tuple(GENERATORS), others=("auto",))
    algorithms = (
        (config.vocab.algorithm,)
        if schedules is None and vocabs is None
        else _names("--vocab", vocabs or config.vocab.algorithm, tuple(VOCAB_ALGORITHMS))
    )
    widths = _widths(names, algorithms)
    head = table_head(widths, runtime)
    if draws is not None:
        num_ranks = wanted_ranks(config.parallel)
        draws = draws.on(split_ranks(config.parallel, num_ranks).pp)
        head = f"{draws.words}\n\n{disturbed.table_head(widths)}"
    if "auto" in names:  # it takes long, so say first what is searched for
        head = f"{SEARCHING} {_vocab_words(algorithms)}\n\n{head}"
    print(f"{headline(config)}\n\n{head}", flush=True)
    started = time.perf_counter()
    items: list[Outcome | Refusal] = []
    with Searching(keeps_best=False) as searching:
        found = (
            simulate_vocabs(config, algorithms, searching.watch)
            if schedules is None
            else simulate_each(config, names, algorithms, runtime, searching.watch)
        )
        for item in found:
            if draws is not None and isinstance(item, Outcome):
                item = replace(item, steps=draws.steps(item.plan))
            searching.print(table_line(item, widths))
            items.append(item)
    outcomes = [item for item in items if isinstance(item, Outcome)]
    steps = {(o.schedule, o.vocab): o.steps for o in outcomes if o.steps is not None}
    if len(steps) > 1:
        print("", *disturbed.verdict(steps), sep="\n")
    print(
        f"\n{len(outcomes)} of {len(items)} simulated in {duration(time.perf_counter() - started)}",
        flush=True,
    )
    before = frozenset[str]()
    if directory is not None:
        before = _names_in(directory)
        _write(directory, "config.yaml", config_yaml)
        _write_table(directory, items)
    if not outcomes:
        raise ConfigError(
            "none of these schedules is possible with these settings; the table says why"
        )
    if directory is not None:
        comparison_png(_marks(outcomes), headline(config), directory / "comparison.png")
        _say_written(directory, ["config.yaml", "table.json", "comparison.png"], before)


def _vocab_words(algorithms: Sequence[str]) -> str:
    """Return with which algorithms schedule=auto is searched for: once each, or once for auto."""
    if algorithms == ("auto",):
        return f"with any of {', '.join(searched_algorithms())}"
    return f"with {'' if len(algorithms) == 1 else 'each of '}{', '.join(algorithms)}"


def draw_frontier(
    config: RunConfig,
    schedules: str | None,
    vocabs: str | None,
    *,
    directory: Path | None,
    config_yaml: str,
) -> int:
    """Search the fastest schedule under every cap on memory, and print a line for each.

    `vocabs` are the algorithms, each with a frontier of its own, `schedules` the named schedules
    to compare with; both are lists with commas, or `all`.  Without them these are what searches
    try.  The named schedules come first, since none of them lies below its frontier.  After Ctrl-C
    the caps that were not searched to the end are left out.  With a `directory` table, pictures and
    schedules are written there.  Returns the exit code.  Raises ConfigError like `compare`.
    """
    _refuse_file(config)
    if schedules is not None and "auto" in schedules.split(","):
        raise ConfigError("--frontier draws what auto finds as a line; drop auto from --compare")
    names = _names("--compare", schedules or ",".join(searched_schedules()), tuple(GENERATORS))
    searched = ",".join(searched_algorithms())
    algorithms = _names("--vocab", vocabs or searched, tuple(VOCAB_ALGORITHMS))
    print(f"{headline(config)}\n", flush=True)
    started = time.perf_counter()
    widths = max(map(len, ("schedule", *names))), max(map(len, ("vocab", *algorithms)))
    print(table_head(widths), flush=True)
    named: dict[str, list[FrontierPoint]] = {algorithm: [] for algorithm in algorithms}
    for item in simulate_each(config, names, algorithms):
        print(table_line(item, widths), flush=True)
        if isinstance(item, Outcome):
            named[item.vocab].append(_named_point(item))
    print(flush=True)
    with Searching() as searching:
        found = curves(config, algorithms, named, searching)
    taken = duration(time.perf_counter() - started)
    print(f"\nsearched in {taken}", flush=True)
    if searching.is_stopped:
        left_out = "further caps and algorithms are left out"
        print(f"the search was stopped: {left_out}", flush=True)
    if directory is not None and not found:
        print(f"no schedule was found, so nothing is written to {directory}", flush=True)
    elif directory is not None:
        before = _names_in(directory)
        _write(directory, "config.yaml", config_yaml)
        option = found[0].points[0].solution.option
        unit = option.cost.microbatch_bytes(option.problem.layout.num_ranks)
        names_written = write(directory, found, named, headline(config), unit)
        _say_written(directory, ["config.yaml", *names_written], before)
        print(files_words(unit), flush=True)
    return searching.exit_code


def _named_point(outcome: Outcome) -> FrontierPoint:
    """Return a named schedule as a point, with what its fullest rank keeps as its cap."""
    plan, timeline = outcome.plan, outcome.timeline
    option = Option(outcome.schedule, plan.problem, plan.cost)
    solution = Solution(option, plan.schedule, outcome.bound)
    return FrontierPoint(max(timeline.peak_bytes), solution, timeline)


def _refuse_file(config: RunConfig) -> None:
    """Raise ConfigError if a schedule comes from a file where schedules are simulated by name."""
    if config.schedule.file is not None:
        raise ConfigError(
            "--compare simulates schedules by name, "
            f"but schedule.file={config.schedule.file} is set; drop one of the two"
        )


def _marks(outcomes: Sequence[Outcome]) -> list[Marker]:
    """Return the points of a picture of bubble against memory."""
    return [
        Marker(item.schedule, item.vocab, item.timeline.mean_bubble, max(item.timeline.peak_bytes))
        for item in outcomes
    ]


def _runtime_called(name: str, device: str) -> Runtime:
    """Return the runtime `name` of passes on `device`.  Raises ConfigError if there is none."""
    if name not in RUNTIMES:
        raise ConfigError(unknown(f"--runtime: {name!r}", name, tuple(RUNTIMES)))
    return RUNTIMES[name].on(device)


def _names(
    option: str, words: str, known: tuple[str, ...], others: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return the names in a list with commas without repetitions; all `known` for `all`.

    `others` are names that `all` does not stand for.
    """
    listed = [part for word in words.split(",") for part in (known if word == "all" else (word,))]
    names = tuple(dict.fromkeys(listed))
    for name in names:
        if name not in known + others:
            words = unknown(f"{option}: {name!r}", name, known + others)
            raise ConfigError(f"{words}, or write {option} all")
    return names


def _names_in(directory: Path) -> frozenset[str]:
    """Return the names of what is in a directory; none if it is not there."""
    return (
        frozenset(path.name for path in directory.iterdir()) if directory.exists() else frozenset()
    )


def _say_written(directory: Path, names: Sequence[str], before: frozenset[str]) -> None:
    """Print what was written to `directory`, which had the names `before`, and what is left there.

    So nobody takes files of an earlier simulation for those of this one.
    """
    replaced = [name for name in names if name in before]
    print(f"written to {directory}: {', '.join(names)}", flush=True)
    if replaced:
        print(f"replaced there: {_few(replaced)}", flush=True)
    if others := sorted(before.difference(names)):
        print(f"there already, and not of this simulation: {_few(others)}", flush=True)


def _few(names: Sequence[str]) -> str:
    """Return the first of `names`, and how many more there are."""
    more = len(names) - _MOST_NAMES
    return ", ".join(
        [*map(printable, names[:_MOST_NAMES]), *([f"and {more} more"] if more > 0 else [])]
    )


def _write(directory: Path, name: str, text: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)


def _write_table(directory: Path, items: Sequence[Outcome | Refusal]) -> None:
    _write(
        directory,
        "table.json",
        json.dumps({"rows": [record(item) for item in items]}, indent=1) + "\n",
    )


@dataclass(frozen=True, slots=True)
class Replayed:
    """A simulated step as a runtime executes it.

    `longer` is the additional time as a fraction of the simulated time.
    """

    title: str
    runtime: Runtime
    replay: Replay
    longer: float

    @property
    def timeline(self) -> Timeline:
        return self.replay.timeline


@dataclass(frozen=True, slots=True)
class Outcome:
    """The simulated step of a schedule with a vocabulary algorithm."""

    schedule: str
    vocab: str
    plan: StepPlan
    bound: Bound
    replayed: Replayed | None = None
    steps: Steps | None = None  # disturbed ones

    @property
    def name(self) -> str:
        return f"{self.schedule} with {self.vocab}"

    @property
    def timeline(self) -> Timeline:
        return self.plan.timeline

    @property
    def gap(self) -> float:
        """The time above the lower bound, as a fraction of that bound; 0 without work."""
        return self.timeline.gap or 0.0

    @property
    def microbatches_in_flight(self) -> tuple[float, ...]:
        """The microbatches in flight at the peak of every rank.

        A microbatch counts in full when all stages of the rank hold it.
        """
        chunks = self.plan.problem.layout.num_chunks
        return tuple(count / chunks for count in self.timeline.peak_in_flight)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A schedule with a vocabulary algorithm that these settings do not allow."""

    schedule: str
    vocab: str
    reason: str


def simulate_step(
    config: RunConfig, runtime: Runtime | None = None, watch: Watch | None = None
) -> Outcome:
    """Plan and simulate one step, and replay its program if a runtime is given.

    `watch` sees the search of schedule=auto go on, and may end it.  Raises ConfigError, which names
    the value and the way out.
    """
    plan = plan_step(config, wanted_ranks(config.parallel), watch)
    bound = step_bound(plan.problem, plan.cost, plan.caps)
    outcome = Outcome(plan.schedule.name, plan.problem.algorithm.name, plan, bound)
    return outcome if runtime is None else replace(outcome, replayed=_replayed(outcome, runtime))


def _replayed(outcome: Outcome, runtime: Runtime) -> Replayed:
    plan, simulated = outcome.plan, outcome.timeline
    result = replay(lower(plan.schedule, plan.problem, plan.cost), plan.cost, runtime)
    result = replace(result, timeline=replace(result.timeline, bound=simulated.bound))
    longer = result.timeline.makespan / simulated.makespan - 1 if simulated.makespan > 0 else 0.0
    return Replayed(
        f"{outcome.name}, replayed on {runtime.name}", runtime, result, round(longer, 9) + 0.0
    )


def _widths(names: Sequence[str], algorithms: Sequence[str]) -> tuple[int, int]:
    """Return the widths of a table's first two columns.

    A search has yet to find both the schedule it starts from and, with vocab=auto, the algorithm.
    """
    if "auto" in names:
        names = [*names, *(f"auto from {name}" for name in GENERATORS)]
    if "auto" in algorithms:
        algorithms = tuple(VOCAB_ALGORITHMS)
    return max(map(len, ("schedule", *names))), max(map(len, ("vocab", *algorithms)))


def simulate_each(
    config: RunConfig,
    schedules: Sequence[str],
    vocabs: Sequence[str],
    runtime: Runtime | None = None,
    watch: Watch | None = None,
) -> Iterator[Outcome | Refusal]:
    """Yield the result of every schedule with every algorithm.

    All other settings stay as they are, except that only `auto` has a cap on memory.  `watch` sees
    its searches go on.
    """
    for schedule in schedules:
        caps = {} if schedule == "auto" else {"cap_gib": None, "cap_microbatches": None}
        settings = replace(config.schedule, name=schedule, **caps)
        for vocab in vocabs:
            chosen = replace(
                config, schedule=settings, vocab=replace(config.vocab, algorithm=vocab)
            )
            try:
                yield simulate_step(chosen, runtime, watch)
            except ConfigError as error:
                yield Refusal(schedule, vocab, str(error))


def simulate_vocabs(
    config: RunConfig, vocabs: Sequence[str], watch: Watch | None = None
) -> Iterator[Outcome | Refusal]:
    """Yield the result of the schedule of `config`, or of its file, with every algorithm.

    `watch` sees the search of schedule=auto go on.  Raises ConfigError if the only one is not
    possible.
    """
    for vocab in vocabs:
        chosen = replace(config, vocab=replace(config.vocab, algorithm=vocab))
        try:
            yield simulate_step(chosen, watch=watch)
        except ConfigError as error:
            if len(vocabs) == 1:
                raise
            yield Refusal(config.schedule.name, vocab, str(error))


def headline(config: RunConfig) -> str:
    """Return ranks, batch and model of a simulation in two lines."""
    model = config.model
    return (
        f"{count_words(wanted_ranks(config.parallel), 'rank')}, "
        f"{count_words(config.num_microbatches, 'microbatch')} of "
        f"{config.micro_batch_size} x {model.seq_length:,} tokens\n"
        f"{count_words(model.num_layers, 'layer')} of hidden size {model.hidden_size:,}, "
        f"vocabulary {model.vocab_size:,}; activations in {config.run.dtype}"
    )


def cost_words(config: RunConfig, plan: StepPlan) -> str:
    """Return in words where the seconds of the passes come from."""
    if config.cost.layer_forward_seconds is not None:
        return f"measured on {config.cost.measured_on or config.cost.measured_device or 'a device'}"
    cost = assumed_costs(plan.work, config.cluster, config.cost)
    if cost.matrix_flops_per_second is not None:
        rate = cost.matrix_flops_per_second / 1e12
        return f"large products at {rate:,.3g} TFLOP/s, attention and bytes at theirs, assumed"
    rate = (cost.flops_per_second or 0.0) / 1e12
    words = f"FLOPs at {rate:,.3g} TFLOP/s"
    if plan.work.on_cuda or config.cost.flops_per_second is not None:
        return f"{words}, assumed"
    hop, barrier = (duration(value or 0.0) for value in (cost.hop_seconds, cost.collective_seconds))
    return (
        f"{words}, {hop} a hop and {barrier} a barrier: assumed for a share of a CPU, as in a run. "
        "vp-plan takes the links of the cluster. cluster=h100_80g_node or cost=a100 plans for GPUs"
    )


def report(outcome: Outcome, columns: int) -> str:
    """Return the text grid, a table of the ranks, and the figures of the step."""
    timeline, bound = outcome.timeline, outcome.bound
    worst = max(range(timeline.num_ranks), key=timeline.peak_bytes.__getitem__)
    figures = [
        f"schedule     {outcome.plan.schedule.name}, "
        f"vocabulary {outcome.plan.problem.algorithm.name}",
        f"makespan     {duration(timeline.makespan)}, without gradient exchange and optimizer",
        f"mean bubble  {timeline.mean_bubble:.1%}",
        f"peak memory  {human_bytes(timeline.peak_bytes[worst])} on rank {worst}, at most "
        f"{max(outcome.microbatches_in_flight):g} microbatches in flight; activations only",
        *_offload_lines(outcome),
        f"lower bound  {duration(bound.seconds)}: {bound.reason}",
        f"gap          {outcome.gap:.1%} above the bound"
        f"{in_its_memory_words(outcome.gap, outcome.plan.gap_in_its_memory())}",
        *_replay_lines(outcome),
    ]
    return "\n".join(
        [grid(timeline, columns), *_rank_table(outcome), "", *wrapped(figures, columns)]
    )


def wrapped(lines: Sequence[str], columns: int) -> list[str]:
    """Return labelled lines in parts of `columns`, or of a few more; parts stand below the text."""
    return [
        part
        for line in lines
        for part in textwrap.wrap(
            line,
            max(columns, _LEAST_COLUMNS),
            subsequent_indent=" " * _LABEL,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def _offload_lines(outcome: Outcome) -> list[str]:
    """Return what goes to the host and back, and time and peak without that; [] if it is off."""
    plan, timeline = outcome.plan, outcome.timeline
    if not plan.cost.offload_bytes:
        return []
    if not timeline.transfers:
        words = nothing_offloaded_words(has_layers=any(plan.cost.offload_bytes))
        return [f"offloaded    {words}"]
    alone = simulate_order(replace(plan.schedule, offloads=()), plan.problem, plan.cost)
    ranks = range(timeline.num_ranks)
    busiest = max(ranks, key=timeline.moved_bytes)
    down, up = timeline.link_busy(busiest)
    moved, held = timeline.moved_bytes(busiest), timeline.host_bytes(busiest, HOST_BLOCK_BYTES)
    without = f"{duration(alone.makespan)}, peak memory {human_bytes(max(alone.peak_bytes))}"
    return [
        f"offloaded    {human_bytes(moved)} of rank {busiest} go to its host and back, "
        f"at most {human_bytes(held)} at a time; its link is busy {down:.0%} down, {up:.0%} up",
        f"without      {without}",
    ]


def _replay_lines(outcome: Outcome) -> list[str]:
    """Return the time of the replay, and the waits that the simulation lacks, longest first."""
    replayed = outcome.replayed
    if replayed is None:
        return []
    lines = [f"{duration(replayed.timeline.makespan)}, {replayed.longer:.2%} longer than simulated"]
    late = late_starts(replayed.replay, outcome.timeline)
    if replayed.runtime.issues_ahead:
        beside = replayed.replay.beside_waits
        mean, worst = sum(beside) / len(beside), max(beside)
        lines.append(
            f"during {mean:.0%} of the passes' time ({worst:.0%} on the worst rank) a posted "
            "communication waits for another rank and occupies GPU thread blocks"
        )
    lines += [f"{duration(entry.seconds)} more waiting of {entry}" for entry in late[:_LATE_STARTS]]
    if len(late) > _LATE_STARTS:
        lines.append(f"({len(late) - _LATE_STARTS} more such waits, none longer)")
    heads = [f"on {replayed.runtime.name}", *[""] * (len(lines) - 1)]
    return [f"{head:<12} {line}" for head, line in zip(heads, lines, strict=True)]


def grid(timeline: Timeline, columns: int) -> str:
    """Return the text grid, or a line that says why there is none.

    If the step is too long for readable passes, only its beginning is shown.  More than 32 ranks
    have no grid.
    """
    if timeline.num_ranks > _GRID_RANKS:
        return (
            f"(no grid: {timeline.num_ranks} ranks are too many for text; --out DIR draws them)\n"
        )
    seconds = _readable_seconds(timeline, columns)
    if seconds >= timeline.makespan:
        return text_grid(timeline, columns)
    shown = f"the first {duration(seconds)} of {duration(timeline.makespan)}"
    return f"{text_grid(timeline, columns, seconds)}({shown}; --out DIR draws the whole step)\n"


def _readable_seconds(timeline: Timeline, columns: int) -> float:
    """Return how many seconds a line can show if the label of a median forward is to fit."""
    forwards = [
        span
        for spans in timeline.compute
        for span in spans
        if span.kind == Kind.F and span.seconds > 0
    ]
    if not forwards:
        return timeline.makespan
    label = 1 + len(str(max(span.microbatch for span in forwards)))
    return (columns - 4) / label * statistics.median(span.seconds for span in forwards)


def _rank_table(outcome: Outcome) -> list[str]:
    """Return a table of the ranks in lines."""
    timeline, plan = outcome.timeline, outcome.plan
    lines = ["rank  layers    V rows     busy   bubble  in flight  peak memory"]
    for rank, layers in enumerate(plan.layers_of_ranks):
        lines.append(
            f"{rank:>4}  {sum(map(len, layers)):>6}  "
            f"{plan.shards[End.OUTPUT][rank].num_rows:>8,}  "
            f"{duration(timeline.busy(rank)):>7}  {timeline.bubble(rank):>6.1%}  "
            f"{outcome.microbatches_in_flight[rank]:>9g}  "
            f"{human_bytes(timeline.peak_bytes[rank]):>11}"
        )
    return lines


def table_head(widths: tuple[int, int], runtime: Runtime | None = None) -> str:
    """Return the header of `table_line`.  `widths`: characters of a schedule, of an algorithm."""
    replayed = "" if runtime is None else f" {f'on {runtime.name}':>9}"
    figures = f"{'makespan':>9} {'bubble':>7} {'gap':>7} {'in flight':>10} {'peak memory':>12}"
    return f"{'schedule':<{widths[0]}} {'vocab':<{widths[1]}} {figures}{replayed}"


def table_line(item: Outcome | Refusal, widths: tuple[int, int]) -> str:
    """Return one line of the comparison.

    Peaks are those of the worst rank, and `in flight` counts microbatches.  The last column of a
    replay says by which fraction it takes longer.
    """
    start = f"{item.schedule:<{widths[0]}} {item.vocab:<{widths[1]}} "
    if isinstance(item, Refusal):
        return f"{start}not possible: {item.reason}"
    if item.steps is not None:
        return disturbed.table_line(item.schedule, item.vocab, item.steps, widths)
    replayed = "" if item.replayed is None else f" {item.replayed.longer:>+9.2%}"
    return start + (
        f"{duration(item.timeline.makespan):>9} {item.timeline.mean_bubble:>7.1%} "
        f"{item.gap:>7.1%} {max(item.microbatches_in_flight):>10g} "
        f"{human_bytes(max(item.timeline.peak_bytes)):>12}{replayed}"
    )


def record(item: Outcome | Refusal) -> dict[str, Any]:
    """Return one row of table.json: bubbles and gap are fractions, lists have a value per rank."""
    start = {"schedule": item.schedule, "vocab": item.vocab}
    if isinstance(item, Refusal):
        return start | {"reason": item.reason}
    timeline, replayed = item.timeline, {}
    if item.replayed is not None:
        replayed["replay"] = {
            "runtime": item.replayed.runtime.name,
            "makespan_seconds": item.replayed.timeline.makespan,
            "longer": item.replayed.longer,
        }
    if item.steps is not None:
        replayed["disturbed"] = disturbed.record(item.steps)
    return (
        start
        | replayed
        | {
            "makespan_seconds": timeline.makespan,
            "mean_bubble": timeline.mean_bubble,
            "bubble": [timeline.bubble(rank) for rank in range(timeline.num_ranks)],
            "peak_bytes": list(timeline.peak_bytes),
            "microbatches_in_flight": list(item.microbatches_in_flight),
            "bound_seconds": item.bound.seconds,
            "bound_reason": item.bound.reason,
            "gap": item.gap,
        }
        | _offload_record(timeline)
    )


def _offload_record(timeline: Timeline) -> dict[str, Any]:
    """Return the transfers to the host for table.json, per rank; {} without any."""
    ranks = range(timeline.num_ranks)
    if not timeline.transfers:
        return {}
    return {
        "offloaded_bytes": [timeline.moved_bytes(rank) for rank in ranks],
        "host_bytes": [timeline.host_bytes(rank, HOST_BLOCK_BYTES) for rank in ranks],
        "link_busy": [timeline.link_busy(rank) for rank in ranks],
    }
