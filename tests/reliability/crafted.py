"""Checkpoints that somebody has made to do harm, with right hashes: all are refused in one line.

CASES changes the manifest of checkpoint 2, or its directory.  No case may open anything outside of
it, wait, or need much memory.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.reliability.checkpoints import NEWEST, body_of, restored, sign, stored_file, two, verdict
from vp_train.checkpoint.manifest import MANIFEST

FIRST, SECOND = "rank-00000.safetensors", "rank-00001.safetensors"
MOST_SECONDS, MOST_BYTES = 10, 2 << 30
BAD_NAMES = (
    "/dev/zero",
    "/etc/passwd",
    "../../outside.safetensors",
    "../step-00000001/rank-00000.safetensors",
    "..",
    ".",
    "",
    "a/rank-00000.safetensors",
    "rank-00000.safetensors/",
    "rank-0.safetensors",
    "rank-00000.safetensors\n",
    "rank-00000.safetensors\x00",
    "\x1b[2Jrank-00000.safetensors",
    "rank-00000.bin",
    "manifest.json",
    "r" * 100_000,
)
BAD_VALUES = (None, True, -1, 1.5, "x", "", [], {}, [[]], 10**30, 1e308, "\x1b[31m", "9" * 5000)


def renamed(name):
    """Let the manifest call a file `name`."""

    def change(body, path):
        body["files"][name] = body["files"].pop(FIRST)

    return change


def changed(*keys, to):
    """Set a value deep in the manifest."""

    def change(body, path):
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = to

    return change


def dropped(*keys):
    """Remove a value deep in the manifest."""

    def change(body, path):
        for key in keys[:-1]:
            body = body[key]
        del body[keys[-1]]

    return change


def replaced_by(make):
    """Put something that is no file in the place of a file, whatever hash it has."""

    def change(body, path):
        (path / FIRST).unlink()
        make(path / FIRST)

    return change


def shape_of(shape, **more):
    """Give tensor b another shape, without another file."""

    def change(body, path):
        body["files"][SECOND]["tensors"]["b"] = {"dtype": "float32", "shape": shape} | more

    return change


def twice(body, path):
    """Hold the first rows twice, and the others never."""
    shutil.copyfile(path / FIRST, path / "rank-00002.safetensors")
    body["files"]["rank-00002.safetensors"] = body["files"][FIRST]


def file_of(content):
    """Write other bytes into a file, and their right hash into the manifest."""

    def change(body, path):
        (path / FIRST).write_bytes(content)
        tensors = body["files"][FIRST]["tensors"]
        body["files"][FIRST] = stored_file(path / FIRST, {}).as_json() | {"tensors": tensors}

    return change


def header_of(header, data=b""):
    """Return a safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def with_more(body, path):
    """Add a tensor to a file that the manifest does not list."""
    save_file({"a": torch.zeros(4, 3), "extra": torch.zeros(2)}, path / FIRST)
    tensors = body["files"][FIRST]["tensors"]
    body["files"][FIRST] = stored_file(path / FIRST, {}).as_json() | {"tensors": tensors}


def text(content):
    """Sign a text that is no manifest."""

    def change(body, path):
        sign(path, content)
        return False

    return change


def raw(write):
    """Write the file of the manifest without a signature."""

    def change(body, path):
        (path / MANIFEST).unlink()
        write(path / MANIFEST)
        return False

    return change


def moved(body, path):
    """Make the directory a link to the same files elsewhere."""
    elsewhere = path.parent.parent / "elsewhere"
    shutil.rmtree(elsewhere, ignore_errors=True)
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    return False


def linked(name):
    """Make one file a link to the same content elsewhere."""

    def change(body, path):
        elsewhere = path.parent.parent / name
        elsewhere.unlink(missing_ok=True)
        (path / name).rename(elsewhere)
        (path / name).symlink_to(elsewhere)
        return False

    return change


def sparse(path):
    """Make a file of 1 GB that has no blocks on the disk."""
    with path.open("wb") as file:
        file.truncate(1 << 30)


def huge_file(body, path):
    """Let the manifest agree with a file of 1 TB without blocks, but for its hash."""
    with (path / FIRST).open("r+b") as file:
        file.truncate(1 << 40)


TENSOR = ("files", FIRST, "tensors", "a")
CASES = {
    **{f"name {name[:24]!r}": renamed(name) for name in BAD_NAMES},
    **{f"link {name}": linked(name) for name in (FIRST, MANIFEST)},
    "directory is a link": moved,
    "pipe": replaced_by(os.mkfifo),
    "zero device": replaced_by(lambda path: path.symlink_to("/dev/zero")),
    "directory for a file": replaced_by(Path.mkdir),
    "manifest is a pipe": raw(os.mkfifo),
    "manifest is a directory": raw(Path.mkdir),
    "manifest is a device": raw(lambda path: path.symlink_to("/dev/zero")),
    "manifest of 1 GB": raw(sparse),
    "manifest of 40 MB of brackets": text("[" * (20 << 20) + "]" * (20 << 20)),
    "file of 1 TB": huge_file,
    "bytes too many": changed("files", FIRST, "bytes", to=1 << 50),
    "bytes too few": changed("files", FIRST, "bytes", to=8),
    **{f"nested {what}": text(what * 100_000) for what in ("[", '{"a":', "[{")},
    **{f"whole is {value!r}"[:30]: text(json.dumps(value)) for value in BAD_VALUES},
    **{f"text {word!r}": text(word) for word in ("", "nul", "\x00", '{"format": 2,}', "NaN")},
    "nested in a state": text('{"format": 2, "state": ' + "[" * 90_000 + "]" * 90_000 + "}"),
    **{f"no {key}": dropped(key) for key in ("format", "step", "state", "files")},
    **{
        f"no {key} of a file": dropped("files", FIRST, key)
        for key in ("bytes", "blake2b", "tensors")
    },
    **{
        f"no {key} of a tensor": dropped(*TENSOR, key)
        for key in ("dtype", "shape", "dim", "ranges")
    },
    "tensor that the file has is not listed": dropped(*TENSOR),
    "tensor that is listed is not in the file": shape_of([5], dim=0, ranges=[]),
    **{
        f"{'.'.join(keys)} is {value!r}"[:60]: changed(*keys, to=value)
        for keys in (
            ("format",),
            ("step",),
            ("files",),
            ("files", FIRST),
            ("files", FIRST, "bytes"),
            ("files", FIRST, "blake2b"),
            ("files", FIRST, "tensors"),
            TENSOR,
            (*TENSOR, "dtype"),
            (*TENSOR, "shape"),
            (*TENSOR, "dim"),
            (*TENSOR, "ranges"),
        )
        for value in BAD_VALUES
        if (keys[-1], value) != ("files", {})
    },
    **{
        f"state is {value!r}"[:40]: changed("state", to=value)
        for value in BAD_VALUES
        if not isinstance(value, dict)
    },
    "step of another": changed("step", to=1),
    **{
        f"shape {shape}"[:40]: shape_of(shape)
        for shape in ([1 << 62], [1 << 30, 1 << 31], [5, 0], [4], [-5], ["5"], [[5]], [1] * 5000)
    },
    "ranges beyond": changed(*TENSOR, "ranges", to=[[0, 8]]),
    "ranges backward": changed(*TENSOR, "ranges", to=[[4, 0]]),
    "ranges overlap": changed(*TENSOR, "ranges", to=[[0, 2], [0, 2]]),
    "ranges of another file": changed(*TENSOR, "ranges", to=[[3, 7]]),
    "other dimension": changed(*TENSOR, "dim", to=1),
    "whole in two files": changed(*TENSOR, to={"dtype": "float32", "shape": [7, 3]}),
    "other dtype": changed(*TENSOR, "dtype", to="bfloat16"),
    "rows twice": twice,
    "extra tensor": with_more,
    "a pickle": file_of(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR."),
    "pointer of git lfs": file_of(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "empty file": file_of(b""),
    "header too long": file_of((1 << 60).to_bytes(8, "little") + b"{}"),
    "header nested": file_of(header_of(b"[" * 100_000)),
    "offsets beyond": file_of(
        header_of({"a": {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 1 << 40]}})
    ),
    "shape overflows": file_of(
        header_of({"a": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 0]}})
    ),
}


def refused(directory, kept, change):
    """Return what went wrong when checkpoint 2 was changed, or None."""
    path = directory / NEWEST
    body = body_of(path)
    if change(body, path) is not False:
        sign(path, body)

    def late(*_):
        raise TimeoutError(f"no answer within {MOST_SECONDS} s")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    was = signal.signal(signal.SIGALRM, late)
    signal.alarm(MOST_SECONDS)
    try:
        wrong = verdict(directory)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, was)
        restored(directory, kept)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return wrong or (f"took {grown >> 20} MiB" if grown > MOST_BYTES else None)


def campaign(seed: int, count: int) -> list[str]:
    """Try `count` crafted checkpoints, all of CASES before one is repeated; return the failures."""
    chance, failures = random.Random(seed), []
    names: list[str] = []
    while len(names) < count:
        names += chance.sample(sorted(CASES), len(CASES))
    with tempfile.TemporaryDirectory() as root:
        directory, kept = Path(root) / "checkpoints", Path(root) / "kept"
        two(directory)
        shutil.copytree(directory, kept)
        for name in names[:count]:
            started = time.monotonic()
            if (wrong := refused(directory, kept, CASES[name])) is not None:
                failures.append(f"{name} ({time.monotonic() - started:.1f} s): {wrong}")
    return failures
