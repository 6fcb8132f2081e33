"""The pages are true: links lead somewhere, commands parse, the first pages run as typed."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from itertools import cycle
from pathlib import Path

import pytest

from schedules.generators import GENERATORS
from schedules.render import svg
from tests.programs import finished
from tests.test_plan_command import AS_TYPED
from vp_train import failures
from vp_train.commands.simulate import simulate_step
from vp_train.commands.sweep import SWEEP, runs_of
from vp_train.config import ConfigError
from vp_train.planning.batch import batch_of
from vp_train.planning.cluster import on_cluster
from vp_train.planning.degrees import split_ranks, wanted_ranks
from vp_train.planning.plan import draft_step
from vp_train.planning.search import limit_of
from vp_train.planning.short import short_step
from vp_train.planning.weigh import Scales
from vp_train.planning.workload import Workload
from vp_train.settings import load_config

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GENERATED = ("settings.md",)
PAGES = [
    README,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
WRITTEN = [page for page in PAGES if page.name not in GENERATED]
COMMANDS = {
    entry.name: entry
    for entry in entry_points(group="console_scripts")
    if entry.value.startswith("vp_train.")
}
WITHOUT_SETTINGS = (
    *("vp-import", "vp-export", "vp-score", "vp-generate", "vp-explain", "vp-report"),
)
PLAIN = ("source", "pip", "pre-commit")  # nothing of ours to parse
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# Links


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return _FENCE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """Return what GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Every file and anchor of this repository that a page links to."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("https://", "http://", "mailto:")):
            path, _, anchor = target.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_a_file_and_a_heading(page):
    for path, anchor in links(page):
        assert path.is_relative_to(ROOT)
        assert path.exists(), f"{path} is not there"
        assert not anchor or anchor in anchors(path), f"{path} has no heading #{anchor}"


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_files_named_in_sentences_are_there(page):
    rooms = "schedules|vp_train|configs|tests|benchmarks|launch|docker|docs"
    for name in re.findall(rf"`((?:{rooms})/[\w./]*)`", prose(page)):
        assert "NAME" in name or (ROOT / name).exists(), f"{name} is not there"


def test_every_schedule_has_a_row_in_the_table_of_its_page():
    page = (ROOT / "docs/schedules.md").read_text()
    table = re.search(r"^## The family\n\n\| `schedule` .*\n(?:\|.*\n)+", page, re.MULTILINE)[0]
    rows = re.findall(r"^\| (`.*?) \|", table.partition("---")[2], re.MULTILINE)
    described = {name for row in rows for name in re.findall("`(.*?)`", row)}
    assert described == {*GENERATORS, "auto"}


def test_the_table_of_exit_codes_has_those_of_the_code():
    table = (ROOT / "docs" / "reliability.md").read_text().partition("## Exit codes")[2]
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", table.partition("\n## ")[0], re.M)}
    assert codes == {value for name, value in vars(failures).items() if name.startswith("EXIT_")}


def test_the_picture_of_a_schedule_is_the_one_that_is_drawn():
    outcome = simulate_step(load_config([]))
    drawn = svg(outcome.timeline, f"{outcome.name}, simulated")
    kept = (ROOT / "benchmarks/results/schedule.svg").read_text()
    assert kept == drawn, "run: make pictures"


def test_every_page_is_reached_from_the_readme():
    reached, open_pages = {README}, [README]
    while open_pages:
        for path, _ in links(open_pages.pop()):
            if path.suffix == ".md" and path not in reached:
                reached.add(path)
                open_pages.append(path)
    assert set(PAGES) - reached == set()


def test_the_readme_is_short():
    assert len(README.read_bytes()) <= 8_000


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_lines_of_pages_are_short(page):
    """Code blocks, tables and html cannot be broken."""
    assert [
        line
        for line in prose(page).splitlines()
        if len(line) > 100 and not line.startswith(("|", "<"))
    ] == []


# Commands


@dataclass(frozen=True, slots=True)
class Command:
    """A command: the variables before it, and its words."""

    environment: dict[str, str]
    words: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Command:
        words = shlex.split(text, comments=True)
        environment = {}
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            name, _, environment[name] = words.pop(0).partition("=")
        return cls(environment, tuple(words[: words.index(">")] if ">" in words else words))


def shell_lines(page: Path) -> list[str]:
    """The lines of the sh blocks of a page, continued ones joined."""
    blocks = [block for language, block in _FENCE.findall(page.read_text()) if language == "sh"]
    return [
        line for block in blocks for line in block.replace("\\\n", "").splitlines() if line.strip()
    ]


def quoted(page: Path) -> Iterator[str]:
    """Commands shown with output or inside sentences; one that leaves something open is none."""
    for _, block in _FENCE.findall(page.read_text()):
        yield from re.findall(r"^\$ (.*)$", block, re.MULTILINE)
    for code in re.findall(r"`([^`]+)`", prose(page)):
        words = code.split()
        if (
            len(words) > 1
            and words[0] in (*COMMANDS, "python", "pytest", "torchrun", "make")
            and not is_open(words)
        ):
            yield " ".join(words)


def is_open(words: list[str]) -> bool:
    """Return whether a word stands for something else, as NAME does."""
    return any("..." in word or word.isupper() for word in words)


CURRENT = [
    page for page in WRITTEN if page.name != "CHANGELOG.md"
]  # what a page of today says to type
TYPED = sorted({text for page in CURRENT for text in (*shell_lines(page), *quoted(page))})


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A directory with the files that commands read, and a home with text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home/corpus").mkdir(parents=True)
    return tmp_path


def stand_ins(place: Path) -> None:
    """Files that earlier commands of the pages write."""
    (place / "imported").mkdir()
    shutil.copy(ROOT / "configs/model/nano.yaml", place / "imported/model.yaml")
    for name in ("here.yaml", "measured.yaml"):
        shutil.copy(ROOT / "configs/cost/a100.yaml", place / name)
    (place / "run.yaml").write_text("model: nano\n")


def check_ours(words: tuple[str, ...], capsys, num_ranks: int | None = None) -> None:
    """A command of ours up to where its work would begin."""
    name, *arguments = words
    asks = "--help" in arguments
    added = [] if asks or name in WITHOUT_SETTINGS else ["--print-config"]
    enter = COMMANDS[name].load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments, *added])
        with pytest.raises(SystemExit) as left:
            enter()
    said = capsys.readouterr().err
    if name in WITHOUT_SETTINGS and not asks:
        assert "--help" not in said, said  # its words are in order; what it is to read is not here
        return
    assert left.value.code == 0, said
    if not asks and "--search" not in arguments:
        check_overrides(arguments, num_ranks, on_cluster=name in ("vp-plan", "vp-profile"))


def check_overrides(
    arguments: list[str], num_ranks: int | None, *, on_cluster: bool = False
) -> None:
    """Settings make a run of so many ranks, or of as many as they ask for."""
    config = load_config([word for word in arguments if re.match(r"[a-z][\w.]*=", word)])
    if not config.schedule.is_solved and config.schedule.file is None:
        wanted = config.cluster.num_gpus if on_cluster else wanted_ranks(config.parallel)
        draft_step(config, num_ranks or wanted)


def check_sweep(arguments: list[str]) -> None:
    """Every run of a sweep has settings that make a run."""
    runs, _ = runs_of([word for word in arguments if "=" in word])
    assert len(runs) > 1
    for run in runs:
        check_overrides(list(run.words), None)


def check_python(words: tuple[str, ...]) -> None:
    """A script or a module with its options, without running it."""
    arguments = list(words)
    if arguments[0] == "-m":
        path = ROOT.joinpath(*arguments[1].split("."))
        if arguments[1] == "pytest":
            check_pytest(arguments[2:])
            return
        path = path.with_suffix(".py")
        rest = arguments[2:]
    else:
        path, rest = ROOT / arguments[0], arguments[1:]
    source = path.read_text()
    for option in (word for word in rest if word.startswith("--")):
        assert f'"{option}"' in source, f"{path.name} has no option {option}"


def check_pytest(arguments: list[str]) -> None:
    paths = [word for word in arguments if word.startswith("tests")]
    assert paths
    for path in paths:
        assert (ROOT / path).exists(), path


def option_of(words: tuple[str, ...], name: str) -> int:
    return int(words[words.index(name) + 1])


@pytest.mark.parametrize("text", TYPED)
def test_every_command_parses(text, place, capsys):
    stand_ins(place)
    command = Command.parse(text)
    name, *rest = command.words
    if "-m" in rest and name == "vp-train":
        check_sweep(rest)
    elif name in COMMANDS:
        nodes = option_of(command.words, "--nodes") if "--nodes" in rest else 0
        check_ours(command.words, capsys, 8 * nodes or None)
    elif name == "srun":
        assert option_of(command.words, "--ntasks-per-node") == 8
        check_ours(tuple(rest[rest.index("vp-train") :]), capsys, 8)
    elif name == "torchrun":
        if "-m" in rest:
            assert rest[rest.index("-m") + 1] == "vp_train"
            check_overrides(rest, option_of(command.words, "--nproc-per-node"))
    elif name == "docker":
        check_overrides(rest[rest.index("vp_train") :], None)
    elif name == "sbatch" and "launch/sweep.sbatch" in rest:
        check_sweep(rest[rest.index("launch/sweep.sbatch") + 1 :])
    elif name == "sbatch":
        ours = rest[rest.index("launch/slurm.sbatch") + 1 :]
        check_ours(("vp-train", *ours), capsys, 8 * option_of(command.words, "--nodes"))
    elif name == "make":
        subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True)
    elif name == "python":
        check_python(tuple(rest))
    elif name == "pytest":
        check_pytest(rest)
    else:
        assert name in PLAIN, f"{text}: nothing here knows how to check it"


def test_the_run_of_the_readme_is_the_one_that_its_plan_is_of():
    commands = [Command.parse(line).words for line in shell_lines(README)]
    (plan,) = (words for words in commands if words[0] == "vp-plan")
    (run,) = (words for words in commands if "--nodes" in words)
    count = f"cluster.num_nodes={option_of(run, '--nodes')}"
    planned, trained = (
        load_config([word for word in words if "=" in word]) for words in (plan, (*run, count))
    )
    same = {name: getattr(trained, name) for name in ("data", "optim")}
    same["run"] = replace(planned.run, steps=trained.run.steps, name=trained.run.name)
    assert replace(planned, **same) == trained


# Options of Megatron-LM that take no value, and values of others as its users write them.
FLAGS = {
    *("sequence-parallel", "use-distributed-optimizer", "overlap-grad-reduce", "bf16", "fp16"),
    *("overlap-param-gather", "optimizer-cpu-offload", "swiglu", "disable-bias-linear"),
    *("add-qkv-bias", "qk-layernorm", "untie-embeddings-and-output-weights"),
    "check-for-nan-in-loss-and-grad",
}
VALUES = {
    "recompute-granularity": "selective",
    "position-embedding-type": "rope",
    "normalization": "RMSNorm",
    "fp8-format": "hybrid",
    "lr-decay-style": "cosine",
    "hidden-size": "512",
    **dict.fromkeys(("save", "load", "data-path", "tokenizer-model"), "here"),
    **dict.fromkeys(("norm-epsilon", "lr", "min-lr", "adam-beta1", "weight-decay"), "1e-5"),
}
# What a setting that is typed alone needs.
NEEDS = {
    "optim.offload": ["optim.name=zero1"],
    "run.linear_dtype": ["run.dtype=bfloat16"],
}


def test_options_of_megatron_are_answered_with_settings_that_can_be_typed():
    page = (ROOT / "docs/from_megatron.md").read_text()
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", page, re.MULTILINE)
    assert len(rows) > 20
    for options, settings in rows:
        pairs = zip(
            re.findall(r"`--(.*?)`", options), cycle(re.findall(r"`(.*?)`", settings)), strict=False
        )
        for option, setting in pairs:
            value = [] if option in FLAGS else [VALUES.get(option, "8")]
            with pytest.raises(ConfigError) as caught:
                load_config([f"--{option}", *value, "run.steps=3"])
            (way,) = re.findall(r"is not an option; write (.*?); (?:to|there)", str(caught.value))
            assert way.startswith(f"{setting}=")
            words = re.findall(r"(?:^| )([a-z_.]+=[^ ,]+)(?![^ ,])", way)
            if "..." not in way:
                load_config([*NEEDS.get(setting, []), *words])


def test_the_search_that_is_shown_has_the_figures_of_its_plans():
    """Two short steps give the time of a long one to 1 %, and the bytes of its offloading to 10."""
    page = (ROOT / "docs/planning.md").read_text()
    (shown,) = (block for _, block in _FENCE.findall(page) if "vp-plan --search --top" in block)
    (command,) = re.findall(r"^\$ vp-plan --search --top 3 (.*)$", shown, re.MULTILINE)
    (plan,) = re.findall(r"^the first:\s+(.*)$", shown, re.MULTILINE)
    row = r"^1 .* (\S+) s +(\S+)% +(\S+)% +(\S+) +\S+ \*$"
    seconds, mfu, _, gib = map(float, re.findall(row, shown, re.MULTILINE)[0])
    config, planned = (load_config(words.split()) for words in (command, f"{command} {plan}"))
    num_gpus = planned.cluster.num_gpus
    degrees = split_ranks(planned.parallel, num_gpus)
    cost = on_cluster(Workload.of(planned, degrees), planned.cluster, planned.cost)
    draft = draft_step(replace(planned, cost=cost), num_gpus)
    step, passes, _ = short_step(draft, planned.schedule.name)
    scales = Scales(planned, limit_of(planned.cluster, 0.05), None)
    assert passes + scales.after(step, planned.optim) == pytest.approx(seconds, rel=0.01)
    assert scales.needs(step, [planned.optim])[0][0] / 2**30 == pytest.approx(gib, rel=0.1)
    flops = draft.work.step_flops * degrees.dp / seconds / num_gpus
    assert mfu / 100 == pytest.approx(flops / planned.cluster.bfloat16_flops_per_second, abs=1e-3)
    assert batch_of(planned) == batch_of(config)


@pytest.mark.parametrize(
    "page", [page for page in WRITTEN if "```python" in page.read_text()], ids=name_of
)
def test_python_on_pages_compiles_and_finds_its_names(page):
    for language, block in _FENCE.findall(page.read_text()):
        if language == "python":
            compile(block, str(page), "exec")
            imports = re.findall(r"^(?:from|import) .*$", block, re.MULTILINE)
            exec("\n".join(imports), {})


def test_make_refuses_another_python_than_the_package_takes_before_it_makes_anything(tmp_path):
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    least = tuple(map(int, needed.removeprefix(">=").split(".")))
    make = ["make", "-C", ROOT, f"VENV={tmp_path}/venv", f"{tmp_path}/venv/installed"]
    for version in ((2, 7), (3, least[1] - 1), least, (3, least[1] + 1), (4, 0)):
        python = tmp_path / "python"
        python.write_text(
            f"#!/bin/sh\n[ $1 = -c ] || {{ echo made; exit 9; }}\n"
            f'exec {sys.executable} -c "import sys; sys.version_info = {version}; $2"\n'
        )
        python.chmod(0o755)
        done = subprocess.run(
            [*make, f"PYTHON={python}"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode != 0
        assert ("made" in done.stdout) is (version >= least)
        words = f"{python} is Python {version[0]}.{version[1]}, and vp_train needs {needed[2:]} or"
        assert (words in done.stderr) is (version < least)


# The first pages, run


def as_typed() -> None:
    """Do what a command does, with another sys.executable."""
    _, sys.executable, *sys.argv = sys.argv
    COMMANDS[sys.argv[0]].load()()


def run_typed(line: str, programs: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of a page in bash; a command of ours in a process that has imported it.

    What it starts with sys.executable has made its imports too, but is not its child.
    """
    command = Command.parse(line)
    name, *words = command.words
    if name not in COMMANDS or set(line) & set("|&;<>$`*?"):
        return subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, timeout=300, check=False
        )
    assert shutil.which(name) is not None
    python = Path("home/python")
    python.write_text(f'#!/bin/sh\nunset {SWEEP}\nexec {programs}/python "$@"\n')
    python.chmod(0o755)
    words = [str(python.absolute()), name, *map(os.path.expanduser, words)]
    return finished(as_typed, *words, seconds=300, variables=command.environment)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_pages_run_as_typed(place, programs, monkeypatch):
    """Every line, one after the other in one directory, each distinct line once.

    `make`, and lines for several nodes or a GPU, are asked what they would do; pip would need a
    network.  A plan of 1024 microbatches is made with 48, to take less time.
    tests/test_plan_command.py runs AS_TYPED.
    """
    first_pages = (README, ROOT / "docs/quickstart.md", ROOT / "docs/working_day.md")
    for number in range(40):
        text = (ROOT / "vp_train/config/model.py").read_text()
        (place / "home/corpus" / f"{number}.txt").write_text(
            text[number * 100 : number * 100 + 3000]
        )
    for name in ("launch", "Makefile", "pyproject.toml", "constraints.txt"):
        (place / name).symlink_to(ROOT / name)
    (place / ".venv").symlink_to(sys.prefix)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for line in dict.fromkeys(line for page in first_pages for line in shell_lines(page)):
        if line.startswith("pip ") or line.split() == ["vp-plan", *AS_TYPED]:
            continue
        typed = re.sub(r"^make ", "make -n ", line)
        typed = typed.replace("num_microbatches=1024", "num_microbatches=48")
        if {"--nodes", "run.device=cuda"} & set(typed.split()):
            typed = f"{typed} --print-config"
        done = run_typed(typed, programs)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(place / "data-cache")
    assert {path.name for path in (place / "exported").iterdir()} >= {
        "config.json",
        "tokenizer.json",
    }
    assert (place / "runs/again/checkpoints").is_dir()
    python = [
        code for kind, code in _FENCE.findall(first_pages[-1].read_text()) if kind == "python"
    ]
    exec("\n".join(python), {})
