"""Small checkpoints to damage, and what must hold when a damaged one is opened."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil

import torch

from vp_train.checkpoint.manifest import MANIFEST, StoredFile, read_manifest
from vp_train.checkpoint.saver import _commit
from vp_train.checkpoint.store import CheckpointTensor, latest, load
from vp_train.checkpoint.stream import Described, write_tensors
from vp_train.tensors.slices import TensorSlice

ROWS, FILES = 7, 2
GOOD, NEWEST = "step-00000001", "step-00000002"


def values(step):
    """Return the whole tensors of checkpoint `step`."""
    generator = torch.Generator().manual_seed(step)
    return {
        "a": torch.randn(ROWS, 3, generator=generator),
        "b": torch.randn(5, generator=generator),
    }


def parts(step):
    """Return the contents of every file: name -> (tensor, its slice of the whole)."""
    whole = values(step)
    cut = [(0, 4), (4, ROWS)]
    files = [{"a": (whole["a"][slice(*bounds)], TensorSlice(0, ROWS, (bounds,)))} for bounds in cut]
    files[1]["b"] = (whole["b"], None)
    return files


def write(directory, step):
    """Write checkpoint `step` with two files, as two ranks do."""
    temporary = directory / f".writing-{step}"
    temporary.mkdir(parents=True)
    entries = {}
    for rank, held in enumerate(parts(step)):
        path = temporary / f"rank-{rank:05d}.safetensors"
        described = [
            Described(name, tuple(tensor.shape), tensor.dtype) for name, (tensor, _) in held.items()
        ]
        write_tensors(path, described, [tensor for tensor, _ in held.values()])
        stored = {
            name: CheckpointTensor(tensor, split).stored for name, (tensor, split) in held.items()
        }
        entries[path.name] = stored_file(path, stored).as_json()
    _commit(step, {"step": step}, entries, temporary, directory / f"step-{step:08d}")


def stored_file(path, tensors):
    """Return the entry of a manifest for the file at `path`."""
    content = path.read_bytes()
    return StoredFile(len(content), hashlib.blake2b(content).hexdigest(), tensors)


def two(directory):
    """Write checkpoints 1 and 2 below `directory`."""
    for step in (1, 2):
        write(directory, step)


def body_of(path):
    """Return the manifest of checkpoint `path` as JSON, to be changed."""
    return json.loads(json.loads((path / MANIFEST).read_text())["manifest"])


def sign(path, body):
    """Write a manifest with the right hash; `body` is JSON, or the text of it."""
    text = body if isinstance(body, str) else json.dumps(body)
    digest = hashlib.blake2b(text.encode()).hexdigest()
    (path / MANIFEST).unlink(missing_ok=True)
    (path / MANIFEST).write_text(json.dumps({"blake2b": digest, "manifest": text}))


def verdict(directory):
    """Return what is wrong when the damaged checkpoint 2 is passed over for checkpoint 1, or None.

    One line must name a file or folder of checkpoint 2, and checkpoint 1 must be used unchanged.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            path = latest(directory)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if path is None or path.name != GOOD:
        return f"{path} was used"
    lines = said.getvalue().splitlines()
    if len(lines) != 1 or NEWEST not in lines[0] or len(lines[0]) > 600:
        return f"{len(lines)} lines were said: {said.getvalue()[:200]!r}"
    if not lines[0].isprintable():
        return f"control characters were printed: {lines[0]!r}"
    return None if holds(path, 1) else "checkpoint 1 has other values"


def holds(path, step):
    """Return whether checkpoint `path` loads as that of `step`."""
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in values(step).items()}
    pieces = {name: CheckpointTensor(tensor) for name, tensor in found.items()}
    load(path, read_manifest(path), pieces)
    return all(torch.equal(found[name], tensor) for name, tensor in values(step).items())


def restored(directory, kept):
    """Put checkpoint 2 back as it is in `kept`."""
    newest = directory / NEWEST
    if newest.is_symlink() or newest.is_file():
        newest.unlink()
    shutil.rmtree(newest, ignore_errors=True)
    shutil.copytree(kept / NEWEST, newest)
