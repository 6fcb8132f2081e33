"""Compare simulated and measured steps of the real executor, with sleeps in place of passes.

    python benchmarks/rehearsal.py [--ranks 8] [--microbatches 16] [--layer-ms 80] [--steps 3]
        [--json FILE]

Processes and communication are real.  If a step takes longer than simulated, the runtime adds
waiting.  The stages and vocabulary layers below have the interfaces of the real ones.  They sleep
for the time of the cost model and return tensors of the real shapes, which gloo moves.  Hops and
barriers are timed first, in the same processes and groups.  The simulation uses these times.

Costs are as in `family.py`: a rank has two layers, each with F = I = W = `layer-ms` (B = 2), and
the output layer costs as much as `head` layers.  T is the number of tokens, H the hidden size.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from schedules.check import check_program, check_schedule
from schedules.cost import CostModel
from schedules.generators import GENERATORS, generate
from schedules.ir import Kind, Pass
from schedules.lower import Program, exchange_of, lower
from schedules.problem import Collective, Problem
from schedules.simulate import simulate
from schedules.timeline import Timeline
from schedules.vocab import VOCAB_ALGORITHMS, Barrier, End, Payload
from vp_train.mesh import build_mesh
from vp_train.pipeline.comms import Comms, ProcessGroups
from vp_train.pipeline.executor import Executor, RankModules
from vp_train.pipeline.recorder import Recorder
from vp_train.pipeline.timers import HostTimer
from vp_train.planning.degrees import Degrees
from vp_train.tensors.pending import Pending

CASES = ("1f1b/none", "1f1b/two_barrier", "1f1b", "zb_h1", "zb_v", "v_half")
# The fraction of the three matrix products that S computes.  T computes the rest.
S_SHARE = {
    "none": 2 / 3,
    "naive": 1 / 3,
    "two_barrier": 1 / 3,
    "one_barrier": 2 / 3,
}
ROUNDS = 15  # repetitions of every communication that is timed


@dataclass(frozen=True, slots=True)
class Case:
    """A schedule with a vocabulary algorithm."""

    schedule: str
    vocab: str

    @classmethod
    def parse(cls, text: str) -> Case:
        """Parse SCHEDULE/VOCAB, such as `1f1b/none`.  Without VOCAB it is `one_barrier`."""
        schedule, _, vocab = text.partition("/")
        case = cls(schedule, vocab or "one_barrier")
        if case.schedule not in GENERATORS or case.vocab not in VOCAB_ALGORITHMS:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not <schedule>[/<vocab>] with a schedule of {', '.join(GENERATORS)} "
                f"and a vocab of {', '.join(VOCAB_ALGORITHMS)}"
            )
        return case


@dataclass(frozen=True, slots=True)
class Setup:
    """The settings that all cases share."""

    microbatches: int
    layer_seconds: float
    head_in_layers: float
    embedding_seconds: float
    tokens: int
    hidden: int
    dtype: torch.dtype
    steps: int

    def problem(self, case: Case, num_ranks: int) -> Problem:
        family = GENERATORS[case.schedule]
        return Problem(
            family.layout_of(num_ranks),
            self.microbatches,
            VOCAB_ALGORITHMS[case.vocab],
            split_backward=family.split_backward,
        )

    def cost(
        self, problem: Problem, hop_seconds: float, barrier_seconds: dict[str, float]
    ) -> CostModel:
        layout, algorithm = problem.layout, problem.algorithm
        stage = 2 * self.layer_seconds / layout.num_chunks
        output = (
            3
            * self.head_in_layers
            * self.layer_seconds
            / (layout.num_ranks if algorithm.sharded else 1)
        )
        share = S_SHARE[algorithm.name]
        per_stage = {Kind.F: stage, Kind.B: 2 * stage, Kind.I: stage, Kind.W: stage}
        per_shard = {
            Kind.S: share * output,
            Kind.T: (1 - share) * output,
            Kind.E: self.embedding_seconds,
            Kind.G: self.embedding_seconds,
        }
        seconds = {kind: (value,) * layout.num_stages for kind, value in per_stage.items()}
        seconds |= {kind: (value,) * layout.num_ranks for kind, value in per_shard.items()}
        return CostModel(seconds, hop_seconds, barrier_seconds)

    def counts(self, problem: Problem) -> list[int]:
        """Return how many tokens every input shard owns: equally many."""
        num_shards = len(problem.shard_ranks(End.INPUT))
        return [
            (self.tokens * (i + 1)) // num_shards - self.tokens * i // num_shards
            for i in range(num_shards)
        ]

    def message(self, payload: Payload, problem: Problem, rank: int) -> Tensor:
        """Return a tensor with the shape and dtype of a rank's message for `payload`."""
        match payload:
            case Payload.EMBEDDINGS:
                own = self.counts(problem)[problem.shard_ranks(End.INPUT).index(rank)]
                return torch.ones(own, self.hidden, dtype=self.dtype)
            case Payload.EMBEDDING_GRADIENT:
                at_root = rank == problem.root(End.INPUT)
                return torch.ones(self.tokens if at_root else 0, self.hidden, dtype=self.dtype)
            case Payload.STATISTICS:
                return torch.ones(3, self.tokens)
            case Payload.MAXIMUM:
                return torch.ones(self.tokens)
            case Payload.SUMS:
                return torch.ones(2, self.tokens)
            case Payload.INPUT_GRADIENT:
                return torch.ones(self.tokens, self.hidden)
            case Payload.ACTIVATIONS:
                return torch.ones(self.tokens, self.hidden, dtype=self.dtype)


# Stages and vocabulary layers that sleep


@dataclass(frozen=True, slots=True)
class Sleeper:
    """A clock that makes a pass last as long as `cost` says.

    `overshoot` is how much longer than asked time.sleep usually takes, in seconds.
    """

    cost: CostModel
    overshoot: float

    @contextmanager
    def lasting(self, kind: Kind, stage: int) -> Iterator[None]:
        """Sleep until the pass has lasted long enough, including the work done inside."""
        end = time.perf_counter() + self.cost.seconds(Pass(stage, kind, 0))
        yield
        time.sleep(max(0.0, end - time.perf_counter() - self.overshoot))


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stage: SleepingStage) -> Tensor:
        ctx.stage = stage
        return stage.pass_on(Kind.F, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,) = grads
        return ctx.stage.pass_on(ctx.stage.backward_kind, dy), None


@dataclass(slots=True)
class SleepingStage:
    """A pipeline stage [s, b, H] -> [s, b, H], which is also its own store of weight gradients."""

    stage: int
    backward_kind: Kind
    sleeper: Sleeper
    waiting: set[int] = field(default_factory=set)

    def __call__(self, x: Tensor, segments: Tensor | None = None) -> Tensor:
        return _Layers.apply(x, self)  # type: ignore[no-untyped-call,no-any-return]

    def pass_on(self, kind: Kind, received: Tensor) -> Tensor:
        with self.sleeper.lasting(kind, self.stage):
            return torch.full_like(received, 1e-3)

    @property
    def weight_grads(self) -> SleepingStage:
        return self

    @property
    def held_bytes(self) -> int:
        return 0

    def fixed_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    def reading(self, need: Callable[[Sequence[str]], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def completing(self, done: Callable[[Sequence[str]], None]) -> AbstractContextManager[None]:
        return nullcontext()

    def offloading(
        self, hooks: Callable[[], AbstractContextManager[None]]
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(())

    def buffers(self) -> Iterator[Tensor]:
        return iter(())

    @contextmanager
    def deferring(self, microbatch: int) -> Iterator[None]:
        yield
        self.waiting.add(microbatch)

    def drain(self, microbatch: int) -> None:
        self.waiting.remove(microbatch)
        with self.sleeper.lasting(Kind.W, self.stage):
            pass

    def assert_empty(self) -> None:
        assert not self.waiting


@dataclass(frozen=True, slots=True)
class SleepingInput:
    """An input layer whose passes E and G sleep."""

    rank: int
    problem: Problem
    setup: Setup
    sleeper: Sleeper

    def begin(self, tokens: Tensor) -> SleepingInput:
        return self

    def counts(self, microbatch: int) -> list[int]:
        return self.setup.counts(self.problem)

    def e(self, microbatch: int) -> Tensor:
        with self.sleeper.lasting(Kind.E, self.rank):
            return self.setup.message(Payload.EMBEDDINGS, self.problem, self.rank)

    def in_order(self, microbatch: int, gathered: Tensor) -> Tensor:
        return gathered

    def by_shard(self, microbatch: int, dy: Tensor) -> Tensor:
        return dy

    def g(self, microbatch: int, dy: Tensor) -> None:
        with self.sleeper.lasting(Kind.G, self.rank):
            pass


@dataclass(frozen=True, slots=True)
class SleepingOutput:
    """An output layer whose passes S and T sleep."""

    rank: int
    problem: Problem
    setup: Setup
    sleeper: Sleeper
    received: dict[int, Tensor] = field(default_factory=dict)  # latest message, by microbatch

    @property
    def held_bytes(self) -> int:
        return 0

    def place(self, targets: Tensor) -> Tensor:
        return targets

    def begin(self, targets: Tensor, weights: Tensor) -> SleepingOutput:
        return self

    def s(self, microbatch: int, x: Tensor, *, keep: bool = True) -> None:
        with self.sleeper.lasting(Kind.S, self.rank):
            pass

    def message(self, payload: Payload, microbatch: int) -> Tensor:
        return self.setup.message(payload, self.problem, self.rank)

    def absorb(self, payload: Payload, microbatch: int, received: Tensor) -> None:
        self.received[microbatch] = received

    def t(self, microbatch: int) -> None:
        with self.sleeper.lasting(Kind.T, self.rank):
            pass

    def input_grad(self, microbatch: int) -> Tensor:
        return self.received[microbatch].to(self.setup.dtype)

    def finish(self) -> Tensor:
        self.received.clear()
        return torch.zeros(self.setup.microbatches, self.setup.tokens)


def sleeping_modules(problem: Problem, rank: int, setup: Setup, sleeper: Sleeper) -> RankModules:
    """Return the modules of a rank as `assembly.build_rank` does, but with sleeping layers."""
    stages = {
        stage: SleepingStage(stage, problem.backward, sleeper)
        for stage in problem.layout.stages_of(rank)
    }
    inputs = (
        SleepingInput(rank, problem, setup, sleeper)
        if rank in problem.shard_ranks(End.INPUT)
        else None
    )
    outputs = (
        SleepingOutput(rank, problem, setup, sleeper)
        if rank in problem.shard_ranks(End.OUTPUT)
        else None
    )
    return RankModules(stages, inputs, outputs, setup.dtype, torch.device("cpu"), setup.hidden)  # type: ignore[arg-type]


# Measurements


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one case.  `measured_seconds` is the median of `seconds_of_steps`.

    `passes_longer_pct` is how much longer than asked the passes of the median step took.  `cpu_pct`
    is the share of all cores that the ranks used.
    """

    schedule: str
    vocab: str
    simulated_seconds: float
    measured_seconds: float
    error_pct: float
    simulated_bubble_pct: float
    measured_bubble_pct: float
    passes_longer_pct: float
    cpu_pct: float
    seconds_of_steps: tuple[float, ...]
    hop_seconds: float
    barrier_seconds: dict[str, float]

    def cells(self) -> str:
        """Return the row of the printed table."""
        return (
            f"| `{self.schedule}` | `{self.vocab}` | {self.simulated_seconds:.3f} "
            f"| {self.measured_seconds:.3f} | {self.error_pct:+.1f} % "
            f"| {self.simulated_bubble_pct:.1f} % | {self.measured_bubble_pct:.1f} % |"
        )


HEADER = (
    "| schedule | vocab | simulated s | measured s | error | simulated bubble | measured bubble |\n"
    + "|---" * 7
    + "|"
)


def common_start() -> float:
    """Wait until a common start of all ranks, and return its time.

    time.perf_counter is the same clock in all processes of a machine.
    """
    dist.barrier()
    moment = torch.tensor([time.perf_counter() + 0.02], dtype=torch.float64)
    dist.broadcast(moment, 0)
    time.sleep(max(0.0, float(moment) - time.perf_counter()))
    return float(moment)


def over_ranks(value: float, how: Any) -> float:
    """All-reduce a number over the ranks with reduction `how`."""
    total = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(total, how)
    return float(total)


def latest(value: float) -> float:
    """Return the largest value of all ranks."""
    return over_ranks(value, dist.ReduceOp.MAX)


def sleep_overshoot() -> float:
    """Return how much longer than asked time.sleep takes on this rank: the median, in seconds."""
    late = []
    for _ in range(20):
        before = time.perf_counter()
        time.sleep(0.01)
        late.append(time.perf_counter() - before - 0.01)
    return statistics.median(late)


def time_hop(rank: int, comms: Comms, setup: Setup) -> float:
    """Return the median time of a hop: half a round trip of [T, H] between ranks 0 and 1.

    All ranks return the same seconds.
    """
    seconds = []
    for _ in range(ROUNDS):
        start = common_start()
        if rank < 2:
            tensor = torch.ones(setup.tokens, setup.hidden, dtype=setup.dtype)
            into = torch.empty_like(tensor)
            pending = comms.receive(into, 1 - rank, watch=unwatched)
            if rank == 1:
                pending.wait()
            comms.send(tensor, 1 - rank, watch=unwatched)
            if rank == 0:
                pending.wait()
        seconds.append(latest(time.perf_counter() - start) / 2)
        comms.drain()
    return statistics.median(seconds)


def time_barrier(
    rank: int, barrier: Barrier, problem: Problem, comms: Comms, setup: Setup
) -> float:
    """Return the median time from a common start until the last receiver has its message.

    All ranks return the same seconds.
    """
    node = Collective(barrier.name, 0)
    receives = rank in problem.receivers(node)
    member = rank in problem.shard_ranks(barrier.end)
    exchange = replace(exchange_of(node, rank, problem), continues=None)
    seconds = []
    for _ in range(ROUNDS):
        start = common_start()
        if member:
            message = setup.message(barrier.payload, problem, rank)
            counts = setup.counts(problem) if barrier.end is End.INPUT else ()
            delivery = comms.start(
                exchange, lambda message=message: message, lambda _: None, counts, None, unwatched
            )
            if delivery is not None:
                delivery()
        seconds.append(latest(time.perf_counter() - start if receives else 0.0))
        comms.drain()
    return statistics.median(seconds)


def unwatched(pending: Pending) -> Pending:
    return pending


def time_comms(
    rank: int, problem: Problem, comms: Comms, setup: Setup
) -> tuple[float, dict[str, float]]:
    """Return the seconds of a hop, and of every barrier by name."""
    barriers = {
        barrier.name: time_barrier(rank, barrier, problem, comms, setup)
        for barrier in problem.algorithm.barriers
        if len(problem.shard_ranks(barrier.end)) > 1
    }
    return time_hop(rank, comms, setup), barriers


def decide(rank: int, case: Case, problem: Problem, cost: CostModel) -> tuple[Program, Timeline]:
    """Return the program and the prediction.  Only rank 0 makes them, to save CPU time."""
    decided: list[Any] = [None]
    if rank == 0:
        schedule = generate(case.schedule, problem, cost)
        check_schedule(schedule, problem)
        program = lower(schedule, problem, cost)
        check_program(program, problem)
        decided = [(program, simulate(schedule, problem, cost))]
    dist.broadcast_object_list(decided, 0)
    program, timeline = decided[0]
    return program, timeline


class PassRecorder(Recorder):
    """A recorder of passes only.  Threads that time communication would need CPU time."""

    def watch(self, name: str, channel: str, pending: Pending) -> Pending:
        return pending


def rehearse_one(rank: int, num_ranks: int, case: Case, setup: Setup) -> Row:
    """Measure one case.  Every rank returns the same row."""
    problem = setup.problem(case, num_ranks)
    groups = build_mesh(Degrees(1, num_ranks, 1), problem).pipeline
    comms = Comms(ProcessGroups(groups, torch.device("cpu")))
    hop_seconds, barrier_seconds = time_comms(rank, problem, comms, setup)
    cost = setup.cost(problem, hop_seconds, barrier_seconds)
    program, timeline = decide(rank, case, problem, cost)
    modules = sleeping_modules(problem, rank, setup, Sleeper(cost, sleep_overshoot()))
    executor = Executor(program, rank, modules, comms)
    batch = torch.zeros(setup.microbatches, 1, setup.tokens, dtype=torch.int64)
    steps: list[tuple[float, float]] = []  # (seconds, mean seconds that a rank spends in passes)
    cpu, wall = 0.0, 0.0
    for step in range(1 + setup.steps):
        timer = HostTimer()
        recorder = PassRecorder(rank, timer, [])
        start = common_start()
        timer.start(start)
        before = time.process_time()
        executor.step(batch, batch, recorder)
        seconds = latest(time.perf_counter() - start)
        busy = (
            over_ranks(sum(span.seconds for span in recorder.spans), dist.ReduceOp.SUM) / num_ranks
        )
        if step > 0:  # the first one is warm-up
            steps.append((seconds, busy))
            cpu, wall = cpu + time.process_time() - before, wall + seconds
    measured, busy = sorted(steps)[len(steps) // 2]
    asked = sum(timeline.busy(r) for r in range(num_ranks)) / num_ranks
    return Row(
        case.schedule,
        case.vocab,
        timeline.makespan,
        measured,
        100 * (measured / timeline.makespan - 1),
        100 * timeline.mean_bubble,
        100 * (1 - busy / measured),
        100 * (busy / asked - 1),
        100 * over_ranks(cpu, dist.ReduceOp.SUM) / wall / (os.cpu_count() or 1),
        tuple(seconds for seconds, _ in steps),
        hop_seconds,
        barrier_seconds,
    )


def rehearse(
    rank: int,
    num_ranks: int,
    cases: list[Case],
    setup: Setup,
    report: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Measure all cases on the default process group.

    Rank 0 reports every row as soon as it is measured.
    """
    rows = []
    for case in cases:
        rows.append(rehearse_one(rank, num_ranks, case, setup))
        if rank == 0 and report is not None:
            report(rows[-1])
    return rows


# Processes


Report = Callable[[Any], None]


def _serve(
    rank: int, num_ranks: int, port: int, work: Callable[[int, Report], object], rows: Any
) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=120)
    store = dist.TCPStore("127.0.0.1", port, num_ranks, is_master=rank == 0, timeout=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    work(rank, rows.put)


def run(
    num_ranks: int, work: Callable[[int, Report], object], header: str, timeout: float
) -> list[Any]:
    """Run `work(rank, report)` on every rank, and print the reported rows as they come.

    Returns the rows.  A rank that fails ends the run with its traceback.  Raises SystemExit after
    `timeout` seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ["OMP_NUM_THREADS"] = "1"  # the ranks inherit it
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    context = multiprocessing.spawn(
        _serve, (num_ranks, port, work, queue), nprocs=num_ranks, join=False, daemon=True
    )
    deadline, rows, done = time.monotonic() + timeout, [], False
    print(header, flush=True)
    while not done:
        done = context.join(timeout=0.5)
        while not queue.empty():
            rows.append(queue.get())
            print(rows[-1].cells(), flush=True)
        if time.monotonic() > deadline:
            raise SystemExit(
                f"no end within {timeout:.0f} s, {len(rows)} cases done; give more with --timeout"
            )
    return rows


def rehearse_rank(
    num_ranks: int, cases: list[Case], setup: Setup, rank: int, report: Report
) -> None:
    """Measure all cases as `rank`."""
    rehearse(rank, num_ranks, cases, setup, report)


def main() -> None:
    from provenance import provenance

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--schedules",
        type=Case.parse,
        nargs="+",
        default=list(map(Case.parse, CASES)),
        metavar="NAME[/VOCAB]",
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=16)
    parser.add_argument(
        "--layer-ms",
        type=float,
        default=80.0,
        help="F of one layer; long, because communication also needs the cores",
    )
    parser.add_argument(
        "--head", type=float, default=2.4, help="cost of the output layer in transformer layers"
    )
    parser.add_argument("--embedding-ms", type=float, default=4.0, help="E and G of one rank")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--steps", type=int, default=3, help="measured steps per case, after one warm-up step"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for the whole run")
    parser.add_argument("--json", type=Path, help="write everything measured as JSON")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error(f"--ranks {arguments.ranks}: a pipeline needs at least 2 to communicate")
    setup = Setup(
        arguments.microbatches,
        arguments.layer_ms / 1e3,
        arguments.head,
        arguments.embedding_ms / 1e3,
        arguments.tokens,
        arguments.hidden,
        getattr(torch, arguments.dtype),
        arguments.steps,
    )
    load = os.getloadavg()[0]
    work = partial(rehearse_rank, arguments.ranks, arguments.schedules, setup)
    rows = run(arguments.ranks, work, HEADER, arguments.timeout)
    print(f"largest error {max((row.error_pct for row in rows), key=abs):+.1f} %")
    if arguments.json:
        described = asdict(setup) | {
            "dtype": arguments.dtype,
            "ranks": arguments.ranks,
            "load_average_before": load,
        }
        result = provenance() | {"setup": described, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
