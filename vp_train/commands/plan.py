"""The command `vp-plan`: a plan or a search, on the terminal and as JSON.  Runs without torch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vp_train.commands.command import (
    OF_A_STEP,
    Command,
    collect_rarely,
    output_of,
    run,
    typed,
    whole_number,
)
from vp_train.commands.plan_remedies import Remedy
from vp_train.commands.plan_words import (
    alternative_lines,
    cluster_words,
    decides_lines,
    decision_of,
    has_fsdp,
    help_lines,
    model_words,
    plan_lines,
    remedies_of,
    remedy_lines,
    text_of,
)
from vp_train.commands.search_beside import Compared, compared_with
from vp_train.commands.search_words import search_lines
from vp_train.commands.searching import Searching
from vp_train.config import ConfigError, RunConfig
from vp_train.durable import write_output
from vp_train.failures import EXIT_CONFIG, EXIT_TIME
from vp_train.planning.alternatives import Alternative, unbeaten, with_it, without_it
from vp_train.planning.batch import batch_of, with_batch_of, with_replicas
from vp_train.planning.cluster import MARGIN
from vp_train.planning.compare import (
    helps_of,
    larger_batch_of,
    report_as_typed,
    rivals_of,
    shared_of,
    with_degrees,
)
from vp_train.planning.found import Estimate, Limits, Refusal, SearchResult
from vp_train.planning.kept import ALL, KEPT_WHERE_TYPED, Kept, searched_words, settings_of
from vp_train.planning.plan import SEARCHING, read_schedule
from vp_train.planning.report import PlanReport, make_report
from vp_train.planning.rivals import Rivals
from vp_train.planning.search import search
from vp_train.planning.space import space_of
from vp_train.units import count_words

_MOST_TOKENS = 10**9
_MARGIN = round(100 * MARGIN)  # percent
_DEFAULT = Limits()
_EFFORT = _DEFAULT.effort // 1000  # thousand passes
_DIVIDE_THE_BATCH = ("parallel.dp", "micro_batch_size")
# What a plan is compared with in JSON; null where that was not looked for.
_KEY_OF_KIND = {False: "without_vocabulary_parallelism", True: "with_vocabulary_parallelism"}
_COMPARED = (*_KEY_OF_KIND.values(), "decides", "helps", "would_help")
_EXAMPLES = """\
  vp-plan model=gpt_4b cluster=a100_80g_node num_microbatches=128
  vp-plan model=llama3_8b cluster=h100_80g_node cluster.num_nodes=4 \\
      parallel.tp=2 parallel.pp=4 num_microbatches=32
  vp-plan --search --top 10 model=gpt_21b cluster=a100_80g_node cluster.num_nodes=2 \\
      num_microbatches=256"""


def main() -> None:
    """Run `vp-plan`: predict bytes, seconds and MFU of a run on a cluster."""
    collect_rarely()
    options = {
        "--search": ("", "rank every way to run the batch on the cluster, fastest first"),
        "--top": ("K", f"with --search: number of plans to show ({_DEFAULT.top})"),
        "--tokens": ("N", "with --search: tokens of a step, as 4e6, instead of num_microbatches"),
        "--keep": (
            "A,B,...",
            "with --search: settings that stay as typed, or `typed` for all of them",
        ),
        "--margin": (
            "PERCENT",
            f"with --search: part of the memory of GPUs and hosts that stays free ({_MARGIN})",
        ),
        "--effort": ("N", f"with --search: thousand passes that may be placed ({_EFFORT})"),
        "--seconds": (
            "N",
            "with --search: limit of its CPU time; one simulation may still end after it "
            f"({_DEFAULT.seconds})",
        ),
        "--no-compare": ("", "show one plan alone: not what would help, nor other plans but FSDP"),
        "--json": ("FILE", "write the report there"),
    }
    run(
        Command(
            "vp-plan",
            "predicts memory, time and MFU of a run on a cluster",
            _plan,
            _EXAMPLES,
            options,
            OF_A_STEP,
        )
    )


def _keeps_typed(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> bool:
    """Return whether `--keep typed` would be new, and allowed."""
    with suppress(ConfigError):
        return "--keep" not in options and bool(kept_of(config, overrides, "typed").values)
    return False


def _plan(config: RunConfig, overrides: Sequence[str], options: Mapping[str, str]) -> int:
    if "--search" not in options:
        for name in ("--top", "--tokens", "--keep", "--margin", "--effort", "--seconds"):
            if name in options:
                raise ConfigError(f"{name} belongs to --search; add that, or drop {name}")
        return show_plan(config, _json_file(options), compares="--no-compare" not in options)
    if "--no-compare" in options:
        raise ConfigError("--no-compare is for one plan; drop it, or --search")
    if config.schedule.file is not None:
        read_schedule(Path(config.schedule.file))  # a search drops it, but a wrong name is told
    kept = kept_of(config, overrides, options.get("--keep"))
    counts, tokens, multiple = typed(overrides, "num_microbatches"), None, ""
    if "--tokens" in options:
        tokens = whole_number(options, "--tokens", 4_194_304, most=_MOST_TOKENS, example="4e6")
        if counts:
            raise ConfigError(f"--tokens and {counts[0]}: both set the batch; drop one of the two")
        parts = {name: kept.values[name] for name in _DIVIDE_THE_BATCH if name in kept.values}
        multiple = " x ".join(f"{name}={value}" for name, value in parts.items() if value > 1)
        config = with_batch_of(config, tokens, math.prod(parts.values()))
    config = with_replicas(config)
    limits = Limits(
        top=whole_number(options, "--top", _DEFAULT.top),
        margin=whole_number(options, "--margin", _MARGIN, least=0, most=90) / 100,
        effort=1000 * whole_number(options, "--effort", _EFFORT),
        seconds=whole_number(options, "--seconds", _DEFAULT.seconds),
    )
    path = _json_file(options)
    if "--keep" in options or kept.values:
        words = kept.words or "nothing, because no setting is typed"
        print(text_of([f"kept: {words}"]), flush=True)
    searched = [word for word in searched_words(overrides) if not kept.has_word(word)]
    if searched:
        hint = "; --keep typed keeps them" if _keeps_typed(config, overrides, options) else ""
        print(text_of([f"searched although typed: {', '.join(searched)}{hint}"]), flush=True)
    is_default = not counts and tokens is None
    print(_batch_words(config, tokens, multiple, is_default=is_default), flush=True)
    return show_search(config, limits, path, kept, is_typed=tokens is None)


def _batch_words(config: RunConfig, tokens: int | None, multiple: str, *, is_default: bool) -> str:
    """Return the batch of a search in words, and where it comes from.

    tokens: --tokens.
    multiple: the settings of which it is a multiple, because they are kept.
    """
    count, length = batch_of(config), config.model.seq_length
    words = f"batch: {count_words(count, 'sequence')} of {length:,} tokens"
    words += f", {count * length:,} tokens in a step"
    if is_default:
        return f"{words}, by default; --tokens N sets another"
    if tokens is None or tokens == count * length:
        return words
    of_what = f" to a multiple of {multiple}" if multiple else ""
    return f"{words}, rounded from --tokens {tokens:,}{of_what}"


def _json_file(options: Mapping[str, str]) -> Path | None:
    """Return the file for the report, if there is one.  Raises ConfigError before any work."""
    return output_of("--json", options["--json"]) if "--json" in options else None


def kept_of(config: RunConfig, overrides: Sequence[str], names: str | None) -> Kept:
    """Return what `--keep NAMES` keeps; `typed` are all that are typed and searched.

    A typed vocab.balance is kept in any case.
    """
    chosen = [] if names is None else [name.strip() for name in names.split(",")]
    if typed(overrides, KEPT_WHERE_TYPED):
        chosen.append(KEPT_WHERE_TYPED)
    if "typed" in chosen:
        chosen = [name for name in chosen if name != "typed"]
        chosen += [name for word in searched_words(overrides) for name in settings_of(word)]
    return Kept.of(config, chosen)


def show_plan(config: RunConfig, path: Path | None, *, compares: bool = True) -> int:
    """Plan `config`, print the report and write it to `path`.  Raises ConfigError.

    The plan comes first, then one comparison after the other, unless not `compares`.  Returns the
    exit code: EXIT_CONFIG if the run does not fit into memory.
    """
    if config.schedule.is_solved:
        print(SEARCHING, flush=True)
    with Searching(keeps_best=config.schedule.is_solved) as searching:
        searching.work_on("planning the step")
        report = make_report(config, searching.watch)
        rivals = rivals_of(config, report)
    print(text_of([*plan_lines(config, report, rivals), *searching.words]), flush=True)
    record = report.record() | {"fsdp": rivals.record() if has_fsdp(config) else None}
    record |= _compare(config, report, rivals) if compares else dict.fromkeys(_COMPARED)
    _write(path, record)
    return searching.exit_code if report.fits else EXIT_CONFIG


def _compare(config: RunConfig, report: PlanReport, rivals: Rivals) -> dict[str, Any]:
    """Print what a plan is compared with as soon as it is known; return that for JSON."""
    with Searching(keeps_best=False) as comparing:
        found = list[Remedy]()
        if not report.fits:
            comparing.work_on("planning what would help")
            found = remedies_of(config, report, comparing.work_on)
            comparing.print(text_of(remedy_lines(found)))
        comparing.work_on("searching without vocabulary parallelism")
        choices = space_of(with_degrees(config, report.degrees)).choices
        shared = shared_of(config, report)
        others = list[Alternative]()
        if config.cluster.num_gpus > 1:
            others.append(without_it(config, report, choices, shared))
        if others and not report.splits_vocabulary:
            comparing.work_on("searching with vocabulary parallelism")
            others.append(with_it(config, report, choices, shared))
        helps = helps_of(config, report, comparing.work_on, choices, shared)
        others = [other.beside(helps) for other in others]
        helps = unbeaten(helps, others, report)
        for other in others:
            comparing.print(text_of(alternative_lines(report, other)))
        comparing.work_on("planning with another contention")
        decision = decision_of(config, report, rivals, others)
        comparing.print(text_of(decides_lines(decision)))
        comparing.work_on("planning a batch twice as large")
        larger = larger_batch_of(config, report) if report.fits else None
        comparing.print(text_of(help_lines(report, helps, larger)))
    tokens = report.num_tokens
    proposed = [one.record(tokens) for one in helps]
    proposed += [] if larger is None else [larger.record(2 * tokens)]
    kinds = {_KEY_OF_KIND[other.splits_vocabulary]: other.record(tokens) for other in others}
    compared = kinds | {"decides": decision.record(), "helps": proposed}
    compared["would_help"] = [one.record() for one in found]
    return dict.fromkeys(_COMPARED) | compared


def show_search(
    config: RunConfig,
    limits: Limits,
    path: Path | None,
    kept: Kept = ALL,
    *,
    is_typed: bool = True,
) -> int:
    """Search for the fastest plans, print them and write them to `path`.  Raises ConfigError.

    Ctrl-C ends it with the best so far.  Returns the exit code.  `is_typed`: whether `config` is a
    run as it was typed, not one of the batch of --tokens.
    """
    print(text_of([model_words(config), cluster_words(config), ""]), flush=True)
    # CPU time, not the clock on the wall: other processes on the machine must not end a search.
    started = time.process_time()
    with Searching() as searching:

        def in_time() -> bool:
            return time.process_time() - started < limits.seconds and not searching.is_stopped

        def show(words: str) -> None:
            searching.work_on(f"{time.process_time() - started:.0f} s of CPU, {words}")

        result = search(config, limits, in_time, show, space_of(config, kept))
        typed = None
        if is_typed and in_time():
            with suppress(KeyboardInterrupt):  # what the search has found is shown in any case
                typed = report_as_typed(
                    config, limits.margin, lambda state: searching.watch(state) and in_time()
                )
            if not in_time():  # schedule=auto may have had an end too early
                typed = None
    spent, is_stopped = time.process_time() - started, searching.is_stopped
    beside = compared_with(config, limits, result)
    lines = search_lines(
        config, limits, result, beside, typed, is_stopped=is_stopped, spent_seconds=spent
    )
    print(text_of(lines), flush=True)
    _write(path, search_record(config, limits, result, typed, beside))
    if searching.is_stopped or result.best:
        return searching.exit_code
    return EXIT_TIME if result.num_open else EXIT_CONFIG


def search_record(
    config: RunConfig,
    limits: Limits,
    result: SearchResult,
    typed: PlanReport | None,
    beside: Compared,
) -> dict[str, Any]:
    """Return the result of a search for JSON, in bytes and seconds; see `search_lines`."""
    firsts = {
        _KEY_OF_KIND[True]: result.with_vocabulary,
        _KEY_OF_KIND[False]: result.without_vocabulary,
        "without_offloading": result.without_offloading,
        "leaner": result.leaner,
    }
    return {
        "best": [
            {"overrides": plan.choice.overrides(config)} | plan.report.record()
            for plan in result.best
        ],
        "estimated": [_estimate_record(config, estimate) for estimate in result.estimated],
        "as_typed": None if typed is None else typed.record(),
        **{
            name: None if first is None else _estimate_record(config, first)
            for name, first in firsts.items()
        },
        "unordered": None if result.unordered is None else result.unordered.overrides(config),
        "refused": [_refusal_record(config, refusal) for refusal in result.refused],
        "closest": None if result.leanest is None else _refusal_record(config, result.leanest),
        **beside.record(),
        "margin": limits.margin,
        "kept": dict(result.kept.values),
        "excluded": dict(result.excluded.most_common()),
        "choices": result.num_choices,
        "estimates": result.num_estimated,
        "planned": result.num_planned,
        "added": result.num_added,
        "same": result.num_same,
        "open": result.num_open,
        "unseen": {_KEY_OF_KIND[splits]: result.num_unseen[splits] for splits in _KEY_OF_KIND},
        "ended": result.ended,
    }


def _refusal_record(config: RunConfig, refusal: Refusal) -> dict[str, Any]:
    return {"overrides": refusal.choice.overrides(config), "reason": refusal.reason}


def _estimate_record(config: RunConfig, estimate: Estimate) -> dict[str, Any]:
    return {
        "overrides": estimate.choice.overrides(config),
        "step_seconds": estimate.seconds,
        "bytes": estimate.memory,
        "host_total_bytes": estimate.host,
        "planned": estimate.is_planned,
    }


def _write(path: Path | None, record: dict[str, Any]) -> None:
    if path is not None:
        write_output(path, json.dumps(record, indent=1) + "\n")
        print(f"written to {path}", flush=True)
