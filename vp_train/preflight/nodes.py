"""The checks of a run's nodes before step 1: every rank says what it has, and all compare.

Nodes with different text, code or settings would train together without an error, each on its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, is_dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import schedules
from vp_train.communication.communicators import NCCL
from vp_train.communication.control import ControlGroup
from vp_train.communication.nccl import communicator_options
from vp_train.config import RunConfig, RunSettings
from vp_train.failures import EXIT_CONFIG, SharedFailure
from vp_train.planning.cluster import Link
from vp_train.planning.estimate import sum_seconds
from vp_train.preflight.findings import (
    Gpu,
    RankFacts,
    clock_range,
    compare,
    network_words,
    node_lines,
    wrong_sums,
)

_SUM_BYTES = 2**24
_SUM_TRIES = 3
_SEEN_SECONDS = 5.0  # a network file system shows another node's new file within this time
_MOST_ERRORS = 8
_MOST_CHARACTERS = 200  # of a variable
_PACKAGES = ("torch", "megatron-core", "deepspeed", "numpy", "tokenizers")
_MARK = re.compile(r"\.preflight-[0-9a-f]{32}")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class PreflightError(SharedFailure):
    """Nodes that do not fit together.  The message has one line per finding."""

    exit_code = EXIT_CONFIG


def spans_nodes(environment: Mapping[str, str]) -> bool:
    """Return whether a run has ranks on other nodes, from what its launcher has set."""
    num_ranks = int(environment.get("WORLD_SIZE", "1"))
    return int(environment.get("LOCAL_WORLD_SIZE", num_ranks)) < num_ranks


def must_compare(environment: Mapping[str, str], settings: RunSettings) -> bool:
    """Return whether the ranks of a run compare notes before step 1, whatever the user wants.

    They do on several nodes, and where ranks under NCCL may have the same GPU.  What a rank sees of
    its node does not count: all must come to the same answer, or some would wait for the others.
    """
    uses_nccl = settings.device == "cuda" and settings.comm_backend == NCCL
    return spans_nodes(environment) or (uses_nccl and int(environment.get("WORLD_SIZE", "1")) > 1)


class Preflight:
    """The checks of one run, first `compare_nodes`, then `measure_network`.  Both are collective.

    schedule: the text of the schedule that this rank has planned.
    texts: the content hash of each corpus (`Source.contents`).
    compiled: what this rank compiles, in words (`assembly.compiled_parts`).
    """

    def __init__(
        self,
        config: RunConfig,
        schedule: str,
        texts: Sequence[str],
        *,
        compiled: Sequence[str] = (),
    ) -> None:
        self._config, self._schedule, self._texts = config, schedule, texts
        self._compiled = compiled
        self._ranks: Sequence[RankFacts] = ()

    def compare_nodes(self, world: ControlGroup) -> None:
        """Compare all nodes, and print one line per node on rank 0.

        Call it before any group but `world` is made: with different settings the ranks would make
        different groups and wait for each other.  Raises PreflightError on all ranks.
        """
        settings = settings_by_name(self._config)
        directory = self._config.run.directory.absolute()
        with _mark(directory, world) as mark:
            unshared = _why_unshared(directory, mark, world.rank)
            world.barrier()
        clocks = world.all_gather_json(_times_of_a_barrier(world))
        own = RankFacts(
            rank=world.rank,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            host=platform.node(),
            boot=_boot_id(),
            clock=clock_range(clocks[world.rank], clocks[0]),
            directory=str(directory),
            unshared=unshared,
            code=_digest_of_code(),
            schedule=_digest(self._schedule),
            settings=_digest(json.dumps(settings)),
            texts=tuple(self._texts),
            versions=_versions(self._config),
            gpu=_gpu(self._config),
            environment=_environment(os.environ),
            compiled=tuple(self._compiled),
        )
        self._ranks = [_facts(value) for value in world.all_gather_json(asdict(own))]
        differ = len({facts.settings for facts in self._ranks}) > 1
        findings = compare(
            self._ranks,
            world.all_gather_json(settings) if differ else (),
            one_gpu_per_rank=dist.get_backend() == NCCL,
        )
        if world.rank == 0:
            for line in node_lines(self._ranks):
                print(f"node      {line}", flush=True)
            for warning in findings.warnings:
                print(f"warning   {warning}", flush=True)
        if findings.errors:
            raise PreflightError(_lines(findings.errors))

    def measure_network(self, world: ControlGroup) -> None:
        """Time one all-reduce of all ranks, and print its bandwidth on rank 0.

        Raises PreflightError on all ranks if a sum is wrong.
        """
        seconds, total = _timed_sum(self._config, world)
        gathered = world.all_gather_json((seconds, total))
        if error := wrong_sums([value[1] for value in gathered], self._ranks):
            raise PreflightError(error)
        slowest = max(value[0] for value in gathered)
        expected = _planned_seconds(self._config, world.size)
        line, warning = network_words(_SUM_BYTES, slowest, world.size, expected)
        if world.rank == 0:
            print(f"network   {line}", flush=True)
            if warning and spans_nodes(os.environ):  # inside a node nobody chooses the network
                print(f"warning   {warning}", flush=True)


def settings_by_name(config: object, prefix: str = "") -> dict[str, str]:
    """Return all settings of a tree of dataclasses by their dotted names, in words."""
    found: dict[str, str] = {}
    for item in fields(config):  # type: ignore[arg-type]
        value, name = getattr(config, item.name), prefix + item.name
        if is_dataclass(value):
            found |= settings_by_name(value, f"{name}.")
        else:
            found[name] = str(value)
    return found


def _lines(errors: Sequence[str]) -> str:
    """Return the errors as lines, and how many are left out."""
    more = len(errors) - _MOST_ERRORS
    rest = [f"and {more} more differences"] if more > 0 else []
    return "\n".join([*errors[:_MOST_ERRORS], *rest])


@contextmanager
def _mark(directory: Path, world: ControlGroup) -> Iterator[str]:
    """Write a file of random name in the run's directory on rank 0, and give its name to all.

    Its content is its name.  A new name is in no cache of a network file system.
    """
    name = f".preflight-{secrets.token_hex(16)}"
    if world.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        with (directory / name).open("x") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
    try:
        yield world.all_gather_json(name)[0]
    finally:
        if world.rank == 0:
            (directory / name).unlink(missing_ok=True)


def _why_unshared(directory: Path, mark: str, rank: int) -> str:
    """Return why `directory` does not hold the mark or cannot be written to, "" if all is well."""
    if not _MARK.fullmatch(mark):  # it came over the network, and is part of a path here
        return "rank 0 did not say which file it wrote"
    until = time.monotonic() + _SEEN_SECONDS
    while True:
        try:
            found = (directory / mark).read_text()
            break
        except OSError as error:
            if time.monotonic() > until:
                return f"a file that rank 0 wrote there cannot be read ({error.strerror})"
        for path in (directory.parent, directory):
            with suppress(OSError):
                os.listdir(path)  # makes a network file system ask its server again
        time.sleep(0.1)
    if found != mark:
        return "a file that rank 0 wrote there has other contents"
    own = directory / f"{mark}-{rank}"
    try:
        own.open("x").close()
        own.unlink()
    except OSError as error:
        return f"a file cannot be written there ({error.strerror})"
    return ""


def _times_of_a_barrier(world: ControlGroup) -> tuple[float, float]:
    """Return the times of the clock, in seconds, before and after a barrier of all ranks."""
    world.barrier()  # all ranks come to the next one at the same time
    before = time.time()
    world.barrier()
    return before, time.time()


def _facts(value: dict[str, Any]) -> RankFacts:
    """Return the facts that JSON has carried."""
    gpu = None if value["gpu"] is None else Gpu(**value["gpu"])
    tuples = {name: tuple(value[name]) for name in ("clock", "texts", "compiled")}
    return RankFacts(**{**value, **tuples, "gpu": gpu})


def _boot_id() -> str:
    """Return the id of this start of the kernel, "" where there is none (not Linux)."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _digest_of_code() -> str:
    """Return a hash of names and contents of the sources of both packages."""
    digest = hashlib.blake2b(digest_size=6)
    assert schedules.__file__ is not None
    for root in (Path(schedules.__file__).parent, Path(__file__).parents[1]):
        for path in sorted((*root.rglob("*.py"), *root.rglob("*.cpp"))):
            content = hashlib.blake2b(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(root.parent).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _versions(config: RunConfig) -> dict[str, str]:
    """Return the versions of Python, of the packages that compute, and of NCCL if it is used."""
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["torch"] = torch.__version__  # metadata does not say for which CUDA it was built
    if config.run.device == "cuda" and config.run.comm_backend == NCCL:
        version = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
        found["NCCL"] = ".".join(map(str, version))
    return found


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that NCCL and gloo read; a very long value is cut off."""
    return {
        name: value[:_MOST_CHARACTERS]
        for name, value in environment.items()
        if name.startswith(("NCCL_", "GLOO_"))
    }


def _gpu(config: RunConfig) -> Gpu | None:
    if config.run.device != "cuda":
        return None
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    uuid = str(getattr(found, "uuid", ""))
    return Gpu(found.name, found.total_memory, torch.cuda.device_count(), uuid)


def _timed_sum(config: RunConfig, world: ControlGroup) -> tuple[float, float]:
    """Return the seconds of an all-reduce of ones over all ranks, and one element of its result.

    It is the fastest of some tries, after one that connects the ranks.
    """
    on_nccl = dist.get_backend() == NCCL
    group = dist.group.WORLD
    device = torch.device("cpu")
    if on_nccl:  # with gloo the default group is connected already
        timeout = timedelta(seconds=config.run.world_timeout_seconds)
        options = communicator_options(config.run, timeout, most_ctas=0)
        group = dist.new_group(timeout=timeout, backend=NCCL, pg_options=options)
        device = torch.device("cuda", torch.cuda.current_device())

    def run() -> tuple[float, float]:
        ones = torch.ones(_SUM_BYTES // 4, device=device)
        if on_nccl:
            torch.cuda.synchronize(device)
        world.barrier()
        began = time.perf_counter()
        dist.all_reduce(ones, group=group)
        if on_nccl:
            torch.cuda.synchronize(device)
        return time.perf_counter() - began, float(ones[-1])

    run()
    tries = [run() for _ in range(_SUM_TRIES)]
    if on_nccl:
        dist.destroy_process_group(group)
    return min(seconds for seconds, _ in tries), tries[-1][1]


def _planned_seconds(config: RunConfig, num_ranks: int) -> float:
    """Return the seconds that plans assume for the all-reduce between nodes."""
    cluster = config.cluster
    link = Link("between nodes", cluster.network_seconds, cluster.network_bytes_per_second)
    return sum_seconds(link.of_group(num_ranks), link.bytes_per_second, _SUM_BYTES, num_ranks)
