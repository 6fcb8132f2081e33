"""Measure what vp-prepare takes for a gigabyte of text, and whether its memory is bounded.

    python benchmarks/prepare.py [--megabytes 48] [--workers 1,2] [--tokens MILLIONS]
        [--before DIR] [--json FILE]

The text is Python's standard library, again and again, with the tokenizer trained once.  Each case
is a process of its own: text files, .jsonl, .jsonl.gz, .parquet, and with `--huge` one line without
a blank and one of words, of so many megabytes.  `--tokens` adds corpora of Megatron-LM with so many
random tokens, in documents of 1,000 and of 100; `--megabytes 0` leaves out the text.  `--before` is
the checkout of another version; its cases are text files and .jsonl.  Of a machine with other work
the CPU seconds say more than the seconds: they count all processes and not the time in which others
run.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from provenance import provenance

VOCAB_SIZE = 32_768
_ROOT = Path(__file__).parent.parent

_CASE = """
import json, resource, sys, time
from vp_train.config import DataConfig
from vp_train.data import prepare
from vp_train.quiet import quiet_megatron

def cpu_seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)

def peak_bytes():
    # Not ru_maxrss: that begins with the memory of the process that has started this one.
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

options = json.loads(sys.argv[1])
vocab_size = options.pop("vocab_size")
with quiet_megatron():
    import megatron.core.datasets.indexed_dataset
started, cpu = time.perf_counter(), cpu_seconds()
corpus = prepare(DataConfig(name="text", **options), vocab_size, progress=False)
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "cpu_seconds": cpu_seconds() - cpu,
    "peak_bytes": peak_bytes(),
    "tokens": corpus.manifest.num_tokens,
}))
"""


def texts(num_bytes: int) -> Iterator[str]:
    """Yield files of the standard library until they have `num_bytes` together."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    seen = 0
    while True:
        for file in files:
            text = file.read_text(encoding="utf-8")
            seen += len(text.encode())
            yield text
            if seen >= num_bytes:
                return


def write_forms(directory: Path, num_bytes: int) -> dict[str, Path]:
    """Write the same text in every form, and return where."""
    found = list(texts(num_bytes))
    plain = directory / "text"
    plain.mkdir()
    for number, text in enumerate(found):
        (plain / f"{number:06}.txt").write_text(text, encoding="utf-8")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in found).encode()
    forms = {"text": plain, "jsonl": directory / "a.jsonl", "jsonl.gz": directory / "a.jsonl.gz"}
    forms["jsonl"].write_bytes(lines)
    forms["jsonl.gz"].write_bytes(gzip.compress(lines, 6))
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return forms
    forms["parquet"] = directory / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": found}), forms["parquet"])
    return forms


def write_huge(directory: Path, num_bytes: int) -> dict[str, Path]:
    """Write a text of one line without a blank, and one of one line of words."""
    forms = {"no blank": directory / "no_blank.txt", "one line": directory / "one_line.txt"}
    for name, path in forms.items():
        text = " ".join(" ".join(texts(1 << 24)).split())
        part = (text.replace(" ", "") if name == "no blank" else text).encode()
        with path.open("wb") as file:
            for _ in range(-(-num_bytes // len(part))):
                file.write(part)
            file.truncate(num_bytes)
    return forms


def write_pairs(directory: Path, num_tokens: int) -> dict[str, Path]:
    """Write random tokens as Megatron-LM does, in documents of 1,000 and of 100, uint16."""
    from vp_train.data.indexed import write_dataset

    forms = {}
    for length in (1_000, 100):
        random = np.random.default_rng(0)
        documents = (
            (random.integers(1, VOCAB_SIZE, length - 1), True) for _ in range(num_tokens // length)
        )
        forms[f"tokens/{length}"] = directory / f"{length}_text_document.idx"
        write_dataset(directory / f"{length}_text_document", documents, 0, VOCAB_SIZE)
    return forms


def measure(
    checkout: Path, path: Path, tokenizer: Path, num_bytes: int, **settings: object
) -> dict[str, Any]:
    """Prepare `path` in a process of its own with the code in `checkout`."""
    with tempfile.TemporaryDirectory() as cache:
        options = {"path": str(path), "tokenizer": str(tokenizer), "cache_dir": cache, **settings}
        options["vocab_size"] = VOCAB_SIZE
        done = subprocess.run(
            [sys.executable, "-c", _CASE, json.dumps(options)],
            env={**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            check=True,
            cwd=cache,
        )
    found = json.loads(done.stdout.splitlines()[-1])
    for name in ("seconds", "cpu_seconds"):
        found[f"{name}_per_gb"] = found[name] * 1e9 / num_bytes
    return dict(found)


def main() -> None:
    """Measure every case, print it, and write all of them to --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=48)
    parser.add_argument("--huge", type=int, default=0, metavar="MEGABYTES")
    parser.add_argument("--tokens", type=int, default=0, metavar="MILLIONS")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--before", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    cases = []

    def run(code: str, name: str, path: Path, num_bytes: int, **settings: object) -> None:
        checkout = options.before.resolve() if code == "before" else _ROOT
        found = measure(checkout, path, tokenizer, num_bytes, **settings)
        cases.append({"code": code, "form": name, "bytes": num_bytes, **settings, **found})
        if options.json is not None:
            result = provenance() | {"load_average": os.getloadavg(), "cases": cases}
            options.json.write_text(json.dumps(result, indent=1) + "\n")
        print(
            f"{code:<6} {name:<11} {settings.get('workers', '-'):>2} workers  "
            f"{found['seconds_per_gb']:7.0f} s/GB  {found['cpu_seconds_per_gb']:7.0f} CPU s/GB  "
            f"peak {found['peak_bytes'] / 1e6:,.0f} MB",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as directory:
        tokenizer = Path(directory) / "tokenizer.json"
        from vp_train.data.tokenizer import train_tokenizer

        train_tokenizer(texts(1 << 23), VOCAB_SIZE).save(str(tokenizer))
        num_bytes = options.megabytes * 1_000_000
        forms = write_forms(Path(directory), num_bytes) if num_bytes else {}
        for name, path in forms.items():
            if options.before is not None and name in ("text", "jsonl"):
                run("before", name, path, num_bytes)
            for workers in map(int, options.workers.split(",")):
                run("now", name, path, num_bytes, workers=workers)
        if options.huge:
            most = max(map(int, options.workers.split(",")))
            for name, path in write_huge(Path(directory), options.huge * 1_000_000).items():
                run("now", name, path, options.huge * 1_000_000, workers=most)
        if options.tokens:
            for name, path in write_pairs(Path(directory), options.tokens * 1_000_000).items():
                run("now", name, path, path.with_suffix(".bin").stat().st_size)


if __name__ == "__main__":
    main()
