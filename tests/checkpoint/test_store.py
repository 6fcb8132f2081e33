"""Checkpoints are exact, complete or absent, and verified before use."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import ready_context
from tests.reliability.checkpoints import body_of, sign, two
from vp_train.checkpoint import saver, store
from vp_train.checkpoint.manifest import Manifest, StoredFile, newest_step, read_manifest
from vp_train.checkpoint.saver import CheckpointError, Saver, save, set_aside
from vp_train.checkpoint.store import CheckpointTensor, find, latest, load, newest
from vp_train.checkpoint.stream import Described, write_tensors
from vp_train.checkpoint.training import latest_of_run
from vp_train.communication.control import ControlGroup
from vp_train.config import ConfigError
from vp_train.durable import checkpoints_in
from vp_train.tensors.slices import TensorSlice

ROWS = 23


def split(num_ranks, seed):
    """Cut ROWS rows at random into num_ranks shards, some of them empty."""
    cuts = sorted(random.Random(seed).choices(range(ROWS + 1), k=num_ranks - 1))
    return list(zip([0, *cuts], [*cuts, ROWS], strict=True))


def truth():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 4, generator=generator), [
        torch.randn(3, i + 1, generator=generator) for i in range(6)
    ]


def pieces_of(rank, num_ranks, seed, fill):
    matrix, wholes = truth()
    start, stop = split(num_ranks, seed)[rank]
    pieces = {
        "matrix": CheckpointTensor(
            matrix[start:stop].clone(), TensorSlice(0, ROWS, ((start, stop),))
        )
    }
    pieces |= {
        f"whole.{i}": CheckpointTensor(whole.clone())
        for i, whole in enumerate(wholes)
        if i % num_ranks == rank
    }
    if not fill:
        for piece in pieces.values():
            piece.tensor.zero_()
    return pieces


def save_one(rank, num_ranks, directory, step=1, seed=0, keep=9):
    pieces = pieces_of(rank, num_ranks, seed, fill=True)
    save(Path(directory), step, pieces, {"step": step}, ControlGroup.flat(dist.group.WORLD), keep)


def load_one(rank, num_ranks, directory, seed):
    path = latest(Path(directory), ControlGroup.flat(dist.group.WORLD))
    manifest, pieces = read_manifest(path), pieces_of(rank, num_ranks, seed, fill=False)
    load(path, manifest, pieces)
    expected = pieces_of(rank, num_ranks, seed, fill=True)
    return manifest.state, all(
        torch.equal(pieces[name].tensor, expected[name].tensor) for name in expected
    )


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (3, 2), (4, 4)])
def test_any_ranks_read_what_any_ranks_wrote_bit_for_bit(ranks, tmp_path, before, after):
    ranks(before).run(save_one, str(tmp_path))
    for state, equal in ranks(after).run(load_one, str(tmp_path), 5):
        assert state == {"step": 1}
        assert equal


def ranges_of(num_ranks, rank, chunks):
    """Return the ranges of dim 1 of a [2, ROWS, 3] tensor that a rank holds.

    The dimension is cut into `chunks` ranges, and a rank gets every num_ranks-th of them.
    """
    cuts = [ROWS * chunk // chunks for chunk in range(chunks + 1)]
    return tuple((cuts[chunk], cuts[chunk + 1]) for chunk in range(rank, chunks, num_ranks))


def whole_of_ranges():
    return torch.arange(2.0 * ROWS * 3).view(2, ROWS, 3)


def save_ranges(rank, num_ranks, directory, chunks):
    split = TensorSlice(1, ROWS, ranges_of(num_ranks, rank, chunks))
    pieces = {"x": CheckpointTensor(split.part(whole_of_ranges()).clone(), split)}
    save(Path(directory), 1, pieces, {}, ControlGroup.flat(dist.group.WORLD), 1)


def load_ranges(rank, num_ranks, directory, chunks):
    split = TensorSlice(1, ROWS, ranges_of(num_ranks, rank, chunks)) if chunks else None
    expected = whole_of_ranges() if split is None else split.part(whole_of_ranges())
    found = torch.full_like(expected, torch.nan)
    path = Path(directory) / "step-00000001"
    load(path, read_manifest(path), {"x": CheckpointTensor(found, split)})
    return torch.equal(found, expected)


@pytest.mark.parametrize(
    ("before", "after"), [((1, 1), (2, 5)), ((2, 5), (1, 0)), ((2, 6), (3, 7)), ((3, 9), (2, 4))]
)
def test_parts_of_several_ranges_are_read_by_parts_of_others(ranks, tmp_path, before, after):
    ranks(before[0]).run(save_ranges, str(tmp_path), before[1])
    assert ranks(after[0]).run(load_ranges, str(tmp_path), after[1]) == [True] * after[0]


def test_a_directory_that_cannot_be_read_is_not_one_without_checkpoints(tmp_path):
    (tmp_path / "file").touch()
    for empty in ("missing", "file"):
        assert checkpoints_in(tmp_path / empty) == []
    (tmp_path / "loop").symlink_to("loop")  # unlike a missing permission, root cannot read it
    for unreadable in ("loop", "x" * 300):
        with pytest.raises(OSError, match=unreadable):
            checkpoints_in(tmp_path / unreadable)


def test_only_the_newest_stay(ranks, tmp_path):
    for step in (1, 2, 3, 10):
        ranks(1).run(save_one, str(tmp_path), step, 0, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]
    ranks(1).run(save_one, str(tmp_path), 10, 0, 2)  # the same step again replaces it
    assert latest(tmp_path).name == "step-00000010"


def test_damaged_checkpoints_of_later_steps_push_no_new_one_out(ranks, tmp_path):
    for step in (4, 5):
        ranks(1).run(save_one, str(tmp_path), step)
    for damaged in tmp_path.iterdir():
        (damaged / "rank-00000.safetensors").write_bytes(b"")
    for step in (1, 2, 3):
        ranks(1).run(save_one, str(tmp_path), step, 0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000003",
        "step-00000004",
        "step-00000005",
    ]
    assert latest(tmp_path).name == "step-00000003"


def go_on_past(rank, num_ranks, directory, damaged, steps):
    saver = Saver(Path(directory), ControlGroup.flat(dist.group.WORLD), 2)
    saver.leave_uncounted(damaged)
    saver.leave_uncounted([])  # it goes back to a checkpoint, and finds no other damage
    kept = []
    for step in steps:
        saver.begin(step, {"x": CheckpointTensor(torch.ones(2))}, {})
        saver.finish()
        kept.append(sorted(int(path.name[5:]) for path in Path(directory).iterdir()))
    return kept


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ((50, 60), [[30, 45, 50], [50, 60]]),
        ((40, 45, 50), [[30, 40, 45], [40, 45], [45, 50]]),
    ],
)
def test_a_damaged_checkpoint_that_was_passed_over_pushes_no_good_one_out(
    ranks, tmp_path, steps, kept
):
    for step in (30, 45):
        ranks(1).run(save_one, str(tmp_path), step)
    (tmp_path / "step-00000045" / "rank-00000.safetensors").write_bytes(b"")
    path, damaged = newest(tmp_path)
    assert path.name == "step-00000030"
    names = [each.name for each in damaged]
    assert names == ["step-00000045"]
    assert ranks(1).run(go_on_past, str(tmp_path), names, steps) == [kept]


@pytest.mark.parametrize("change", ["size", "bytes", "manifest", "gone"])
def test_altered_bytes_make_a_checkpoint_useless_and_a_lost_file_may_come_back(
    ranks, tmp_path, change
):
    for step in (30, 45):
        ranks(1).run(save_one, str(tmp_path), step)
    place = tmp_path / "step-00000045" / "rank-00000.safetensors"
    content = place.read_bytes()
    if change == "manifest":
        place = place.with_name("manifest.json")
        place.write_text(place.read_text().replace("matrix", "matrox"))
    elif change == "gone":
        place.unlink()
    else:
        place.write_bytes(content[:-8] + (b"12345678" if change == "bytes" else b""))
    assert newest_step(tmp_path) == (45 if change == "bytes" else 30)
    assert newest_step(tmp_path, 46) == newest_step(tmp_path)
    assert newest_step(tmp_path, 45) == 30
    _, (damage,) = newest(tmp_path)
    assert damage.is_altered == (change != "gone")


def test_a_checkpoint_that_is_set_aside_is_none_for_anybody(ranks, tmp_path):
    for step in (10, 20, 30):
        ranks(1).run(save_one, str(tmp_path), step)
    assert set_aside(tmp_path, "step-00000030").name == "step-00000030.damaged"
    assert newest_step(tmp_path) == 20
    ranks(1).run(save_one, str(tmp_path), 30, 0, 2)
    kept = ["step-00000020", "step-00000030", "step-00000030.damaged"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    set_aside(tmp_path, "step-00000030")  # which replaces the earlier one
    assert sorted(path.name for path in tmp_path.iterdir()) == [kept[0], kept[2]]
    assert set_aside(tmp_path, "step-00000030") is None


def fail_to_save(rank, num_ranks, directory):
    try:
        save_one(rank, num_ranks, directory, 2)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_save_that_fails_on_one_rank_fails_on_all_and_keeps_older_checkpoints(ranks, tmp_path):
    ranks(2).run(save_one, str(tmp_path))
    (tmp_path / ".writing-step-00000002").write_text("a file where the directory should be")
    for message in ranks(2).run(fail_to_save, str(tmp_path)):
        assert "could not write the checkpoint" in message
    assert latest(tmp_path).name == "step-00000001"


def test_nothing_unfinished_is_left(ranks, tmp_path):
    """A failed save cleans up at once.  What a killed process left is removed by the next save."""
    for message in ranks(2).run(fail_to_save_on_the_second, str(tmp_path)):
        assert "rank 1 could not write the checkpoint" in message
    assert list(tmp_path.iterdir()) == []
    for name in (".writing-step-00000007", ".removing-step-00000001"):
        (tmp_path / name).mkdir()
    ranks(2).run(save_one, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def save_without_removing(rank, num_ranks, directory):
    inner = saver._remove
    saver._remove = lambda path: (_ for _ in ()).throw(
        PermissionError(13, "Permission denied", str(path))
    )
    try:
        for step in (1, 2):
            save_one(rank, num_ranks, directory, step, 0, 1)
    finally:
        saver._remove = inner


def test_an_old_checkpoint_that_cannot_be_removed_ends_nothing(ranks, tmp_path):
    ranks(2).run(save_without_removing, str(tmp_path))
    assert latest(tmp_path).name == "step-00000002"
    assert (tmp_path / "step-00000001").is_dir()


def fail_to_commit(rank, num_ranks, directory):
    inner = saver._commit
    saver._commit = lambda *_: (_ for _ in ()).throw(OSError("no space"))
    try:
        return fail_to_save(rank, num_ranks, directory)
    finally:
        saver._commit = inner


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_checkpoint_that_cannot_be_completed_fails_on_all_ranks_and_leaves_nothing(
    ranks, tmp_path, num_ranks
):
    messages = ranks(num_ranks).run(fail_to_commit, str(tmp_path))
    line = "rank 0 could not write the checkpoint of step 2: OSError: no space"
    assert messages == [line] * num_ranks
    assert list(tmp_path.iterdir()) == []


def fail_to_save_on_the_second(rank, num_ranks, directory):
    inner = saver.write_new
    if rank == 1:
        saver.write_new = lambda *_: (_ for _ in ()).throw(OSError("no space"))
    try:
        return fail_to_save(rank, num_ranks, directory)
    finally:
        saver.write_new = inner


def test_a_manifest_that_is_valid_but_foreign_is_refused(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "manifest.json").write_text(json.dumps(["not", "a", "manifest"]))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged: the whole is \["):
        read_manifest(tmp_path / "step-00000001")
    with pytest.raises(
        ConfigError,
        match=r"every checkpoint in .* is damaged or incomplete; restore one$",
    ):
        latest(tmp_path)
    with pytest.raises(ConfigError, match=r"restore one, or move them away to begin without$"):
        latest_of_run(tmp_path, None)
    assert latest(tmp_path / "elsewhere") is None


def choose_counting(rank, num_ranks, directory):
    """Return the checkpoint that `latest` chooses, and the files that this rank hashed."""
    hashed, inner = [], store.check_file

    def check(path, stored):
        hashed.append(f"{path.parent.name}/{path.name}")
        inner(path, stored)

    store.check_file = check
    try:
        return latest(Path(directory), ControlGroup.flat(dist.group.WORLD)), hashed
    finally:
        store.check_file = inner


def test_ranks_share_the_hashing_and_choose_the_same_checkpoint(ranks, tmp_path):
    for step in (1, 2):
        ranks(3).run(save_one, str(tmp_path), step)
    damaged = tmp_path / "step-00000002" / "rank-00001.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    chosen, hashed = zip(*ranks(3).run(choose_counting, str(tmp_path)), strict=True)
    assert set(chosen) == {tmp_path / "step-00000001"}
    files = [
        f"step-0000000{step}/rank-0000{rank}.safetensors" for step in (1, 2) for rank in range(3)
    ]
    assert sorted(name for names in hashed for name in names) == files


def mismatch(rank, num_ranks, directory, pieces):
    try:
        path = latest(Path(directory))
        load(path, read_manifest(path), pieces)
    except ConfigError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(
    ("name", "piece", "message"),
    [
        (
            "matrix",
            CheckpointTensor(torch.zeros(4, 4), TensorSlice(0, ROWS + 1, ((0, 4),))),
            "resume with the model",
        ),
        (
            "matrix",
            CheckpointTensor(
                torch.zeros(4, 4, dtype=torch.float64), TensorSlice(0, ROWS, ((0, 4),))
            ),
            "is float32",
        ),
        ("whole.0", CheckpointTensor(torch.zeros(3, 2)), "[3, 1]"),
        ("unknown", CheckpointTensor(torch.zeros(3)), "does not hold all of unknown"),
    ],
)
def test_other_tensors_are_refused_by_name(ranks, tmp_path, name, piece, message):
    ranks(1).run(save_one, str(tmp_path))
    (refusal,) = ranks(1).run(mismatch, str(tmp_path), {name: piece})
    assert name in refusal
    assert message in refusal


def save_forever(directory, pipe):
    """Save checkpoint after checkpoint alone, and send the step of each that is complete."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world = ControlGroup.flat(dist.group.WORLD)
    for step in itertools.count(1):
        tensor = CheckpointTensor(torch.full((50_000,), float(step)))
        save(directory, step, {"x": tensor}, {"step": step}, world, 2)
        pipe.send(step)


def last_sent(pipe):
    """Return the last step that a killed process has sent."""
    last = 0
    with contextlib.suppress(EOFError):
        while True:
            last = pipe.recv()
    return last


def test_a_kill_at_any_moment_leaves_only_complete_checkpoints(tmp_path):
    chance, context = random.Random(0), ready_context()
    for round_number in range(5):
        directory = tmp_path / str(round_number)
        ours, theirs = context.Pipe()
        process = context.Process(target=save_forever, args=(directory, theirs), daemon=True)
        process.start()
        theirs.close()
        assert ours.recv() == 1
        time.sleep(chance.uniform(0.0, 0.08))
        process.kill()
        process.join()
        last = max(1, last_sent(ours))
        found = sorted(directory.glob("step-*"))
        assert found
        for path in found:
            manifest, target = read_manifest(find(path)), torch.zeros(50_000)
            load(path, manifest, {"x": CheckpointTensor(target)})
            step = manifest.step
            assert torch.equal(target, torch.full((50_000,), float(step)))
        assert read_manifest(latest(directory)).step >= last  # nothing committed is lost


def cut(chance, size, num_parts):
    """Cut `size` values into ranges, some of them empty, and deal them to `num_parts` at random."""
    bounds = sorted(chance.choices(range(size + 1), k=chance.randint(0, 6)))
    ranges = list(itertools.pairwise([0, *bounds, size]))
    owners = [chance.randrange(num_parts) for _ in ranges]
    return [
        tuple(bounds for bounds, owner in zip(ranges, owners, strict=True) if owner == part)
        for part in range(num_parts)
    ]


def stored_in_files(directory, whole, splits):
    """Write the slices `splits` of `whole`, each into a file; None is all of it."""
    files = {}
    for rank, split in enumerate(splits):
        path = directory / f"rank-{rank:05d}.safetensors"
        path.unlink(missing_ok=True)
        piece = CheckpointTensor(whole if split is None else sliced(whole, split), split)
        shape = tuple(piece.tensor.shape)
        write_tensors(path, [Described("x", shape, whole.dtype)], [piece.tensor])
        files[path.name] = StoredFile(path.stat().st_size, "", {"x": piece.stored})
    return Manifest(1, {}, files)


def sliced(whole, split):
    """Return a slice, that of no range too."""
    if not split.ranges:
        return whole.narrow(split.dim, 0, 0)
    return split.part(whole)


@pytest.mark.parametrize("seed", range(40))
def test_any_slices_are_read_from_any_others_along_any_dimension(tmp_path, seed):
    chance = random.Random(seed)
    sizes = [chance.randint(1, 7) for _ in range(chance.randint(1, 3))]
    whole = torch.arange(1.0, 1.0 + torch.Size(sizes).numel()).view(sizes)
    dim = chance.randrange(len(sizes))

    def splits():
        if chance.random() < 0.2:
            return [None]
        ranges = cut(chance, sizes[dim], chance.randint(1, 4))
        return [TensorSlice(dim, sizes[dim], part) for part in ranges]

    manifest = stored_in_files(tmp_path, whole, splits())
    for split in splits():
        expected = whole if split is None else sliced(whole, split)
        found = torch.zeros_like(expected)
        load(tmp_path, manifest, {"x": CheckpointTensor(found, split)})
        assert torch.equal(found, expected)
        wide = torch.zeros_like(expected, dtype=torch.float64)
        load(tmp_path, manifest, {"x": CheckpointTensor(wide, split)}, cast=True)
        assert torch.equal(wide, expected.double())


def test_slices_along_another_dimension_are_refused(tmp_path):
    """A manifest of somebody else alone has them; their ranges are not those of this run."""
    whole = torch.arange(16.0).view(4, 4)
    manifest = stored_in_files(tmp_path, whole, [TensorSlice(1, 4, ((0, 1),))])
    piece = CheckpointTensor(torch.zeros(1, 4), TensorSlice(0, 4, ((0, 1),)))
    with pytest.raises(ConfigError, match="has slices of x along another dimension than this run"):
        load(tmp_path, manifest, {"x": piece})


@pytest.mark.parametrize("cast", [False, True])
def test_a_value_that_no_file_holds_is_missed_and_all_others_are_not(tmp_path, cast):
    whole, verb = torch.arange(12.0).view(4, 3), "start" if cast else "resume"
    held = TensorSlice(0, 4, ((0, 1), (2, 4)))
    manifest = stored_in_files(tmp_path, whole, [held])
    for ranges in (((0, 1),), ((2, 3), (3, 4)), ((1, 1),), ()):
        piece = CheckpointTensor(
            torch.zeros(sum(b - a for a, b in ranges), 3), TensorSlice(0, 4, ranges)
        )
        load(tmp_path, manifest, {"x": piece}, cast=cast)
        assert torch.equal(piece.tensor, sliced(whole, piece.split))
    for ranges in (((1, 2),), ((0, 2),), ((0, 1), (1, 2)), ((0, 4),)):
        piece = CheckpointTensor(
            torch.zeros(sum(b - a for a, b in ranges), 3), TensorSlice(0, 4, ranges)
        )
        with pytest.raises(ConfigError, match=f"does not hold all of x; {verb} with the model it"):
            load(tmp_path, manifest, {"x": piece}, cast=cast)
    number = CheckpointTensor(torch.zeros(()))
    with pytest.raises(ConfigError, match="does not hold all of y"):
        load(tmp_path, manifest, {"y": number}, cast=cast)


def test_a_checkpoint_is_found_by_its_run_its_directory_a_link_or_itself(tmp_path, capsys):
    run = tmp_path / "run"
    two(run / "checkpoints")
    newest_one, older = (run / "checkpoints" / f"step-0000000{step}" for step in (2, 1))
    (tmp_path / "link").symlink_to(older)
    assert find(run) == find(run / "checkpoints") == find(newest_one) == newest_one
    assert find(older) == find(tmp_path / "link") == older
    (older / "rank-00001.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"{older} is incomplete"):
        find(tmp_path / "link")
    assert find(run) == newest_one
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(ConfigError, match=f"{place} holds no checkpoint; give the directory"):
            find(place)
    (tmp_path / "empty" / "config.json").touch()
    with pytest.raises(ConfigError, match=r"a model of Hugging Face: vp-import .*/empty DIRECTORY"):
        find(tmp_path / "empty")
    assert capsys.readouterr().err == ""


def test_each_newer_checkpoint_that_is_passed_over_is_reported_by_a_line(tmp_path, capsys):
    two(tmp_path)
    (tmp_path / "step-00000003").symlink_to(tmp_path / "step-00000001")

    def check(manifest):
        if manifest.step == 2:
            raise ValueError("it is not wanted")

    path, damaged = newest(tmp_path, None, check)
    assert path == tmp_path / "step-00000001"
    assert [(each.name, each.is_altered) for each in damaged] == [
        ("step-00000003", False),
        ("step-00000002", False),
    ]
    link = f"{tmp_path / 'step-00000003'} is a symbolic link, which may lead elsewhere"
    unwanted = f"{tmp_path / 'step-00000002' / 'manifest.json'} is damaged: it is not wanted"
    assert [each.words for each in damaged] == [link, unwanted]
    lines = [f"checkpoint passed over: {words}" for words in (link, unwanted)]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_checkpoint_is_altered_if_one_of_its_files_is_whatever_is_wrong_with_others(tmp_path):
    two(tmp_path)
    newer = tmp_path / "step-00000002"
    (newer / "rank-00000.safetensors").unlink()
    (newer / "rank-00001.safetensors").write_bytes(b"")

    class Group:
        """Two ranks, this one the first: it finds a lost file, the other one an altered file."""

        rank, size = 0, 2

        def all_gather_json(self, value):
            others = value if isinstance(value, list) and isinstance(value[0], str) else None
            return [value, ["altered", True] if others is None and value else value]

    (_, (damage,)) = newest(tmp_path, Group())
    assert damage.is_altered
    assert "rank-00000" in damage.words


def test_the_newest_step_is_that_of_the_newest_whole_checkpoint(tmp_path):
    assert newest_step(tmp_path) is None
    two(tmp_path)
    assert newest_step(tmp_path) == 2
    path = tmp_path / "step-00000002"
    sign(path, body_of(path) | {"step": 7})
    assert newest_step(tmp_path) == 1
    (tmp_path / "step-00000001" / "manifest.json").unlink()
    assert newest_step(tmp_path) is None
