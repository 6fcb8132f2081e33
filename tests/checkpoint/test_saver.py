"""A step waits for a copy only; what is written beside it is complete on all ranks or on none."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.disk import largest_file
from vp_train import durable
from vp_train.checkpoint import saver as module
from vp_train.checkpoint.manifest import read_manifest
from vp_train.checkpoint.saver import CheckpointError, Saver, StuckDiskError, save
from vp_train.checkpoint.store import CheckpointTensor, find, latest, load
from vp_train.communication.control import ControlGroup
from vp_train.failures import EXIT_IO


def saver_of(directory, keep=9):
    return Saver(Path(directory), ControlGroup.flat(dist.group.WORLD), keep)


def piece(rank, value, size=1000):
    return {f"x{rank}": CheckpointTensor(torch.full((size,), float(value)))}


def loaded(path, rank, size=1000):
    """Return the distinct values of the tensor that `rank` has saved."""
    tensor = torch.full((size,), torch.nan)
    load(path, read_manifest(path), {f"x{rank}": CheckpointTensor(tensor)})
    return tensor.unique().tolist()


@contextmanager
def held_back():
    """Let the writing thread of this rank wait, until the yielded event is set."""
    inner, go_on = module.write_new, threading.Event()

    def late(*arguments):
        assert go_on.wait(30)
        inner(*arguments)

    module.write_new = late
    try:
        yield go_on
    finally:
        go_on.set()
        module.write_new = inner


def change_while_written(rank, num_ranks, directory):
    saver, pieces = saver_of(directory), piece(rank, 1)
    with held_back() as go_on:
        saver.begin(1, pieces, {})
        ready_at_once = saver.is_ready
        pieces[f"x{rank}"].tensor.fill_(2.0)  # what the next step does
        nothing_yet = latest(Path(directory)) is None
        dist.barrier()
        go_on.set()
        saver.finish()
    path = find(Path(directory) / "step-00000001")
    return ready_at_once, nothing_yet, loaded(path, rank), saver.is_ready, saver.take_failure()


def test_a_save_holds_the_values_at_its_begin(ranks, tmp_path):
    for answer in ranks(2).run(change_while_written, str(tmp_path)):
        assert answer == (False, True, [1.0], False, None)


def advance_when_all_are_ready(rank, num_ranks, directory):
    """Do what steps do: exchange whether all are ready, and go on only then."""
    saver, world, seen = saver_of(directory), ControlGroup.flat(dist.group.WORLD), []
    saver.begin(1, piece(rank, 1), {})
    for _ in range(10_000):
        seen.append(Path(directory, "step-00000001").exists())
        if all(world.all_gather_json(saver.is_ready)):
            saver.advance()
        if saver._save is None:
            return seen[0], Path(directory, "step-00000001").exists()
    return "never done"


def test_steps_complete_a_save_without_waiting(ranks, tmp_path):
    assert ranks(2).run(advance_when_all_are_ready, str(tmp_path)) == [(False, True)] * 2


def save_on_a_stuck_disk(rank, num_ranks, directory, function):
    """Save while rank 1's (`write_new`) or rank 0's (the others) disk takes nothing."""
    group = ControlGroup.flat(dist.group.WORLD)
    saver = Saver(Path(directory), group, 9, patience_seconds=1.0)
    inner, go_on = getattr(module, function), threading.Event()

    def stuck(*arguments):
        if rank == (function == "write_new"):
            go_on.wait(30)
        return inner(*arguments)

    setattr(module, function, stuck)
    began = time.monotonic()
    try:
        saver.begin(1, piece(rank, 1), {})
        saver.finish()
    except StuckDiskError as error:
        saver.finish()  # there is nothing more to wait for
        return error.exit_code, str(error), time.monotonic() - began
    finally:
        go_on.set()
        setattr(module, function, inner)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("_make_empty", "rank 0 could not make {}/.writing-step-00000001: "),
        ("write_new", "rank 1 could not write its file in {}/.writing-step-00000001: "),
        ("write_manifest", "rank 0 could not complete {}/step-00000001: "),
    ],
)
def test_a_disk_that_takes_nothing_ends_the_run_after_its_patience(
    ranks, tmp_path, function, words
):
    for code, said, seconds in ranks(2).run(save_on_a_stuck_disk, str(tmp_path), function):
        assert code == EXIT_IO
        assert said.startswith(words.format(tmp_path))
        assert said.endswith("has taken nothing for 1 s (run.world_timeout_seconds)")
        assert 1 < seconds < 10


def write_slowly(rank, num_ranks, directory):
    """Write in twelve chunks, which together take longer than the patience."""
    saver = Saver(Path(directory), ControlGroup.flat(dist.group.WORLD), 9, patience_seconds=1.0)
    inner, chunk = module.write_new, module._CHUNK

    def slow(path, parts):
        inner(path, (time.sleep(0.2) or part for part in parts))

    module.write_new, module._CHUNK = slow, 350
    try:
        saver.begin(1, piece(rank, 1), {})
        saver.finish()
    finally:
        module.write_new, module._CHUNK = inner, chunk
    return saver.take_failure(), loaded(Path(directory) / "step-00000001", rank)


def test_a_slow_disk_that_gets_on_is_waited_for(ranks, tmp_path):
    began = time.monotonic()
    assert ranks(2).run(write_slowly, str(tmp_path)) == [(None, [1.0])] * 2
    assert time.monotonic() - began > 2


def test_a_disk_takes_a_large_file_little_by_little(tmp_path, monkeypatch):
    unsynced, most = 0, []
    monkeypatch.setattr(durable, "_MOST_UNSYNCED", 10, raising=False)

    def sync(descriptor):
        nonlocal unsynced
        unsynced = 0

    def parts():
        nonlocal unsynced
        for _ in range(9):
            unsynced += 4
            yield b"four"
            most.append(unsynced)

    monkeypatch.setattr(durable.os, "fsync", sync)
    durable.write_new(tmp_path / "file", parts())
    assert (tmp_path / "file").read_bytes() == b"four" * 9
    assert max(most) <= 12
    assert unsynced == 0


def save_twice(rank, num_ranks, directory):
    saver = saver_of(directory)
    saver.begin(1, piece(rank, 1), {})
    first = saver._copy._buffer.data_ptr()
    saver.begin(2, piece(rank, 2), {})  # waits for the first
    both = [
        loaded(Path(directory) / "step-00000001", rank),
        saver._copy._buffer.data_ptr() == first,
    ]
    saver.finish()
    return [*both, loaded(Path(directory) / "step-00000002", rank)]


def test_the_next_save_waits_for_the_one_before_and_uses_its_memory(ranks, tmp_path):
    assert ranks(2).run(save_twice, str(tmp_path)) == [[[1.0], True, [2.0]]] * 2


def fail_on_the_second(rank, num_ranks, directory):
    saver, inner = saver_of(directory), module.write_new
    saver.begin(1, piece(rank, 1), {})
    saver.finish()
    if rank == 1:
        module.write_new = lambda path, _: (_ for _ in ()).throw(OSError(28, "full", str(path)))
    try:
        saver.begin(2, piece(rank, 2), {})
        saver.finish()
    finally:
        module.write_new = inner
    failure = saver.take_failure()
    saver.begin(3, piece(rank, 3), {})
    saver.finish()
    return str(failure), saver.take_failure(), sorted(os.listdir(directory))


def test_a_failure_in_a_thread_is_that_of_all_ranks_and_the_next_save_works(ranks, tmp_path):
    for message, later, names in ranks(2).run(fail_on_the_second, str(tmp_path)):
        assert message.startswith("rank 1 could not write the checkpoint of step 2: OSError: ")
        assert "rank-00001.safetensors" in message
        assert later is None
        assert names == ["step-00000001", "step-00000003"]


def save_what_no_file_holds(rank, num_ranks, directory):
    saver = saver_of(directory)
    saver.begin(1, {"x": CheckpointTensor(torch.ones(3, dtype=torch.int64))}, {})
    saver.finish()
    return str(saver.take_failure())


def test_a_copy_that_fails_is_a_failure_of_the_save(ranks, tmp_path):
    (message,) = ranks(1).run(save_what_no_file_holds, str(tmp_path))
    assert "could not write the checkpoint of step 1: ValueError: x is torch.int64" in message
    assert list(tmp_path.iterdir()) == []


def modes_and_priority(rank, num_ranks, directory):
    before = os.umask(0o027)
    try:
        saver = saver_of(directory)
        saver.begin(1, piece(rank, 1), {})
        saver.finish()
    finally:
        os.umask(before)
    nice = saver._thread.submit(os.getpriority, os.PRIO_PROCESS, 0).result()
    files = Path(directory, "step-00000001").iterdir()
    return {stat.S_IMODE(path.stat().st_mode) for path in files}, nice


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are those of Linux")
def test_files_follow_the_umask_and_the_thread_gives_way(ranks, tmp_path):
    ((modes, nice),) = ranks(1).run(modes_and_priority, str(tmp_path))
    assert modes == {0o640}
    assert nice == min(19, os.getpriority(os.PRIO_PROCESS, 0) + module._NICENESS)  # Linux' most


def test_a_thread_keeps_to_its_share_until_somebody_waits():
    module._Pace(None).rest(1000.0)  # no share: never a rest
    pace = module._Pace(0.5)
    began = time.process_time()
    thread = threading.Thread(target=pace.rest, args=(0.05,), daemon=True)
    thread.start()
    while thread.is_alive():
        sum(range(1000))  # what a step does: it uses CPU time
    assert time.process_time() - began >= 0.05
    hurried = threading.Thread(target=pace.rest, args=(1000.0,), daemon=True)
    hurried.start()
    hurried.join(0.05)
    assert hurried.is_alive()
    pace.hurry()
    hurried.join(10)
    assert not hurried.is_alive()


def shares(rank, num_ranks, directory):
    """Return the share of the CPU time that a save of host tensors has, by device of the run."""
    found = {}
    for step, device in enumerate(("cpu", "cuda")):
        saver = Saver(Path(directory), ControlGroup.flat(dist.group.WORLD), 1, device=device)
        saver.begin(step, piece(rank, 1), {})
        found[device] = saver._pace._share
        saver.finish()
    return found


def test_only_where_the_steps_use_the_cpus_the_thread_has_a_share(ranks, tmp_path):
    assert ranks(1).run(shares, str(tmp_path)) == [{"cpu": module._SHARE, "cuda": None}]


def mixed(rank, num_ranks, directory):
    """Save and load tensors of all dtypes, strided, empty and without dimensions."""
    tensors = {
        "narrow": torch.arange(3, dtype=torch.float32).to(torch.bfloat16),
        "wide": torch.arange(5, dtype=torch.float64),
        "turned": torch.arange(12.0).view(3, 4).T,
        "nothing": torch.empty(0, 4),
        "number": torch.tensor(3.25),
    }
    pieces = {name: CheckpointTensor(tensor) for name, tensor in tensors.items()}
    path = save(Path(directory), 1, pieces, {}, ControlGroup.flat(dist.group.WORLD), 1)
    found = {name: CheckpointTensor(torch.ones_like(tensor)) for name, tensor in tensors.items()}
    load(find(path), read_manifest(path), found)
    return all(torch.equal(found[name].tensor, tensor) for name, tensor in tensors.items())


def test_all_kinds_of_tensors_come_back(ranks, tmp_path):
    assert ranks(1).run(mixed, str(tmp_path)) == [True]


def save_on_a_full_disk(rank, num_ranks, directory):
    world = ControlGroup.flat(dist.group.WORLD)
    save(Path(directory), 1, piece(rank, 1), {}, world, 1)
    try:
        with largest_file(2_000):
            save(Path(directory), 2, piece(rank, 2), {}, world, 1)
    except CheckpointError as error:
        return str(error), loaded(latest(Path(directory)), rank), os.listdir(directory)
    return "saved"


def test_a_full_disk_names_the_file_and_leaves_the_checkpoint_before(ranks, tmp_path):
    ((message, values, names),) = ranks(1).run(save_on_a_full_disk, str(tmp_path))
    assert "File too large: " in message
    assert "rank-00000.safetensors" in message
    assert (values, names) == ([1.0], ["step-00000001"])


def save_until_full(rank, num_ranks, directory):
    world, message = ControlGroup.flat(dist.group.WORLD), ""
    for step in range(1, 9):
        try:
            save(Path(directory), step, piece(rank, step, 40_000), {}, world, 9)
        except CheckpointError as error:
            message = str(error)
            break
    kept = {path.name: loaded(find(path), rank, 40_000) for path in Path(directory).iterdir()}
    return message, kept


def test_a_disk_that_fills_up_keeps_all_that_was_saved(ranks, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        ((message, kept),) = ranks(1).run(save_until_full, str(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert "No space left on device" in message
    assert kept == {f"step-{step:08d}": [float(step)] for step in range(1, len(kept) + 1)}
    assert len(kept) >= 2


def save_through_a_link(rank, num_ranks, directory, elsewhere):
    (Path(directory) / "checkpoints").symlink_to(elsewhere)
    return save_to(rank, Path(directory) / "checkpoints")


def save_to(rank, directory):
    try:
        save(directory, 1, piece(rank, 1), {}, ControlGroup.flat(dist.group.WORLD), 1)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_link_is_not_followed(ranks, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (message,) = ranks(1).run(save_through_a_link, str(tmp_path), str(elsewhere))
    assert "checkpoints is a symbolic link" in message
    assert list(elsewhere.iterdir()) == []
