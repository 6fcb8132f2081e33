"""YAML, JSON, schedules, tokenizers and corpora made to do harm: each is refused in one line.

A case is a file in the place where a command looks for one.  The line must name it.  Nothing in it
may run, be expanded from the environment, wait, or need much memory.  The cases after all of CASES
are random changes of a stored corpus that keep sizes and times.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from tests.reliability.overrides import in_empty_directory, judged
from vp_train.commands import prepare, simulate, train
from vp_train.commands.command import guarded
from vp_train.config import DataConfig
from vp_train.data import manifest
from vp_train.data import prepare as prepared
from vp_train.failures import EXIT_OK

VOCAB = 300
MOST_BYTES = 1 << 30
SECRET = "a secret of the environment"
PWNED = "!!python/object/apply:os.system ['touch pwned']"

DOES = ("training a tokenizer", "tokenizing")

Write = Callable[[Path], None]


def text(content: str | bytes) -> Write:
    """Return what writes a file with this content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda path: (path.unlink(missing_ok=True), path.write_bytes(data))[0]


def sparse(path: Path) -> None:
    """Make a file of 1 GB that has no blocks on the disk."""
    with path.open("wb") as file:
        file.truncate(1 << 30)


def no_file(make: Callable[[Path], object]) -> Write:
    """Return what puts something else than a file there."""

    def write(path: Path) -> None:
        path.unlink(missing_ok=True)
        make(path)

    return write


BOMB = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
NO_TEXT: dict[str, Write] = {
    "pipe": no_file(os.mkfifo),
    "directory": no_file(Path.mkdir),
    "device": no_file(lambda path: path.symlink_to("/dev/zero")),
    "loop": no_file(lambda path: path.symlink_to(path)),
    "nothing": no_file(lambda path: None),
    "1 GB": sparse,
    "binary": text(bytes(range(256)) * 20),
    "not UTF-8": text(b"num_layers: 2 # \xff\n"),
}
YAML: dict[str, Write] = NO_TEXT | {
    "empty": text(""),
    "null bytes": text("\0" * 100),
    "byte order mark alone": text("\ufeff"),
    "list": text("- 1\n"),
    "scalar": text("abc"),
    "two documents": text("num_layers: 2\n---\nnum_layers: 3\n"),
    "brackets": text("num_layers: " + "[" * 3_000),
    "closed brackets": text("num_layers: " + "[" * 3_000 + "]" * 3_000),
    "braces": text("{a: " * 3_000),
    "indented": text("".join(" " * n + "a:\n" for n in range(500))),
    "many values": text("".join(f"a{n}: {n}\n" for n in range(20_000))),
    "bomb": text("a0: &a0 [x]\n" + BOMB),
    "merge": text("a: &a {num_layers: 2}\nb:\n  <<: *a\n"),
    "alias of itself": text("a: &a [*a]\n"),
    "unknown resolver": text("num_layers: ${nowhere:1}\n"),
    "environment": text("num_layers: ${oc.env:SECRET}\n"),
    "environment in a key": text("${oc.env:SECRET}: 1\n"),
    "environment in a list": text("num_layers: [1, 'a${oc.env:SECRET}']\n"),
    "object": text(f"num_layers: {PWNED}\n"),
    "name of a class": text("num_layers: !!python/name:os.system\n"),
    "local tag": text("num_layers: !x 3\n"),
    "set": text("? a\n? b\n"),
    "number of 5,000 digits": text("num_layers: " + "9" * 5_000),
    "text of 200 kB": text("num_layers: " + "x" * 200_000),
    "control characters": text('"\\e[31m": 1\n'),
    "control characters in a value": text('activation: "\\e[31m"\n'),
    "key that is a list": text("[a]: 1\n"),
    "key that is a mapping": text("{a: b}: 1\n"),
    "key that is null": text("null: 1\n"),
    "unknown key": text("layers: 3\n"),
    "list for a number": text("num_layers: [1, 2]\n"),
    "mapping for a number": text("num_layers: {a: 1}\n"),
    "target": text("_target_: os.system\n"),
    "missing value": text("num_layers: ???\n"),
    "infinite": text("init_std: .inf\n"),
    "tabs": text("a:\n\t- b\n"),
    "directive": text("%YAML 9.9\n---\na: 1\n"),
}
SCHEDULES: dict[str, Write] = NO_TEXT | {
    "empty": text(""),
    "other text": text("hello"),
    "name alone": text("# a\n"),
    "control characters": text("# \x1b[31m\n0F0\n"),
    "large numbers": text("# a\n0F" + "9" * 5_000 + "\n"),
    "large stage": text("# a\n99999999999F0 0B0\n"),
    "a million ranks": text("# a\n" + "0F0 0B0\n" * 1_000_000),
    "lines": text("# a\n" + "\n" * 1_000_000),
}
CSV: dict[str, Write] = NO_TEXT | {
    "empty": text(""),
    "quote": text('"0F0\n'),
    "cell of 1 MB": text("0F0," + "x" * 10**6 + "\n"),
    "control characters": text("\x1b[31m,0F0\n"),
    "commas": text("," * 10**6),
    "large numbers": text("0F" + "9" * 5_000 + "\n"),
}
TOKENIZERS: dict[str, Write] = NO_TEXT | {
    "empty": text(""),
    "nothing in it": text("{}"),
    "list": text("[]"),
    "deep": text("[" * 100_000),
    "model of another kind": text('{"model": {"type": "pickle"}}'),
    "large identifiers": text(
        '{"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 4294967295}}}'
    ),
    "template": text('{"post_processor": {"type": "TemplateProcessing"}, "model": {}}'),
}
LINES: dict[str, Write] = {
    "no JSON": text("{\n"),
    "deep": text('{"text": ' + "[" * 100_000 + "\n"),
    "no text": text('{"a": 1}\n'),
    "control characters": text('{"\\u001b[31m": 1}\n'),
    "number": text('{"text": ' + "9" * 5_000 + "}\n"),
    "list": text("[]\n"),
    "not UTF-8": text(b'{"text": "\xff"}\n'),
    "nothing": text(""),
    "null bytes": text("\0" * 100),
}


def damaged(change: Callable[[Path], None]) -> Callable[[Path], None]:
    """Return what changes a stored corpus in the directory `corpus`."""
    return lambda root: change(root / "corpus")


def entry(name: str, value: object) -> Callable[[Path], None]:
    """Return what writes another value into a manifest, with its right hash."""

    def change(path: Path) -> None:
        values = json.loads((path / "manifest.json").read_text())
        del values["manifest_hash"]
        values[name] = value
        values["manifest_hash"] = manifest._hash_of(values)
        (path / "manifest.json").write_text(json.dumps(values))

    return change


def no_entry(path: Path) -> None:
    """Take an entry out of a manifest."""
    values = json.loads((path / "manifest.json").read_text())
    del values["blocks"]
    (path / "manifest.json").write_text(json.dumps(values))


def as_file(name: str, write: Write) -> Callable[[Path], None]:
    """Return what replaces a file of a corpus."""
    return lambda path: write(path / name)


def swapped(path: Path) -> None:
    """Let tokens and index change their places."""
    (path / "tokens.bin").rename(path / "x")
    (path / "tokens.idx").rename(path / "tokens.bin")
    (path / "x").rename(path / "tokens.idx")


def linked(name: str) -> Callable[[Path], None]:
    """Return what makes a file of a corpus a link to the same content outside."""

    def change(path: Path) -> None:
        shutil.move(path / name, path.parent / f"outside-{name}")
        (path / name).symlink_to(path.parent / f"outside-{name}")

    return change


def cut(name: str) -> Callable[[Path], None]:
    """Return what takes the last byte from a file."""
    return lambda path: os.truncate(path / name, (path / name).stat().st_size - 1)


FILES = ("manifest.json", "tokenizer.json", "tokens.bin", "tokens.idx")
VALUES = (None, True, -1, 1.5, "x\x1b", [], {}, 10**30, "9" * 5_000)
CORPORA: dict[str, Callable[[Path], None]] = {
    **{
        f"{name} is {what}": as_file(name, write)
        for name in FILES
        for what, write in NO_TEXT.items()
        # Without one of these a directory is no stored corpus, but one of text, and it has none.
        if not (what in ("nothing", "loop") and name in ("manifest.json", "tokens.idx"))
    },
    **{f"{name} is a link": linked(name) for name in FILES},
    **{f"{name} is cut": cut(name) for name in FILES},
    **{
        f"{name}={value!r}"[:60]: entry(name, value)
        for name in ("name", "num_tokens", "num_documents", "vocab_size", "file_bytes", "blocks")
        for value in VALUES
    },
    "file outside": entry("file_bytes", {"../../a": 1}),
    "device": entry("file_bytes", {"/dev/zero": 1}),
    "tokens and index change places": swapped,
    "manifest is deep": as_file("manifest.json", text("[" * 100_000)),
    "manifest without hashes": no_entry,
}


class Case:
    """A file or a corpus, the command that reads it, and the name that must be in its line."""

    def __init__(
        self,
        make: Callable[[Path], None],
        main: Callable[[], None],
        arguments: Sequence[str],
        name: str,
    ) -> None:
        self.make, self.main, self.arguments, self.name = make, main, arguments, name


def _in_place(name: str, write: Write) -> Callable[[Path], None]:
    return lambda root: write(root / name)


_TEXT = ("data=text", "data.path=text", f"model.vocab_size={VOCAB}", "data.cache_dir=cache")
_STORED = ("data=text", "data.path=corpus", f"model.vocab_size={VOCAB}", "data.cache_dir=cache")


def _cases() -> dict[str, Case]:
    places = (
        ("model", YAML, simulate.main, ["model=given.yaml"], "given.yaml"),
        ("cost", YAML, simulate.main, ["cost=given.yaml"], "given.yaml"),
        ("saved", YAML, train.main, ["run.resume=true", "run.name=one"], "runs/one/config.yaml"),
        ("schedule", SCHEDULES, simulate.main, ["schedule.file=given.txt"], "given.txt"),
        ("csv", CSV, simulate.main, ["schedule.file=given.csv"], "given.csv"),
        (
            "tokenizer",
            TOKENIZERS,
            prepare.main,
            [*_TEXT, "data.tokenizer=given.json"],
            "given.json",
        ),
        ("lines", LINES, prepare.main, [*_TEXT, "data.path=given.jsonl"], "given.jsonl"),
    )
    cases = {
        f"{place} {what}": Case(_in_place(name, write), main, arguments, name)
        for place, files, main, arguments, name in places
        for what, write in files.items()
        # A run that has saved nothing begins.
        if (place, what) not in (("saved", "nothing"), ("saved", "loop"))
        # A pipe or a directory in place of a run's settings is no run either.
        and not (place == "saved" and what in ("pipe", "directory", "device"))
    }
    return cases | {
        f"corpus {what}": Case(damaged(change), prepare.main, _STORED, "corpus")
        for what, change in CORPORA.items()
    }


CASES = _cases()


def random_change(chance: random.Random) -> Case:
    """Return a change of some bytes of a stored corpus that keeps size and time."""
    name, kind = chance.choice(FILES), chance.choice(("bit", "bytes", "zeros", "other"))
    place, noise = chance.random(), chance.randbytes(chance.choice((1, 2, 16, 300)))

    def change(path: Path) -> None:
        file = path / name
        before, content = file.stat(), bytearray(file.read_bytes())
        start = int(place * len(content))
        if kind == "bit":
            content[start] ^= 1 << noise[0] % 8
        elif kind == "zeros":
            content[start : start + len(noise)] = bytes(len(content[start : start + len(noise)]))
        elif kind == "other":  # a part of the same file at another place
            part = content[: len(content) - start][: len(noise)]
            content[start : start + len(part)] = part
        else:
            content[start : start + len(noise)] = noise[: len(content) - start]
        file.write_bytes(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    return Case(damaged(change), _prepare_stored, (), f"corpus/{name}")


def _prepare_stored() -> None:
    """Find the stored corpus as `vp-prepare` does, but without composing settings every time."""

    def body() -> int:
        prepared(DataConfig("text", path="corpus", cache_dir="cache"), VOCAB, progress=False)
        return EXIT_OK

    guarded("vp-prepare", body)


@contextlib.contextmanager
def workplace() -> Iterator[Path]:
    """Work in a directory with text, a stored corpus that was checked, and a run."""
    with in_empty_directory() as root, mock.patch.dict(os.environ, {"SECRET": SECRET}):
        (root / "text").mkdir()
        for number in range(8):
            (root / f"text/{number}.txt").write_text(f"{number} one two three " * 50)
        config = DataConfig("text", path="text", cache_dir="cache")
        shutil.copytree(prepared(config, VOCAB, progress=False).path, root / "kept", symlinks=True)
        yield root


def tried(root: Path, case: Case) -> str | None:
    """Make the case in `root`; return what is wrong with how it ends, None if nothing."""
    for name in ("corpus", "runs"):
        shutil.rmtree(root / name, ignore_errors=True)
    shutil.copytree(root / "kept", root / "corpus")
    (root / "runs/one").mkdir(parents=True)
    case.make(root)
    same = _is_same(root)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wrong, said = judged(case.main, case.arguments, refuses=not same)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if wrong is None and not same:
        # Before text turns out to be broken, a line says what is done with it.
        if [line for line in said.splitlines() if not line.startswith(DOES)][1:]:
            wrong = f"{len(said.splitlines())} lines: {said[:300]!r}"
        elif case.name not in said:
            wrong = f"{case.name} is not named: {said[:300]!r}"
    if wrong is None and grown > MOST_BYTES:
        wrong = f"took {grown >> 20} MiB"
    if wrong is None and ((root / "pwned").exists() or SECRET in said):
        wrong = f"something ran, or was expanded: {said[:300]!r}"
    for path in root.glob("given.*"):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    return wrong


def _is_same(root: Path) -> bool:
    """Return whether the corpus says what it said, and no other file is given."""
    kept, ours = root / "kept", root / "corpus"
    if [*root.glob("given.*"), *(root / "runs/one").iterdir()]:
        return False
    try:
        if any((ours / name).is_symlink() or not (ours / name).is_file() for name in FILES):
            return False
        manifests = [json.loads((path / FILES[0]).read_bytes()) for path in (kept, ours)]
    except (ValueError, OSError, RecursionError):
        return False
    return manifests[0] == manifests[1] and all(
        (kept / name).stat().st_size == (ours / name).stat().st_size
        and (kept / name).read_bytes() == (ours / name).read_bytes()
        for name in FILES[1:]
    )


def campaign(seed: int, count: int) -> list[str]:
    """Try `count` cases, CASES in random order and then random changes; return the failures."""
    chance, failures = random.Random(seed), []
    names: list[str] = chance.sample(sorted(CASES), min(count, len(CASES)))
    cases = [(name, CASES[name]) for name in names]
    cases += [(f"change {n}", random_change(chance)) for n in range(count - len(cases))]
    with workplace() as root:
        for name, case in cases:
            if (wrong := tried(root, case)) is not None:
                failures.append(f"{name}: {wrong}")
    return failures
