"""The arrows between packages point one way, and each heavy dependency has one door."""

from __future__ import annotations

import ast
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for package in ("schedules", "vp_train") for path in (ROOT / package).rglob("*.py")
)
OURS = ("schedules", "vp_train")

# What a module may import of ours, the longest prefix of its name deciding; modules not listed may
# import anything of ours but the top: nobody imports train or a command, except that commands do.
ALLOWED = {
    "schedules": ("schedules",),
    "vp_train.config": ("vp_train.config",),
    "vp_train.settings": (
        "vp_train.config",
        "vp_train.durable",
        "vp_train.settings",
        "vp_train.units",
    ),
    "vp_train.units": (),
    "vp_train.quiet": (),
    "vp_train.durable": (),
    "vp_train.failures": ("vp_train.config", "vp_train.durable"),
    "vp_train.supervision": (
        "vp_train.communication",
        "vp_train.config",
        "vp_train.durable",
        "vp_train.failures",
        "vp_train.supervision",
    ),
    "vp_train.tensors": ("vp_train.tensors",),
    "vp_train.communication": (
        "schedules",
        "vp_train.config",
        "vp_train.durable",
        "vp_train.planning.degrees",
        "vp_train.communication",
    ),
    "vp_train.planning": (
        "schedules",
        "vp_train.config",
        "vp_train.durable",
        "vp_train.model.shape",
        "vp_train.planning",
        "vp_train.tensors.alignment",
        "vp_train.units",
        "vp_train.vocab.chunks",
        "vp_train.vocab.shard",
    ),
    "vp_train.explain": (
        "schedules",
        "vp_train.config",
        "vp_train.durable",
        "vp_train.explain",
        "vp_train.planning",
        "vp_train.profile.costs",
    ),
    "vp_train.model": ("vp_train.config", "vp_train.model", "vp_train.quiet", "vp_train.tensors"),
    "vp_train.vocab": ("schedules.ir", "schedules.vocab", "vp_train.tensors", "vp_train.vocab"),
    "vp_train.pipeline": ("schedules", "vp_train.tensors", "vp_train.vocab", "vp_train.pipeline"),
    "vp_train.optim": (
        "vp_train.communication.control",
        "vp_train.config",
        "vp_train.optim",
        "vp_train.quiet",
        "vp_train.tensors",
        "vp_train.units",
    ),
    "vp_train.hf": (
        "vp_train.config",
        "vp_train.checkpoint",
        "vp_train.data.tokenizer",
        "vp_train.model.shape",
        "vp_train.hf",
        "vp_train.durable",
        "vp_train.tensors.precision",
        "vp_train.units",
    ),
    "vp_train.preflight": (
        "schedules",
        "vp_train.communication",
        "vp_train.config",
        "vp_train.failures",
        "vp_train.planning",
        "vp_train.preflight",
        "vp_train.units",
    ),
    "vp_train.report": (
        "schedules",
        "vp_train.config",
        "vp_train.durable",
        "vp_train.explain",
        "vp_train.report",
        "vp_train.settings",
        "vp_train.units",
    ),
    "vp_train.data": (
        "vp_train.config",
        "vp_train.data",
        "vp_train.durable",
        "vp_train.quiet",
        "vp_train.units",
    ),
}
MOST_POSITIONAL = 5  # parameters of a constructor; the others are keywords
MOST_ROOT_MODULES = 8  # besides __init__ and __main__
DOORS = {
    "megatron": {"vp_train.model.megatron", "vp_train.data.indexed"},
    "hydra": {f"vp_train.settings.{name}" for name in ("compose", "sweeps", "words")},
    "omegaconf": {f"vp_train.settings.{name}" for name in ("choices", "compose", "files", "saved")},
    "tokenizers": {"vp_train.data.tokenizer", "vp_train.data.worker"},
    "pyarrow": {"vp_train.data.tables"},
    "zstandard": {"vp_train.data.files"},
    "safetensors": {"vp_train.checkpoint.store", "vp_train.checkpoint.stream"},
    "transformers": set(),
    "matplotlib": {"vp_train.commands.plot", "vp_train.report.draw"},
    "jinja2": {"vp_train.report.page"},
    "deepspeed": {"vp_train.optim.offload"},
    "wandb": set(),  # metrics.trackers imports what is installed, by name
    "mlflow": set(),
}
# The only modules of planning that know the whole configuration; the others take its sections and
# the Workload that is made of it.
KNOW_THE_RUN = {"workload", "plan", "report", "choice", "compare", "weigh", "search", "no_choice"}
KNOW_THE_RUN |= {"slow_link", "outlook", "batch", "kept", "space", "alternatives"}
WITHOUT_TORCH = (
    "schedules",
    "vp_train.config",
    "vp_train.durable",
    "vp_train.communication.communicators",
    "vp_train.communication.flight_recorder",
    "vp_train.commands.command",
    "vp_train.commands.explain",
    "vp_train.commands.plan",
    "vp_train.commands.plan_remedies",
    "vp_train.commands.plan_words",
    "vp_train.commands.plot",
    "vp_train.commands.report",
    "vp_train.commands.search_beside",
    "vp_train.commands.search_words",
    "vp_train.commands.simulate",
    "vp_train.explain",
    "vp_train.failures",
    "vp_train.planning",
    "vp_train.preflight.findings",
    "vp_train.report",
    "vp_train.settings",
    "vp_train.supervision.ending",
    "vp_train.supervision.requests",
    "vp_train.units",
    "vp_train.model.shape",
    "vp_train.data.documents",
    "vp_train.data.encoding",
    "vp_train.data.tables",
)


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def statements_of(path):
    """The imports of a file, except for type checking only, and its functions."""
    found, waiting = [], [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef):
            found.append(node)
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            waiting += (child for child in ast.iter_child_nodes(node) if may_hold(child))
    return found


def may_hold(node):
    """Return whether a node is a statement, or a part of one that has statements."""
    return isinstance(node, ast.stmt | ast.excepthandler | ast.match_case)


@cache
def imports_of(path):
    """Every module imported anywhere in the file, except for type checking only."""
    found = set()
    for node in statements_of(path):
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


def test_arrows_point_one_way():
    for path in SOURCES:
        module = name_of(path)
        rules = [prefix for prefix in ALLOWED if within(module, (prefix,))]
        ours = {imported for imported in imports_of(path) if within(imported, OURS)}
        if rules:
            allowed = ALLOWED[max(rules, key=len)]
            assert [name for name in ours if not within(name, allowed)] == [], module
        if not within(module, ("vp_train.commands", "vp_train.__main__")):
            top = ("vp_train.train", "vp_train.commands")
            assert [name for name in ours if within(name, top)] == [], module


def test_no_module_needs_itself():
    """Also through others; what is imported for type checking only does not count."""
    modules = {name_of(path): path for path in SOURCES}
    needs = {name: imports_of(path) & modules.keys() for name, path in modules.items()}
    TopologicalSorter(needs).prepare()  # raises CycleError


def test_heavy_dependencies_have_one_door():
    for path in SOURCES:
        module = name_of(path)
        imported = {name.split(".")[0] for name in imports_of(path)}
        for dependency, doors in DOORS.items():
            assert dependency not in imported or module in doors, (module, dependency)
        if within(module, WITHOUT_TORCH):
            assert "torch" not in imported, module
        if within(module, ("schedules",)):
            assert imported - {"schedules", "numpy"} <= sys.stdlib_module_names, module


def test_constructors_with_many_parameters_take_keywords():
    for path in SOURCES:
        for node in statements_of(path):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                positional = [*node.args.posonlyargs, *node.args.args][1:]
                assert len(positional) <= MOST_POSITIONAL, f"{path}, line {node.lineno}"


def test_planning_computes_with_a_workload_and_not_with_the_whole_configuration():
    paths = (ROOT / "vp_train" / "planning").glob("*.py")
    assert {path.stem for path in paths if "RunConfig" in path.read_text()} == KNOW_THE_RUN


def test_the_root_has_few_modules():
    modules = {path.stem for path in (ROOT / "vp_train").glob("*.py")} - {"__init__", "__main__"}
    assert len(modules) <= MOST_ROOT_MODULES, sorted(modules)


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {name_of(path) for path in SOURCES if path.name == "__init__.py"}
    configs = {name for name in listed if name.startswith("vp_train.configs")}
    assert set(listed) - configs == found
    assert configs == {
        ".".join(("vp_train", *path.parent.relative_to(ROOT).parts))
        for path in (ROOT / "configs").rglob("*.yaml")
    }
