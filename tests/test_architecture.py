"""The arrows between packages point one way, and each heavy dependency has one door."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for package in ("schedules", "vp_train") for path in (ROOT / package).rglob("*.py"))
OURS = ("schedules", "vp_train")

# What a module may import of ours, the longest prefix of its name deciding; modules not listed may import anything of ours
# but the top: nobody imports train or cli, except that cli starts train and launcher.
PLANNING = ("schedules", "vp_train.config", "vp_train.degrees", "vp_train.model.shape", "vp_train.vocab.shard")
ALLOWED = {
    "schedules": ("schedules",),
    "vp_train.config": (),
    "vp_train.settings": ("vp_train.config",),
    "vp_train.exits": (),
    "vp_train.quiet": (),
    "vp_train.durable": (),
    "vp_train.split": (),
    "vp_train.precision": (),
    "vp_train.degrees": ("vp_train.config",),
    "vp_train.communicators": ("schedules", "vp_train.degrees"),
    "vp_train.control": (),
    "vp_train.failures": ("vp_train.config", "vp_train.exits"),
    "vp_train.flight_recorder": (),
    "vp_train.nccl": ("vp_train.config", "vp_train.flight_recorder"),
    "vp_train.estimate": PLANNING,
    "vp_train.placement": (*PLANNING, "vp_train.estimate"),
    "vp_train.plan": (*PLANNING, "vp_train.estimate", "vp_train.placement"),
    "vp_train.model": (
        "vp_train.config",
        "vp_train.model",
        "vp_train.precision",
        "vp_train.quiet",
        "vp_train.split",
        "vp_train.streams",
    ),
    "vp_train.streams": (),
    "vp_train.collectives": (),
    "vp_train.vocab": ("schedules.ir", "schedules.vocab", "vp_train.precision", "vp_train.streams", "vp_train.vocab"),
    "vp_train.pipeline": (
        "schedules",
        "vp_train.collectives",
        "vp_train.precision",
        "vp_train.streams",
        "vp_train.vocab",
        "vp_train.pipeline",
    ),
    "vp_train.optim": (
        "vp_train.collectives",
        "vp_train.config",
        "vp_train.control",
        "vp_train.optim",
        "vp_train.precision",
        "vp_train.quiet",
    ),
    "vp_train.hf": ("vp_train.config", "vp_train.checkpoint", "vp_train.model.shape", "vp_train.hf", "vp_train.durable"),
    "vp_train.data": ("vp_train.config", "vp_train.data", "vp_train.durable", "vp_train.quiet"),
}
DOORS = {
    "megatron": {"vp_train.model.megatron", "vp_train.data.indexed"},
    "hydra": {"vp_train.settings"},
    "omegaconf": {"vp_train.settings"},
    "tokenizers": {"vp_train.data.tokenizer", "vp_train.data.corpus"},
    "safetensors": {"vp_train.checkpoint.store", "vp_train.checkpoint.stream"},
    "transformers": set(),
    "matplotlib": {"vp_train.plot"},
    "deepspeed": {"vp_train.optim.offload"},
}
WITHOUT_TORCH = (
    "schedules",
    "vp_train.config",
    "vp_train.communicators",
    "vp_train.degrees",
    "vp_train.estimate",
    "vp_train.failures",
    "vp_train.flight_recorder",
    "vp_train.placement",
    "vp_train.plan",
    "vp_train.planner",
    "vp_train.simulation",
    "vp_train.plot",
    "vp_train.exits",
    "vp_train.model.shape",
    "vp_train.data.documents",
)


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
    """Every module imported anywhere in the file, except for type checking only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(submodule(node.module, alias.name) or node.module for alias in node.names)
    return found


def submodule(package, name):
    """`package.name` if it is a module of ours."""
    path = ROOT.joinpath(*package.split("."), name)
    return f"{package}.{name}" if path.is_dir() or path.with_suffix(".py").exists() else None


def within(module, prefixes):
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_arrows_point_one_way(path):
    module = name_of(path)
    rules = [prefix for prefix in ALLOWED if within(module, (prefix,))]
    ours = {imported for imported in imports_of(path) if within(imported, OURS)}
    if rules:
        allowed = ALLOWED[max(rules, key=len)]
        assert {imported for imported in ours if not within(imported, allowed)} == set()
    if module not in ("vp_train.cli", "vp_train.__main__"):
        assert not {imported for imported in ours if within(imported, ("vp_train.train", "vp_train.cli", "vp_train.launcher"))}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_heavy_dependencies_have_one_door(path):
    module = name_of(path)
    imported = {name.split(".")[0] for name in imports_of(path)}
    for dependency, doors in DOORS.items():
        assert dependency not in imported or module in doors, dependency
    if within(module, WITHOUT_TORCH):
        assert "torch" not in imported
    if within(module, ("schedules",)):
        assert imported - {"schedules", "numpy"} <= sys.stdlib_module_names
