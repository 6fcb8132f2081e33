"""A step waits for a copy only; what is written beside it is complete on all ranks or on none."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

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


class Scripted:
    """A group whose ranks say in each round of messages what `rounds` has, as of rank 0."""

    def __init__(self, rounds=()):
        self.rank, self.rounds, self.said = 0, iter(rounds), []

    def all_gather_json(self, value):
        self.said.append(value)
        return next(self.rounds)


def waited(rounds, *, work=None, patience=1.0):
    """Return the words with which a wait for ranks that say `rounds` ends, empty if all is done."""
    saver = Saver(Path("runs"), Scripted(rounds), 9, patience_seconds=patience)
    try:
        saver._await(work or module._done(None), "write")
    except StuckDiskError as error:
        return str(error)
    finally:
        saver._thread.shutdown()
    assert next(saver._group.rounds, None) is None, "some rounds were not waited for"
    return ""


DONE, STUCK, LATE = (True, 0, False), (False, 0, False), (False, 0, True)


@pytest.mark.parametrize(
    ("rounds", "words"),
    [
        ([[DONE, DONE]], ""),
        ([[DONE, STUCK], [DONE, DONE]], ""),
        ([[STUCK, STUCK], [LATE, STUCK]], "rank 0 (and 1 more) could not write: "),
        ([[LATE, STUCK], [LATE, STUCK]], "rank 0 (and 1 more) could not write: "),
        ([[DONE, STUCK], [(True, 0, True), STUCK]], "rank 1 could not write: "),
        (
            [[DONE, STUCK, STUCK, STUCK]] * 2 + [[(True, 0, True), *[STUCK] * 3]],
            "rank 1 (and 2 more)",
        ),
        # The clock of rank 0 counts, and whatever a rank has written or completed begins it anew.
        ([[DONE, LATE], [DONE, LATE], [DONE, DONE]], ""),
        ([[(True, 0, True), (False, count, True)] for count in range(3)] + [[DONE, DONE]], ""),
        ([[STUCK, STUCK], [(True, 0, True), STUCK], [DONE, DONE]], ""),
    ],
)
def test_a_disk_is_stuck_when_no_rank_gets_on_for_the_patience_of_the_first(rounds, words):
    assert waited(rounds).startswith(words)
    assert bool(waited(rounds)) == bool(words)


def test_a_rank_is_late_when_more_than_its_patience_has_passed_since_anything_changed(monkeypatch):
    now = iter([0.0, 5.0, 7.0, 12.0, 12.1, 99.0])  # the wait begins; a change is noticed at 7.0
    clock = SimpleNamespace(monotonic=lambda: next(now), process_time=time.process_time)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "_WAIT_SECONDS", 0.0)
    saver = Saver(
        Path("runs"), Scripted([[STUCK], [STUCK], [STUCK], [DONE]]), 9, patience_seconds=5.0
    )
    saver._await(Future(), "write")
    assert saver._group.said == [(False, 0, late) for late in (False, False, True, True)]


def test_a_saver_without_a_save_has_nothing_to_do():
    saver = Saver(Path("runs"), Scripted(), 9)
    saver.advance()
    saver.finish()
    assert not saver.is_ready
    assert saver.take_failure() is None
    assert saver._group.said == []


def test_a_failure_is_told_once(ranks, tmp_path):
    ((first, again),) = ranks(1).run(failures_of_a_save, str(tmp_path))
    assert "could not write" in first
    assert again is None


def failures_of_a_save(rank, num_ranks, directory):
    saver = saver_of(directory)
    saver.begin(1, {"x": CheckpointTensor(torch.ones(3, dtype=torch.int64))}, {})
    saver.finish()
    return str(saver.take_failure()), saver.take_failure()


def test_the_cpu_time_of_all_chunks_is_within_the_share(monkeypatch):
    """The clock is that of the test: it advances while the thread rests."""
    now = [10.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(process_time=lambda: now[0]))
    pace = module._Pace(0.25)
    pace._hurry = SimpleNamespace(
        is_set=lambda: False, wait=lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    for chunks, total in enumerate((1.0, 1.5, 1.5, 4.0), 1):
        pace.rest(total - pace._used)
        assert now[0] - 10.0 == pytest.approx(4 * total, abs=0.011)
        assert pace.chunks == chunks
    now[0] += 100.0
    pace.rest(1.0)
    assert now[0] == pytest.approx(126.0, abs=0.011)


@pytest.mark.parametrize("seed", range(30))
def test_the_newest_good_checkpoints_stay_with_all_that_is_newer_and_nothing_unfinished(
    tmp_path, seed
):
    chance = random.Random(seed)
    steps = sorted(chance.sample(range(1, 40), chance.randint(1, 9)))
    step, keep = chance.choice(steps), chance.randint(1, 4)
    damaged = {each for each in steps if each != step and chance.random() < 0.4}
    for each in steps:
        (tmp_path / durable.checkpoint_name(each)).mkdir()
    for stray in (".writing-step-00000001", ".removing-step-00000002"):
        (tmp_path / stray / "part").mkdir(parents=True)
    (tmp_path / "step-00000003.damaged").mkdir()
    module._retain(tmp_path, step, keep, {durable.checkpoint_name(each) for each in damaged})
    good = [each for each in steps if each <= step and each not in damaged][-keep:]
    left = [durable.checkpoint_name(each) for each in steps if each >= good[0]]
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == sorted([*left, "step-00000003.damaged"])


def test_a_checkpoint_that_is_a_link_is_removed_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("kept")
    (tmp_path / "step-00000001").symlink_to(tmp_path / "elsewhere")
    (tmp_path / ".removing-step-00000001").mkdir()  # what a killed process has left
    module._remove(tmp_path / "step-00000001")
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    assert (tmp_path / "elsewhere" / "file").read_text() == "kept"


def test_a_checkpoint_has_its_name_when_all_of_it_is_on_disk_and_so_is_its_name(
    tmp_path, monkeypatch
):
    """An earlier one of the step gives way only then; a damaged one is set aside as safely."""
    final, temporary = module._final_and_temporary(tmp_path, 1)
    module._make_empty(temporary)
    final.mkdir()
    happened, rename, sync = [], Path.rename, module.sync
    monkeypatch.setattr(
        Path, "rename", lambda path, to: (happened.append((path, to)), rename(path, to))[1]
    )
    monkeypatch.setattr(
        module, "sync", lambda path: (happened.append((path, sorted(os.listdir(path)))), sync(path))
    )
    module._commit(1, {}, {}, temporary, final)
    assert happened == [
        (temporary, ["manifest.json"]),
        (final, tmp_path / ".removing-step-00000001"),
        (temporary, final),
        (tmp_path, ["step-00000001"]),
    ]
    happened.clear()
    aside = module.set_aside(tmp_path, final.name)
    assert happened == [(final, aside), (tmp_path, ["step-00000001.damaged"])]


def test_what_a_killed_process_has_written_is_no_part_of_the_next_save_of_its_step(tmp_path):
    place = tmp_path / "checkpoints" / ".writing-step-00000001"
    for _ in range(2):
        module._make_empty(place)
        assert list(place.iterdir()) == []
        (place / "rank-00001.safetensors").write_text("of the killed one")


def test_a_copy_in_memory_is_a_file_whose_tensors_begin_at_multiples_of_their_elements(tmp_path):
    dtypes = [torch.bfloat16, torch.float64, torch.float16, torch.float32]
    copy, chance = module._HostCopy(), random.Random(0)
    for number in range(20):
        tensors = {
            f"{'x' * chance.randint(1, 9)}{i}": torch.randn(
                chance.choice([(), (3,), (0, 2), (5, 3)])
            ).to(chance.choice(dtypes))
            for i in range(chance.randint(0, 6))
        }
        copy.take({name: CheckpointTensor(tensor) for name, tensor in tensors.items()})
        assert len(copy._buffer) >= len(copy.image)
        path = tmp_path / str(number)
        path.write_bytes(copy.image)
        found = load_file(path)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in found)
        length = int.from_bytes(copy.image[:8], "little")
        header = json.loads(bytes(copy.image[8 : 8 + length]))
        assert (8 + length) % 8 == 0
        for name, tensor in tensors.items():
            assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0


def test_memory_for_copies_grows_only_when_it_is_too_small():
    copy, places = module._HostCopy(), []
    for size in (100, 50, 100, 101, 7):
        copy.take({"x": CheckpointTensor(torch.ones(size))})
        places.append((len(copy._buffer), len(copy.image)))
    assert [held for held, _ in places] == [places[0][1]] * 3 + [places[3][1]] * 2


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def test_a_copy_from_a_gpu_is_made_between_the_kernels_of_two_steps(monkeypatch):
    """A stand-in for a stream notes when it waits and for what."""
    happened, copy = [], module._HostCopy()
    side = SimpleNamespace(
        wait_stream=lambda stream: happened.append(f"after {stream}"),
        synchronize=lambda: happened.append("complete"),
    )

    @contextmanager
    def within(stream):
        assert stream is side
        happened.append(copy.image[-8:].tolist())
        yield
        happened.append(torch.frombuffer(copy.image[-8:], dtype=torch.float32).tolist())

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the step")
    monkeypatch.setattr(torch.cuda, "stream", within)
    for value in (1.0, 2.0):
        tensor = torch.full((2,), value).as_subclass(OnGpu)
        copy.take({"x": CheckpointTensor(tensor)})
        begin, _, copied, end = happened
        assert (begin, copied, end) == ("after the step", [value, value], "complete")
        happened.clear()


class Runtime:
    """A stand-in for CUDA's runtime: it notes what is registered, and may allow no more."""

    def __init__(self, result=0):
        self.result, self.registered = result, {}

    def cudaHostRegister(self, place, size, flags):
        if not self.result:
            assert place not in self.registered
            self.registered[place] = size
        return self.result

    def cudaHostUnregister(self, place):
        del self.registered[place]


def test_only_the_memory_that_a_copy_has_now_is_registered_with_cuda(monkeypatch):
    runtime, copy = Runtime(), module._HostCopy()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    for size in (100, 50, 300, 300, 1000):
        copy._reserve(size, pinned=True)
        assert list(runtime.registered.items()) == [(copy._buffer.data_ptr(), len(copy._buffer))]
        assert len(copy._buffer) >= size
    plain = module._HostCopy()
    plain._reserve(100, pinned=False)
    assert len(runtime.registered) == 1


def test_without_pinned_memory_an_error_that_cuda_keeps_ends_nothing(monkeypatch):
    """CUDA hands the error to the next launch, whatever that is."""
    runtime, copy, launched = Runtime(result=2), module._HostCopy(), []

    def launch(*_, device):
        launched.append(device)
        raise RuntimeError("out of pinned memory")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch, "zeros", launch)
    copy._reserve(100, pinned=True)
    assert (len(copy._buffer), launched) == (100, ["cuda"])
    copy._reserve(200, pinned=True)  # it was not registered, so to unregister it is an error
    runtime.result = 0
    copy._reserve(300, pinned=True)
    assert list(runtime.registered) == [copy._buffer.data_ptr()]
    copy._reserve(400, pinned=False)
    assert not runtime.registered


class Echo:
    """A group of one rank that is asked a few times at most."""

    rank = 1

    def __init__(self):
        self.rounds = 0

    def all_gather_json(self, value):
        self.rounds += 1
        assert self.rounds < 4, "the thread still rests"
        return [value]


@pytest.mark.parametrize("call", ["finish", "advance"])
def test_whoever_waits_for_a_save_lets_its_thread_rest_no_more(call):
    """The thread has no share at all, so without that it would rest for ever."""
    saver = Saver(Path("runs"), Echo(), 9)
    saver._pace = pace = module._Pace(0.0)
    work = saver._thread.submit(lambda: pace.rest(1.0) or "no space")
    saver._save = module._Save(1, {}, work)
    try:
        getattr(saver, call)()
    finally:
        pace.hurry()
    assert "no space" in str(saver.take_failure())
