"""Steps 11 and 12: the commands profile a rank and train."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from gpu.common import Report, Where, command, model_words

# 11


def profiled(where: Where, report: Report) -> None:
    """Measure stages of two jobs with vp-profile; compare memory and step with vp-plan."""
    from vp_train.planning.report import make_report
    from vp_train.settings import load_config

    graphs = "run.cuda_graphs=true"
    small = ["parallel.pp=8", "num_microbatches=16"]
    jobs: tuple[tuple[str, str, list[str]], ...] = (
        ("gpt_4b", "0", ["cluster=h100_80g_node", *small]),
        ("gpt_4b", "0", ["cluster=h100_80g_node", *small, graphs]),
        ("llama3_8b", "7", ["cluster=h100_80g_node", "parallel.pp=8", "num_microbatches=8"]),
    )
    if not where.on_gpu:
        small = ["parallel.pp=2", "num_microbatches=2", "cluster.gpus_per_node=2"]
        jobs = (("gpt_4b", "0", small), ("gpt_4b", "0", [*small, graphs]))
    for model, ranks, more in jobs:
        name = f"{model} by graphs" if graphs in more else model
        words, file = [*model_words(model, where), *more], where.folder / f"{name}.json"
        start = "from vp_train.commands.profile import main; main()"
        command(
            where,
            "-c",
            start,
            *words,
            "--ranks",
            ranks,
            "--steps",
            "1",
            "--json",
            str(file),
            seconds=100,
        )
        found = json.loads(file.read_text())
        report.note(**{name: found})
        for rank in found["ranks"]:
            values = rank["deviations"]
            report.check(
                f"{name} rank {rank['rank']}: deviations of what its passes compute with",
                "finite, not 0",
                ", ".join(f"{key} {value:.1e}" for key, value in values.items()),
                all(0 < value < math.inf for value in values.values()),
            )
            error = rank["predicted_peak_bytes"] / rank["peak_bytes"] - 1
            measured = f"{rank['peak_bytes'] / 2**30:.2f} GiB, predicted {error:+.1%}"
            report.check(
                f"{name} rank {rank['rank']}: memory",
                "predicted within 5 %",
                measured,
                abs(error) <= 0.05,
                judged=where.on_gpu,
            )
        alone = ["cluster.sustained=1", "cluster.contention=0"]  # as the passes were measured
        planned, measured_step = (
            make_report(load_config([*words, *alone])).step_seconds,
            found["predicted"]["step_seconds"],
        )
        error = planned / measured_step - 1
        measured = f"{1e3 * measured_step:.0f} ms, planned {error:+.1%}"
        report.check(
            f"{name}: step of the job, from measured passes",
            "planned within 15 %",
            measured,
            abs(error) <= 0.15,
            judged=where.on_gpu,
        )


# 12


def training(where: Where, report: Report) -> None:
    """Train with ranks that share the GPU over gloo, against the CPU; trace, save and resume."""
    steps, dtype = 10 if where.on_gpu else 4, str(where.dtype).removeprefix("torch.")
    words = [
        "model=nano",
        "model.num_layers=8",
        "data=synthetic",
        f"run.dtype={dtype}",
        f"run.steps={steps}",
    ]
    words += ["run.trace_step=3", f"run.checkpoint_every={steps // 2}", "run.eval_every=0"]
    words += [f"run.root={where.folder}", "run.comm_backend=gloo"]
    zero = [*words, "optim.name=zero1", "parallel.pp=2", f"run.device={where.device.type}"]
    runs = {"zero1": zero}
    if where.on_gpu:
        four = [*words, "parallel.pp=4"]
        runs |= {
            "zero1": [*zero, "parallel.dp=2"],
            "pipeline": [*four, "run.device=cuda"],
            "cpu": [*four, "run.device=cpu"],
            "nccl": [*words, "parallel.pp=1", "run.device=cuda", "run.comm_backend=nccl"],
        }
    failed = _train(where, runs)
    report.check("runs", "all end well", ", ".join(failed) or f"{len(runs)} ended well", not failed)
    losses = {name: _losses(where, name) for name in runs}
    report.note(losses=losses)
    for name, found in losses.items():
        right = len(found) == steps and all(map(math.isfinite, found)) and found[-1] < found[0]
        expected, measured = "fall", f"{found[0]:.3f} to {found[-1]:.3f}" if found else "none"
        if name in ("pipeline", "nccl"):  # two replicas have another batch
            worst = _largest_difference(found, losses["cpu"])
            right = right and worst <= 1e-2
            expected, measured = "fall, within 1 % of the CPU's", f"{measured}, off by {worst:.1e}"
        report.check(f"{name}: losses", expected, measured, right)
    _check_trace(where.folder / ("pipeline" if where.on_gpu else "zero1"), report, where)
    last = where.folder / "zero1" / "checkpoints" / f"step-{steps:08}"
    shutil.rmtree(last)
    failed = _train(where, {"zero1": [*runs["zero1"], "run.resume=true", "run.trace_step=0"]})
    worst = _largest_difference(_losses(where, "zero1"), losses["zero1"])
    right = not failed and worst <= (1e-2 if where.on_gpu else 0) and last.is_dir()
    measured = ", ".join(failed) or f"largest difference {worst:.1e}"
    report.check("zero1 resumed half-way", "the same losses", measured, right)


def _largest_difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference, infinite if a value is missing or not finite."""
    if (
        not expected
        or len(found) != len(expected)
        or not all(map(math.isfinite, [*found, *expected]))
    ):
        return math.inf
    return max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))


def _train(where: Where, runs: dict[str, list[str]]) -> list[str]:
    """Run vp-train with these settings, all at once; return what failed."""
    processes = {}
    for name, words in runs.items():
        output = (where.folder / f"{name}.txt").open("w")
        command = [sys.executable, "-m", "vp_train", *words, f"run.name={name}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes[name] = subprocess.Popen(
            command, cwd=where.folder, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    failed = []
    for name, process in processes.items():
        if process.wait():
            failed.append(f"{name}: exit code {process.returncode}")
            print(f"{name}:\n{(where.folder / f'{name}.txt').read_text()[-3000:]}")
    return failed


def _losses(where: Where, name: str) -> list[float]:
    file = where.folder / name / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    values = [json.loads(line)["loss"] for line in lines]
    return [math.nan if value is None else value for value in values]


def _check_trace(run: Path, report: Report, where: Where) -> None:
    """Check that the traced step of a run has passes, hops and barriers, as measured.

    Over gloo those of a GPU are not timed: to wait for one stops the host.
    """
    file = run / "trace" / "step.json"
    events = json.loads(file.read_text())["traceEvents"] if file.is_file() else []
    measured = {
        event["pid"]
        for event in events
        if event["ph"] == "M" and event["args"]["name"].startswith("measured")
    }
    spans = [event for event in events if event["ph"] == "X" and event["pid"] in measured]
    kinds = Counter(event["cat"] for event in spans)
    passes, hops = sum(kinds[letter] for letter in "FBIWSTEG"), kinds["hop"]
    barriers = sum(count for kind, count in kinds.items() if kind.startswith("C"))
    sane = all(event["ts"] >= 0 and 0 <= event["dur"] < 60e6 for event in spans)
    found = f"{passes} passes, {hops} hops, {barriers} barriers"
    right = bool(passes) and sane and bool(hops and barriers) != where.on_gpu
    expected = "passes alone" if where.on_gpu else "passes, hops and barriers"
    report.check("trace", expected, found, right)
