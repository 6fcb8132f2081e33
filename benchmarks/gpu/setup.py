"""Steps 1, 2 and 5: what is installed, collectives of one rank, and the CUDA tests."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from xml.etree import ElementTree

import torch
import torch.distributed as dist
from torch import Tensor

from gpu.common import ROOT, Report, Where

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
    sum_of_all = _start_collective(group, Transfer.ALL_SUM, message, 0, ())
    pending = timer.watch(sum_of_all, "sums", ends.append)
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
