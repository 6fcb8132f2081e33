"""Random damage to a checkpoint: every one is named, and the checkpoint before is used."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

from tests.reliability.checkpoints import GOOD, NEWEST, restored, two, verdict


def flip(chance, path, directory):
    """Flip one bit."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def zero(chance, path, directory):
    """Set a block to zero, as a disk does that loses a sector."""
    content = bytearray(path.read_bytes())
    # The block begins at a byte that is not zero, so that something changes.
    start = chance.choice([place for place, byte in enumerate(content) if byte])
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def truncate(chance, path, directory):
    """Cut the end off."""
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def extend(chance, path, directory):
    """Append bytes."""
    path.write_bytes(path.read_bytes() + chance.randbytes(chance.randint(1, 64)))


def delete(chance, path, directory):
    """Remove a file."""
    path.unlink()


def swap(chance, path, directory):
    """Exchange the files of two ranks."""
    first, second = sorted((directory / NEWEST).glob("rank-*"))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def stale(chance, path, directory):
    """Put the file of the same name from the checkpoint before in its place."""
    shutil.copyfile(directory / GOOD / path.name, path)


def garble(chance, path, directory):
    """Overwrite a piece with random bytes."""
    content = bytearray(path.read_bytes())
    start = chance.randrange(len(content))
    content[start : start + 16] = bytes(byte ^ 0x55 for byte in content[start : start + 16])
    path.write_bytes(content)


MUTATIONS = (flip, zero, truncate, extend, delete, swap, stale, garble)


def campaign(seed: int, count: int) -> list[str]:
    """Damage a checkpoint `count` times, and return a text for every case that went wrong."""
    chance, failures = random.Random(seed), []
    with tempfile.TemporaryDirectory() as root:
        directory, kept = Path(root) / "checkpoints", Path(root) / "kept"
        two(directory)
        shutil.copytree(directory, kept)
        for number in range(count):
            mutate = MUTATIONS[number % len(MUTATIONS)]
            path = chance.choice(sorted((directory / NEWEST).iterdir()))
            mutate(chance, path, directory)
            if (wrong := verdict(directory)) is not None:
                failures.append(f"{number}: {mutate.__name__} of {path.name}: {wrong}")
            restored(directory, kept)
    return failures
