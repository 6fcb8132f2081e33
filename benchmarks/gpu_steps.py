"""The steps of `gpu_check.py`, each run as `python gpu_steps.py NUMBER cuda|cpu RESULT`.

A step takes a `Where` and a `Report`.  What it imports of vp_train it imports itself, so that a
broken part fails its own step only.  On the CPU sizes are tiny, and checks that only a GPU can
pass are not judged.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import torch
import torch.distributed as dist
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Where:
    """The device of a step, and a folder of its own."""

    device: torch.device
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Return bfloat16; on the CPU float32, which needs no compiler."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def synchronise(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal values, made on the device."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)


class Report:
    """The findings of a step.  The file is rewritten at once, so that it outlives a crash."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.checks: list[dict[str, Any]] = []
        self.figures: dict[str, Any] = {}

    def check(
        self, what: str, expected: str, measured: str, passed: bool, *, judged: bool = True
    ) -> None:
        """Add a check; `judged` False: it counts for nothing here."""
        verdict = bool(passed) if judged else None
        self.checks.append(
            {"what": what, "expected": expected, "measured": measured, "passed": verdict}
        )
        self._write()

    def note(self, **figures: Any) -> None:
        """Add figures that nothing is expected of."""
        self.figures |= figures
        self._write()

    def _write(self) -> None:
        self._path.write_text(
            json.dumps({"checks": self.checks, "figures": self.figures}, indent=1)
        )


# What several steps need

_AHEAD_CYCLES = 10_000_000  # 5 to 6 ms


def milliseconds(
    where: Where, work: Callable[[], object], calls: int = 5, rounds: int = 7
) -> float:
    """Return the median time of one call on the device: events around `calls` of them.

    The device sleeps before them, so that the host is ahead, as in a run.
    """
    for _ in range(2):
        work()
    times = []
    for _ in range(rounds if where.on_gpu else 2):
        _get_ahead(where)
        begin = _mark(where)
        for _ in range(calls):
            work()
        times.append(_elapsed(where, begin, _mark(where)) / calls)
    return median(times)


def _mark(where: Where) -> Any:
    if not where.on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(where: Where, begin: Any, end: Any) -> float:
    """Return the milliseconds between two marks, once the second has been reached."""
    if not where.on_gpu:
        return 1e3 * (end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end))


def _get_ahead(where: Where) -> None:
    """Keep the device busy for some milliseconds, in which the host issues what follows."""
    if where.on_gpu:
        torch.cuda._sleep(_AHEAD_CYCLES)


def sleep_cycles(milliseconds: float) -> int:
    """Return how many cycles torch.cuda._sleep needs for so long, as measured here."""
    cycles = 20_000_000
    torch.cuda._sleep(cycles)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return int(cycles * milliseconds / begin.elapsed_time(end))


def model_words(name: str, where: Where) -> list[str]:
    """Return the overrides for a model; on the CPU for one of its shape that is tiny."""
    words = [f"model={name}"]
    if not where.on_gpu:
        sizes = {
            "num_layers": 8,
            "hidden_size": 64,
            "num_heads": 4,
            "ffn_hidden_size": 128,
            "vocab_size": 4096,
        }
        groups = 4 if name.startswith("gpt") else 2
        sizes |= {"num_query_groups": groups, "seq_length": 64}
        words += [f"model.{key}={value}" for key, value in sizes.items()]
    return words


def lone_group() -> dist.ProcessGroup:
    """Return a gloo group of this process alone."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def first_layers(
    name: str,
    where: Where,
    num_layers: int = 1,
    *,
    dtype: torch.dtype | None = None,
    products: Any = None,
    compiles: str = "auto",
    num_offloaded: int = 0,
) -> tuple[Any, Any]:
    """Return a stage with the first layers of a model, with fp32 gradients, and its ModelConfig.

    products: those of its linear layers, None for plain ones.
    compiles: a value of run.compile.
    num_offloaded: how many of the layers are offloaded.
    """
    from vp_train.model.elementwise import choose_fuse
    from vp_train.model.linear import PLAIN
    from vp_train.model.shape import compiles_layers
    from vp_train.model.stage import Stage
    from vp_train.settings import load_config

    model = load_config(model_words(name, where)).model
    stage = Stage(
        model,
        range(num_layers),
        final_norm=False,
        dtype=dtype or where.dtype,
        device=where.device,
        group=lone_group(),
        seed=1,
        products=products or PLAIN,
        fuse=choose_fuse(
            compiles,
            where.device,
            compiles=compiles_layers(
                compiles,
                model,
                model.seq_length * model.ffn_hidden_size,
                where.dtype.itemsize,
                on_cuda=where.device.type == "cuda",
            ),
        ),
        num_offloaded=num_offloaded,
    )
    for parameter in stage.parameters():
        main_gradient(parameter)
    return stage, model


def main_gradient(parameter: nn.Parameter) -> None:
    """Give a parameter an fp32 gradient of zeros, as a run does."""
    if parameter.dtype is not torch.float32:
        parameter.grad_dtype = torch.float32
    parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)


def command(where: Where, *words: str, seconds: float) -> str:
    """Run a Python command in this step's folder; return its output, raise with it if it fails."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=where.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} left with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def top_kernels(
    where: Where, work: Callable[[], object], count: int = 15, *, by_host: bool = False
) -> list[dict[str, Any]] | str:
    """Return what took longest on the device, or on the host, in one call of `work`.

    Where counters are forbidden, return why.
    """
    from torch.profiler import ProfilerActivity, profile

    on_device = where.on_gpu and not by_host
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    try:
        with profile(activities=activities) as profiler:
            work()
            where.synchronise()
    except Exception as error:
        return str(error)
    spent = f"self_{'device' if on_device else 'cpu'}_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, spent))
    return [
        {"name": event.key[:100], "calls": event.count, "microseconds": getattr(event, spent)}
        for event in events[:count]
    ]


# 1


_NEEDED = (
    "megatron.core",
    "deepspeed",
    "hydra",
    "omegaconf",
    "tokenizers",
    "safetensors",
    "rich",
    "tensorboard",
    "pytest",
)
_WELCOME = ("triton", "transformers", "liger_kernel", "cut_cross_entropy", "xdist")


def imports(where: Where, report: Report) -> None:
    """Import everything, and ask which attention torch takes."""
    from torch.nn.attention import SDPBackend

    if not where.on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    seconds, missing = {}, {}
    for name in (*_NEEDED, "vp_train.train", *_WELCOME):
        begin = time.perf_counter()
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a package does when it is imported
            missing[name] = f"{type(error).__name__}: {error}"
        seconds[name] = round(time.perf_counter() - begin, 2)
    report.note(import_seconds=seconds, missing=missing)
    lacking = [name for name in (*_NEEDED, "vp_train.train") if name in missing]
    report.check(
        "imports", "all", f"without {', '.join(lacking)}" if lacking else "all", not lacking
    )
    taken = {}
    for name, (tokens, heads, groups) in {
        "gpt_4b": (2048, 24, 24),
        "llama3_8b": (8192, 32, 8),
    }.items():
        tokens = tokens if where.on_gpu else 64
        q, k, v = (where.randn(1, count, tokens, 128) for count in (heads, groups, groups))
        choice = torch._fused_sdp_choice(q, k, v, is_causal=True, enable_gqa=heads != groups)
        taken[name] = SDPBackend(choice).name
    fused = all("FLASH" in name or "CUDNN" in name for name in taken.values())
    report.check(
        "attention backend", "flash or cuDNN", ", ".join(taken.values()), fused, judged=where.on_gpu
    )


# 2


def collectives(where: Where, report: Report) -> None:
    """Use every collective of the executor and the optimizers on a communicator of one rank."""
    from schedules.vocab import Transfer
    from vp_train.mesh import build_mesh
    from vp_train.pipeline.comms import _start_collective
    from vp_train.pipeline.timers import timer_of
    from vp_train.planning.plan import make_plan
    from vp_train.settings import load_config
    from vp_train.tensors.collectives import all_gather_single, reduce_scatter_single

    backend = "nccl" if where.on_gpu else "gloo"
    if where.on_gpu:
        torch.cuda.set_device(0)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # a free port
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    options = None
    if where.on_gpu:
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.max_ctas = 4
    group = dist.new_group([0], backend=backend, pg_options=options)
    report.check("new_group with options", "a group", type(group).__name__, group.size() == 1)
    wrong, done = [], 0

    def expect(what: str, found: Tensor, wanted: Tensor) -> None:
        nonlocal done
        done += 1
        if found.shape != wanted.shape or not torch.equal(found, wanted):
            wrong.append(what)

    side = torch.cuda.Stream(priority=-1) if where.on_gpu else None
    for dtype, transfer in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32, torch.float64), Transfer
    ):
        rows = transfer in (Transfer.GATHER, Transfer.SCATTER)
        for count in (5, 0) if rows else (5,):
            message = torch.arange(3.0 * count).view(count, 3).to(where.device, dtype)
            expected = message[None] if transfer is Transfer.ALL_GATHER else message
            what = f"{transfer} of {count} rows of {dtype}"
            try:
                with torch.cuda.stream(side):  # does nothing without a stream
                    if side is not None:
                        side.wait_stream(torch.cuda.default_stream())
                    found = _start_collective(group, transfer, message.clone(), 0, (count,)).wait()
                where.synchronise()
                expect(what, found, expected)
            except Exception as error:
                wrong.append(f"{what}: {error}")
    for dtype in (torch.bfloat16, torch.float32):
        part, whole = (
            torch.arange(6.0).to(where.device, dtype),
            torch.empty(6, device=where.device, dtype=dtype),
        )
        all_gather_single(whole, part, group, async_op=True).wait()
        expect(f"all_gather_single of {dtype}", whole, part)
        reduce_scatter_single(whole, part, group, async_op=True).wait()
        expect(f"reduce_scatter_single of {dtype}", whole, part)
    timer, ends = timer_of(where.device), []
    timer.start()
    message = torch.ones(1 << 20, device=where.device)
    pending = timer.watch(_start_collective(group, Transfer.ALL_SUM, message, 0, ()), ends.append)
    pending.wait()
    where.synchronise()
    spent = timer.seconds(ends[0])
    report.check("a timed collective", "0 to 1 s", f"{1e3 * spent:.3f} ms", 0 < spent < 1)
    counted = torch.tensor([3], device=where.device)
    dist.all_reduce(counted, dist.ReduceOp.MAX, group=group)
    expect("all_reduce of int64", counted, torch.tensor([3], device=where.device))
    report.check(
        "collectives", "all deliver", f"{done} done, wrong: {'; '.join(wrong) or 'none'}", not wrong
    )
    plan = make_plan(load_config(["model=nano", "parallel.pp=1"]), 1)
    mesh = build_mesh(plan.degrees, plan.problem)
    report.check("mesh of one rank", "rank 0", f"rank {mesh.rank}", mesh.rank == 0)
    begin = time.perf_counter()
    dist.destroy_process_group()
    seconds = time.perf_counter() - begin
    report.check("destroy", "under 10 s", f"{seconds:.2f} s", seconds < 10)


# 3


_SLEEP_MILLISECONDS = 50.0


def stall(where: Where, report: Report) -> None:
    """Let C1 sleep: the next F must not wait for it.  Then any delays must not change a bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    lateness = _lateness(where, report)
    report.check(
        "F after a C1 that sleeps 50 ms",
        "under 1 ms late",
        ", ".join(f"{late:.3f} ms" for late in lateness),
        max(lateness) < 1,
        judged=where.on_gpu,
    )
    seeds, cases, different = (4, 6, []) if where.on_gpu else (1, 1, [])
    for name, algorithm in _cases()[:cases]:
        different += _different_bits(where, name, algorithm, seeds)
    measured = f"{cases} cases x {seeds} seeds, different: {', '.join(different) or 'none'}"
    report.check("gradients under random delays", "the same bits", measured, not different)


def _lateness(where: Where, report: Report) -> list[float]:
    """Return how long after S the next F began on each of two ranks, in ms, C1b under way."""
    from tests.schedules.cases import problem
    from vp_train.pipeline.comms import Comms
    from vp_train.pipeline.local import Switchboard, run_ranks

    board = Switchboard(problem(2, 1, "one_barrier"), where.device)
    size = 4096 if where.on_gpu else 64
    together = threading.Barrier(2, timeout=30)
    cycles = sleep_cycles(_SLEEP_MILLISECONDS) if where.on_gpu else 0
    transport = _sleeping_transport(cycles)

    def work(rank: int) -> dict[str, float]:
        comms, matrix = Comms(transport(board, rank)), where.randn(size, size)
        step = partial(_two_passes, where, rank, comms, matrix, together, cycles=cycles // 2)
        step()  # loads kernels
        return step()

    found = run_ranks(board, work)
    report.note(
        c1_milliseconds=[of_rank["c1"] for of_rank in found],
        host_milliseconds=[of_rank["host"] for of_rank in found],
    )
    slept = min(of_rank["c1"] for of_rank in found)
    report.check("C1 slept", "at least 40 ms", f"{slept:.1f} ms", slept >= 40, judged=where.on_gpu)
    right = all(of_rank["right"] for of_rank in found)
    report.check("C1 and C1b deliver", "the sums", "the sums" if right else "others", right)
    return [of_rank["late"] for of_rank in found]


def _sleeping_transport(cycles: int) -> Any:
    """Return a class of transports whose collectives sleep before they read.

    The device sleeps for `cycles`; with 0 the host sleeps instead.
    """
    from vp_train.pipeline.local import LocalTransport

    class Slow(LocalTransport):
        def _arriving(self, key: Any, senders: Any, read: Any) -> Any:
            def slowly(call: Any, messages: Any) -> Tensor:
                if cycles:
                    torch.cuda._sleep(cycles)
                else:
                    time.sleep(0.005)
                return read(call, messages)

            return super()._arriving(key, senders, slowly)

    return Slow


def _two_passes(
    where: Where,
    rank: int,
    comms: Any,
    matrix: Tensor,
    together: threading.Barrier,
    *,
    cycles: int,
) -> dict[str, float]:
    """Run S and the next F of a rank, and issue C1 and C1b between them.

    The device sleeps for `cycles` first: S is long, and meanwhile the hosts issue all that follows.

    Returns in ms how late F began, how long C1 took and how long the host was busy; and whether
    the right values arrived.
    """
    gathered: list[Tensor] = []
    reduced: list[Tensor] = []
    where.synchronise()
    together.wait()
    host = time.perf_counter()
    if cycles:
        torch.cuda._sleep(cycles)
    torch.mm(matrix, matrix)
    s_end = _mark(where)
    c1, c1b = _start_barriers(where, rank, comms, gathered, reduced)
    f_begin = _mark(where)
    torch.mm(matrix, matrix)  # F
    issued = 1e3 * (time.perf_counter() - host)
    c1()
    c1_end = _mark(where)
    if c1b is not None:
        c1b()
    comms.drain()
    sent = torch.tensor([1.0, 2.0], device=where.device)[:, None, None]
    right = torch.equal(gathered[0], sent.expand_as(gathered[0]))
    right = right and all(torch.equal(value, torch.full_like(value, 6.0)) for value in reduced)
    late, slept = _elapsed(where, s_end, f_begin), _elapsed(where, s_end, c1_end)
    return {"late": late, "c1": slept, "host": issued, "right": float(right)}


def _start_barriers(
    where: Where, rank: int, comms: Any, gathered: list[Tensor], reduced: list[Tensor]
) -> tuple[Any, Any]:
    """Start C1, whose result goes to `gathered`, and C1b of its sum, to `reduced` on rank 1."""
    from schedules.lower import Exchange
    from schedules.problem import Collective
    from schedules.vocab import End, Payload, Transfer

    shape = (1024, 1024) if where.on_gpu else (8, 8)
    first = (End.OUTPUT, Transfer.ALL_GATHER, Payload.STATISTICS, 1, 1)
    second = (End.OUTPUT, Transfer.REDUCE, Payload.INPUT_GRADIENT, 1, 1)
    c1 = comms.start(
        Exchange(*first, counted=False, contributes=True, delivers=True, continues=None),
        lambda: torch.full(shape, rank + 1.0, device=where.device),
        gathered.append,
        (),
        None,
        lambda pending: pending,
    )
    c1b = comms.start(
        Exchange(
            *second,
            counted=False,
            contributes=True,
            delivers=rank == 1,
            continues=Collective("C1", 0),
        ),
        lambda: gathered[0].sum(0),
        reduced.append,
        (),
        c1,
        lambda pending: pending,
    )
    return c1, c1b


def _cases() -> list[tuple[str, str]]:
    return list(
        itertools.product(
            ("1f1b", "zb_h1", "v_half"), ("one_barrier", "two_barrier", "none", "naive")
        )
    )


def _different_bits(where: Where, name: str, algorithm: str, seeds: int) -> list[str]:
    """Return what the delays of some seeds change in the gradients of a step of three ranks."""
    from dataclasses import replace

    from schedules.generators import GENERATORS
    from tests.pipeline.test_equivalence import config_of
    from tests.pipeline.test_local import DELAY_SECONDS, gradients_of
    from tests.pipeline.truth import random_batch
    from vp_train.config import VocabConfig
    from vp_train.planning.plan import make_plan

    torch.use_deterministic_algorithms(True)  # sums of embedding gradients
    stages = GENERATORS[name].layout_of(3).num_stages
    config = config_of(
        3, 4, 101, schedule=name, vocab=VocabConfig(algorithm), num_stages=stages, tied=True
    )
    config = replace(config, run=replace(config.run, device=where.device.type))
    plan, batch = make_plan(config, 3), random_batch(config, 1)
    try:
        expected = gradients_of(config, plan, batch)
        found = []
        for seed in range(seeds):
            delayed = gradients_of(config, plan, batch, delay_seconds=DELAY_SECONDS, seed=seed)
            names = expected.keys() | delayed.keys()
            same = {
                key for key in names if key in delayed and torch.equal(delayed[key], expected[key])
            }
            found += [f"{name} {algorithm} seed {seed} {key}" for key in sorted(names - same)[:3]]
        finite = all(bool(tensor.isfinite().all()) for tensor in expected.values())
        return found if finite else [*found, f"{name} {algorithm}: not finite"]
    finally:
        torch.use_deterministic_algorithms(False)


# 4


def accumulation(where: Where, report: Report) -> None:
    """Add products to fp32 gradients in place: the weight gradients of a layer."""
    from vp_train.model.linear import _accumulate

    shapes = ((2048, 3072, 12288), (8192, 4096, 14336), (8192, 4096, 4096))
    for tokens, inner, outer in shapes if where.on_gpu else ((64, 32, 48),):
        x, dy = where.randn(tokens, inner), where.randn(tokens, outer)
        weight = nn.Parameter(where.randn(outer, inner))
        main_gradient(weight)
        gradient, plain = weight.grad, torch.empty_like(weight, requires_grad=False)
        assert gradient is not None
        source = torch.empty_like(gradient)
        for _ in range(2):
            _accumulate(weight, x, dy)
        exact = 2 * (dy.float().T @ x.float())
        error = ((gradient - exact).abs().max() / exact.abs().max()).item()
        name = f"{outer} x {tokens} x {inner}"
        report.check(
            f"{name}: error", "under 1e-3", f"{error:.1e}", error < 1e-3 and weight.grad is gradient
        )
        del exact
        grown = 0
        if where.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _accumulate(weight, x, dy)
            torch.cuda.synchronize()
            grown = torch.cuda.max_memory_allocated() - before
        report.check(
            f"{name}: memory", "does not grow", f"{grown} bytes", grown == 0, judged=where.on_gpu
        )
        ours = milliseconds(where, lambda x=x, dy=dy, weight=weight: _accumulate(weight, x, dy))
        theirs = milliseconds(
            where, lambda x=x, dy=dy, out=plain: torch.mm(dy.T, x, out=out.detach())
        )
        copied = milliseconds(
            where, lambda gradient=gradient, source=source: gradient.copy_(source)
        )
        rate = 2e-9 * tokens * inner * outer / theirs
        report.check(
            f"{name}: time",
            "at most that of a product of bf16 and a copy of the gradient",
            f"{ours:.3f} of {theirs:.3f} + {copied:.3f} ms; {rate:.0f} TFLOP/s",
            ours <= theirs + copied,
            judged=where.on_gpu,
        )


# 5


def cuda_tests(where: Where, report: Report) -> None:
    """Run the tests that need a GPU; those of the whole trainer are a step of their own."""
    files = ["tests/vocab/test_cuda.py"]
    if where.on_gpu:
        files += [
            "tests/model/test_attention.py",
            "tests/model/test_elementwise.py",
            "tests/model/test_graphs.py",
            "tests/pipeline/test_cuda.py",
            "tests/test_profile.py::test_on_a_gpu_what_waits_for_a_sum_reads_what_was_formed",
        ]
    result = where.folder / "junit.xml"
    words = [
        "-m",
        "pytest",
        *files,
        "-k",
        "not trainer" if where.on_gpu else "not trainer and not interpreter",  # it takes seconds
        "-p",
        "no:cacheprovider",
        f"--junitxml={result}",
    ]
    if where.on_gpu and importlib.util.find_spec("xdist") is not None:
        words += ["-n", "4"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, check=False)
    counts: Counter[str] = Counter()
    failures, cases = [], []
    if result.is_file():
        cases = list(ElementTree.parse(result).getroot().iter("testcase"))
    for case in cases:
        outcome = next(
            (kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None),
            "passed",
        )
        counts[outcome] += 1
        if outcome in ("failure", "error"):
            failures.append(f"{case.get('classname')}::{case.get('name')}")
    report.note(counts=dict(counts), failures=failures)
    measured = (
        ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) or "no test"
    )
    right = done.returncode == 0 and bool(cases) and not failures
    report.check("the CUDA tests", "none fails", measured, right)
    report.check(
        "they run",
        "none is skipped",
        f"{counts['skipped']} skipped",
        not counts["skipped"],
        judged=where.on_gpu,
    )


# 6


def vocabulary(where: Where, report: Report) -> None:
    """Time S and T for several sizes of chunks, against three products and other libraries."""
    from peers_vocab import installed
    from vocab_passes import DeviceCase, Ours

    from vp_train.vocab.loss import LossOptions

    report.note(peers=installed())
    sizes = [size << 20 for size in (32, 128, 512)] if where.on_gpu else [4096, 16384]
    shapes = (
        ((4096, 4096, 16384), (4096, 4096, 32768), (2048, 3072, 32000), (8192, 4096, 16032))
        if where.on_gpu
        else ((32, 16, 256),)
    )
    rows: list[dict[str, Any]] = []
    for tokens, hidden, num_rows in shapes:
        shape = f"T {tokens} H {hidden} R {num_rows}"
        case = DeviceCase(where.device.type, where.dtype, tokens, hidden, num_rows)
        ours = {size: Ours(case, "chunked", "one_barrier", LossOptions()) for size in sizes}
        works, missing = _vocabulary_works(where, case, ours)
        times = {name: milliseconds(where, work, 2, 5) for name, work in works.items()}
        for size, layer in ours.items():
            sized = {"tokens": tokens, "hidden": hidden, "rows": num_rows, "chunk_bytes": size}
            rows.append(sized | _pass_milliseconds(where, size, layer))
            report.note(passes=rows)
        report.note(**{f"{shape} milliseconds": times, f"{shape} missing": missing})
        best = min(sizes, key=lambda size: times[_chunks(size)])
        report.note(**{f"{shape} kernels": top_kernels(where, works[_chunks(best)], 20)})
        flops = 6.0 * tokens * hidden * num_rows
        _judge_vocabulary(where, report, shape, times=times, best=best, flops=flops)
        del works, ours
        if where.on_gpu:
            torch.cuda.empty_cache()


def _chunks(size: int) -> str:
    return f"chunks of {size} bytes"


def _with_chunk(where: Where, size: int, work: Callable[[], object]) -> Callable[[], object]:
    """Return `work` as it runs with chunks of this size."""
    from vp_train.vocab.chunks import CHUNKS, ChunkSize

    least = 1_024 if where.on_gpu else 1

    def run() -> object:
        CHUNKS[where.device.type] = ChunkSize(size, least, 32_768)
        return work()

    return run


def _vocabulary_works(
    where: Where, case: Any, ours: dict[int, Any]
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Return what to time by name: products, our layers, peers; and why peers are missing."""
    from peers_vocab import PEERS
    from vocab_passes import AccumulatingFloor, Floor

    works: dict[str, Callable[[], object]] = {
        "floor": AccumulatingFloor(case),
        "floor without sum": Floor(case),
    }
    works |= {_chunks(size): _with_chunk(where, size, layer) for size, layer in ours.items()}
    missing = {}
    for name in [name for name in PEERS if name != "published"]:
        try:
            peer = PEERS[name](*case.inputs())
            peer()  # it may fail only here
            works[name] = peer
        except Exception as error:  # whatever a peer lacks here is a result too
            first_line, _, _ = str(error).partition("\n")
            missing[name] = f"{type(error).__name__}: {first_line}"
    return works, missing


def _pass_milliseconds(where: Where, size: int, layer: Any) -> dict[str, float]:
    """Return the medians of S and of T, each on its own."""
    layer.apart = {}
    for _ in range(3):
        _with_chunk(where, size, layer)()
    return {name: 1e3 * median(seconds) for name, seconds in layer.apart.items()}


def _judge_vocabulary(
    where: Where, report: Report, shape: str, *, times: dict[str, float], best: int, flops: float
) -> None:
    """Check the time with the best size of chunks against the floor and the fastest peer."""
    from peers_vocab import PEERS

    ours, floor = times[_chunks(best)], times["floor"]
    rate = f"floor at {1e-9 * flops / floor:.0f} TFLOP/s"
    measured = f"{ours / floor:.2f} with chunks of {best >> 20} MiB, {rate}"
    what, passed = f"{shape}: S and T / floor", 0.75 * ours <= floor
    report.check(what, "at most 1.33", measured, passed, judged=where.on_gpu)
    others = {name: time for name, time in times.items() if name in PEERS}
    if others:
        fastest = min(others, key=others.__getitem__)
        measured = f"{ours / others[fastest]:.2f} of {fastest}"
        what, passed = f"{shape}: S and T / fastest peer", ours <= others[fastest]
        report.check(what, "at most 1", measured, passed, judged=where.on_gpu)


# 7


_LAYER_MILLISECONDS = {
    "gpt_4b": (1.0, 2.1),
    "llama3_8b": (7.4, 15.9),
}  # F and B, estimated for an H100
_TOLERANCE = 1.25
_PEAK = 9.89e14  # bfloat16 FLOP/s of an H100, dense


def layers(where: Where, report: Report) -> None:
    """Time one layer forward and backward, on the GPU and on the host, and list its kernels.

    Also without compiled elementwise work, which takes other times of both, and layer after layer
    without a pause, when the GPU reaches its limit of power and lowers its clock; with zeros it
    takes less power.
    """
    from vp_train.model.shape import layer_flops

    for name, expected in _LAYER_MILLISECONDS.items():
        stage, model = first_layers(name, where)
        shape = (model.seq_length, 1, model.hidden_size)
        x, dy = where.randn(*shape).requires_grad_(), where.randn(*shape)
        times = _host_and_device(where, stage, x, dy)
        for letter, most in zip("FB", expected, strict=True):
            measured, limit = times[letter], most * _TOLERANCE
            report.check(
                f"{name}: {letter}",
                f"about {most} ms",
                f"{measured:.2f} ms",
                measured <= limit,
                judged=where.on_gpu,
            )
        host, device = (sum(times[letter + kind] for letter in "FB") for kind in (" host", ""))
        report.check(
            f"{name}: host ahead",
            "less than the GPU's time",
            f"{host:.2f} of {device:.2f} ms",
            host < device,
            judged=where.on_gpu,
        )
        work = partial(_forward_backward, stage, x, dy)
        steady, clock = _without_pause(where, work, sum(times[letter] for letter in "FB"))
        rate = 3e3 * layer_flops(model, model.seq_length) / steady
        report.check(
            f"{name}: layer after layer",
            "at least 55 % MFU",
            f"{steady:.2f} ms, {rate / _PEAK:.1%} MFU; {clock}",
            rate >= 0.55 * _PEAK,
            judged=where.on_gpu and name == "llama3_8b",
        )
        zeros = partial(_forward_backward, stage, torch.zeros_like(x, requires_grad=True), 0 * dy)
        of_zeros, cool_clock = _without_pause(where, zeros, steady)
        plain, _ = first_layers(name, where, compiles="off")
        report.note(
            **{
                f"{name} milliseconds": times,
                f"{name} layer after layer": {
                    "milliseconds": steady,
                    "clock": clock,
                    "milliseconds, of zeros": of_zeros,
                    "clock, of zeros": cool_clock,
                },
                f"{name} milliseconds, nothing compiled": _host_and_device(where, plain, x, dy),
            }
        )
        report.note(**{f"{name} kernels": top_kernels(where, work)})
        report.note(**{f"{name} on the host": top_kernels(where, work, 30, by_host=True)})


def _forward_backward(stage: Any, x: Tensor, dy: Tensor) -> None:
    stage(x, None).backward(dy)


def _without_pause(
    where: Where, work: Callable[[], object], milliseconds: float
) -> tuple[float, str]:
    """Return the median milliseconds of `work` in the second of two seconds of it.

    The other result is the clock and the power in between, as nvidia-smi says them.
    milliseconds: what `work` takes about.
    """
    count = max(2, int(2000 / milliseconds)) if where.on_gpu else 2
    query = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader"]
    marks, clock, asked = [_mark(where)], "no GPU", None
    for turn in range(count):
        if where.on_gpu and turn == count // 2:
            marks[-1].synchronize()  # half of the work is done, so the GPU is warm
            asked = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        work()
        marks.append(_mark(where))
    if asked is not None:
        clock = asked.communicate()[0].strip()
    times = [_elapsed(where, *pair) for pair in itertools.pairwise(marks[count // 2 :])]
    return median(times), clock


def _host_and_device(where: Where, stage: Any, x: Tensor, dy: Tensor) -> dict[str, float]:
    """Return the milliseconds of F and B on the device, and those of the host to issue them."""
    found: dict[str, list[float]] = {"F": [], "B": [], "F host": [], "B host": []}
    for turn in range(8 if where.on_gpu else 2):
        where.synchronise()
        _get_ahead(where)
        marks, clock = [_mark(where)], [time.perf_counter()]
        y = stage(x, None)
        marks.append(_mark(where))
        clock.append(time.perf_counter())
        y.backward(dy)
        marks.append(_mark(where))
        clock.append(time.perf_counter())
        if turn < 2 and where.on_gpu:
            continue
        for index, letter in enumerate("FB"):
            found[letter].append(_elapsed(where, *marks[index : index + 2]))
            found[f"{letter} host"].append(1e3 * (clock[index + 1] - clock[index]))
    return {key: median(values) for key, values in found.items()}


# 8


class _Between:
    """An observer that knows whether its rank is between its first and its last pass."""

    def __init__(self, num_passes: int) -> None:
        self._left, self._begun = num_passes, False

    @property
    def inside(self) -> bool:
        return self._begun and self._left > 0

    @contextmanager
    def observe(self, item: object, held_bytes: object) -> Iterator[None]:
        self._begun = True
        yield
        self._left -= 1

    def waits(self, action: object, item: object) -> AbstractContextManager[None]:
        return nullcontext()

    def watch(self, name: str, pending: Any) -> Any:
        return pending


def synchronisations(where: Where, report: Report) -> None:
    """Let torch warn of all that waits for the device in a step of two ranks of this process."""
    observers: dict[int, _Between] = {}
    found: list[dict[str, Any]] = []

    def record(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "synchroniz" in str(message):
            observer = observers.get(threading.get_ident())
            frames = [frame for frame in traceback.extract_stack() if "vp_train" in frame.filename]
            stack = [f"{frame.filename.removeprefix(str(ROOT))}:{frame.lineno}" for frame in frames]
            at = f"{filename.removeprefix(str(ROOT))}:{lineno}"
            inside = observer is not None and observer.inside
            found.append({"inside": inside, "at": at, "stack": stack[-4:]})

    def listen() -> None:
        """Begin to hear; threads of ranks may have changed the filters while they built models."""
        warnings.simplefilter("always")
        warnings.showwarning = record
        if where.on_gpu:
            torch.cuda.set_sync_debug_mode("warn")

    with warnings.catch_warnings():
        for schedule in ("1f1b", "zb_h1"):
            found.clear()
            _watched_step(where, schedule, observers, listen)
            heard = len(found)
            if where.on_gpu:
                torch.ones(1, device=where.device).item()
                torch.cuda.set_sync_debug_mode("default")
            heard = len(found) - heard
            report.check(
                f"{schedule}: .item() is heard",
                "1 or more",
                str(heard),
                heard > 0,
                judged=where.on_gpu,
            )
            inside = [item for item in found if item["inside"]]
            outside = [item for item in found if not item["inside"]]
            report.note(**{f"{schedule} outside": outside[:20], f"{schedule} inside": inside[:20]})
            places = ", ".join(sorted({item["at"] for item in inside})) or "none"
            report.check(f"{schedule}: synchronisations between passes", "none", places, not inside)
    _timed_step(where, report)


def _watched_step(
    where: Where, schedule: str, observers: dict[int, _Between], listen: Callable[[], None]
) -> None:
    """Run a step that does not count, then `listen`, and another.

    `observers` gets the observer of each rank, by its thread.
    """
    from schedules.lower import Action
    from tests.local import run_locally

    config, plan, (tokens, labels) = _nano(where, schedule)

    def work(rank: int, model: Any, together: Any) -> None:
        num_passes = sum(op.action is Action.RUN for op in plan.program.ranks[rank])
        for turn in range(2):  # the first allocates and compiles
            where.synchronise()
            model.gradients.zero()
            observer = observers[threading.get_ident()] = _Between(num_passes)
            if turn and rank == 0:
                listen()
            together.gather(rank, None)
            model.train_step(tokens, labels, observer)
            model.optimizer.reduce()
            together.gather(rank, None)

    run_locally(config, plan, work)


def _nano(where: Where, schedule: str) -> tuple[Any, Any, Tensor]:
    """Return the configuration and plan of two ranks, and their tokens and labels [2, m, b, s]."""
    from vp_train.planning.plan import make_plan
    from vp_train.settings import load_config

    dtype = str(where.dtype).removeprefix("torch.")
    words = [
        f"schedule={schedule}",
        "parallel.pp=2",
        f"run.device={where.device.type}",
        f"run.dtype={dtype}",
    ]
    config = load_config(["model=nano", "num_microbatches=4", *words])
    shape = (2, 4, config.micro_batch_size, config.model.seq_length)
    return config, make_plan(config, 2), torch.randint(0, config.model.vocab_size, shape)


def _timed_step(where: Where, report: Report) -> None:
    """Time the passes of a step of two ranks of this process, and hops and barriers.

    On a GPU the host of a rank waits for the messages of others, so only passes are timed there.
    """
    from schedules.lower import Action
    from tests.local import run_locally
    from vp_train.pipeline.recorder import Recorder
    from vp_train.pipeline.timers import timer_of

    config, plan, (tokens, labels) = _nano(where, "zb_h1")

    def work(rank: int, model: Any, together: Any) -> tuple[int, Any, Any]:
        num_passes = sum(op.action is Action.RUN for op in plan.program.ranks[rank])
        timer = timer_of(where.device, host_waits=where.on_gpu)
        recorder = Recorder(rank, timer, list(model.parameters.values()))
        for observer in (_Between(num_passes), recorder):
            model.gradients.zero()
            where.synchronise()
            together.gather(rank, None)
            recorder.timer.start()
            model.train_step(tokens, labels, observer)
            model.optimizer.reduce()
            together.gather(rank, None)
        where.synchronise()
        return num_passes, recorder.spans, recorder.communications

    wrong, found = [], []
    for rank, (num_passes, spans, communications) in enumerate(run_locally(config, plan, work)):
        kinds = Counter("hop" if span.kind == "hop" else "barrier" for span in communications)
        found.append(f"{len(spans)} passes, {kinds['hop']} hops, {kinds['barrier']} barriers")
        overlaps = [b.name for a, b in itertools.pairwise(spans) if b.start < a.end - 1e-5]
        backwards = [
            span.name
            for span in (*spans, *communications)
            if span.end < span.start or span.start < 0
        ]
        communicates = bool(kinds["hop"] and kinds["barrier"])
        if len(spans) != num_passes or communicates == where.on_gpu or overlaps or backwards:
            wrong.append(f"rank {rank}: {overlaps[:3]} overlap, {backwards[:3]} run backwards")
    measured = "; ".join([*found, *wrong])
    report.check("a timed step", "passes one after the other", measured, not wrong)


# 9


def spinning(where: Where, report: Report) -> None:
    """Multiply beside kernels that occupy thread blocks, as NCCL's do while they wait."""
    size, calls = (4096, 20) if where.on_gpu else (64, 2)
    how = _spinner(where)
    times: dict[str, dict[int, float]] = {}
    for rows in (size, 4 * size):
        a, b = where.randn(rows, size), where.randn(size, size)
        name = f"{rows} x {size} x {size}"
        times[name] = {
            blocks: _beside(where, how, blocks, a, b, calls) for blocks in (0, 1, 2, 4, 8, 16, 32)
        }
    report.note(milliseconds=times, blocks_by=how.__name__)
    small = next(iter(times.values()))
    slower = {blocks: time / small[0] - 1 for blocks, time in small.items() if blocks}
    for blocks, most in ((2, 0.40), (4, 0.60), (32, 0.80)):
        measured = f"{slower[blocks]:+.1%}"
        report.check(
            f"GEMM beside {blocks} blocks",
            f"at most {most:.0%} slower",
            measured,
            slower[blocks] <= most,
            judged=where.on_gpu,
        )


def _beside(
    where: Where, how: Callable[[int], object], blocks: int, a: Tensor, b: Tensor, calls: int
) -> float:
    """Return the milliseconds of a product beside so many blocks, the best of three."""
    rounds = []
    for _ in range(4):
        where.synchronise()
        spun = how(blocks)
        time.sleep(0.002)  # they are there when the products begin
        begin = _mark(where)
        for _ in range(calls):
            torch.mm(a, b)
        rounds.append(_elapsed(where, begin, _mark(where)) / calls)
        where.synchronise()
        del spun
    return min(rounds[1:])


def _spinner(where: Where) -> Callable[[int], object]:
    """Return what occupies some thread blocks for 20 ms beside the current stream."""
    if not where.on_gpu:

        def nothing(blocks: int) -> None:
            pass

        return nothing
    cycles = sleep_cycles(20)
    streams = [torch.cuda.Stream(priority=-1) for _ in range(32)]

    def sleeping_streams(blocks: int) -> None:
        for stream in streams[:blocks]:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(cycles)

    def triton_kernel(blocks: int) -> object:
        from spin import spin

        if not blocks:
            return None
        with torch.cuda.stream(streams[0]):
            return spin(blocks, 0.02)

    try:
        triton_kernel(1)
        torch.cuda.synchronize()
    except Exception:  # no Triton, or one that does not compile here
        traceback.print_exc()
        return sleeping_streams
    return triton_kernel


# 10


def packed(where: Where, report: Report) -> None:
    """Pack sixteen documents of sixteen lengths: what new lengths cost the host, and known ones."""
    _attentions(where, report)
    stage, model = first_layers("llama3_8b", where)
    length, count = model.seq_length, 16

    def segments(seed: int) -> Tensor:
        """[1, s], of documents that all have other lengths."""
        generator = torch.Generator().manual_seed(seed)
        cuts = (torch.randperm(length - 1, generator=generator)[: count - 1] + 1).sort().values
        begins = torch.zeros(length, dtype=torch.int64)
        begins[cuts] = 1
        return begins.cumsum(0)[None]

    x = where.randn(length, 1, model.hidden_size).requires_grad_()
    dy = where.randn(length, 1, model.hidden_size)

    def visit(segments: Tensor | None) -> tuple[float, float]:
        """Return the host's and the whole time of F and B, in ms."""
        where.synchronise()
        begin = time.perf_counter()
        stage(x, segments).backward(dy)
        host = time.perf_counter() - begin
        where.synchronise()
        return 1e3 * host, 1e3 * (time.perf_counter() - begin)

    for unknown in (None, segments(0), None):  # loads kernels
        visit(unknown)
    whole = visit(None)
    first, second, others, again = (visit(segments(seed)) for seed in (1, 1, 2, 2))
    report.note(unpacked=whole, first=first, second=second, others=others, others_again=again)
    each = max(first[0] - second[0], others[0] - again[0], 0) / count
    report.check(
        "a new length, on the host",
        "at most 1 ms (cuDNN would make a plan)",
        f"{each:.2f} ms",
        each <= 1,
        judged=where.on_gpu,
    )
    known = max(second[0], again[0]) / count
    report.check(
        "a known length, on the host",
        "at most 1 ms",
        f"{known:.2f} ms",
        known <= 1,
        judged=where.on_gpu,
    )


def _attentions(where: Where, report: Report) -> None:
    """Time F and B of attention: torch's choice, one document, 16 of them, windows."""
    from vp_train.model.attention import Documents, Rule, attend_documents, block_attention

    times = {}
    for tokens, heads, groups in ((2048, 24, 24), (8192, 32, 8)) if where.on_gpu else ((64, 4, 2),):
        q, k, v = (
            where.randn(tokens, count, 128).requires_grad_() for count in (heads, groups, groups)
        )
        dy = where.randn(tokens, heads * 128)
        windowed = Rule(128**-0.5, None, tokens // 4)

        def whole(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            inputs = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
            y = nn.functional.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
            return y[0].transpose(0, 1).flatten(1)

        def blocks(q: Tensor = q, k: Tensor = k, v: Tensor = v, rule: Rule = windowed) -> Tensor:
            return block_attention(q[:, None], k[:, None], v[:, None], rule)[:, 0]

        works: dict[str, Callable[[], Tensor | None]] = {
            "whole": whole,
            "windows by blocks": blocks,
        }
        for name, count, window in (
            ("one document", 1, None),
            ("16 documents", 16, None),
            ("windows by documents", 1, windowed.window),
        ):
            documents = Documents.on(where.device, (tokens // count,) * count)
            works[name] = partial(attend_documents, q, k, v, documents, windowed.scale, window)
        for name, work in works.items():
            y = work()
            if y is not None:  # there is no such kernel on a CPU
                times[f"T {tokens}: {name}"] = milliseconds(
                    where, lambda work=work, dy=dy: work().backward(dy), 3, 5
                )
    report.note(attention_milliseconds=times)


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


# 13


def float8_layers(where: Where, report: Report) -> None:
    """Multiply in float8 against bfloat16: error, time and rate of y and dx, then a whole layer."""
    from vp_train.model.float8 import Float8Products

    shapes = ((2048, 3072, 12288), (8192, 4096, 14336), (8192, 14336, 4096), (8192, 4096, 6144))
    rows = []
    for tokens, inner, outer in shapes if where.on_gpu else ((48, 32, 64),):
        x, dy = (where.randn(tokens, size, dtype=torch.bfloat16) for size in (inner, outer))
        weight = nn.Parameter(where.randn(outer, inner, dtype=torch.bfloat16))
        row: dict[str, Any] = {"tokens": tokens, "in": inner, "out": outer}
        row |= _times_of_products(where, "bfloat16", None, x, dy, weight)
        for name in ("row", "tensor"):
            products = Float8Products(by_row=name == "row")
            _judge_float8(
                report, f"{tokens} x {inner} x {outer} by {name}", products, x, dy, weight
            )
            row |= _times_of_products(where, name, products, x, dy, weight)
        speed = (row["bfloat16 y"] + row["bfloat16 dx"]) / (row["row y"] + row["row dx"])
        report.check(
            f"{tokens} x {inner} x {outer}: y and dx by row, with rounding",
            "at least 1.2 times as fast as bfloat16",
            f"{speed:.2f} times",
            speed >= 1.2,
            judged=where.on_gpu,
        )
        rows.append(row)
        report.note(products=rows)
    _float8_layer(where, report)


def _times_of_products(
    where: Where, name: str, products: Any, x: Tensor, dy: Tensor, weight: nn.Parameter
) -> dict[str, float]:
    """Return the milliseconds of y and dx with the weight rounded before, and their TFLOP/s."""
    from vp_train.model.linear import PLAIN

    formed = PLAIN if products is None else products
    with formed.fixed_weights(), torch.no_grad():
        y = milliseconds(where, lambda: formed.output(x, weight))
        dx = milliseconds(where, lambda: formed.input_gradient(dy, weight))
    flops = 2e-9 * x.numel() * len(weight)
    return {
        f"{name} y": y,
        f"{name} dx": dx,
        f"{name} y TFLOP/s": flops / y,
        f"{name} dx TFLOP/s": flops / dx,
    }


def _judge_float8(
    report: Report, what: str, products: Any, x: Tensor, dy: Tensor, weight: nn.Parameter
) -> None:
    """Compare y and dx with fp32 products of the same rounded matrices, in a part of their rows."""
    from vp_train.model.float8 import PRECISE, rounded

    by_row, some = products._by_row, slice(0, 256)
    worst = 0.0
    with torch.no_grad():
        for left, dtype, right, found in (
            (x, PRECISE, weight, products.output(x, weight)),
            (dy, products.gradient_dtype, weight.T, products.input_gradient(dy, weight)),
        ):
            a, b = rounded(left, dtype, by_row=by_row), rounded(right, PRECISE, by_row=by_row)
            scale = a.scale[some] if by_row else a.scale
            exact = (a.values[some].float() * scale) @ (b.values.float() * b.scale).T
            error = (found[some].float() - exact).abs().max() / exact.abs().max()
            worst = max(worst, error.item())
    # bfloat16 rounds by 2^-8; the fast accumulation of an H100 has about 14 bits.
    report.check(f"{what}: error", "under 1.5e-2", f"{worst:.1e}", worst < 1.5e-2)


def _float8_layer(where: Where, report: Report) -> None:
    """Time F, I and W of one layer in bfloat16 and in float8, and its gradients' difference."""
    from vp_train.model.float8 import Float8Products
    from vp_train.model.linear import PLAIN

    for name in ("gpt_4b", "llama3_8b") if where.on_gpu else ("llama3_8b",):
        times: dict[str, dict[str, float]] = {}
        gradients = {}
        for kind, products in (("bfloat16", PLAIN), ("float8", Float8Products(by_row=True))):
            stage, model = first_layers(name, where, dtype=torch.bfloat16, products=products)
            torch.manual_seed(1)
            shape = (model.seq_length, 1, model.hidden_size)
            x, dy = (where.randn(*shape, dtype=torch.bfloat16) for _ in range(2))
            x.requires_grad_()
            with stage.fixed_weights():
                times[kind] = _passes_of_layer(where, stage, x, dy)
                for parameter in stage.parameters():
                    main_gradient(parameter)
                stage(x).backward(dy)
            gradients[kind] = [parameter.grad for parameter in stage.parameters()]
            del stage
        report.note(**{f"{name} passes in ms": times})
        error = max(
            ((ours - theirs).norm() / theirs.norm()).item()
            for ours, theirs in zip(*gradients.values(), strict=True)
        )
        what = f"{name}: what float8 changes of the gradient of a parameter"
        report.check(what, "at most 20 %", f"{error:.1%}", error <= 0.2)
        speed = sum(times["bfloat16"].values()) / sum(times["float8"].values())
        report.check(
            f"{name}: F, I and W",
            "at least 1.15 times as fast as bfloat16",
            f"{speed:.2f} times",
            speed >= 1.15,
            judged=where.on_gpu,
        )


def _passes_of_layer(where: Where, stage: Any, x: Tensor, dy: Tensor) -> dict[str, float]:
    """Return the median milliseconds of F, I and W of a stage, one after another."""
    found: dict[str, list[float]] = {"F": [], "I": [], "W": []}
    for _ in range(6 if where.on_gpu else 2):
        where.synchronise()
        _get_ahead(where)
        marks = [_mark(where)]
        y = stage(x)
        marks.append(_mark(where))
        with stage.weight_grads.deferring(0):
            y.backward(dy)
        marks.append(_mark(where))
        stage.weight_grads.drain(0)
        marks.append(_mark(where))
        for kind, (begin, end) in zip("FIW", itertools.pairwise(marks), strict=True):
            found[kind].append(_elapsed(where, begin, end))
    return {kind: median(values[1:]) for kind, values in found.items()}


# 14


def rules(where: Where, report: Report) -> None:
    """Attend with softcaps, windows and documents: FlexAttention against blocks and the varlen."""
    from vp_train.model.attention import (
        Documents,
        Rule,
        attend_documents,
        attend_flexibly,
        block_attention,
    )

    tokens, heads, groups, size = (4096, 16, 8, 256) if where.on_gpu else (192, 4, 2, 16)
    window, scale = tokens // 4, size**-0.5
    dtype = torch.bfloat16
    q, k, v = (
        where.randn(tokens, count, size, dtype=dtype).requires_grad_()
        for count in (heads, groups, groups)
    )
    dy = where.randn(tokens, heads * size, dtype=dtype)
    generator = torch.Generator().manual_seed(0)

    def documents(count: int) -> Documents:
        cuts = (torch.randperm(tokens - 1, generator=generator)[: count - 1] + 1).sort().values
        ends = [0, *cuts.tolist(), tokens]
        return Documents.on(where.device, tuple(b - a for a, b in itertools.pairwise(ends)))

    def blocks(packed: Documents, rule: Rule) -> Tensor:
        pieces = zip(*(t[:, None].split(packed.lengths) for t in (q, k, v)), strict=True)
        return torch.cat([block_attention(*piece, rule)[:, 0] for piece in pieces])

    def gradients(y: Tensor) -> list[Tensor]:
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), dy)]

    times: dict[str, dict[str, float]] = {}
    host: dict[str, float] = {}
    for name, rule, packed in (
        ("softcap", Rule(scale, 50.0, None), documents(1)),
        ("softcap, window", Rule(scale, 50.0, window), documents(1)),
        ("softcap, window, 9 documents", Rule(scale, 50.0, window), documents(9)),
        ("window", Rule(scale, None, window), documents(1)),
    ):
        works = {
            "blocks": partial(blocks, packed, rule),
            "flexible": partial(attend_flexibly, q, k, v, packed, rule),
        }
        if rule.softcap is None:
            works["varlen"] = partial(attend_documents, q, k, v, packed, scale, rule.window)
        begin = time.perf_counter()
        first = works["flexible"]()
        if first is None:  # there is no such kernel here
            report.check(name, "a kernel", "none", False, judged=where.on_gpu)
            del works["flexible"]
        else:
            found = gradients(first)
            where.synchronise()
            host[name] = time.perf_counter() - begin
            _judge_attention(report, name, found, gradients(blocks(packed, rule)))
        times[name] = {
            kind: milliseconds(where, lambda work=work: work().backward(dy), 3, 5)
            for kind, work in works.items()
            if work() is not None
        }
        report.note(milliseconds=times, first_seconds=host)
        if "flexible" in times[name]:
            ratio = times[name]["blocks"] / times[name]["flexible"]
            measured, what = f"{ratio:.1f} times", f"{name}: FlexAttention"
            report.check(what, "at least 3 times as fast as blocks", measured, ratio >= 3)
    _judge_new_documents(where, report, documents, (q, k, v, dy), Rule(scale, 50.0, window))
    _judge_other_sizes(where, report, (q, k, v), Rule(scale, 50.0, window))


def _judge_attention(
    report: Report, name: str, found: Sequence[Tensor], expected: Sequence[Tensor]
) -> None:
    """Check outputs and gradients of bfloat16 against each other."""
    worst = max(
        ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
        for a, b in zip(found, expected, strict=True)
    )
    report.check(f"{name}: y, dq, dk, dv", "within 2 %", f"{worst:.1e}", worst < 2e-2)


def _judge_new_documents(
    where: Where,
    report: Report,
    documents: Callable[[int], Any],
    tensors: tuple[Tensor, ...],
    rule: Any,
) -> None:
    """Check that documents of new lengths are compiled for no more, by what they cost the host."""
    from vp_train.model.attention import attend_flexibly

    q, k, v, dy = tensors
    seconds = []
    for count in (9, 2, 17, 33, 5):
        packed = documents(count)
        where.synchronise()
        begin = time.perf_counter()
        y = attend_flexibly(q, k, v, packed, rule)
        if y is None:
            return
        y.backward(dy)
        seconds.append(time.perf_counter() - begin)
    report.note(new_documents_host_milliseconds=[1e3 * value for value in seconds])
    worst = 1e3 * max(seconds[1:])
    report.check(
        "documents of new lengths, on the host", "at most 20 ms", f"{worst:.1f} ms", worst <= 20
    )


def _judge_other_sizes(
    where: Where, report: Report, tensors: tuple[Tensor, ...], rule: Any
) -> None:
    """Attend over fewer tokens, as inference does: the second size is compiled for all others."""
    from vp_train.model.attention import Documents, attend_flexibly, block_attention

    seconds, worst = [], 0.0
    for tokens in (len(tensors[0]) // part for part in (2, 3, 4, 5)):
        q, k, v = (tensor.detach()[:tokens] for tensor in tensors)
        where.synchronise()
        begin = time.perf_counter()
        y = attend_flexibly(q, k, v, Documents.on(where.device, (tokens,)), rule)
        if y is None:
            return
        where.synchronise()
        seconds.append(time.perf_counter() - begin)
        expected = block_attention(q[:, None], k[:, None], v[:, None], rule)[:, 0].float()
        worst = max(worst, ((y.float() - expected).abs().max() / expected.abs().max()).item())
    report.note(other_sizes_seconds=seconds)
    report.check("other numbers of tokens: y", "within 2 %", f"{worst:.1e}", worst < 2e-2)
    last = seconds[-1]
    report.check("the last of them", "not compiled: under 1 s", f"{last:.3f} s", last < 1)


# 15

_UNDERWAY = 6  # microbatches between forward and backward, as on the first of six stages
_LEAVES, _RETURNS = 3, 2  # passes that a copy to the host and one back may take
_ON_DEVICE = 4  # microbatches that are on the device at most: two that leave, two that came back


def offloading(where: Where, report: Report) -> None:
    """Copy to host memory and back beside products, and run a stage whose activations wait there.

    The stage runs 1F1B as the first of six.  Half of its layers are offloaded: a link of 40 GB/s
    needs less time for them than the passes do.  On a slower one the passes wait.
    """
    rate = _time_link(where, report)
    stage, model = first_layers("llama3_8b", where, 4, num_offloaded=2)
    x, dy = (where.randn(model.seq_length, 1, model.hidden_size) for _ in range(2))
    found = {}
    for name, offloads in (("on the device", False), ("in host memory", True)):
        for _ in range(2):  # the first time allocates
            found[name] = _run_1f1b(where, stage, x, dy, offloads=offloads)
    here, away = found.values()
    worst = max(
        float((a - b).double().norm() / b.double().norm().clamp_min(1e-30))
        for a, b in zip(away.gradients, here.gradients, strict=True)
    )
    same = worst <= (1e-2 if where.on_gpu else 0)
    report.check("gradients with activations in host memory", "the same", f"{worst:.1e}", same)
    moved = away.moved_bytes / 2  # in each direction
    report.check(
        "bytes moved in each direction", "more than none", f"{moved / 2**20:.0f} MiB", moved > 0
    )
    copy = moved / (2 * _UNDERWAY) / rate / 1e6
    report.note(
        milliseconds={name: run.milliseconds for name, run in found.items()},
        peak_bytes={name: run.peak_bytes for name, run in found.items()},
        moved_bytes=moved,
        copy_milliseconds=copy,
        pass_milliseconds=here.passes,
    )
    expected = _with_copies(here.passes, copy)
    report.check(
        f"1F1B of {2 * _UNDERWAY} microbatches",
        f"at most 10 % above {expected:.1f} ms, what its passes and copies of {copy:.1f} ms take",
        f"{away.milliseconds:.1f} ms; {here.milliseconds:.1f} ms without copies",
        away.milliseconds <= 1.1 * expected,
        judged=where.on_gpu,
    )
    saved = here.peak_bytes - away.peak_bytes
    gone = (_UNDERWAY - _ON_DEVICE) * moved / (2 * _UNDERWAY)
    report.check(
        "peak memory",
        f"falls by {gone / 2**20:.0f} MiB, which {_UNDERWAY - _ON_DEVICE} microbatches keep, +-15%",
        f"falls by {saved / 2**20:.0f} MiB",
        abs(saved - gone) <= 0.15 * gone,
        judged=where.on_gpu,
    )


def _time_link(where: Where, report: Report) -> float:
    """Return the GB/s of the link in each direction with copies in both at once."""
    from vp_train.pipeline.offload import FROM_HOST, TO_HOST, HostLink
    from vp_train.tensors.streams import streams_of

    count, block = (64, 8 << 20) if where.on_gpu else (4, 1 << 18)
    link = HostLink(streams_of(where.device), where.device, block)
    pairs = {}
    for side in (TO_HOST, FROM_HOST):
        device = torch.ones(count * block, dtype=torch.uint8, device=where.device).split(block)
        host = [link.memory.take() for _ in range(count)]
        ends = (host, device) if side == TO_HOST else (device, host)
        pairs[side] = list(zip(*ends, strict=True))
    a, b = (where.randn(4096, 4096) if where.on_gpu else where.randn(64, 64) for _ in range(2))
    products = 64 if where.on_gpu else 2

    def work(sides: Sequence[str], num_products: int) -> None:
        copies = [link.copy(side, pairs[side]) for side in sides]
        for _ in range(num_products):
            torch.mm(a, b)
        for copy in copies:
            copy.wait()

    cases = {
        "to host": ((TO_HOST,), 0),
        "from host": ((FROM_HOST,), 0),
        "both": ((TO_HOST, FROM_HOST), 0),
        "products": ((), products),
        "all": ((TO_HOST, FROM_HOST), products),
    }
    times = {name: milliseconds(where, partial(work, *case), 1) for name, case in cases.items()}
    rates = {name: count * block / 1e6 / times[name] for name in ("to host", "from host", "both")}
    report.note(link_gigabytes_per_second=rates, link_milliseconds=times)
    least = max(times["both"], times["products"])
    report.check(
        "copies in both directions beside products",
        f"at most 40 % above the longer of the two, {least:.1f} ms",
        f"{times['all']:.1f} ms, {rates['both']:.1f} GB/s in each direction",
        times["all"] <= 1.4 * least,
        judged=where.on_gpu,
    )
    return rates["both"]


def _order() -> list[tuple[str, int]]:
    """Return the passes of the first of `_UNDERWAY` stages, for twice as many microbatches."""
    order = [(kind, i) for i in range(2 * _UNDERWAY) for kind in "FB"]
    return sorted(order, key=lambda entry: entry[1] + (_UNDERWAY - 0.5) * (entry[0] == "B"))


def _with_copies(passes: dict[str, float], copy: float) -> float:
    """Return the milliseconds of `_order` if a microbatch takes `copy` in each direction."""
    order, now, out, back = _order(), 0.0, 0.0, 0.0
    gone: dict[int, tuple[int, float]] = {}  # by microbatch, its forward's turn and its copy's end
    here: dict[int, float] = {}  # by microbatch, the end of its copy back
    for turn, (kind, i) in enumerate(order):
        now = max([now, *(end for begun, end in gone.values() if begun <= turn - _LEAVES)])
        soon = order[turn + _RETURNS] if turn + _RETURNS < len(order) else ("", 0)
        if soon[0] == "B":
            back = here[soon[1]] = max(back, now) + copy
        now = max(now, here.get(i, 0.0) if kind == "B" else 0.0) + passes[kind]
        if kind == "F":
            out = max(out, now) + copy
            gone[i] = (turn, out)
    return now


@dataclass(frozen=True, slots=True)
class _Run:
    """A run of a stage: its time, its memory of the device above that before it, its results.

    passes: the median milliseconds of F and of B.
    """

    milliseconds: float
    passes: dict[str, float]
    peak_bytes: int
    moved_bytes: int
    gradients: tuple[Tensor, ...]


def _run_1f1b(where: Where, stage: Any, x: Tensor, dy: Tensor, *, offloads: bool) -> _Run:
    """Run the passes of the first of `_UNDERWAY` stages for twice as many microbatches."""
    from vp_train.pipeline.offload import HostLink, Kept, storages_of
    from vp_train.tensors.streams import streams_of

    for parameter in stage.parameters():
        main_gradient(parameter)
    link = HostLink(streams_of(where.device), where.device)
    order = _order()
    marks: list[Any] = []
    outputs: dict[int, Tensor] = {}
    kept: dict[int, Kept] = {}
    left: dict[int, int] = {}  # after which pass each microbatch began to leave
    where.synchronise()
    before = torch.cuda.memory_allocated() if where.on_gpu else 0
    if where.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begin = _mark(where)
    for turn, (kind, i) in enumerate(order):
        for earlier in [earlier for earlier, at in left.items() if at <= turn - _LEAVES]:
            kept[earlier].offloaded()
            del left[earlier]
        soon = order[turn + _RETURNS] if turn + _RETURNS < len(order) else ("", 0)
        if soon[0] == "B" and soon[1] in kept:
            kept[soon[1]].reload()
        if kind == "F":
            kept_here = kept[i] = link.keep(f"0F{i}", storages_of(stage))
            with stage.offloading(kept_here.hooks) if offloads else nullcontext():
                outputs[i] = stage(x.detach().requires_grad_())
            if offloads:
                kept_here.offload()
                left[i] = turn
            else:
                del kept[i]
        else:
            if offloads:
                kept.pop(i).restored()
            outputs.pop(i).backward(dy)
        marks.append(_mark(where))
    elapsed = _elapsed(where, begin, marks[-1])
    times = [
        (kind, _elapsed(where, *pair))
        for (kind, _), pair in zip(order[1:], itertools.pairwise(marks), strict=True)
    ]
    passes = {wanted: median(taken for kind, taken in times if kind == wanted) for wanted in "FB"}
    peak = torch.cuda.max_memory_allocated() - before if where.on_gpu else 0
    gradients = tuple(parameter.grad.clone() for parameter in stage.parameters())
    return _Run(elapsed, passes, peak, link.moved_bytes, gradients)


# All


@dataclass(frozen=True, slots=True)
class Step:
    """A step, and the most seconds it may take.  What is `timed` has the GPU for itself."""

    name: str
    run: Callable[[Where, Report], None]
    limit_seconds: float
    timed: bool = False


STEPS: dict[int, Step] = {
    1: Step("imports and attention", imports, 100),
    2: Step("collectives of one rank", collectives, 60),
    3: Step("stalls and delays", stall, 80, timed=True),
    4: Step("accumulated products", accumulation, 40, timed=True),
    5: Step("the CUDA tests", cuda_tests, 170),
    6: Step("S and T", vocabulary, 90, timed=True),
    7: Step("one layer", layers, 75, timed=True),
    8: Step("synchronisations", synchronisations, 60),
    9: Step("spinning kernels", spinning, 40, timed=True),
    10: Step("packed lengths", packed, 60, timed=True),
    11: Step("profile against plan", profiled, 150, timed=True),
    12: Step("training", training, 170),
    13: Step("float8", float8_layers, 100, timed=True),
    14: Step("softcaps and windows", rules, 110, timed=True),
    15: Step("activations in host memory", offloading, 80, timed=True),
}


def main(arguments: Sequence[str]) -> None:
    number, device, result = arguments
    sys.path.insert(0, str(ROOT))  # for the tests, which are no package that is installed
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)
    path = Path(result)
    STEPS[int(number)].run(Where(torch.device(device), path.parent), Report(path))


if __name__ == "__main__":
    main(sys.argv[1:])
