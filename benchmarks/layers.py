"""Count and time one decoder layer: operations, elementwise bytes, kept bytes, CPU time.

    OMP_NUM_THREADS=1 python benchmarks/layers.py [--host] [--before DIR] [--turns 60] [--json FILE]

There are three systems.  `plain` and `fused` are this checkout with elementwise work as torch
operations and compiled.  `before`, with `--before DIR`, is a checkout of an earlier commit, with
torch operations.

Counts are of a layer in bf16 with the heads of a preset and an eighth of its widths.  An operation
is one that torch dispatches and that is not a view.  These count as one: a compiled region, which
reads its arguments once and writes its results once; torch's RMSNorm, for which it has kernels on
CUDA; a product with its addition to an fp32 gradient.  Elementwise are all operations but matrix
products and attention.  Their bytes are in units of T H values of two bytes, and so are those that
autograd keeps.

Times are CPU seconds of one thread for a smaller layer, forward and backward.  Every system has a
process, and they take turns, so that other work on the machine meets all of them.  A ratio is the
median over the turns.

With `--host` there are no counts, and layers so small that nearly all of their time is what the
host takes to issue them: a stage with four layers of a preset in fp32, with two heads of 8 values
and four tokens.  Times are of one layer; a turn is the median of 20 passes.  `replayed` calls the
operations of `plain` once more, also those that are views, without this project's code and without
autograd.  `before fused` is the earlier commit compiled; the ratio of `fused` is to it.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HERE = Path(__file__).resolve().parents[1]
COUNTED = ("llama3_8b", "gpt_4b")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALL = {  # what is timed: the proportions of llama3_8b
    "num_layers": 1,
    "hidden_size": 512,
    "num_heads": 8,
    "num_query_groups": 2,
    "ffn_hidden_size": 1792,
    "seq_length": 512,
}


TINY = {"num_layers": 4, "hidden_size": 16, "ffn_hidden_size": 16, "seq_length": 4}  # with --host
PASSES = 20  # of a turn with --host


class Record(TorchDispatchMode):
    """Keeps the operations that torch dispatches, with their arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        call = partial(func, *args, **(kwargs or {}))
        self._calls.append(call)
        return call()

    def __len__(self) -> int:
        return len(self._calls)

    @torch.no_grad()
    def replay(self, *_: object) -> None:
        """Call the operations again."""
        for call in self._calls:
            call()


class Count(TorchDispatchMode):
    """Counts operations that are no views, and the bytes that elementwise ones read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations, self.bytes, self.names = 0, 0, list[str]()
        self._inside = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._inside and not _is_view(func):
            name = func.__name__
            arguments = [*args, *(kwargs or {}).values()]
            self._add(name, arguments, result, elementwise=not _is_product(name))
        return result

    def _add(self, name: str, arguments: Any, result: Any, *, elementwise: bool) -> None:
        self.operations += 1
        self.names.append(name)
        if elementwise:
            self.bytes += _bytes_of(arguments) + _bytes_of(result)

    def region(
        self, function: Callable[..., Any], *, elementwise: bool = True
    ) -> Callable[..., Any]:
        """Return `function` as a region that counts as one operation."""

        def run(*arguments: Any) -> Any:
            self._inside = True
            try:
                result = function(*arguments)
            finally:
                self._inside = False
            self._add(function.__name__, arguments, result, elementwise=elementwise)
            return result

        return run


class _KernelNorm(torch.autograd.Function):
    """torch's RMSNorm with one operation forward and one backward, as on CUDA."""

    counter: Count

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        def rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            return torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)

        y, rate = _KernelNorm.counter.region(rms_norm)(x, weight)
        ctx.save_for_backward(x, weight, rate)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        def rms_norm_backward(*saved: Tensor) -> tuple[Tensor, Tensor]:
            return torch.empty_like(saved[1]), torch.empty_like(saved[2])

        dx, dweight = _KernelNorm.counter.region(rms_norm_backward)(*grads, *ctx.saved_tensors)
        return dx, dweight, None


_NO_WORK = ("empty", "empty_like", "new_empty", "detach", "_unsafe_view")


def _is_view(func: Any) -> bool:
    """Return whether an operation only returns views, or memory that nobody has written."""
    returned = [value.alias_info for value in func._schema.returns]
    views = bool(returned) and all(info is not None and not info.is_write for info in returned)
    return views or func.__name__.split(".")[0] in _NO_WORK


def _is_product(name: str) -> bool:
    return any(word in name for word in ("mm", "attention", "bmm"))


def _bytes_of(value: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return sum(
        tensor.element_size()
        * math.prod(n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        for tensor in tensors
    )


def fuse_of(system: str) -> Any:
    """Return how elementwise work runs, None in a checkout that does not know `fuse`."""
    try:
        from vp_train.model.elementwise import plain
        from vp_train.tensors.compiling import compiled_for_tokens
    except ImportError:
        return None
    return compiled_for_tokens if "fused" in system else plain


def build(model: Any, dtype: torch.dtype, fuse: Any) -> Any:
    """Return a stage of one layer with fp32 gradients, as in a run."""
    import torch.distributed as dist

    from vp_train.model.stage import Stage

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    options = {"fuse": fuse} if "fuse" in inspect.signature(Stage).parameters else {}
    stage = Stage(
        model,
        range(model.num_layers),
        final_norm=False,
        dtype=dtype,
        device=torch.device("cpu"),
        group=dist.group.WORLD,
        seed=1,
        **options,
    )
    for parameter in stage.parameters():
        if parameter.dtype is not torch.float32:
            parameter.grad_dtype = torch.float32
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    return stage


def preset(name: str) -> Any:
    from vp_train.settings import load_config

    return load_config([f"model={name}"]).model


def reduced(name: str) -> Any:
    """Return one layer of a preset with its numbers of heads and an eighth of its widths."""
    model = preset(name)
    return replace(
        model,
        num_layers=1,
        hidden_size=model.hidden_size // 8,
        ffn_hidden_size=model.ffn_hidden_size // 8,
        seq_length=256,
    )


def count(name: str, system: str) -> dict[str, Any]:
    """Return the counts of one layer of a preset."""
    from vp_train.model import linear, shape

    model, counter = reduced(name), Count()
    # On CUDA a product that is added to an fp32 gradient is one operation.
    linear._accumulate = counter.region(linear._accumulate, elementwise=False)
    fuse = counter.region if system == "fused" else fuse_of(system)
    if fuse is None:
        _KernelNorm.counter = counter
        torch.nn.functional.rms_norm = lambda x, shape, weight, epsilon: _KernelNorm.apply(
            x, weight, epsilon
        )
    stage = build(model, torch.bfloat16, fuse)
    x = torch.randn(model.seq_length, 1, model.hidden_size, dtype=torch.bfloat16)
    x.requires_grad_()
    unit = 2 * x.numel()
    with kept(stage) as storages, counter:
        y = stage(x)
    forward, dy = _read(counter, unit), torch.randn_like(y)
    with counter:
        y.backward(dy)
    parameters = inspect.signature(shape.layer_activation_bytes).parameters
    given = {"fused_norms": True} if "fused_norms" in parameters else {}
    return {
        "forward": forward,
        "backward": _read(counter, unit),
        "kept_units": sum(storages.values()) / unit,
        "kept_units_planned": shape.layer_activation_bytes(model, 1, 2, **given) / unit,
    }


@contextmanager
def kept(stage: nn.Module) -> Iterator[dict[int, int]]:
    """Within this context collect the storages that autograd saves, without the weights."""
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)  # so that no other storage gets its id
        if storage._cdata not in weights:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    weights = {parameter.untyped_storage()._cdata for parameter in stage.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def _read(counter: Count, unit: int) -> dict[str, Any]:
    """Return the counts since the last call, and begin again."""
    found = {
        "operations": counter.operations,
        "elementwise_units": round(counter.bytes / unit, 1),
        "names": " ".join(name.split(".")[0] for name in counter.names),
    }
    counter.operations, counter.bytes, counter.names = 0, 0, []
    return found


def tiny(name: str) -> Any:
    """Return a few layers of a preset with next to nothing to compute."""
    model = preset(name)
    groups = 2 if model.num_query_groups == model.num_heads else 1
    return replace(model, num_heads=2, num_query_groups=groups, **TINY)


def serve_times(model: Any, dtype: torch.dtype, system: str, passes: int) -> None:
    """Time a stage once for every line of the standard input; print the CPU seconds of a layer.

    They are the median of some passes.

    The first line printed has those of the first pass, which compiles.
    """
    torch.set_num_threads(1)
    stage = build(model, dtype, fuse_of(system))
    generator = torch.Generator().manual_seed(0)
    shape = (model.seq_length, 1, model.hidden_size)
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    forward, backward = partial(stage, x), partial(torch.autograd.backward, grad_tensors=dy)
    begin = _cpu_seconds()
    backward(forward())
    first = {"first": _cpu_seconds() - begin, "dx": float(x.grad.float().norm())}
    if system == "replayed":
        with Record() as of_forward:
            y = forward()
        with Record() as of_backward:
            backward(y)
        forward, backward = of_forward.replay, of_backward.replay
        first["calls"] = (len(of_forward) + len(of_backward)) / model.num_layers
    print(json.dumps(first), flush=True)
    for _ in sys.stdin:
        turns = [_timed(forward, backward) for _ in range(passes)]
        print(
            json.dumps(
                {
                    part: statistics.median(turn[part] for turn in turns) / model.num_layers
                    for part in turns[0]
                }
            ),
            flush=True,
        )


def _timed(forward: Callable[[], Any], backward: Callable[[Any], None]) -> dict[str, float]:
    begin = time.process_time()
    y = forward()
    middle = time.process_time()
    backward(y)
    return {"forward": middle - begin, "backward": time.process_time() - middle}


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of the compilers that it has started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def command(kind: str, first: str, system: str) -> list[str]:
    return [sys.executable, "-W", "ignore", __file__, "--worker", kind, first, system]


def environment(system: str, before: Path | None) -> dict[str, str]:
    checkout = before if "before" in system else HERE
    threads = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
    return os.environ | threads | {"PYTHONPATH": str(checkout)}


def counted(name: str, system: str, before: Path | None) -> dict[str, Any]:
    """Return the counts of a system, whose code is this checkout's or that of `before`."""
    done = subprocess.run(
        command("count", name, system),
        env=environment(system, before),
        stdout=subprocess.PIPE,
        check=True,
    )
    return dict(json.loads(done.stdout))


def compared(
    kind: str, first: str, systems: list[str], turns: int, before: Path | None
) -> dict[str, Any]:
    """Let the systems take turns in timing a layer; return medians and ratios to another one.

    That is the first one, or the one of the same name before.
    """
    workers = {
        system: subprocess.Popen(
            command(kind, first, system),
            env=environment(system, before),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for system in systems
    }

    def answer(system: str) -> dict[str, float]:
        stream = workers[system].stdout
        assert stream is not None
        return dict(json.loads(stream.readline()))

    result: dict[str, Any] = {system: {"first_pass": answer(system)} for system in systems}
    times: dict[str, list[dict[str, float]]] = {system: [] for system in systems}
    for _ in range(turns):
        for system in systems:
            stream = workers[system].stdin
            assert stream is not None
            print(file=stream, flush=True)
            times[system].append(answer(system))
    for worker in workers.values():
        worker.communicate()
    for system in systems:
        earlier = f"before {system}"
        for part in ("forward", "backward", "both"):
            mine, base = (
                [turn[part] if part in turn else sum(turn.values()) for turn in times[name]]
                for name in (system, earlier if earlier in times else systems[0])
            )
            result[system][f"{part}_seconds"] = statistics.median(mine)
            result[system][f"{part}_ratio"] = statistics.median(
                a / b for a, b in zip(mine, base, strict=True)
            )
    return result


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        kind, first, system = sys.argv[2:]
        if kind == "count":
            print(json.dumps(count(first, system)))
        elif kind == "host":
            serve_times(tiny(first), torch.float32, system, PASSES)
        else:
            from vp_train.config import ModelConfig

            serve_times(ModelConfig(**SMALL), DTYPES[first], system, 1)
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", action="store_true", help="time what the host takes")
    parser.add_argument("--before", type=Path, metavar="DIR", help="an earlier commit's checkout")
    parser.add_argument("--turns", type=int, default=60, help="of every system; 0: no times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    arguments = parser.parse_args()
    before = arguments.before and arguments.before.resolve()
    result = (
        {"host": hosts(arguments.turns, before)}
        if arguments.host
        else {"counts": counts(before), "times": timed(arguments.turns, before)}
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(provenance() | result, indent=1) + "\n")


def hosts(turns: int, before: Path | None) -> dict[str, Any]:
    """Print and return what the host takes for a layer."""
    systems = [*(["before", "before fused"] if before else []), "plain", "fused", "replayed"]
    found: dict[str, Any] = {}
    for name in COUNTED:
        found[name] = compared("host", name, systems, turns, before)
        print(name)
        for system, figures in found[name].items():
            calls = figures["first_pass"].get("calls")
            print(
                f"  {system:12} {1e6 * figures['forward_seconds']:4.0f} + "
                f"{1e6 * figures['backward_seconds']:4.0f} us, ratio {figures['both_ratio']:.3f} "
                f"(forward {figures['forward_ratio']:.3f}, backward "
                f"{figures['backward_ratio']:.3f})"
                + (f", {calls:.0f} operations" if calls else ""),
                flush=True,
            )
    return found


def counts(before: Path | None) -> dict[str, Any]:
    """Print and return the counts of layers."""
    systems = [*(["before"] if before else []), "plain", "fused"]
    found: dict[str, Any] = {}
    for name in COUNTED:
        found[name] = {system: counted(name, system, before) for system in systems}
        print(name)
        for system, figures in found[name].items():
            forward, backward = figures["forward"], figures["backward"]
            print(
                f"  {system:6} {forward['operations']:3} + {backward['operations']:3} operations, "
                f"{forward['elementwise_units']:5} + {backward['elementwise_units']:5} units, "
                f"keeps {figures['kept_units']:.2f} units, "
                f"{figures['kept_units_planned']:.2f} planned",
                flush=True,
            )
    return found


def timed(turns: int, before: Path | None) -> dict[str, Any]:
    """Print and return the times of a small layer."""
    systems = [*(["before"] if before else []), "plain", "fused"]
    found: dict[str, Any] = {}
    for dtype in DTYPES if turns else ():
        found[dtype] = compared("time", dtype, systems, turns, before)
        print(dtype)
        for system, figures in found[dtype].items():
            print(
                f"  {system:6} {1e3 * figures['both_seconds']:6.1f} ms CPU, "
                f"{figures['both_ratio']:.3f} of the first (forward "
                f"{figures['forward_ratio']:.3f}, backward {figures['backward_ratio']:.3f}); "
                f"first pass {figures['first_pass']['first']:.1f} s CPU",
                flush=True,
            )
    return found


if __name__ == "__main__":
    main()
