"""The image has what it names, runs without root, and the package works without the checkout.

`python -m tests.launch.dockerfile DIRECTORY` carries out the pip commands too, which takes minutes.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from tests.launch.dockerfile import (
    DOCKERFILE,
    ROOT,
    arguments,
    clean_environment,
    commands,
    copies,
    copy_context,
    packages,
    steps,
)

STEPS = steps(DOCKERFILE.read_text())


def test_everything_that_is_copied_exists_and_is_not_ignored():
    rules = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert rules[0] == "*"
    for source, _ in copies(STEPS):
        assert (ROOT / source).exists(), source
        assert f"!{source}" in rules
    named = {rule[1:] for rule in rules if rule.startswith("!")}
    assert named == {source for source, _ in copies(STEPS)}
    assert not [name for name in named if fnmatch.fnmatch(name, ".*")]


def test_the_image_has_rdma_and_a_user_without_root_s_rights():
    names = [step.name for step in STEPS]
    assert {"libibverbs1", "librdmacm1", "ibverbs-providers"} <= set(packages(STEPS))
    (user,) = [step.text for step in STEPS if step.name == "USER"]
    assert user not in ("root", "0")
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    assert any(command[:1] == ["useradd"] and user in command for command in commands_of())


@pytest.mark.skipif(shutil.which("useradd") is None or os.getuid() != 0, reason="needs useradd")
@pytest.mark.parametrize("others", ["", "ubuntu:x:1000:1000::/home/ubuntu:/bin/sh\n"])
def test_the_user_is_made_whether_or_not_the_base_has_one_of_its_number(tmp_path, others):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/passwd").write_text(f"root:x:0:0::/root:/bin/sh\n{others}")
    (tmp_path / "etc/group").write_text("root:x:0:\n")
    (command,) = (command for command in commands_of() if command[0] == "useradd")
    subprocess.run(["useradd", "--prefix", tmp_path, *command[1:]], check=True, timeout=60)
    added = (tmp_path / "etc/passwd").read_text().splitlines()[-1]
    assert added.split(":")[0:3:2] == ["vp", "1000"]
    assert (tmp_path / "home/vp").is_dir()


def commands_of(**values):
    return commands(STEPS, arguments(STEPS) | values)


def test_torch_and_its_index_are_build_arguments_and_their_default_is_what_is_tested():
    pip = [command for command in commands_of() if command[0] == "pip"]
    assert "torch==2.13.0" in pip[0]
    makefile = (ROOT / "Makefile").read_text()
    assert arguments(STEPS)["TORCH"] in makefile
    other = commands_of(TORCH="torch==2.12.1", PIP_OPTIONS="--index-url URL")
    assert any({"torch==2.12.1", "--index-url", "URL"} <= set(command) for command in other)


@pytest.mark.skipif(shutil.which("apt-cache") is None, reason="no apt-cache here")
def test_debian_has_the_packages():
    found = subprocess.run(
        ["apt-cache", "policy", *packages(STEPS)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    if not [line for line in found.splitlines() if line.startswith("g++:")]:
        pytest.skip("apt has no lists of packages here (apt-get update)")
    candidates = [line.split()[-1] for line in found.splitlines() if "Candidate:" in line]
    assert len(candidates) == len(packages(STEPS))
    assert "(none)" not in candidates


@pytest.mark.slow
def test_the_package_that_the_image_installs_works_without_the_checkout(tmp_path):
    setuptools = pytest.importorskip("setuptools")
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    if int(setuptools.__version__.split(".")[0]) < int(needed[0].partition(">=")[2]):
        pytest.skip(f"building needs {needed[0]}, here is {setuptools.__version__}")
    context, environment, work = (tmp_path / name for name in ("context", "venv", "work"))
    for path in (context, work):
        path.mkdir()
    copy_context(STEPS, context)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    subprocess.run([sys.executable, "-c", build], cwd=context, check=True, timeout=60)
    (wheel,) = context.glob("*.whl")
    venv.create(environment, with_pip=False)
    (packages_dir,) = environment.glob("lib/python*/site-packages")
    # Dependencies come from here.  A path in a .pth file brings no finder of an editable install.
    ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages_dir / "dependencies.pth").write_text("\n".join(ours))
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")),
            *("install", "--quiet", "--no-deps", "--no-index", str(wheel)),
        ],
        check=True,
        timeout=60,
    )
    variables = clean_environment(environment)

    def run(*words):
        return subprocess.run(
            words,
            cwd=work,
            env=variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout

    where = "import vp_train, schedules; print(vp_train.__file__, schedules.__file__)"
    assert str(ROOT) not in run("python", "-c", where).replace(str(tmp_path), "")
    assert "llama3_8b" in run("vp-train", "--help")
    assert "1f1b with one_barrier" in run("vp-plan", "model=nano", "schedule=1f1b")
