"""Measure time, memory and accuracy of the vocabulary passes of one shard: S, T, E, G, and peers.

    OMP_NUM_THREADS=1 python benchmarks/vocab_passes.py [--device cuda] [--peers] [--json FILE]
        [--plot FILE] [--tokens T ...] [--hidden H ...] [--vocab V ...] [--ranks P ...]
        [--dtypes ...] [--backends ...] [--algorithms ...]
        [--label-smoothing A] [--z-loss L] [--softcap C]

The floor of S and T is three matrix products of their sizes, of which dW is added to fp32.
`products` are the three into existing memory, without that sum.  Everything of a case is timed in
turns in one process.  `ratio` is the median over rounds of time / floor, `ratio_to_products` that
of time / products.
`s_milliseconds` and `t_milliseconds` are the passes without the rest.  A shard has V / P rows,
rounded up.  `extra_mib` is the peak memory in addition to weight, gradient and inputs.  Errors are
the largest difference from float64, relative to the largest value.  Peers compute a layer of V / P
rows by autograd.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peers_vocab import PEERS, installed
from provenance import provenance
from torch import Tensor

from schedules.ir import Kind
from schedules.vocab import VOCAB_ALGORITHMS, End, Transfer
from vp_train.tensors.precision import DTYPES, accumulate, statistics_dtype
from vp_train.vocab.backends import BACKENDS
from vp_train.vocab.input import InputLayer
from vp_train.vocab.loss import LossOptions
from vp_train.vocab.output import OutputLayer
from vp_train.vocab.reference import cross_entropy
from vp_train.vocab.shard import Shard

ROUNDS, SLOW_SECONDS = 7, 5.0
LEAST_SECONDS = 5.0  # of measurement: quick work gets more rounds
ACCURATE_ELEMENTS = 1 << 25  # largest T x R for which errors are measured, in float64


@dataclass(frozen=True, slots=True)
class Case:
    """One shard: T tokens, H hidden, R = V / P rows."""

    device: str
    dtype: torch.dtype
    tokens: int
    hidden: int
    rows: int

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return x [T, H], weight [R, H], targets [T] and dL/dloss [T]."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.tokens, self.hidden, generator=generator)
        weight = torch.randn(self.rows, self.hidden, generator=generator) * self.hidden**-0.5
        targets = torch.randint(0, self.rows, (self.tokens,), generator=generator)
        scale = torch.full((self.tokens,), 1 / self.tokens)
        return (
            x.to(self.device, self.dtype),
            weight.to(self.device, self.dtype),
            targets.to(self.device),
            scale.to(self.device),
        )


class DeviceCase(Case):
    """A case whose inputs are made on the device, where the host would take too long."""

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        on_device: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        weight = torch.randn(self.rows, self.hidden, **on_device) * self.hidden**-0.5
        targets = torch.randint(0, self.rows, (self.tokens,), device=self.device)
        scale = torch.full((self.tokens,), 1 / self.tokens, **on_device)
        return torch.randn(self.tokens, self.hidden, **on_device), weight, targets, scale


class Ours:
    """S and T as the trainer calls them, with a single shard.

    Every barrier delivers the rank's own message.
    """

    def __init__(self, case: Case, backend: str, algorithm: str, options: LossOptions) -> None:
        name, _, fraction = backend.partition(":")
        barriers = VOCAB_ALGORITHMS[algorithm].barriers
        self.barriers = [
            barrier for barrier in barriers if barrier.end is End.OUTPUT and barrier.name != "C0"
        ]
        self.x, self.weight, targets, scale = case.inputs()
        self.scale = scale[None].cpu()  # on the CPU as in a run
        self.grad = torch.zeros_like(self.weight, dtype=statistics_dtype(case.dtype))
        self.layer = OutputLayer(
            self.weight,
            self.grad,
            Shard(0, case.rows),
            vocab_size=case.rows,
            input_gradient=VOCAB_ALGORITHMS[algorithm].input_gradient,
            backend=name,
            options=options,
            recompute_fraction=float(fraction or 1),
        )
        # A run places the targets of a step during the step before.
        self.targets = self.layer.place(targets[None].cpu())
        self.device, self.held_bytes = case.device, 0
        # Seconds of every S and T on their own.  None: they are not measured.
        self.apart: dict[str, list[float]] | None = None

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Return the token losses [T] and dx [T, H]."""
        step = self.layer.begin(self.targets, self.scale)
        self._pass("s", lambda: step.s(0, self.x))
        self.held_bytes = step.held_bytes
        t_done = False
        for barrier in self.barriers:
            if barrier.after is Kind.T:
                self._pass("t", lambda: step.t(0))
                t_done = True
            message = step.message(barrier.payload, 0)
            gathers = barrier.transfer is Transfer.ALL_GATHER
            step.absorb(barrier.payload, 0, message[None] if gathers else message)
        if not t_done:
            self._pass("t", lambda: step.t(0))
        dx = step.input_grad(0)
        return step.finish()[0], dx

    def _pass(self, name: str, work: Callable[[], None]) -> None:
        if self.apart is None:
            work()
        else:
            self.apart.setdefault(name, []).append(timed(work, self.device))


class Floor:
    """The three matrix products of S and T: Z = x W^T, P W and P^T x."""

    def __init__(self, case: Case) -> None:
        self.x, self.weight, _, _ = case.inputs()
        self.logits = torch.empty(case.tokens, case.rows, dtype=case.dtype, device=case.device)
        self.dx, self.dw = torch.empty_like(self.x), torch.empty_like(self.weight)

    def __call__(self) -> None:
        torch.mm(self.x, self.weight.T, out=self.logits)
        torch.mm(self.logits, self.weight, out=self.dx)
        torch.mm(self.logits.T, self.x, out=self.dw)


class AccumulatingFloor(Floor):
    """The three products, of which dW is added to fp32."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self.rounded = self.dw
        self.dw = torch.zeros_like(self.weight, dtype=statistics_dtype(case.dtype))

    def __call__(self) -> None:
        torch.mm(self.x, self.weight.T, out=self.logits)
        torch.mm(self.logits, self.weight, out=self.dx)
        if self.x.dtype is statistics_dtype(self.x.dtype):
            self.dw.addmm_(self.logits.T, self.x)
        elif self.dw.is_cuda:
            torch.addmm(self.dw, self.logits.T, self.x, out_dtype=torch.float32, out=self.dw)
        else:  # no product of a CPU adds to another dtype
            torch.mm(self.logits.T, self.x, out=self.rounded)
            accumulate(self.dw, self.rounded)


class Lookups:
    """E and G of one of P shards."""

    def __init__(self, case: Case, ranks: int) -> None:
        _, self.weight, _, _ = case.inputs()
        self.grad = torch.zeros_like(self.weight, dtype=statistics_dtype(case.dtype))
        shards = [Shard(rank * case.rows, (rank + 1) * case.rows) for rank in range(ranks)]
        self.layer = InputLayer(self.weight, self.grad, shards, 0)
        tokens = torch.randint(
            0, case.rows * ranks, (1, case.tokens), generator=torch.Generator().manual_seed(0)
        )
        self.step = self.layer.begin(tokens)
        self.dy = self.step.e(0)

    def e(self) -> None:
        self.step.e(0)

    def g(self) -> None:
        self.step.g(0, self.dy)


# Measurements


def timed(work: Callable[[], object], device: str) -> float:
    """Return the seconds of one call."""
    synchronise(device)
    start = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - start


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(works: dict[str, Callable[[], object]], device: str) -> dict[str, list[float]]:
    """Return the seconds of every piece of work per round, after two warm-up calls.

    Slow work takes part in the first round only.
    """
    slow = {
        name
        for name, work in works.items()
        if timed(work, device) > SLOW_SECONDS and timed(work, device) > SLOW_SECONDS
    }
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for name in works.keys() - slow:
        works[name]()
    index, start = 0, time.perf_counter()
    while index < ROUNDS or time.perf_counter() - start < LEAST_SECONDS:
        for name, work in works.items():
            if index == 0 or name not in slow:
                seconds[name].append(timed(work, device))
        index += 1
    return seconds


@contextmanager
def peak_memory(device: str) -> Iterator[list[float]]:
    """Yield a list, and append to it by how many MiB the peak memory grew inside."""
    grown: list[float] = []
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # free memory cached by the C library would hide growth
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield grown
        grown.append((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_kib("VmRSS")
    yield grown
    grown.append((resident_kib("VmHWM") - before) / 2**10)


def resident_kib(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])


def errors(
    case: Case, losses: Tensor, dx: Tensor, grad: Tensor, truth: tuple[Tensor, Tensor, Tensor]
) -> dict[str, float]:
    """Return the largest errors of loss, dx and dw, relative to the largest value.

    If a peer returns only the mean loss, its error is that of the mean.
    """
    loss = truth[0] if losses.shape == truth[0].shape else truth[0].mean(0, keepdim=True)
    pairs = zip(("loss", "dx", "dw"), (losses, dx, grad), (loss, *truth[1:]), strict=True)
    return {
        f"{name}_error": ((ours.double() - true).abs().max() / true.abs().max()).item()
        for name, ours, true in pairs
    }


def measure(
    case: Case,
    ranks: int,
    backends: list[str],
    algorithms: list[str],
    options: LossOptions,
    *,
    peers: bool,
) -> Iterator[dict[str, Any]]:
    """Yield a row for every backend with every algorithm, for E and G, and for the peers."""
    ours = {
        f"{backend}/{algorithm}": (backend, algorithm, options)
        for backend in backends
        for algorithm in algorithms
    }
    works: dict[str, Any] = {"floor": AccumulatingFloor(case), "products": Floor(case)} | {
        name: Ours(case, *pair) for name, pair in ours.items()
    }
    lookups = Lookups(case, ranks)
    works |= {"E": lookups.e, "G": lookups.g}
    missing = {}
    for name, make in PEERS.items() if peers else ():
        try:
            works[name] = make(*case.inputs())
            works[name]()  # some peers fail only when they are called
        except Exception as error:  # a peer that does not work here is a result too
            works.pop(name, None)
            missing[name] = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
    seconds = in_turns(works, case.device)
    truth = None
    if case.tokens * case.rows <= ACCURATE_ELEMENTS:
        x, weight, targets, scale = case.inputs()
        truth = cross_entropy(x.double(), weight.double(), targets, scale.double(), options)
    shape = {
        "device": case.device,
        "dtype": str(case.dtype).removeprefix("torch."),
        "tokens": case.tokens,
        "hidden": case.hidden,
        "vocab": case.rows * ranks,
        "ranks": ranks,
        "rows": case.rows,
        "options": asdict(options),
    }
    flops = 6 * case.tokens * case.hidden * case.rows
    for name, times in seconds.items():
        row = shape | {"what": name, "milliseconds": 1e3 * statistics.median(times)}
        if name not in ("E", "G"):
            for ratio, of in (("ratio", "floor"), ("ratio_to_products", "products")):
                row[ratio] = statistics.median(
                    own / other for own, other in zip(times, seconds[of], strict=False)
                )
            row["tflops"] = flops / statistics.median(times) / 1e12
        if isinstance(works[name], Ours):
            pass_seconds = works[name].apart = {}
            for _ in range(3):
                works[name]()
            row |= {
                f"{kind}_milliseconds": 1e3 * statistics.median(values)
                for kind, values in pass_seconds.items()
            }
        if name not in ("E", "G", "floor", "products"):
            del works[name]
            work = Ours(case, *ours[name]) if name in ours else PEERS[name](*case.inputs())
            with peak_memory(case.device) as grown:
                losses, dx = work()
            row["extra_mib"] = grown[0]
            if truth is not None:
                row |= errors(case, losses, dx, work.grad, truth)
            if isinstance(work, Ours):
                row["held_bytes"] = work.held_bytes
        yield row
    for name, why in missing.items():
        yield shape | {"what": name, "missing": why}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the ratio to the floor and the extra memory of every row."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if "ratio" in r and r["what"] not in ("floor", "products")]
    names = list(dict.fromkeys(row["what"] for row in rows))
    cases = list(
        dict.fromkeys((row["dtype"], row["tokens"], row["hidden"], row["rows"]) for row in rows)
    )
    figure = Figure(figsize=(6 + 1.6 * len(cases), 7), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(2, 1),
        ("ratio", "extra_mib"),
        ("time / floor", "extra memory, MiB"),
        strict=True,
    ):
        for offset, name in enumerate(names):
            values = {
                (r["dtype"], r["tokens"], r["hidden"], r["rows"]): r[key]
                for r in rows
                if r["what"] == name
            }
            places = [
                index + 0.8 * offset / len(names)
                for index, case in enumerate(cases)
                if case in values
            ]
            axes.bar(
                places,
                [values[case] for case in cases if case in values],
                0.8 / len(names),
                align="edge",
                label=name,
            )
        axes.set_xticks(
            [index + 0.4 for index in range(len(cases))],
            [f"{d}\nT={t} H={h}\nR={r:,}" for d, t, h, r in cases],
        )
        axes.set_ylabel(label)
        axes.set_yscale("log")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def backend(text: str) -> str:
    """Check the name of a backend.  `recompute` may have a fraction after a colon."""
    name, colon, fraction = text.partition(":")
    try:
        known = name in BACKENDS and (
            not colon or (name == "recompute" and 0 <= float(fraction) <= 1)
        )
    except ValueError:
        known = False
    if not known:
        raise argparse.ArgumentTypeError(
            f"{text!r}; choose from {', '.join(BACKENDS)} and recompute:FRACTION, 0 to 1"
        )
    return text


def new_file(text: str) -> Path:
    """Check before measuring for an hour that the directory of an output file exists."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}; {path.parent} is not a directory")
    return path


def count(text: str) -> int:
    """Parse a whole number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}; give at least 1")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--tokens", type=count, nargs="+", default=[512], help="T, tokens of a microbatch (512)"
    )
    parser.add_argument("--hidden", type=count, nargs="+", default=[512], help="H (512)")
    parser.add_argument(
        "--vocab", type=count, nargs="+", default=[262_144], help="V, rows of all shards (262144)"
    )
    parser.add_argument(
        "--ranks", type=count, nargs="+", default=[4], help="P, shards that V is split into (4)"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float32"])
    parser.add_argument(
        "--backends", type=backend, nargs="+", default=["chunked", "recompute", "recompute:0.5"]
    )
    parser.add_argument(
        "--algorithms",
        nargs="+",
        choices=("naive", "two_barrier", "one_barrier"),
        default=["one_barrier", "two_barrier"],
    )
    parser.add_argument("--label-smoothing", type=float, default=0.0)
    parser.add_argument("--z-loss", type=float, default=0.0)
    parser.add_argument("--softcap", type=float)
    parser.add_argument(
        "--peers", action="store_true", help="also measure other implementations, if installed"
    )
    parser.add_argument("--json", type=new_file, help="write the rows as JSON")
    parser.add_argument("--plot", type=new_file, help="draw the rows")
    arguments = parser.parse_args()
    try:
        options = LossOptions(arguments.label_smoothing, arguments.z_loss, arguments.softcap)
    except ValueError as error:
        parser.error(str(error))
    if arguments.peers and options != LossOptions():
        parser.error(
            "--peers compares the plain loss; leave out --label-smoothing, --z-loss and --softcap"
        )
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; use --device cpu")
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    rows = []
    for sizes in itertools.product(
        arguments.dtypes, arguments.tokens, arguments.hidden, arguments.vocab, arguments.ranks
    ):
        dtype, tokens, hidden, vocab, ranks = sizes
        case = Case(arguments.device, DTYPES[dtype], tokens, hidden, -(-vocab // ranks))
        for row in measure(
            case, ranks, arguments.backends, arguments.algorithms, options, peers=arguments.peers
        ):
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.json:
        peers = {"peers": installed()} if arguments.peers else {}
        arguments.json.write_text(
            json.dumps(provenance() | peers | {"rows": rows}, indent=1) + "\n"
        )
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
