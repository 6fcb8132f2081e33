"""Directories of runs as a run writes them, without the training."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from vp_train.metrics.figures import RankFigures, figures_of
from vp_train.metrics.progress import StepReport, Validation
from vp_train.metrics.reporter import Reporter
from vp_train.metrics.run_directory import RunDirectory
from vp_train.pipeline.stopwatch import Part
from vp_train.planning.plan import make_plan
from vp_train.settings import load_config
from vp_train.settings.files import config_text

STEPS = 30
EVIL = "<script>alert(1)<!--\"'&"


def slower(timeline, factor):
    """Return the same passes, `factor` times as long."""
    rows = [
        [replace(s, start=factor * s.start, end=factor * s.end) for s in row]
        for row in timeline.compute
    ]
    return replace(timeline, compute=tuple(map(tuple, rows)), comm=(), bound=0.0)


def figures(step):
    seconds = {part: 0.01 * (1 + index) for index, part in enumerate(Part)}
    rank = RankFigures(seconds | {Part.DATA: 0.001 * step}, 3e9)
    return figures_of([rank, replace(rank, allocated=2e9)], best_seconds=0.1)


@pytest.fixture(scope="module")
def write_run(tmp_path_factory):
    """Return a function that writes a finished run and returns its directory and reporter."""
    root = tmp_path_factory.mktemp("runs")

    def write(name, *overrides, steps=STEPS, traced=True):
        words = ["model=nano", "num_microbatches=4", f"run.root={root}", f"run.steps={STEPS}"]
        config = load_config([*words, *overrides])
        config = replace(config, run=replace(config.run, name=name))
        plan, directory = make_plan(config, 2), RunDirectory(config.run)
        reporter = Reporter(config, plan, directory, 1)
        reporter.start(config_text(config))
        for step in range(1, steps + 1):
            loss = math.nan if step == 9 else 8.0 / step
            reporter.step(
                StepReport(step, loss, 1.0, 1e-3, 1e4, 3e9, int(step > 6), 0, figures(step))
            )
            if step == 6:
                reporter.say(f"step 6: a loss of {EVIL}")
            if step == 5 and traced:
                reporter.trace(slower(plan.timeline, 3.0), (11, 12))
            if step % 10 == 0:
                reporter.validation(
                    step, [Validation("", 9.0 / step), Validation("wiki", 7.0, 1.5)]
                )
            reporter.record()
        reporter.finish([3e9, 2e9])
        (directory.path / "checkpoints" / f"step-{steps:08d}").mkdir(parents=True)
        return directory.path, reporter

    return write


@pytest.fixture(scope="module")
def evil_run(write_run):
    """Return the directory of a run in which whatever can be text is script."""
    path, _ = write_run(EVIL, f"run.project='{EVIL.replace(chr(39), '')}'")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line[f"validation/{EVIL}/loss"] = 1.0
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (path / "logs").mkdir()
    (path / "logs" / f"{EVIL}.log").write_text(f"RuntimeError: {EVIL}\n")
    environment = json.loads((path / "env.json").read_text())
    environment |= {"host": EVIL, "command": ["vp-train", EVIL], "commit": EVIL}
    (path / "env.json").write_text(json.dumps(environment | {"packages": {EVIL: EVIL}}))
    summary = json.loads((path / "summary.json").read_text())
    summary["ranks"][0]["layers"] = EVIL
    (path / "summary.json").write_text(json.dumps(summary))
    return path
