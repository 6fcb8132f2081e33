"""The measurement of single ranks of a job on one device.

Passes are real.  Messages are noise, sent through torch's fake process group.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from schedules.ir import Kind
from vp_train.assembly import RankModel, build_rank, rank_device
from vp_train.communication.nccl import require_float8, require_gpu, set_environment
from vp_train.config import ConfigError, RunConfig, RunSettings
from vp_train.mesh import build_mesh
from vp_train.model import megatron
from vp_train.pipeline.recorder import Recorder
from vp_train.pipeline.timers import timer_of
from vp_train.planning.plan import make_plan
from vp_train.profile.costs import RankProfile, pass_seconds
from vp_train.profile.live import LiveStorages, leave_compiled_code_alone
from vp_train.tensors import compiling


def measure_ranks(
    config: RunConfig, num_ranks: int, pipeline_ranks: list[int], num_steps: int
) -> Iterator[RankProfile]:
    """Yield the profiles of `pipeline_ranks`, one rank after the other, each in its own process.

    Every rank runs `num_steps` steps after a first one that does not count.  It is the rank of the
    first replica and the first of its tensor-parallel ranks.  Raises ConfigError if a rank does not
    fit on the device.
    """
    # A fork saves the seconds of the imports, but CUDA does not work after a fork.
    context: Any = multiprocessing.get_context(
        "spawn" if config.run.device == "cuda" else "forkserver"
    )
    context.set_forkserver_preload([__name__])
    for pipeline_rank in pipeline_ranks:
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, config, num_ranks, pipeline_rank, num_steps), daemon=True
        )
        process.start()
        theirs.close()
        try:
            status, value = ours.recv()
        except EOFError:
            status, value = "died", "its process was killed"
        process.join()
        if status == "full":
            raise ConfigError(
                f"rank {pipeline_rank} does not fit on this device: {value}; "
                "vp-plan tells what would help"
            )
        if status == "died":
            raise ConfigError(
                f"rank {pipeline_rank} does not fit on this machine: {value}, as the system does "
                "where memory ends; choose a smaller model, or fewer microbatches"
            )
        if status == "failed":
            raise RuntimeError(f"rank {pipeline_rank}: {value}")
        yield value


def _serve(
    pipe: Connection, config: RunConfig, num_ranks: int, pipeline_rank: int, num_steps: int
) -> None:
    """Measure one rank and send the result, or the failure, through `pipe`."""
    # Worker processes of the compiler would leave semaphores behind.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    try:
        pipe.send(("done", _measure(config, num_ranks, pipeline_rank, num_steps)))
    except torch.OutOfMemoryError as error:
        pipe.send(("full", str(error).partition("\n")[0]))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
    os._exit(0)


def _measure(config: RunConfig, num_ranks: int, pipeline_rank: int, num_steps: int) -> RankProfile:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    on_cuda = config.run.device == "cuda"
    if config.run.compile == "off":
        compiling.turn_off(os.environ)
    if on_cuda:
        set_environment(os.environ, config.run, Path())  # like the run that is predicted
        torch.cuda.set_device(0)
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        leave_compiled_code_alone()
    require_float8(config.run)
    plan = make_plan(config, num_ranks)
    rank = plan.degrees.rank(0, pipeline_rank, 0)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=num_ranks)
    model = build_rank(config, plan, build_mesh(plan.degrees, plan.problem))
    receive_noise(torch.Generator(rank_device(config)).manual_seed(1))
    shape = (config.num_microbatches, config.micro_batch_size, config.model.seq_length)
    generator = torch.Generator().manual_seed(1)
    batch = torch.randint(0, config.model.vocab_size, (2, *shape), generator=generator)
    steps = _Steps(model, batch, config.run, pipeline_rank)
    steps.run()  # compiles, and allocates what stays
    timed: dict[tuple[Kind, int], list[tuple[float, float]]] = {}
    programs, optimizers = [], []
    for _ in range(num_steps):
        program, optimizer = steps.run()
        programs.append(program)
        optimizers.append(optimizer)
        for key, spent in steps.timed().items():
            timed.setdefault(key, []).extend(spent)
    state, peak = steps.bytes_on_cuda() if on_cuda else steps.bytes_on_cpu()
    deviations = steps.deviations()
    passes, on_processor = pass_seconds(timed)
    return RankProfile(
        pipeline_rank,
        passes,
        program_seconds=median(programs),
        optimizer_seconds=median(optimizers),
        state_bytes=state,
        peak_bytes=peak,
        deviations=deviations,
        on_processor=on_processor,
    )


def receive_noise(generator: torch.Generator) -> None:
    """Let hops, broadcasts and all-to-alls of this process deliver noise from `generator`.

    The noise is normal with unit variance.  An all-gather delivers copies of what this rank sends,
    and a reduce-scatter a part of it.  In memory that they share with it nothing changes.
    Without this, torch's fake group would leave the old content of the memory, in which NaN,
    infinity and denormals are slow, or refuse to receive.  `generator` is on the device of the
    messages.

    On a GPU a stream that waits for one of these, or for a sum, waits for what the issuing stream
    did before, as with NCCL.  The fake group waits for nothing: passes would read what a side
    stream has not formed yet.
    """
    receive, broadcast = dist.irecv, dist.broadcast
    gather_name, scatter_name = (
        ("all_gather_single", "reduce_scatter_single")
        if hasattr(dist, "all_gather_single")
        else ("all_gather_into_tensor", "reduce_scatter_tensor")
    )

    def irecv(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        tensor.normal_(generator=generator)
        return receive(tensor, *arguments, **options)

    def broadcast_noise(tensor: torch.Tensor, src: int, *arguments: Any, **options: Any) -> Any:
        if dist.get_rank() != src:
            tensor.normal_(generator=generator)
        return broadcast(tensor, src, *arguments, **options)

    def exchange(output: torch.Tensor, *_: object, group: dist.ProcessGroup, async_op: bool) -> Any:
        output.normal_(generator=generator)
        return dist.barrier(group=group, async_op=async_op)

    def local(fill: Callable[[torch.Tensor, torch.Tensor], object]) -> Callable[..., Any]:
        def run(
            output: torch.Tensor,
            tensor: torch.Tensor,
            *,
            group: dist.ProcessGroup,
            async_op: bool = False,
        ) -> Any:
            if output.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                fill(output, tensor)
            return dist.barrier(group=group, async_op=async_op)

        return run

    gather_own = local(lambda output, own: output.view(-1, *own.shape).copy_(own))
    scatter_own = local(lambda output, own: output.copy_(own.view(-1, *output.shape)[0]))
    delivering: dict[str, Callable[..., Any]] = {
        "irecv": irecv,
        "broadcast": broadcast_noise,
        "all_to_all_single": exchange,
        gather_name: gather_own,
        scatter_name: scatter_own,
        "all_reduce": dist.all_reduce,
        "reduce": dist.reduce,
    }
    for name, function in delivering.items():
        setattr(dist, name, _in_order(function) if generator.device.type == "cuda" else function)
    megatron.set_collectives(gather_own, scatter_own)


def _in_order(communicate: Callable[..., Any]) -> Callable[..., Any]:
    """Return `communicate`, but its work lets a stream wait for what the issuing stream did."""

    def issue(*arguments: Any, **options: Any) -> Any:
        return None if communicate(*arguments, **options) is None else _Ordered()

    return issue


class _Ordered:
    """The work of a communication that ends with what its stream did before."""

    def __init__(self) -> None:
        self._end = torch.cuda.current_stream().record_event()

    def wait(self) -> bool:
        torch.cuda.current_stream().wait_event(self._end)
        return True

    def is_completed(self) -> bool:
        return bool(self._end.query())


def _when_computed() -> float:
    """Wait until the passes of this rank are computed, and return the time in seconds."""
    torch.cuda.current_stream().synchronize()
    return time.perf_counter()


class _Steps:
    """Training steps of one rank."""

    def __init__(
        self, model: RankModel, batch: torch.Tensor, run: RunSettings, pipeline_rank: int
    ) -> None:
        self._model, self._rank = model, pipeline_rank
        self._on_cuda, self._cuda_graphs = run.device == "cuda", run.cuda_graphs
        self._tokens, self._labels = batch
        self._clock = _when_computed if self._on_cuda else time.perf_counter

    def run(self) -> tuple[float, float]:
        """Run one step and return the seconds of its passes and of its optimizer."""
        self._model.gradients.zero()
        start = self._clock()
        self._model.train_step(self._tokens, self._labels)
        between = self._clock()
        self._update()
        return between - start, self._clock() - between

    def timed(self) -> dict[tuple[Kind, int], list[tuple[float, float]]]:
        """Run one step and return the seconds of its passes by kind and stage.

        Beside them are those on a processor, on a GPU all.
        """
        timer = timer_of(torch.device("cuda" if self._on_cuda else "cpu"))
        recorder = Recorder(self._rank, timer, [])
        timer.start()
        self._model.gradients.zero()
        self._model.train_step(self._tokens, self._labels, recorder)
        self._update()
        found: dict[tuple[Kind, int], list[tuple[float, float]]] = {}
        for span, processor in zip(recorder.spans, recorder.processor_seconds, strict=True):
            seconds = span.end - span.start
            spent = (seconds, seconds if self._on_cuda else processor)
            found.setdefault((Kind(span.kind), span.stage), []).append(spent)
        return found

    def deviations(self) -> dict[str, float]:
        """Run a step; return the deviations of its last microbatch (`RankProfile.deviations`)."""
        found: dict[str, torch.Tensor] = {}

        def note(name: str, tensor: torch.Tensor) -> None:
            found[name] = tensor.detach().std()  # summed in fp32 without a copy

        def watch(number: int, x: torch.Tensor, y: torch.Tensor) -> None:
            note(f"x{number}", x)
            note(f"y{number}", y)
            if y.requires_grad:
                y.register_hook(lambda dy: note(f"dy{number}", dy))  # type: ignore[no-untyped-call]

        hooks = [
            stage.register_forward_hook(lambda _, given, y, n=number: watch(n, given[0], y))
            for number, stage in self._model.stages.items()
        ]
        try:
            self.run()
        finally:
            for hook in hooks:
                hook.remove()
        return {name: deviation.item() for name, deviation in found.items()}

    def bytes_on_cuda(self) -> tuple[int, int]:
        """Return the bytes allocated between steps and at the peak of a step, on a GPU.

        The peak is of what is reserved if there are CUDA graphs, as in `RankFigures`.
        """
        state = torch.cuda.memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.run()
        if self._cuda_graphs:
            return state, torch.cuda.max_memory_reserved()
        return state, torch.cuda.max_memory_allocated()

    def bytes_on_cpu(self) -> tuple[int, int]:
        """Return the bytes allocated between steps and at the peak of a step, on a CPU."""
        live = LiveStorages()
        live.add_existing()
        state = live.peak
        with live:
            self.run()
        return state, live.peak

    def _update(self) -> None:
        """Run the optimizer with a learning rate of 0: gradients of noise must change nothing."""
        self._model.optimizer.reduce()
        self._model.optimizer.squared_norm()
        self._model.optimizer.step(0.0, 0.0)


def device_words(config: RunConfig) -> dict[str, Any]:
    """Return the device, the version of torch and the dtype.  Raises ConfigError without a GPU."""
    require_gpu(config.run)
    name = (
        torch.cuda.get_device_name(0)
        if config.run.device == "cuda"
        else f"CPU, {os.environ.get('OMP_NUM_THREADS', '1')} thread"
    )
    return {"device": name, "torch": torch.__version__, "dtype": config.run.dtype}
