"""Fixtures every test may use."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _pytest.runner import runtestprotocol
from hypothesis import settings

from schedules import generators
from schedules.generators import auto
from tests.warm import WarmPrograms, WarmWorkers

if TYPE_CHECKING:  # pytest itself starts and ends its workers without torch
    from tests.ranks import Ranks

# CI must not fail by chance; elsewhere every run tries new examples.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI"):
    settings.load_profile("ci")


# The files that take longest begin first, so that none of them runs alone at the end.  Those that
# wait most of their time stand apart, so that no CPU is idle: the first, test_namespaces.py,
# test_nodes.py, test_local_ranks.py and test_ends.py.
LONG = (
    "test_slurm.py",
    "test_docs.py",
    "test_equivalence_between_processes.py",
    "test_auto.py",
    "test_train.py",
    "test_namespaces.py",
    "test_equivalence.py",
    "test_campaigns.py",
    "test_resume.py",
    "test_nodes.py",
    "test_plan_command.py",
    "test_simulate_command.py",
    "test_gpu_check.py",
    "test_replay.py",
    "test_local_ranks.py",
    "test_convert.py",
    "test_memory.py",
    "test_local.py",
    "test_ends.py",
    "test_offload.py",
    "test_explain.py",
    "test_offloading.py",
    "test_compiling.py",
    "test_cache.py",
    "test_families.py",
    "test_generators.py",
    "test_saved_settings.py",
    "test_mutants.py",
    "test_cli.py",
    "test_cuda.py",
    "test_search.py",
    "test_alternatives.py",
    "test_output.py",
    "test_replicas.py",
    "test_stage.py",
    "test_failures.py",
    "test_optimizer.py",
    "test_training.py",
    "test_plan.py",
    "test_settings.py",
    "test_report.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Let xdist keep the order of `LONG`; it would begin with the files of most tests.

    Also end the deafness to Ctrl-C that a shell's & gives to its jobs: tests send SIGINT.
    """
    # Scripts of benchmarks import each other by their bare names.  A worker has another path than
    # the process that has imported its tests.
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.set_threshold(10_000)  # memory is there; rare collections save a twentieth of the time
    if hasattr(config.option, "loadscopereorder"):  # xdist is installed
        config.option.loadscopereorder = False
    starts_workers = getattr(config.option, "tx", None) and not hasattr(config, "workerinput")
    has_gpu = any(Path("/dev").glob("nvidia[0-9]*"))
    if starts_workers and sys.platform == "linux" and not has_gpu:
        workers = WarmWorkers(config.invocation_params.dir, config.args)
        config.option.tx = [f"{way}//python={workers.python}" for way in config.option.tx]
        config.add_cleanup(workers.stop)


def pytest_collection_finish() -> None:
    """Let no collection of garbage visit the modules and the tests again.

    There are millions of objects; visits to them take a sixth of the time of tests.
    """
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of `LONG` first, in that order."""
    place = {name: number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Let a worker of xdist send only the report of a test that passes, unless more are shown.

    By itself it sends a test's start, set-up, call, tear-down and end, which takes longer than most
    tests.
    """
    options = item.config.option
    shows_more = options.verbose > 0 or options.durations is not None or options.xmlpath
    if shows_more or not hasattr(item.config, "workerinput"):
        return None
    for report in runtestprotocol(item, nextitem=nextitem, log=False):
        if report.when == "call" or not report.passed:
            item.ihook.pytest_runtest_logreport(report=report)
    return True


POOLS: dict[int, Ranks] = {}


@pytest.fixture(scope="module", autouse=True)
def ranks_rest() -> Iterator[None]:
    """Let the ranks that a module has used rest while others run."""
    yield
    for pool in POOLS.values():
        pool.rest()


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """Run a command in this process: main, name, words -> (exit code, stdout, stderr)."""

    def run(main: Callable[[], None], name: str, *words: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """`ranks(n)`: n living gloo processes, shared by all tests of the session."""

    from tests.ranks import Ranks

    def get(world_size: int) -> Ranks:
        if world_size not in POOLS:
            POOLS[world_size] = Ranks(world_size)
        for size, pool in POOLS.items():
            if size != world_size:
                pool.rest()
        return POOLS[world_size]

    yield get
    for pool in POOLS.values():
        pool.stop()


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a directory with programs called python and vp-train that start fast."""
    warm = WarmPrograms(tmp_path_factory.mktemp("programs"))
    yield warm.place
    warm.stop()


@pytest.fixture(scope="session")
def little_effort() -> Callable[[pytest.MonkeyPatch], None]:
    """`little_effort(patch)`: search with little effort, for laws that hold at any."""

    def spare(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(generators, "_EFFORT", 5_000)
        patch.setattr(auto, "_FIRST", 1_000)
        patch.setattr(auto, "_TIGHTENED", 500)
        patch.setattr(auto, "_ROUNDS", ((2, 15_000), (1, 30_000)))

    return spare


@pytest.fixture
def quick_search(
    monkeypatch: pytest.MonkeyPatch, little_effort: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Search with little effort, for laws of schedule=auto that hold at any."""
    little_effort(monkeypatch)


@pytest.fixture
def unrefined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make schedules with the least effort, for laws that hold for any valid schedule."""
    monkeypatch.setattr(generators, "_EFFORT", 0)
