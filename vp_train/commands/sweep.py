"""Sweeps: `vp-train -m` trains every combination of lists of values, one run after the other.

`launch/sweep.sbatch` starts one of them per index of a Slurm array, with `--only`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from threading import Thread
from typing import IO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from vp_train.commands.agent import Signals, noting_signals
from vp_train.commands.command import (
    Command,
    check_printable,
    configured,
    path_of,
    split_options,
    whole_number,
)
from vp_train.commands.local_ranks import search_options
from vp_train.commands.place import is_rank, is_slurm_rank, place_of
from vp_train.config import ConfigError, RunConfig, RunSettings, printable
from vp_train.config.typed import override
from vp_train.durable import UnreadableError, checkpoints_in, open_regular, read_text
from vp_train.durable import replace as replace_file
from vp_train.failures import EXIT_OK, EXIT_TIME
from vp_train.settings import load_config
from vp_train.settings.resume import changes, check_start
from vp_train.settings.sweeps import combinations
from vp_train.settings.unknown import refuse_options
from vp_train.units import count_words, human_bytes, loss_words

SWEEP = "VP_TRAIN_SWEEP"  # environment variable of runs with the process id of their sweep
_FLAGS = ("-m", "--multirun")
_MOST_BYTES = 1 << 20  # of a file with lines of overrides
_SIGNS = ",()[]{}'\""  # that no name has
_POLL_SECONDS = 0.1
_LEFT_SECONDS = 1.0  # that a process which outlives its run may keep its stderr open
_MOST_TAIL = 1 << 14  # bytes of a run's stderr that are kept


@dataclass(frozen=True, slots=True)
class SweptRun:
    """One run of a sweep.

    words: its overrides, with run.name.
    chosen: the settings that it need not share with the other runs, as they were written.
    """

    name: str
    words: tuple[str, ...]
    chosen: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run has come to.  Values are None where its metrics do not have them.

    exit_code: None for a run that was not started.
    steps: the last step in metrics.jsonl, 0 without one.
    tokens_per_second: the median of all steps.
    peak_bytes: memory of the worst rank.
    reason: why the run failed, in one line; None if it did not.
    """

    name: str
    chosen: Mapping[str, str]
    exit_code: int | None = None
    steps: int = 0
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    peak_bytes: float | None = None
    reason: str | None = None


def is_sweep(arguments: Sequence[str]) -> bool:
    """Return whether the arguments of vp-train ask for a sweep."""
    asks = any(flag in arguments for flag in _FLAGS)
    return asks and "--help" not in arguments and "-h" not in arguments


def sweep(command: Command, arguments: Sequence[str]) -> int:
    """Train the runs of a sweep, and write their table; return the exit code.

    With --only, this process trains one of them instead.  All settings are checked before the first
    run starts.  A run that fails does not stop the others, but one that leaves on request does.
    Raises ConfigError.
    """
    for word in arguments:
        check_printable(word)
    shows = "--print-config" in arguments
    words, options = split_options(
        [word for word in arguments if word not in (*_FLAGS, "--print-config")], command.options
    )
    refuse_options(words, tuple(command.options))
    runs, base = runs_of(words)
    if "--only" in options:
        return configured(command, _chosen_arguments(runs, options) + ["--print-config"] * shows)
    if shows:
        raise ConfigError("--print-config shows one run of a sweep; choose it with --only I")
    if (
        is_rank(os.environ)
        or is_slurm_rank(os.environ)
        or not place_of(options, os.environ).is_alone
    ):
        raise ConfigError(
            "-m trains one run after the other on this machine; on several nodes train each with "
            "--only I, as launch/sweep.sbatch does"
        )
    return _sweep(runs, base, options)


def _chosen_arguments(runs: Sequence[SweptRun], options: Mapping[str, str]) -> list[str]:
    """Return the arguments of the run that --only chooses."""
    index = whole_number(options, "--only", 0, least=0)
    if index >= len(runs):
        raise ConfigError(
            f"--only {index} of {count_words(len(runs), 'run')}; they are 0 to {len(runs) - 1}, "
            f"so submit launch/sweep.sbatch with --array 0-{len(runs) - 1}"
        )
    words = runs[index].words
    print(f"sweep: {_place(index, runs)}: {' '.join(words)}", file=sys.stderr, flush=True)
    return [*words, *_options_again(options)]


def _options_again(options: Mapping[str, str]) -> list[str]:
    """Return the options of a sweep that are those of its runs, as they are typed."""
    kept = {name: value for name, value in options.items() if name != "--only"}
    return [word for name, value in kept.items() for word in (name, value) if word]


def runs_of(words: Sequence[str]) -> tuple[list[SweptRun], str]:
    """Return the runs of a sweep in the order of their indices, and the name that they share.

    The first word may be a file with the overrides of one run per line.  Each line is combined with
    all other words; the last list changes fastest.  Runs are named NAME-0, NAME-1, ... after
    run.name, else after the file, else `sweep`.  A line may name its own run.  Raises ConfigError.
    """
    if not words:
        raise ConfigError("give lists such as optim.lr=1e-3,3e-4, or a file of overrides")
    _refuse_twice([word for word in words if "=" in word])
    base, lines = "sweep", [list[str]()]
    if "=" not in words[0]:
        base, lines = Path(words[0]).stem, _lines_of(path_of(words[0], "the first word"))
        words = words[1:]
    base = next((_value_of(word) for word in reversed(words) if _is_name(word)), base)
    words = [word for word in words if not _is_name(word)]
    runs: list[SweptRun] = []
    for line in lines:
        own = [_value_of(word) for word in line if _is_name(word)]
        given = [*words, *(word for word in line if not _is_name(word))]
        _refuse_twice(line)
        own_names = {word.partition("=")[0] for word in line}
        lists = [word for word in words if word.partition("=")[0] in own_names]
        if len(combinations(lists)) > 1:  # every run would have the value of the line
            _refuse_twice([*lists, *line])
        found = combinations(given)
        for combined in found:
            name = f"{base}-{len(runs)}"
            if own:
                name = own[-1] if len(found) == 1 else f"{own[-1]}-{found.index(combined)}"
            differs = [word for word in combined if word not in given or word in line]
            chosen = {word.partition("=")[0]: _value_of(word) for word in differs}
            runs.append(SweptRun(name, (*combined, override("run.name", name)), chosen))
    _check_names(runs, base)
    RunSettings(name=base)  # refuses what is no name: the table is called so
    return runs, base


def _is_name(word: str) -> bool:
    return word.startswith("run.name=")


def _value_of(word: str) -> str:
    return word.partition("=")[2]


def _refuse_twice(words: Sequence[str]) -> None:
    """Raise ConfigError for a setting that has two values: only the last one would count."""
    first: dict[str, str] = {}
    for word in words:
        name = word.partition("=")[0]
        if first.setdefault(name, word) != word:
            raise ConfigError(
                f"{first[name]} and {word} are the same setting; drop one of the two, or write a "
                f"list as in {name}=A,B"
            )


def _check_names(runs: Sequence[SweptRun], base: str) -> None:
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            raise ConfigError(f"two runs of the sweep are called {run.name}; give each a name")
        if "run.root" in run.chosen:
            raise ConfigError("run.root has several values; all runs of a sweep lie in one root")
        if any(sign in run.name for sign in _SIGNS):
            given = base if any(sign in base for sign in _SIGNS) else run.name
            raise ConfigError(
                f"run.name={given} has signs that a name cannot have; give one name, and the runs "
                "are called NAME-0, NAME-1, ..."
            )


def _lines_of(path: Path) -> list[list[str]]:
    """Return the overrides of every line of a file: quotes as in a shell, # begins a comment."""
    try:
        lines = read_text(path, _MOST_BYTES).splitlines()
    except UnreadableError as error:
        raise ConfigError(
            f"{error}; the first word is an override or a file of overrides"
        ) from None
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            words = shlex.split(line, comments=line.lstrip().startswith("#"))
        except ValueError as error:
            raise ConfigError(f"{path}: line {number}: {error}") from None
        if words:
            found.append(words)
    if not found:
        raise ConfigError(f"{path} has no line with overrides")
    return found


def _sweep(runs: Sequence[SweptRun], base: str, options: Mapping[str, str]) -> int:
    configs = _checked(runs, options)
    place = Path(configs[0].run.root).expanduser() / base
    if configs[0].run.resume:
        _require_same_runs(place.with_name(f"{base}.json"), runs)
    if len(runs) == 1 and not runs[0].chosen:
        raise ConfigError(
            "-m trains every combination of lists, and no setting has one; write for example "
            "optim.lr=1e-3,3e-4, or drop -m"
        )
    results = [RunResult(run.name, run.chosen) for run in runs]
    with noting_signals() as signals:
        for index, (run, config) in enumerate(zip(runs, configs, strict=True)):
            where = f"sweep: {_place(index, runs)}, {run.name}"
            done = _steps_done(config) if config.run.resume else 0
            if done >= config.run.steps:
                more = f", more than run.steps={config.run.steps}" * (done > config.run.steps)
                print(f"{where}, is finished: {count_words(done, 'step')}{more}", flush=True)
                code, said = EXIT_OK, None
            else:
                print(": ".join(filter(None, (where, _said(run)))), flush=True)
                code, said = _trained((*_words_of(run, config), *_options_again(options)), signals)
            result = result_of(run, config, code)
            results[index] = replace(result, reason=said) if code else result
            _write(place, results)
            if code == EXIT_TIME or signals.has_request:
                break
    left = index < len(runs) - 1 and (code == EXIT_TIME or signals.has_request)
    best = best_of(results)
    _print_table(results, best)
    if words := _unlike_words(configs):
        print(words, flush=True)
    print(f"the table is in {place}.csv and {place}.json", flush=True)
    if left or code == EXIT_TIME:
        print(
            f"vp-train: the sweep has left with {_place(index, runs)} ({run.name}); the same "
            "command with run.resume=true goes on, without the runs that are finished",
            file=sys.stderr,
            flush=True,
        )
        return code or EXIT_TIME
    return next((result.exit_code for result in results if result.exit_code), EXIT_OK)


def _words_of(run: SweptRun, config: RunConfig) -> Sequence[str]:
    """Return the overrides of a run, of one that never started without those to resume."""
    if config.run.resume and not config.run.directory.exists():
        return [word for word in run.words if not word.startswith("run.resume=")]
    return run.words


def _checked(runs: Sequence[SweptRun], options: Mapping[str, str]) -> list[RunConfig]:
    """Return the settings of all runs.  Raises ConfigError that names the run and what it chose."""
    configs = []
    for index, run in enumerate(runs):
        try:
            configs.append(_checked_run(run, whole_number(options, "--ranks", 0)))
        except ConfigError as error:
            raise ConfigError(
                f"{_place(index, runs)} ({_said(run) or run.name}): {error}"
            ) from None
    return configs


def _require_same_runs(path: Path, runs: Sequence[SweptRun]) -> None:
    """Raise ConfigError if the table of a sweep that goes on has runs that are not in `runs`."""
    try:
        rows = json.loads(read_text(path, _MOST_BYTES))
        before = [str(row["run"]) for row in rows]
    except (UnreadableError, ValueError, TypeError, KeyError, RecursionError):
        return
    lost = [name for name in before if name not in {run.name for run in runs}]
    if lost:
        raise ConfigError(
            f"{path} is of a sweep of {count_words(len(before), 'run')}, and {printable(lost[0])} "
            f"is none of these {len(runs)}; give the same lists to go on, or choose another "
            "run.name"
        )


def _place(index: int, runs: Sequence[SweptRun]) -> str:
    """Return which run of a sweep this is, counted from one."""
    return f"run {index + 1} of {len(runs)}"


def _said(run: SweptRun) -> str:
    return " ".join(f"{name}={value}" for name, value in run.chosen.items())


def _checked_run(run: SweptRun, num_ranks: int) -> RunConfig:
    """Return the settings of a run that can start, or go on.  Raises ConfigError."""
    from vp_train.metrics.run_directory import refuse_used
    from vp_train.planning.degrees import wanted_ranks
    from vp_train.planning.plan import check_ramp, make_plan

    config = load_config(run.words)
    refuse_used(config.run)
    check_start(config)
    # One that failed before its first checkpoint has nothing to lose, and may be mended.
    done = bool(checkpoints_in(config.run.checkpoints)) or _steps_done(config) >= config.run.steps
    if config.run.resume and done and (config.run.directory / "config.yaml").is_file():
        for change in changes(config):
            if any(f"{change.name}.".startswith(f"{name}.") for name in run.chosen):
                raise ConfigError(
                    f"{config.run.directory} has run with {change.name}={change.before}, so it is "
                    "of another sweep; choose another run.name"
                )
    if not config.schedule.is_solved:
        check_ramp(config, make_plan(config, num_ranks or wanted_ranks(config.parallel)))
    return config


def _trained(arguments: Sequence[str], signals: Signals) -> tuple[int, str | None]:
    """Train a run in a process of its own; return its exit code and the last line on its stderr.

    It gets the signals that this process gets.
    """
    command = [sys.executable, "-u", *search_options(), "-m", "vp_train", *arguments]
    environment = {**os.environ, SWEEP: str(os.getpid())}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    assert process.stderr is not None
    tail = bytearray()
    # The thread owns the pipe: closed here, its number could be that of the next run's.
    reader = Thread(target=_passed_on, args=(process.stderr, tail), daemon=True)
    reader.start()
    passed_on = 0
    while True:
        for number, _ in signals.noted[passed_on:]:
            process.send_signal(number)
        passed_on = len(signals.noted)
        try:
            code = process.wait(_POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        reader.join(_LEFT_SECONDS)
        lines = bytes(tail).decode(errors="replace").strip().splitlines()
        return code if code >= 0 else 128 - code, printable(lines[-1].strip()) if lines else None


def _passed_on(source: IO[bytes], tail: bytearray) -> None:
    """Write what comes from `source` on stderr, keep its end in `tail`, and close it."""
    with source:
        while piece := os.read(source.fileno(), 1 << 16):
            with contextlib.suppress(OSError):  # nobody reads it, but the run goes on
                sys.stderr.buffer.write(piece)
                sys.stderr.buffer.flush()
            tail += piece
            del tail[:-_MOST_TAIL]


def _steps_done(config: RunConfig) -> int:
    """Return the step that a run has come to, as far as another start would go on from it."""
    if not config.run.saves:
        return result_of(SweptRun("", (), {}), config, None).steps
    from vp_train.checkpoint.manifest import newest_step

    return newest_step(config.run.checkpoints, config.run.steps) or 0


def result_of(run: SweptRun, config: RunConfig, exit_code: int | None) -> RunResult:
    """Return what a run has come to, as far as its metrics.jsonl says it."""
    result = RunResult(run.name, run.chosen, exit_code)
    last: dict[str, float] = {}
    speeds, peak, steps = [], 0.0, 0
    try:
        with open_regular(config.run.directory / "metrics.jsonl", follow=False) as file:
            for line in file:
                record = _numbers_of(line)
                last |= record
                if math.isfinite(step := record.get("step", math.nan)):
                    steps = int(step)
                speeds += [record["tokens_per_second"]] if "tokens_per_second" in record else []
                peak = max(peak, record.get("peak_bytes", 0.0))
    except (OSError, UnreadableError):
        return result
    return replace(
        result,
        steps=steps,
        loss=last.get("loss"),
        validation_loss=last.get("validation_loss"),
        tokens_per_second=median(speeds) if speeds else None,
        peak_bytes=peak or None,
    )


def _numbers_of(line: bytes) -> dict[str, float]:
    """Return the numbers in a line of metrics.jsonl; a kill may have cut it off."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(record, dict):
        return {}
    return {
        name: math.nan if value is None else value
        for name, value in record.items()
        if value is None or (type(value) in (int, float) and abs(value) < 1e300)
    }


def best_of(results: Sequence[RunResult]) -> RunResult | None:
    """Return the finished run with the lowest validation loss, or with the lowest loss.

    A run that has diverged, so that one of them is not finite, does not count.  If one of the other
    finished runs has no validation loss, the training loss decides.
    """
    finished = [
        result
        for result in results
        if result.exit_code == EXIT_OK
        and result.loss is not None
        and all(map(math.isfinite, (result.loss, result.validation_loss or 0.0)))
    ]
    for name in ("validation_loss", "loss"):
        values = [getattr(result, name) for result in finished]
        if values and None not in values:
            return finished[values.index(min(values))]
    return None


def _unlike_words(configs: Sequence[RunConfig]) -> str:
    """Return that validations have different samples, so that their losses say little; else ""."""
    sizes = sorted({config.eval_sequences for config in configs if config.run.eval_every})
    if len(sizes) < 2:
        return ""
    return (
        f"validations have {', '.join(f'{size:,}' for size in sizes)} sequences, so their losses "
        f"do not compare; set run.eval_sequences={sizes[-1]} for all runs"
    )


def _rows(results: Sequence[RunResult], best: RunResult | None) -> list[dict[str, object]]:
    """Return one row per run, with a column for every setting that some run chose."""
    names = list(dict.fromkeys(name for result in results for name in result.chosen))
    rows = []
    for result in results:
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(result).items()
            if name not in ("name", "chosen")
        }
        chosen = {name: result.chosen.get(name) for name in names}
        rows.append({"run": result.name, **chosen, **values, "best": result is best})
    return rows


def _write(place: Path, results: Sequence[RunResult]) -> None:
    """Write the table to `place`.csv and `place`.json."""
    rows, text = _rows(results, best_of(results)), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    place.parent.mkdir(parents=True, exist_ok=True)
    replace_file(place.with_name(f"{place.name}.csv"), text.getvalue())
    replace_file(place.with_name(f"{place.name}.json"), json.dumps(rows, indent=1) + "\n")


def _print_table(results: Sequence[RunResult], best: RunResult | None) -> None:
    table = Table(box=SIMPLE_HEAD, show_edge=False, header_style="", padding=(0, 1))
    names = list(dict.fromkeys(name for result in results for name in result.chosen))
    figures = ("steps", "loss", "validation", "tokens/s", "peak memory", "exit")
    for name in ("run", *names, *figures, ""):
        table.add_column(name, justify="right" if name in figures else "left", overflow="fold")
    for result in results:
        speed, peak = result.tokens_per_second, result.peak_bytes
        table.add_row(
            result.name,
            *(result.chosen.get(name, "") for name in names),
            f"{result.steps:,}",
            *(
                "" if value is None else loss_words(value)
                for value in (result.loss, result.validation_loss)
            ),
            "" if speed is None else f"{speed:,.0f}",
            "" if peak is None else human_bytes(peak),
            "" if result.exit_code is None else str(result.exit_code),
            "best" if result is best else "",
        )
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, markup=False, highlight=False)
    console.print(table)
    for result in results:
        if result.reason is not None:
            console.print(f"{result.name}: {result.reason}", soft_wrap=True)
