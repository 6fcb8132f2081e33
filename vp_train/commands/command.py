"""Parts that all commands share: overrides, options and help, and exit codes for errors."""

from __future__ import annotations

import argparse
import difflib
import gc
import math
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from vp_train.config import ConfigError, RunConfig, printable
from vp_train.durable import missing_directories, write_output
from vp_train.failures import EXIT_OK, ending_of_command
from vp_train.settings import load_config
from vp_train.settings.files import config_text, expanded, has_settings
from vp_train.settings.help import (
    all_settings_help,
    files_words,
    section_help,
    setting_help,
    settings_help,
)
from vp_train.settings.meant import close_names
from vp_train.settings.tree import YAML_ENDINGS, group_choices, sections, setting_names
from vp_train.supervision.ending import write_stderr

_WIDTH, _LEAST_WIDTH = 100, 40  # columns of lines without a terminal, and on any terminal
_NARROWEST = 32  # columns of a meaning beside its label
_MEANING, _INDENT = 48, 6  # the column of the meaning of settings, and that below a long label
_ALL = "settings"  # what --help takes for all of them
_LABEL = re.compile(r" +\S+( \S+)? {2,}(?=\S)|\s*")  # what further lines leave free
_LEAST_OF_GPUS = 1e13  # FLOP/s in bfloat16
MOST_NUMBER = 1_000_000  # of an option that takes a count, unless it says another
_HELP = """\
{command}: {purpose}

usage: {command} [settings=FILE.yaml] [group=choice ...] [key=value ...]
       {command} --print-config ...     show the resolved configuration and stop
       {command} --help [NAME]          this page, or one group or setting in full
       {command} --version              the version of the package
{options}
Groups and their choices (each is a YAML file of configs/):
{groups}

Settings{which} and their values now (`{command} --help model`: one group in full):
{values}

A list is written [1,2,3], nothing is null.  Of two values of a setting the last counts.
{files}  Examples:
"""
# The groups and settings that say how long a step takes and what it needs.  A run that is there
# has settings of its own.
OF_A_STEP = (
    *("model", "schedule", "vocab", "parallel", "loss", "optim", "cost", "cluster"),
    *("num_microbatches", "micro_batch_size", "batch_ramp"),
    *("run.name", "run.root", "run.resume"),
    *("run.device", "run.dtype", "run.linear_dtype", "run.float8_scales"),
    *("run.compile", "run.cuda_graphs"),
)


@dataclass(frozen=True, slots=True)
class Command:
    """A console command.

    `body` gets the configuration, the overrides as typed, and the options, and returns the exit
    code.  `options` maps a name to the placeholder of its value, empty if it takes none, and to
    what it does.  `reads` names the groups and settings that count for it, which its help shows; it
    shows all if there are none.  A command line may have others, those of the run.
    """

    name: str
    purpose: str
    body: Callable[[RunConfig, Sequence[str], Mapping[str, str]], int]
    examples: str
    options: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    reads: tuple[str, ...] = ()


def run(command: Command) -> NoReturn:
    """Run a command with the arguments of this process, and leave with its exit code."""
    guarded(command.name, lambda: configured(command, sys.argv[1:]))


def configured(command: Command, arguments: Sequence[str]) -> int:
    """Show the help or the configuration if `arguments` ask for it, else run the command."""
    for word in arguments:
        check_printable(word)
    words = [word for word in arguments if word not in ("--help", "-h", "--print-config")]
    wants_help = "--help" in arguments or "-h" in arguments
    overrides, options = split_options(words, command.options)
    chosen = list(filter(_is_name, overrides)) if wants_help else []
    overrides = [word for word in overrides if word not in chosen]
    for name in chosen:
        _check_name(name, command.name)
    config = load_config(overrides, tuple(command.options))
    if (line := _without_device(config, overrides)) and prints():
        write_stderr(f"{command.name}: {line}\n")
    if wants_help:
        pages = [_page(name, config, command.name) for name in chosen]
        print(_broken("\n\n".join(pages)) if pages else _help(command, config))
        return EXIT_OK
    if "--print-config" in arguments:
        print(config_text(config), end="")
        return EXIT_OK
    return command.body(config, overrides, options)


def typed(overrides: Sequence[str], *names: str) -> list[str]:
    """Return those of the overrides that set one of these groups or settings."""
    return [word for word in overrides if word.lstrip("+~").partition("=")[0] in names]


def _without_device(config: RunConfig, overrides: Sequence[str]) -> str:
    """Return a line about a cluster of GPUs whose ranks stay on CPUs since nobody says otherwise.

    It is empty where there is nothing to say.
    """
    is_gpu = config.cluster.bfloat16_flops_per_second >= _LEAST_OF_GPUS
    if not is_gpu or config.run.device != "cpu" or typed(expanded(overrides), "run", "run.device"):
        return ""
    return (
        "the cluster has the peak of GPUs, but run.device=cpu is the default; presets of GPUs set "
        "run.device=cuda run.dtype=bfloat16 too"
    )


def _page(name: str, config: RunConfig, command: str) -> str:
    """Return the help on one group or setting, or on all settings together."""
    if name == _ALL:
        return all_settings_help(command)
    return section_help(name, config) if name in sections() else setting_help(name, config)


def _is_name(word: str) -> bool:
    return "=" not in word and not word.startswith(("-", "+", "~"))


def _check_name(name: str, command: str) -> None:
    """Raise ConfigError unless `name` is a group of settings or one setting."""
    names = [*sections(), *setting_names()]
    if name in (*names, _ALL):
        return
    groups = [] if "." in name else difflib.get_close_matches(name, list(sections()), n=1)
    close = [*groups, *close_names(name)]
    hint = f"did you mean {close[0]}?" if close else f"{command} --help names all"
    kind = "setting" if "." in name else "setting or group of settings"
    raise ConfigError(f"{name} is not a {kind}; {hint}")


def prints() -> bool:
    """Return whether this process prints a ConfigError: every rank of a node finds the same."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def guarded(name: str, body: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its code.

    Errors of the user and of the system are printed in one line, all others with a traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # by `start.py`, until here
        signal.signal(signal.SIGINT, signal.default_int_handler)
    _open_closed_streams()
    try:
        code = _say_version(name) if "--version" in sys.argv[1:] else body()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        ending = ending_of_command(error, name)
        code = ending.code
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if ending.words and (prints() or not isinstance(error, ConfigError)):
            write_stderr(f"{ending.words}\n")
    sys.stdout.flush()
    sys.exit(code)


def collect_rarely() -> None:
    """Let a planning command look for cycles of garbage rarely.

    Schedules and timelines have none, but many objects: Python's own thresholds take a sixth of a
    search over splits (47 and 40 s for 70B on 64 GPUs, with the same memory).  A run does without:
    its search of schedule=auto keeps few objects, and took as long (9.6 and 9.4 s for 16 ranks).
    """
    gc.set_threshold(50_000, 20, 100)


def _say_version(name: str) -> int:
    print(f"{name} {version('vp_train')}")
    return EXIT_OK


def _open_closed_streams() -> None:
    """Let a closed stdin, stdout or stderr be /dev/null, also for the processes that we start."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))


def split_options(
    words: Sequence[str], known: Mapping[str, tuple[str, str]]
) -> tuple[list[str], dict[str, str]]:
    """Return the overrides, and the values of the known options.

    An option is written `--out DIR` or `--out=DIR`.  The value of an option that takes none is "".
    """
    overrides: list[str] = []
    options: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name not in known:
            overrides.append(word)
            continue
        if not known[name][0]:
            if equals:
                raise ConfigError(f"{word}: {name} takes no value; write {name}")
            options[name] = ""
            continue
        value = value if equals else next(rest, "")
        if not value or (value.startswith("-") and not re.fullmatch(r"-[0-9.]+", value)):
            raise ConfigError(f"{name} needs a value: {name} {known[name][0]}")
        options[name] = value
    return overrides, options


def whole_number(
    options: Mapping[str, str],
    name: str,
    default: int,
    *,
    least: int = 1,
    most: int = MOST_NUMBER,
    example: str | None = None,
) -> int:
    """Return the value of an option that takes a count, `default` if it was not given.

    It may be written as 1e6 too.  Raises ConfigError, which names the bounds and an `example`, the
    default if it is None.
    """
    if name not in options:
        return default
    word = options[name]
    is_number = re.fullmatch(r"[0-9]{1,19}(\.[0-9]{1,6})?(e[0-9]{1,2})?", word)
    value = Decimal(word if is_number else -1)
    if not (least <= value <= most and value % 1 == 0):
        raise ConfigError(
            f"{name} {word} is not a whole number in [{least:,}, {most:,}]; "
            f"write for example {name} {example or min(most, max(default, least))}"
        )
    return int(value)


def number(name: str, word: str, *, example: str) -> float:
    """Return the value of an option that takes a finite number of at least 0.

    Raises ConfigError with an `example`.
    """
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ConfigError(
            f"{name} {word} is not a number of at least 0; write for example {name} {example}"
        )
    return value


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, as ConfigError."""

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Raise ConfigError for a value that is no choice, in the words of other commands."""
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise ConfigError(
                f"{'/'.join(action.option_strings)} {value} is not known; choose one of {choices}"
            )

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


_OVERRIDE = r"[+~]{0,2}[a-z_]+(\.[a-z_0-9]+)*=.*"


def path_of(word: str, name: str = "a path") -> Path:
    """Return the path that was typed, with ~ expanded; `name` says what it is the path of.

    The home of somebody who is not known stays as it was typed.  Raises ConfigError if the word is
    empty or unprintable.
    """
    check_printable(word)
    if not word:
        raise ConfigError(f"{name} is empty; is a variable of the shell not set?")
    return Path(os.path.expanduser(word))


def check_printable(word: str) -> None:
    """Raise ConfigError for an argument that a terminal would obey instead of showing it."""
    if (shown := printable(word)) != word:
        raise ConfigError(f"{shown}: arguments and names of files have no control characters")


def path_argument(word: str) -> Path:
    """Return the path of an argument as `path_of` does, with an error that argparse passes on."""
    try:
        return path_of(word)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output_of(option: str, word: str) -> Path:
    """Return the file that an option names, with ~ expanded.

    Raises OSError if no file can be written there, before work is done for it.  Nothing is left
    there: whoever writes it makes the directories above it.
    """
    path = _target_of(option, word)
    with _writable(option, path, "give a file in a directory where you may write"):
        _try_to_write(path)
    return path


def cost_output_of(option: str, word: str) -> Path:
    """Return the file of costs that an option names, as `output_of` does.

    Raises ConfigError for a name that `cost=FILE` does not read, and for a file that is there and
    holds something else.
    """
    path = output_of(option, word)
    if path.suffix not in YAML_ENDINGS:
        raise ConfigError(
            f"{option} {path}: only a name that ends with .yaml can be read as cost=FILE; write "
            f"{option} {path}.yaml"
        )
    if path.is_file() and path.stat().st_size and not has_settings(path, "cost"):
        raise ConfigError(
            f"{option} {path} is there and holds no costs; give another {option} FILE.yaml"
        )
    return path


def write_costs(path: Path, text: str) -> str:
    """Write the file that `cost_output_of` has returned.  Return that, and whether it was there."""
    replaced = ", in place of those that were there" if path.is_file() else ""
    write_output(path, text)
    return f"costs written to {path}{replaced}"


def output_directory_of(option: str, word: str) -> Path:
    """Return the directory that an option names, with ~ expanded.

    Raises OSError if no file can be written there, before work is done for it.  Nothing is left
    there: whoever writes to it makes it.
    """
    path = _target_of(option, word)
    with _writable(option, path, "give a directory where you may write"):
        _try_to_write(path / f".{os.getpid()}")
    return path


def _target_of(option: str, word: str) -> Path:
    """Return the path that an option names.  Raises ConfigError for what looks like an override.

    An option whose value was forgotten would take the next override for it.
    """
    if re.fullmatch(_OVERRIDE, word):
        raise ConfigError(
            f"{option} {word}: that looks like an override, not like a path; write {option} PATH "
            f"{word}, or {option} ./{word} for a path of that name"
        )
    return path_of(word, option)


@contextmanager
def _writable(option: str, path: Path, way_out: str) -> Iterator[None]:
    """Let an OSError raised inside name the option, the path and the way out."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{option} {path} cannot be written ({error.strerror}); {way_out}") from None


def _try_to_write(path: Path) -> None:
    """Open a file for writing without changing it.  Raises OSError.

    If it is new it is removed, and so are new directories above it.
    """
    is_new = not os.path.lexists(path)
    new_directories = missing_directories(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
    finally:
        for directory in new_directories:
            with suppress(OSError):
                directory.rmdir()


def text_width() -> int:
    """Return the columns of text: those of the terminal, 100 where stdout is none."""
    try:
        columns = os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):  # stdout is no terminal, or no file
        return _WIDTH
    return max(columns, _LEAST_WIDTH) if columns else _WIDTH


def _broken(page: str) -> str:
    """Return a page in lines of `text_width` columns; further ones stand below the meaning."""
    width = text_width()
    return "\n".join(part for line in page.splitlines() for part in _parts(line, width))


def _parts(line: str, width: int) -> list[str]:
    """Return a line in parts of `width` columns; a long label is one of its own."""
    found = _LABEL.match(line)
    label = "" if found is None else found[0]
    if len(line) <= width:
        return [line]
    first, below = label, " " * len(label)
    if len(label) > width - _NARROWEST:
        below = " " * (_MEANING if width - _NARROWEST >= _MEANING else _INDENT)
        first = below
    parts = textwrap.wrap(
        line[len(label) :],
        width,
        initial_indent=first,
        subsequent_indent=below,
        break_on_hyphens=False,
        break_long_words=False,
    )
    return parts if first == label else [label.rstrip(), *parts]


def _help(command: Command, config: RunConfig) -> str:
    def counts(name: str) -> bool:
        """Return whether a group, or the group of a setting, or itself, is one that counts."""
        return not command.reads or bool({name, name.partition(".")[0]} & {*command.reads})

    lines = "\n".join(
        f"  {group:<10}  {', '.join(choices)}"
        for group, choices in group_choices().items()
        if counts(group) or any(name.startswith(f"{group}.") for name in command.reads)
    )
    options = "".join(
        f"       {f'{name} {value}':<20} {does}\n"
        for name, (value, does) in command.options.items()
    )
    page = _HELP.format(
        command=command.name,
        purpose=command.purpose,
        options=options,
        groups=lines,
        which=" that count here" if command.reads else "",
        files=files_words("cluster" if counts("cluster") else "model"),
        values=settings_help(config, filter(counts, setting_names())),
    )
    return f"{_broken(page)}\n{command.examples}"
