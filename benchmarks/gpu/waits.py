"""Steps 8 and 9: where the host waits for the device, and kernels that spin beside others."""

from __future__ import annotations

import itertools
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from gpu.common import ROOT, Report, Where, elapsed, mark, sleep_cycles

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

    def watch(self, name: str, channel: str, pending: Any) -> Any:
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
        if where.on_gpu:
            times[f"{name}, with as many multiprocessors left free"] = {
                blocks: _beside(where, how, blocks, a, b, calls, free=blocks)
                for blocks in (0, 2, 4, 32)
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
    where: Where,
    how: Callable[[int], object],
    blocks: int,
    a: Tensor,
    b: Tensor,
    calls: int,
    *,
    free: int | None = None,
) -> float:
    """Return the milliseconds of a product beside so many blocks, the best of three.

    free: the multiprocessors that the product, by cuBLASLt, leaves to others; None: as usual.
    """
    rounds = []
    with nullcontext() if free is None else _left_free(free):
        for _ in range(4):
            where.synchronise()
            spun = how(blocks)
            time.sleep(0.002)  # they are there when the products begin
            begin = mark(where)
            for _ in range(calls):
                torch.mm(a, b)
            rounds.append(elapsed(where, begin, mark(where)) / calls)
            where.synchronise()
            del spun
    return min(rounds[1:])


@contextmanager
def _left_free(multiprocessors: int) -> Iterator[None]:
    """Let products take cuBLASLt, and leave so many multiprocessors to other kernels."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    torch._C._set_sm_carveout_experimental(multiprocessors)
    try:
        yield
    finally:
        torch._C._set_sm_carveout_experimental(None)
        torch.backends.cuda.preferred_blas_library(before)


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
