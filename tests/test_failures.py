"""Messages of torch about another rank, and deaths of ranks, give an exit code and one line."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.programs import finished
from vp_train.checkpoint.saver import CheckpointError
from vp_train.commands import launch
from vp_train.commands.command import guarded
from vp_train.communication import flight_recorder
from vp_train.communication.nccl import require_gpu, set_environment, take_gpu, watch
from vp_train.config import ConfigError, RunSettings
from vp_train.durable import is_fresh
from vp_train.failures import (
    EXIT_CONFIG,
    EXIT_HANG,
    EXIT_INTERNAL,
    EXIT_IO,
    EXIT_OK,
    EXIT_TIME,
    Ending,
    RankEnd,
    ending_of_rank,
    peer_failure,
    root_cause,
)
from vp_train.planning.plan import make_plan
from vp_train.settings import load_config

NOTHING_SAVED = "there is no checkpoint to go on from"
SETTINGS = RunSettings(timeout_seconds=300, world_timeout_seconds=1800)
LOST = [
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] "
    "Connection closed by peer [127.0.0.1]:4097",
    "Failed to recv, got 0 bytes. Connection was likely closed. "
    "Did the remote server shutdown or crash?",
    "NCCL communicator was aborted on rank 3.",
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3699, "
    "remote process exited or there was a network error, NCCL version 2.27.5\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting prematurely.\n"
    "Last error:\nsocketProgress: Connection closed by remote peer node7<52134>",
    "[3] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d "
    "key-value store by key '0', but store->get('0') got error: Connection reset by peer",
]
WAITED = [
    (
        "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] "
        "Timed out waiting 300000ms for recv",
        300,
        "timeout",
    ),
    (
        "[3] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d "
        "key-value store by key '0', but store->get('0') got error: "
        "wait timeout after 1800000ms, keys: /default_pg/0//cuda//0",
        1800,
        "world_timeout",
    ),
    (
        "[../third_party/gloo/gloo/transport/tcp/pair.cc:525] "
        "Application timeout caused pair closure",
        300,
        "timeout",
    ),
    (
        "Timed out after 1800 seconds waiting for clients. 3/4 clients joined.",
        1800,
        "world_timeout",
    ),
    (
        "[PG ID 4 PG GUID 45 Rank 1] Process group watchdog thread terminated with exception: "
        "[Rank 1] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=2, OpType=SEND, NumelIn=8, NumelOut=8, Timeout(ms)=300000) "
        "ran for 300001 milliseconds before timing out.",
        300,
        "timeout",
    ),
]


@pytest.mark.parametrize("kind", [RuntimeError, dist.DistBackendError])
@pytest.mark.parametrize("words", LOST)
def test_a_lost_peer_is_an_internal_end(words, kind):
    failure = peer_failure(kind(words), SETTINGS)
    assert (failure.code, failure.words) == (EXIT_INTERNAL, "another rank went away")


@pytest.mark.parametrize("kind", [RuntimeError, dist.DistStoreError])
@pytest.mark.parametrize(("words", "seconds", "setting"), WAITED)
def test_a_silent_peer_is_a_hang_of_so_many_seconds(words, seconds, setting, kind):
    failure = peer_failure(kind(words), SETTINGS)
    assert failure.code == EXIT_HANG
    assert failure.words == f"another rank has not answered for {seconds} s (run.{setting}_seconds)"


@pytest.mark.parametrize(
    "error",
    [ValueError(LOST[0]), RuntimeError("CUDA error: an illegal memory access was encountered")],
)
def test_other_errors_say_nothing_of_peers(error):
    assert peer_failure(error, SETTINGS) is None


ABRT, KILL, SEGV = signal.SIGABRT, signal.SIGKILL, signal.SIGSEGV


def end(rank, code, words="", *, follows=False):
    """A rank that said how it ends."""
    return RankEnd(rank, code, Ending(code, words, follows=follows), "node1")


LOST = "rank 3: another rank went away"
ABORTED = "rank 1 was aborted by NCCL's watchdog: another rank has not answered for 300 s"


@pytest.mark.parametrize(
    ("ends", "code", "words"),
    [
        ([], 0, ""),
        ([end(1, 0), end(0, 0, "done already")], 0, "done already"),
        ([RankEnd(0, EXIT_CONFIG), RankEnd(1, EXIT_INTERNAL)], EXIT_CONFIG, ""),
        # Whatever died first, what a rank found wrong is the cause ...
        ([end(3, EXIT_INTERNAL, LOST, follows=True), end(1, EXIT_IO, "full")], EXIT_IO, "full"),
        ([RankEnd(0, -KILL), end(1, EXIT_CONFIG, "spike")], EXIT_CONFIG, "spike"),
        ([RankEnd(2, 0), end(1, EXIT_INTERNAL, "bug")], EXIT_INTERNAL, "bug"),
        ([end(1, EXIT_INTERNAL, "bug"), RankEnd(0, -SEGV)], EXIT_INTERNAL, "bug"),
        (
            [RankEnd(0, -SEGV), end(1, EXIT_INTERNAL, "bug")],
            128 + SEGV,
            "rank 0 was killed by SIGSEGV; the other ranks were stopped",
        ),
        # ... and of all who found the same, one has the words.
        ([end(2, EXIT_CONFIG), end(0, EXIT_CONFIG, "not finite")], EXIT_CONFIG, "not finite"),
        ([end(2, EXIT_TIME), end(1, EXIT_TIME), end(0, EXIT_TIME, "left")], EXIT_TIME, "left"),
        (
            [end(3, EXIT_INTERNAL, LOST, follows=True), RankEnd(2, -KILL, None, "node7")],
            128 + KILL,
            "rank 2 on node7 was killed by SIGKILL (somebody, or the kernel as memory ran out); "
            "the other ranks were stopped",
        ),
        (
            [end(3, EXIT_INTERNAL, LOST, follows=True), RankEnd(2, -SEGV)],
            128 + SEGV,
            "rank 2 was killed by SIGSEGV; the other ranks were stopped",
        ),
        (
            [end(2, EXIT_INTERNAL, "cut off"), RankEnd(1, -KILL), end(0, EXIT_HANG, "waited")],
            128 + KILL,
            "rank 1 was killed by SIGKILL (somebody, or the kernel as memory ran out); "
            "the other ranks were stopped",
        ),
        (
            [end(3, EXIT_INTERNAL, LOST, follows=True), RankEnd(1, 0, None, "node7")],
            EXIT_INTERNAL,
            "rank 1 on node7 left with code 0 while others still ran; something in it called exit",
        ),
        (
            [end(3, EXIT_INTERNAL, LOST, follows=True), end(0, EXIT_HANG, "rank 2 hangs")],
            EXIT_HANG,
            "rank 2 hangs",
        ),
        ([end(3, EXIT_INTERNAL, LOST, follows=True)], EXIT_INTERNAL, LOST),
        ([RankEnd(0, -ABRT), end(1, EXIT_HANG, "rank 2 hangs")], EXIT_HANG, "rank 2 hangs"),
        (
            [RankEnd(0, -ABRT), RankEnd(2, -KILL)],
            128 + KILL,
            "rank 2 was killed by SIGKILL (somebody, or the kernel as memory ran out); "
            "the other ranks were stopped",
        ),
        (
            [RankEnd(2, EXIT_INTERNAL), RankEnd(0, -ABRT), RankEnd(1, -ABRT)],
            EXIT_HANG,
            f"{ABORTED} (run.timeout_seconds); last communications of rank 1: logs/1",
        ),
        (
            [RankEnd(2, EXIT_INTERNAL), RankEnd(0, -ABRT)],
            128 + ABRT,
            "rank 0 was killed by SIGABRT; the other ranks were stopped",
        ),
    ],
)
def test_a_job_ends_with_the_cause_and_not_with_what_followed(ends, code, words):
    def record_of(rank):
        return Path("logs/1") if rank == 1 else None

    cause = root_cause(ends, SETTINGS, record_of)
    assert (cause.code, cause.words) == (code, words)


def raised(error):
    """The error after it was raised and caught."""
    try:
        raise error
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("first\nsecond"), "rank 2 failed at step 7: ValueError: first second;"),
        (ValueError("x" * 5000), f"rank 2 failed at step 7: ValueError: {'x' * 400}...;"),
        (SystemExit(3), "rank 2 failed at step 7: something called sys.exit(3);"),
        (MemoryError(), "rank 2 failed at step 7: MemoryError; vp-plan with the same settings"),
    ],
)
def test_a_failure_is_one_line_and_its_traceback_goes_into_the_log(error, words):
    ending = ending_of_rank(raised(error), SETTINGS, 2, 7)
    assert ending.code == EXIT_INTERNAL
    assert ending.words.startswith(words)
    assert ending.words.endswith("its traceback: runs/default/logs/rank-2.log")
    assert "\n" not in ending.words
    assert ending.log.startswith("Traceback")


def test_a_folder_in_the_place_of_a_file_is_for_the_user_to_mend(tmp_path):
    with pytest.raises(IsADirectoryError) as caught:
        tmp_path.write_text("")
    ending = ending_of_rank(caught.value, RunSettings(root=str(tmp_path)), 0, 1)
    assert ending.code == EXIT_IO
    assert ending.words == f"vp-train: {tmp_path}: Is a directory, at step 1; {NOTHING_SAVED}"


def test_a_full_disk_is_one_line_that_says_where_the_run_goes_on(tmp_path):
    settings = RunSettings(root=str(tmp_path))
    error = OSError(errno.ENOSPC, "No space left on device", "LOCK")
    ending = ending_of_rank(error, settings, 0, 0)
    assert ending.words == f"vp-train: LOCK: No space left on device; {NOTHING_SAVED}"
    for step in (5, 10):
        (settings.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    ending = ending_of_rank(error, settings, 0, 12)
    way_on = "run.resume=true goes on after step 10"
    assert ending.words == f"vp-train: LOCK: No space left on device, at step 12; {way_on}"
    error = CheckpointError("rank 0 could not write the checkpoint of step 15")
    assert ending_of_rank(error, settings, 0, 15).words == f"vp-train: {error}; {way_on}"


def test_no_terminal_obeys_what_a_failure_says():
    ending = ending_of_rank(raised(ValueError("\x1b[2Jgone\x07")), SETTINGS, 0, 1)
    assert "\\x1b[2Jgone\\x07" in ending.words
    assert Ending(70, "one\ntwo\r").words == "one\ntwo\\r"


def test_a_failure_names_the_last_line_of_this_package():
    try:
        RunSettings(steps=0)
    except ConfigError as error:
        ending = ending_of_rank(error, SETTINGS, 0, 1)
    assert re.search(r" \(in \w+, vp_train/config/setting\.py:\d+\); its traceback", ending.words)


def launch_scripts():
    """Be a launcher with the script `sys.argv[1]` in place of ranks."""
    script, *overrides = sys.argv[1:]
    launch.sys = SimpleNamespace(executable=script, stdout=sys.stdout, stderr=sys.stderr)
    launch.starts_by_fork = lambda config: False
    place = launch.Place(host="here")
    raise SystemExit(launch.launch(load_config(overrides), overrides, None, place))


def launch_stopped():
    """Be a launcher that gets the signal in place of a script before its ranks start."""
    number = int(sys.argv[1])
    launch._in_copy = lambda body: os.kill(os.getpid(), number)
    guarded("vp-train", launch_scripts)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_ranks_start_is_said_and_leaves_no_directory(tmp_path, number):
    overrides = ["model=nano", "data=synthetic", f"run.root={tmp_path / 'runs'}"]
    done = finished(launch_stopped, str(int(number)), *overrides)
    assert done.returncode == 128 + number
    assert done.stderr == f"vp-train: stopped by {number.name} before ranks started\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("every", "trains", "words"),
    [
        (5, True, "finish their step, save and leave; once more ends the run without saving"),
        (0, True, "finish their step and leave; once more"),
        (5, False, "the preflight goes on"),
    ],
)
def test_the_answer_to_a_signal_is_what_the_ranks_do(every, trains, words):
    settings = RunSettings(checkpoint_every=every, checkpoint_minutes=0)
    assert words in launch._answer(settings, trains=trains)


def test_a_preflight_says_that_a_directory_has_a_run_and_a_start_refuses_it(
    tmp_path, monkeypatch, capsys
):
    words = ["model=nano", "data=synthetic", f"run.root={tmp_path}", "schedule=auto"]
    config = load_config(words)
    config.run.directory.mkdir()
    (config.run.directory / "metrics.jsonl").write_text("{}")
    monkeypatch.setattr(launch, "import_for_ranks", lambda config: None)
    monkeypatch.setattr(launch, "_in_copy", lambda body: Ending(EXIT_OK, ""))
    plan = make_plan(load_config(words[:-1]), 4)
    monkeypatch.setattr(launch, "_searched", lambda config, num_ranks: plan)
    found = []

    def run_job(news, job):
        found.extend(path.name for path in config.run.directory.iterdir())
        return Ending(EXIT_OK, "")

    monkeypatch.setattr(launch, "run_job", run_job)
    place = launch.Place(host="here")
    with pytest.raises(ConfigError, match="already holds a run"):
        launch.launch(config, words, None, place)
    assert launch.launch(config, words, None, place, only_preflight=True) == EXIT_OK
    assert "already holds a run" in capsys.readouterr().err
    assert len(found) == 2, "what it holds, and the schedule for the ranks"
    assert [path.name for path in config.run.directory.iterdir()] == ["metrics.jsonl"]


RANK = """#!/bin/sh
if [ "$RANK" = 1 ]; then
    {deed}
    kill -ABRT $$
fi
sleep 60
"""


def launch_ranks_that(deed, tmp_path):
    """Run the launcher with shell scripts in place of ranks; rank 1 does `deed` and aborts."""
    rank = tmp_path / "rank.sh"
    rank.write_text(RANK.replace("{deed}", deed))
    rank.chmod(0o755)
    overrides = [
        "model=nano",
        "data=synthetic",
        "parallel.pp=2",
        f"run.root={tmp_path}",
        "run.name=run",
        "run.timeout_seconds=9",
    ]
    return finished(launch_scripts, str(rank), *overrides)


@pytest.mark.slow
def test_a_rank_that_nccl_aborts_is_a_hang_whose_record_is_named(tmp_path):
    record = flight_recorder.file_of({}, tmp_path / "run", 1)
    done = launch_ranks_that(f"mkdir -p {record.parent}; echo pickle > {record}", tmp_path)
    assert done.returncode == EXIT_HANG, done.stderr
    assert done.stderr == (
        "vp-train: rank 1 on here was aborted by NCCL's watchdog: "
        "another rank has not answered for 9 s "
        f"(run.timeout_seconds); last communications of rank 1: {record}\n"
    )


@pytest.mark.slow
def test_any_other_abort_is_a_signal_whatever_an_earlier_run_has_left(tmp_path):
    record = flight_recorder.file_of({}, tmp_path / "run", 1)
    record.parent.mkdir(parents=True)
    record.write_text("pickle")
    os.utime(record, (1e9, 1e9))
    done = launch_ranks_that("true", tmp_path)
    assert done.returncode == 128 + signal.SIGABRT
    assert done.stderr == (
        "vp-train: rank 1 on here was killed by SIGABRT; the other ranks were stopped; "
        f"{NOTHING_SAVED}\n"
    )


class Backend:
    """The NCCL backend of a group, which fails after it was asked `looks` times."""

    def __init__(self, error, looks):
        self.error, self.looks = error, looks

    def get_error(self):
        self.looks -= 1
        return SimpleNamespace(name="SUCCESS" if self.looks >= 0 else self.error)


@pytest.mark.parametrize("error", ["TIMEOUT", "COMM_ERROR"])
def test_an_error_of_nccl_is_noticed_once(monkeypatch, error):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: group.config)
    groups = [
        SimpleNamespace(config="cpu:gloo,cuda:gloo"),
        SimpleNamespace(config="cuda:nccl", _get_backend=lambda _: Backend(error, 10**9)),
        SimpleNamespace(config="cpu:gloo,cuda:nccl", _get_backend=lambda _: Backend(error, 2)),
    ]
    said, noticed = [], threading.Event()
    watch(groups, lambda error: (said.append(error), noticed.set()))
    assert noticed.wait(10)
    assert said == [error]


def test_a_watch_keeps_no_process_alive_and_says_nothing_after_its_end(monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")

    def fail_at_the_end():
        ended.wait(10)
        stopped.set()
        return SimpleNamespace(name="TIMEOUT")

    said, ended, before = [], threading.Event(), set(threading.enumerate())
    backend = SimpleNamespace(get_error=fail_at_the_end)
    stopped = watch([SimpleNamespace(_get_backend=lambda _: backend)], said.append)
    (thread,) = set(threading.enumerate()) - before
    assert thread.daemon
    ended.set()
    thread.join(10)
    assert not thread.is_alive()
    assert said == []


def test_nothing_is_watched_where_torch_does_not_say_its_errors(monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    before = threading.active_count()
    watch([SimpleNamespace(_get_backend=lambda _: object())], print)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("num_cpus", "num_local", "threads"), [(3, 8, 1), (64, 8, 8), (255, 8, 31), (512, 8, 32)]
)
def test_ranks_of_a_node_share_its_cpus_to_compile(
    tmp_path, monkeypatch, num_cpus, num_local, threads
):
    monkeypatch.setattr(os, "cpu_count", lambda: num_cpus)
    for is_bound in (False, True):
        own = range(max(1, num_cpus // num_local) if is_bound else num_cpus)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, own=own: own)
        environment = {"LOCAL_WORLD_SIZE": str(num_local)}
        set_environment(environment, RunSettings(), tmp_path)
        assert environment["TORCHINDUCTOR_COMPILE_THREADS"] == str(threads)


def test_the_environment_is_set_where_the_user_has_not(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(20))
    monkeypatch.setattr(os, "cpu_count", lambda: 20)
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "TORCH_NCCL_TRACE_BUFFER_SIZE": "5"}
    set_environment(environment, RunSettings(hop_channels=2), tmp_path)
    assert environment == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "5",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
        "NCCL_RUNTIME_CONNECT": "0",
        "NCCL_MAX_P2P_NCHANNELS": "2",
        "TORCHINDUCTOR_COMPILE_THREADS": "20",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "3000",
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/logs/flight-recorder-rank-",
    }
    assert (
        flight_recorder.file_of(environment, Path("elsewhere"), 3)
        == tmp_path / "logs" / "flight-recorder-rank-3"
    )
    assert flight_recorder.file_of({}, tmp_path, 3) == tmp_path / "logs" / "flight-recorder-rank-3"
    environment = {
        "PYTORCH_CUDA_ALLOC_CONF": "",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "mine",
        "NCCL_RUNTIME_CONNECT": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "7",
    }
    set_environment(environment, RunSettings(hop_channels=0), tmp_path)
    assert environment == {
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "PYTORCH_CUDA_ALLOC_CONF": "",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "mine",
        "NCCL_RUNTIME_CONNECT": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "7",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "3000",
        "TORCH_FR_BUFFER_SIZE": "2000",
    }
    assert flight_recorder.file_of(environment, Path("elsewhere"), 3) == Path("mine3")


def test_a_run_on_gpus_is_refused_where_torch_finds_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    require_gpu(RunSettings(device="cpu"))
    with pytest.raises(ConfigError, match=r"run.device=cuda, .* use run.device=cpu"):
        require_gpu(RunSettings(device="cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    require_gpu(RunSettings(device="cuda"))


@pytest.fixture
def node(monkeypatch):
    """Return a function that gives this process a node with GPUs, and returns what it asks for."""

    def with_gpus(num_devices, capability=(9, 0)):
        asked = []

        def capability_of():
            assert asked, "asked of a GPU that may be another rank's"
            return capability

        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
        monkeypatch.setattr(torch.cuda, "set_device", asked.append)
        monkeypatch.setattr("vp_train.communication.nccl.stay_near_gpu", lambda _: None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", capability_of)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
        return asked

    return with_gpus


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
@pytest.mark.parametrize("num_devices", [1, 2, 3])
@pytest.mark.parametrize("num_local", [None, 1, 2, 3])
def test_ranks_of_a_node_share_its_gpus_evenly_and_with_nccl_not_several_of_them(
    node, backend, num_devices, num_local
):
    settings, taken = RunSettings(device="cuda", comm_backend=backend), []
    for local in range(num_local or 1):
        environment = {"LOCAL_WORLD_SIZE": str(num_local), "LOCAL_RANK": str(local)}
        environment = {} if num_local is None else environment
        asked = node(num_devices)
        if backend == "nccl" and (num_local or 1) > num_devices > 1:
            with pytest.raises(
                ConfigError, match=rf"^{num_local} ranks but {num_devices} GPU\(s\)"
            ):
                take_gpu(environment, settings)
            assert asked == []
            continue
        assert take_gpu(environment, settings) == backend
        assert environment["TORCH_FR_BUFFER_SIZE"] == "2000"  # NCCL and CUDA are set up
        taken += asked
    assert taken in ([], [local % num_devices for local in range(num_local or 1)])


def test_a_rank_goes_to_the_cpus_near_its_gpu_before_that_has_memory(node, monkeypatch):
    asked, near = node(4), []
    monkeypatch.setattr(
        "vp_train.communication.nccl.stay_near_gpu", lambda index: near.append((index, [*asked]))
    )
    take_gpu({"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}, RunSettings(device="cuda"))
    assert (near, asked) == ([(3, [])], [3])


def test_a_rank_on_a_cpu_takes_nothing(monkeypatch):
    monkeypatch.delattr(torch.cuda, "device_count")  # nor anything else of CUDA
    environment = {"LOCAL_WORLD_SIZE": "9"}
    assert take_gpu(environment, RunSettings(device="cpu")) == "gloo"
    assert environment == {"LOCAL_WORLD_SIZE": "9"}


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 8), (8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize("linear", ["compute", "float8"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_float8_is_refused_on_a_gpu_without_it_and_nothing_else_is(
    node, device, linear, capability
):
    node(1, capability)
    settings = RunSettings(dtype="bfloat16", linear_dtype=linear, device=device)
    if (device, linear) == ("cuda", "float8") and capability < (8, 9):
        major, minor = capability
        with pytest.raises(ConfigError, match=f"and A100 has {major}.{minor}; drop"):
            take_gpu({}, settings)
    else:
        take_gpu({}, settings)


def test_a_record_is_fresh_from_the_moment_on_and_absent_never(tmp_path):
    record = tmp_path / "record"
    assert not is_fresh(record, 0.0)
    record.write_text("last words")
    os.utime(record, (100.0, 100.0))
    found = [is_fresh(record, since) for since in (99.0, 100.0, 101.0)]
    assert found == [True, True, False]


def test_a_record_is_waited_for_until_it_no_longer_grows_and_not_for_ever(tmp_path, monkeypatch):
    """The clock is that of the test: it advances by what is slept, and the file grows thrice."""
    record, now = tmp_path / "record", [0.0]
    monkeypatch.setattr(flight_recorder, "DUMP_SECONDS", 2.0)

    def sleep(seconds):
        now[0] += seconds
        if 0.3 < now[0] < 0.9:
            record.write_text("x" * round(10 * now[0]))

    monkeypatch.setattr(
        flight_recorder, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep)
    )
    assert flight_recorder.wait_for(record, 0.0)
    assert now[0] == pytest.approx(1.0)  # the first look that finds the size of the one before
    record.unlink()
    now[0] = 10.0
    assert not flight_recorder.wait_for(record, 0.0)
    assert now[0] == pytest.approx(13.0, abs=0.21)
