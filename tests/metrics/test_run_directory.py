"""Nothing of an earlier run is lost, and a run that left nothing does not block the next."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from vp_train.config import ConfigError, RunSettings
from vp_train.metrics.run_directory import (
    RunDirectory,
    TakenError,
    disk_warning,
    is_original,
    refuse_running,
    refuse_used,
    removed_if_unused,
)


def test_a_run_that_ended_before_its_first_step_does_not_block_its_name(tmp_path):
    settings = RunSettings(root=str(tmp_path))
    directory = RunDirectory(settings)
    directory.metrics.touch()
    settings.checkpoints.mkdir()
    refuse_used(settings)


def test_a_checkpoint_alone_is_a_run(tmp_path):
    settings = RunSettings(root=str(tmp_path))
    RunDirectory(settings)
    (settings.checkpoints / "step-00000001").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"run\.resume=true, or choose another run\.name"):
        RunDirectory(settings)
    resumed = RunDirectory(replace(settings, resume=True))
    assert resumed.trace.is_dir()


def test_a_run_makes_the_folders_above_its_own(tmp_path):
    settings = RunSettings(root=str(tmp_path / "runs" / "of mine"))
    assert (
        settings.directory
        == RunDirectory(settings).path
        == tmp_path / "runs" / "of mine" / "default"
    )
    assert settings.directory.is_dir()


def test_the_lock_names_its_process_and_two_names_do_not_meet(tmp_path):
    first = RunDirectory(RunSettings(root=str(tmp_path)))
    second = RunDirectory(RunSettings(root=str(tmp_path), name="other"))
    for directory in (first, second):
        assert (directory.path / "LOCK").read_text().splitlines()[0] == f"{os.getpid()}"
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        RunDirectory(RunSettings(root=str(tmp_path)))


def test_a_removed_directory_is_made_again_with_its_lock_and_texts(tmp_path):
    directory = RunDirectory(RunSettings(root=str(tmp_path)))
    directory.write("config.yaml", "a: 1\n")
    assert directory.hold() is None
    shutil.rmtree(directory.path)
    assert directory.hold().startswith(f"{directory.path} was removed while this run used it")
    assert (directory.path / "config.yaml").read_text() == "a: 1\n"
    assert directory.hold() is None
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        RunDirectory(RunSettings(root=str(tmp_path)))
    (directory.path / "LOCK").unlink()
    assert directory.hold().startswith(f"{directory.path / 'LOCK'} was removed")
    (directory.path / "LOCK").rename(tmp_path / "mark")
    (directory.path / "LOCK").symlink_to(tmp_path / "mark")
    with pytest.raises(OSError, match="LOCK is a symbolic link"):
        directory.hold()


def test_a_removed_directory_that_another_run_has_taken_is_left_to_it(tmp_path):
    first = RunDirectory(RunSettings(root=str(tmp_path)))
    shutil.rmtree(first.path)
    RunDirectory(RunSettings(root=str(tmp_path)))  # its lock ends with it
    second = RunDirectory(RunSettings(root=str(tmp_path)))
    with pytest.raises(TakenError, match=f"removed .*, and process {os.getpid()} uses it now"):
        first.hold()
    assert second.hold() is None


def test_a_lock_that_is_removed_as_it_is_taken_is_not_held(tmp_path, monkeypatch):
    settings, flock, removed = RunSettings(root=str(tmp_path)), fcntl.flock, []

    def remove_once(file, how):
        flock(file, how)
        if not removed:
            removed.append(file)
            (settings.directory / "LOCK").unlink()

    monkeypatch.setattr(fcntl, "flock", remove_once)
    directory = RunDirectory(settings)
    assert directory.hold() is None
    with pytest.raises(ConfigError, match="in use"):
        RunDirectory(settings)


def test_a_file_system_whose_inodes_change_takes_no_directory_away(tmp_path, monkeypatch):
    directory = RunDirectory(RunSettings(root=str(tmp_path)))
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    assert directory.hold() is None


def test_the_lock_does_not_pass_to_a_child_process(tmp_path):
    directory = RunDirectory(RunSettings(root=str(tmp_path)))
    assert not os.get_inheritable(directory._lock.fileno())


@pytest.mark.parametrize(
    "name",
    ["LOCK", "metrics.jsonl", "checkpoints", "tensorboard", "trace", "logs", "profile", "trackers"],
)
def test_a_run_does_not_write_through_links(tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    if "." in name or name == "LOCK":
        elsewhere.write_text("precious")
    else:
        elsewhere.mkdir()
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / name).symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=f"default/{name} is a symbolic link"):
        RunDirectory(RunSettings(root=str(tmp_path), resume=True))
    assert elsewhere.is_dir() or elsewhere.read_text() == "precious"


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_opened(tmp_path):
    (tmp_path / "default").mkdir()
    for name in ("LOCK", "metrics.jsonl"):
        os.mkfifo(tmp_path / "default" / name)
        with pytest.raises(ConfigError, match=f"{name} is of another kind"):
            RunDirectory(RunSettings(root=str(tmp_path), resume=True))
        (tmp_path / "default" / name).unlink()


def test_a_link_in_the_place_of_a_text_is_replaced(tmp_path):
    directory = RunDirectory(RunSettings(root=str(tmp_path)))
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (directory.path / "config.yaml").symlink_to(precious)
    directory.write("config.yaml", "a: 1\n")
    assert precious.read_text() == "precious"
    assert (directory.path / "config.yaml").read_text() == "a: 1\n"
    assert not (directory.path / "config.yaml").is_symlink()


def test_the_kept_tokenizer_has_the_bytes_of_that_of_the_text(tmp_path):
    content = '{"a": "\u0120\u00e9"}\r\n'.encode()
    (tmp_path / "own.json").write_bytes(content)
    directory = RunDirectory(RunSettings(root=str(tmp_path)))
    directory.keep_tokenizer(tmp_path / "own.json", {"eos_token": "<end>"})
    assert (directory.path / "tokenizer.json").read_bytes() == content


def test_only_the_directory_that_a_run_has_made_is_original(tmp_path):
    made = RunDirectory(RunSettings(root=str(tmp_path))).path
    lock = made / "LOCK"
    shutil.copytree(made, tmp_path / "copy")
    assert is_original(made)
    assert not is_original(tmp_path / "copy")
    assert not is_original(tmp_path / "missing")
    process, token, identity = lock.read_text().splitlines()
    for lines in ([process, identity], [process, token, identity, ""], [process, token, "x"], []):
        lock.write_text("".join(f"{line}\n" for line in lines))
        assert not is_original(made), lines
    lock.rename(tmp_path / "elsewhere")
    lock.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text(f"{process}\n{token}\n{identity}\n")
    assert not is_original(made)


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "trace", "logs", "profile"])
def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path, name):
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / name).write_text("a file")
    with pytest.raises(ConfigError, match=f"{name} is of another kind"):
        RunDirectory(RunSettings(root=str(tmp_path), resume=True))


def test_a_directory_is_running_while_its_lock_is_held(tmp_path):
    settings = RunSettings(root=str(tmp_path))
    refuse_running(settings)
    directory = RunDirectory(settings)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}; wait for it"):
        refuse_running(settings)
    directory._lock.close()
    refuse_running(settings)
    with (directory.path / "LOCK").open("a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.truncate(0)
        other.write("\x1b[31m\n")
        other.flush()
        with pytest.raises(ConfigError, match="in use by another process"):
            refuse_running(settings)


def test_metrics_of_a_step_are_a_run_and_an_empty_file_is_none(tmp_path):
    settings = RunSettings(root=str(tmp_path))
    directory = RunDirectory(settings)
    directory.metrics.write_text("")
    refuse_used(settings)
    directory.metrics.write_text("{}")
    with pytest.raises(ConfigError, match="already holds a run"):
        refuse_used(settings)
    refuse_used(replace(settings, resume=True))


@pytest.mark.parametrize("there", [[], ["a"], ["a", "a/default"]])
@pytest.mark.parametrize("end", ["launcher", "rank"])
def test_a_run_that_writes_nothing_leaves_only_what_was_there(tmp_path, there, end):
    for name in there:
        (tmp_path / name).mkdir()
    settings = RunSettings(root=str(tmp_path / "a"))
    with removed_if_unused(settings):
        directory = RunDirectory(settings)
        if end == "rank":
            directory.forsake()
        directory._lock.close()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == there


def test_a_directory_that_is_in_use_or_written_to_is_not_removed(tmp_path):
    settings = RunSettings(root=str(tmp_path / "a"))
    with removed_if_unused(settings):
        directory = RunDirectory(settings)
    with pytest.raises(ConfigError), removed_if_unused(settings):
        RunDirectory(settings)
    assert directory.hold() is None
    directory.write("trace/step.json", "{}")
    directory.forsake()
    assert directory.hold() is None


def test_to_look_whether_a_directory_is_running_leaves_no_lock_of_its_own(tmp_path):
    settings = RunSettings(root=str(tmp_path))
    settings.directory.mkdir()
    refuse_running(settings)
    assert not any(settings.directory.iterdir())
    (settings.directory / "notes").touch()  # of somebody else
    with removed_if_unused(settings):
        refuse_running(settings)
    assert [path.name for path in settings.directory.iterdir()] == ["notes"]
    directory = RunDirectory(settings)
    directory._lock.close()
    refuse_running(settings)
    assert is_original(settings.directory)


@pytest.mark.parametrize(
    ("given", "there", "num_new"),
    [
        ({"steps": 100, "checkpoint_every": 10}, [], 3),  # two stay while a third is written
        ({"steps": 100, "checkpoint_every": 10}, [10], 2),
        ({"steps": 100, "checkpoint_every": 10}, [10, 20], 1),
        ({"steps": 100, "checkpoint_every": 10}, [10, 20, 30], 1),
        ({"steps": 100, "checkpoint_every": 10, "keep_checkpoints": 4}, [10, 20], 3),
        ({"steps": 10, "checkpoint_every": 10}, [], 1),
        ({"steps": 11, "checkpoint_every": 10}, [], 2),
        ({"steps": 35, "checkpoint_every": 10, "keep_checkpoints": 9}, [10], 3),
        ({"steps": 10, "checkpoint_every": 10}, [10], 0),
        ({"steps": 10, "checkpoint_every": 0}, [], 0),
        ({"steps": 10, "checkpoint_every": 0, "checkpoint_minutes": 5.0}, [], 3),
    ],
)
def test_a_disk_without_room_for_the_checkpoints_is_said(
    tmp_path, monkeypatch, given, there, num_new
):
    settings = RunSettings(root=str(tmp_path / "deep"), **given)
    for step in there:
        (settings.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    size = 2**20
    for missing in (0, 1):
        free = max(0, num_new * size - missing)
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free)
        )
        words = disk_warning(settings, size)
        if missing and num_new:
            assert words.startswith(f"{settings.directory} is on a disk with ")
            assert f"checkpoints take {num_new}.0 MiB more (1.0 MiB each; " in words
            assert f"run.keep_checkpoints={settings.keep_checkpoints}, and one more" in words
        else:
            assert words is None


def test_a_disk_that_says_nothing_is_not_warned_of(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.ESTALE, "stale")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    assert disk_warning(RunSettings(root=str(tmp_path)), 2**60) is None
