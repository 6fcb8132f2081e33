"""Step 3: a message that is late delays what needs it and changes no bit."""

from __future__ import annotations

import itertools
import os
import threading
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.common import Report, Where, elapsed, mark, sleep_cycles

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
    s_end = mark(where)
    c1, c1b = _start_barriers(where, rank, comms, gathered, reduced)
    f_begin = mark(where)
    torch.mm(matrix, matrix)  # F
    issued = 1e3 * (time.perf_counter() - host)
    c1()
    c1_end = mark(where)
    if c1b is not None:
        c1b()
    comms.drain()
    sent = torch.tensor([1.0, 2.0], device=where.device)[:, None, None]
    right = torch.equal(gathered[0], sent.expand_as(gathered[0]))
    right = right and all(torch.equal(value, torch.full_like(value, 6.0)) for value in reduced)
    late, slept = elapsed(where, s_end, f_begin), elapsed(where, s_end, c1_end)
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
