"""The setup of NCCL and CUDA: environment, options of a communicator, and a watch for errors.

Everything here does nothing if torch has no NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist

from vp_train.communication.flight_recorder import DUMP_SECONDS, prefix
from vp_train.communication.locality import stay_near_gpu
from vp_train.config import ConfigError, RunSettings

_POLL_SECONDS = 0.2
_MOST_COMPILE_THREADS = 32  # torch's own bound
_FLOAT8_CAPABILITY = (8, 9)  # the first with products of float8


def require_gpu(
    settings: RunSettings, typed: str = "run.device=cuda", instead: str = "use run.device=cpu"
) -> None:
    """Raise ConfigError if run.device=cuda finds no GPU here.  It does not start CUDA.

    typed, instead: how it was asked for, and the way out.
    """
    if settings.device == "cuda" and not torch.cuda.device_count():
        raise ConfigError(f"{typed}, but torch finds no GPU here; {instead}")


def take_gpu(environment: MutableMapping[str, str], settings: RunSettings) -> str:
    """Give the rank that `environment` describes its GPU, and return the backend of its tensors.

    Call it before anything touches the GPU; it sets what CUDA and NCCL read at start.  On a CPU it
    changes nothing.  Raises ConfigError if there is no GPU here, if float8 is wanted and missing,
    or if NCCL would need more GPUs than the node has.  A rank that sees one GPU does not know that:
    it may be another one in every rank, as where Slurm binds each to its own.  The preflight
    decides.
    """
    if settings.device == "cpu":
        require_float8(settings)
        return "gloo"
    set_environment(environment, settings, settings.directory)
    require_gpu(settings)
    num_local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    num_devices = torch.cuda.device_count()
    if settings.comm_backend == "nccl" and num_local > num_devices > 1:
        raise ConfigError(
            f"{num_local} ranks but {num_devices} GPU(s) on this node, and NCCL needs one GPU per "
            "rank; start fewer ranks here, or let them share GPUs with run.comm_backend=gloo"
        )
    device = int(environment.get("LOCAL_RANK", "0")) % num_devices
    stay_near_gpu(device)  # before there is pinned memory, and threads that would stay elsewhere
    torch.cuda.set_device(device)
    require_float8(settings)
    return settings.comm_backend


def require_float8(settings: RunSettings) -> None:
    """Raise ConfigError if run.linear_dtype=float8 finds a GPU or a torch without it.

    On a GPU it starts CUDA.
    """
    if settings.linear_dtype != "float8":
        return
    if settings.device == "cpu":
        if settings.float8_scales == "row" and not _multiplies_by_row():
            raise ConfigError(
                f"run.float8_scales=row, but torch {torch.__version__} has no float8 product with "
                "scales of rows on a CPU; set run.float8_scales=tensor, or install a later torch"
            )
        return
    capability = torch.cuda.get_device_capability()
    if capability < _FLOAT8_CAPABILITY:
        major, minor = capability
        raise ConfigError(
            f"run.linear_dtype=float8 needs a GPU of compute capability 8.9 or later, such as an "
            f"H100, and {torch.cuda.get_device_name()} has {major}.{minor}; drop run.linear_dtype, "
            "or open the run with --dtype bfloat16"
        )


def _multiplies_by_row() -> bool:
    """Return whether torch multiplies float8 matrices with a scale for every row on a CPU."""
    matrix, scale = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(matrix, matrix.T, scale_a=scale, scale_b=scale.T, out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def set_environment(
    environment: MutableMapping[str, str], settings: RunSettings, directory: Path
) -> None:
    """Set the variables that CUDA, NCCL and torch read at start, except those the user has set.

    Call it before anything touches the GPU.
    """
    # Each communicator and the passes have a stream.  On CUDA's default of 8 queues some streams
    # would block others.
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    if "PYTORCH_CUDA_ALLOC_CONF" not in environment:  # the older name takes precedence
        # The number of tokens that a rank owns varies between microbatches, so sizes vary too.
        environment.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # NCCL would connect rings and trees in the first collective that takes them, within a step.
    environment.setdefault("NCCL_RUNTIME_CONNECT", "0")
    if settings.hop_channels:
        environment.setdefault("NCCL_MAX_P2P_NCHANNELS", str(settings.hop_channels))
    # By default every rank would start a process for each CPU of the node to compile for its GPU.
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(_compile_threads(environment)))
    environment.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    environment.setdefault("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", f"{DUMP_SECONDS * 1000:.0f}")
    # If both are set, torch uses the new names and warns about the old ones.
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in environment:
        environment.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    if "TORCH_NCCL_DEBUG_INFO_TEMP_FILE" not in environment:
        environment.setdefault("TORCH_FR_DUMP_TEMP_FILE", prefix(directory))


def _compile_threads(environment: Mapping[str, str]) -> int:
    """Return this rank's share of the CPUs, at most as many as torch's compiler takes alone."""
    num_local = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    share = max(1, (os.cpu_count() or 1) // num_local)  # a bound rank has its share already
    return min(_MOST_COMPILE_THREADS, share, len(os.sched_getaffinity(0)))


def communicator_options(settings: RunSettings, timeout: timedelta, *, most_ctas: int) -> Any:
    """Return a new ProcessGroupNCCL.Options, None if torch has no NCCL.

    timeout: the same as for `new_group`; torch warns if they differ.
    most_ctas: use at most so many thread blocks, 0 for NCCL's choice.
    """
    kind = getattr(dist, "ProcessGroupNCCL", None)
    if kind is None:
        return None
    options = kind.Options(is_high_priority_stream=settings.comm_priority)
    options._timeout = timeout
    if most_ctas and hasattr(options.config, "max_ctas"):
        options.config.max_ctas = most_ctas
    return options


def watch(groups: Iterable[dist.ProcessGroup], failed: Callable[[str], None]) -> Event:
    """Call `failed` once, from a new thread, when NCCL reports an error in one of `groups`.

    Its argument is "TIMEOUT", "COMM_ERROR" or "REMOTE_ERROR".  `failed` should exit the process at
    once: a few seconds later torch's watchdog aborts it with a stack trace, and without an exit
    code that names the cause.  Set the returned event to end the watch.
    """
    backends = [backend for group in groups if (backend := _nccl_backend(group)) is not None]
    stopped = Event()
    if backends:
        Thread(target=_poll, args=(backends, failed, stopped), daemon=True).start()
    return stopped


def _nccl_backend(group: dist.ProcessGroup) -> Any:
    """Return the NCCL backend of `group` if this version of torch exposes its errors, else None."""
    if "nccl" not in dist.get_backend_config(group):
        return None
    backend = group._get_backend(torch.device("cuda"))
    return backend if hasattr(backend, "get_error") else None


def _poll(backends: list[Any], failed: Callable[[str], None], stopped: Event) -> None:
    while not stopped.wait(_POLL_SECONDS):
        for backend in backends:
            error = backend.get_error().name
            if error != "SUCCESS":
                if not stopped.is_set():  # errors while ranks leave are not failures
                    failed(error)
                return
