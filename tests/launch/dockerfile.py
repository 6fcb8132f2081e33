"""Carry out the steps of docker/Dockerfile without a daemon.

    python -m tests.launch.dockerfile DIRECTORY

makes a virtual environment in DIRECTORY, copies what the image copies, runs every pip command of
the image there, and then `vp-train --help` from an empty directory.  It takes minutes and a package
index.  With --apt it also asks apt whether it could install the packages.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"


@dataclass(frozen=True, slots=True)
class Step:
    """One instruction of a Dockerfile and its text."""

    name: str
    text: str


def steps(text: str) -> list[Step]:
    """Return the instructions of a Dockerfile in order."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    split = (line.split(maxsplit=1) for line in joined.splitlines() if line.strip())
    return [Step(name, rest[0].strip() if rest else "") for name, *rest in split]


def arguments(found: Sequence[Step]) -> dict[str, str]:
    """Return the build arguments and their defaults."""
    pairs = (step.text.partition("=") for step in found if step.name == "ARG")
    return {name: value for name, _, value in pairs}


def copies(found: Sequence[Step]) -> Iterator[tuple[str, str]]:
    """Yield source and destination of everything that is copied."""
    for step in found:
        if step.name == "COPY":
            *sources, destination = step.text.split()
            yield from ((source, destination) for source in sources)


def commands(found: Sequence[Step], values: Mapping[str, str]) -> list[list[str]]:
    """Return the commands of all RUN steps as words, with the build arguments put in."""
    result = []
    for step in found:
        if step.name != "RUN":
            continue
        text = re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], step.text)
        result += [part.split() for part in text.split("&&")]
    return result


def packages(found: Sequence[Step]) -> list[str]:
    """Return the Debian packages that the image installs."""
    return [
        word
        for command in commands(found, arguments(found))
        if command[:2] == ["apt-get", "install"]
        for word in command[2:]
        if not word.startswith("-")
    ]


def copy_context(found: Sequence[Step], target: Path) -> None:
    """Copy from the repository into `target` what the image has in its working directory."""
    for source, destination in copies(found):
        origin, goal = ROOT / source, target / destination
        if origin.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(origin, goal, ignore=ignored, dirs_exist_ok=True)
        else:
            shutil.copy(origin, goal)


def clean_environment(environment: Path) -> dict[str, str]:
    """Return variables under which only the virtual environment's Python is found."""
    kept = {name: os.environ[name] for name in os.environ if not name.startswith("PYTHON")}
    kept["PATH"] = f"{environment / 'bin'}:{os.environ['PATH']}"
    return kept | {"VIRTUAL_ENV": str(environment)}


def main() -> None:
    """Carry out the steps, and leave with the code of the first that fails."""
    parser = argparse.ArgumentParser(description="Carry out the Dockerfile without a daemon.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--apt", action="store_true")
    options = parser.parse_args()
    found = steps(DOCKERFILE.read_text())
    environment, context = options.directory / "venv", options.directory / "context"
    work = options.directory / "workspace"
    for path in (context, work):
        path.mkdir(parents=True)
    venv.create(environment, with_pip=True)
    copy_context(found, context)
    variables = clean_environment(environment)
    todo = [(words, context) for words in commands(found, arguments(found)) if words[0] == "pip"]
    if options.apt:
        todo.insert(0, (["apt-get", "install", "--simulate", *packages(found)], context))
    todo.append((["vp-train", "--help"], work))
    todo.append((["vp-plan", "model=nano"], work))
    for words, directory in todo:
        print(f"$ {' '.join(words)}", flush=True)
        code = subprocess.run(words, cwd=directory, env=variables, check=False).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    main()
