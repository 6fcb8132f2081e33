"""Overrides of every size and kind: each ends with 78 and at most ten lines, or it runs.

A case is a command line of one to three random overrides.  The commands run in this process, behind
the guard that turns their errors into exit codes.  `vp-train` stops where its ranks would start,
with the plan made and checked.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

from vp_train.commands import launch, prepare, simulate, train
from vp_train.config import RunConfig, printable
from vp_train.failures import EXIT_CONFIG, EXIT_IO, EXIT_OK
from vp_train.planning.degrees import check_node, wanted_ranks
from vp_train.planning.plan import make_plan
from vp_train.settings.tree import sections, setting_names

MOST_SECONDS = 3.0  # of this process, for a refusal
MOST_SECONDS_OF_A_RUN = 60
MOST_LINES, LONGEST_LINE = 10, 2_000

NUMBERS = (
    *("0", "1", "2", "3", "7", "64", "-1", "-0", "+1", "1.5", "-1e-9", "1e-320", "1e23", "1e309"),
    *("nan", "-nan", "inf", "-inf", "1000000", "99999999999", "10**9", "0x10", "1_000", "٣"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "9" * 400, "9" * 5_000),
)
WORDS = (
    *(
        "",
        " ",
        "true",
        "false",
        "null",
        "None",
        "~",
        "~root",
        "~no-such-user/x",
        ".",
        "..",
        "../x",
        "a/b",
        "a\\b",
    ),
    *("/dev/zero", "/dev/stdin", "/proc/self/mem", "x.yaml", "x.csv", "a b", "a,b", "a=b", "-x"),
    *("é", "日本", "🙂", "\x1b[31m", "\x1b]0;title\x07", "a\nb", "a\tb", "a\rb", "\x00", "\x7f"),
    *("\u202eabc", "\u200b", "\ufeff", "\udcff", "\x9b31m", "\u2028", "%s", "{0}", "$(ls)", "`ls`"),
    *("${oc.env:HOME}", "${run.name}", "${", "$", "???", "\\${a}", "!!python/object:x", "&a", "*a"),
    *("choice(1,2)", "range(1,99999999)", "glob(*)", "int(3)", "str(1)", "shuffle(1,2)", "sort(2)"),
)
SHAPES = (
    *("[]", "{}", "[1]", "[1,2]", "[[1]]", "[1,", "]", "[", "}", "{a:1}", "{a:{b:1}}", "[null]"),
    *("[-1,2,3,4]", "[a,b]", "[{}]", "[{path:x}]", "[{path:x,weight:nan}]", "[{weight:0}]", "()"),
    *("'", '"', "'a", '"a', "''", "'a'b", "\\'", "[1,2,3,4]", "[1e99]", "[true]", "{path:x}"),
)
LONG = (
    *("x" * 10**6, "1" * 10**6, "[" * 10**6, "x" * 5_000, "1," * 10**5, "[" * 3_000, "'" * 3_000),
    *(
        "[" + "1," * 500 + "1]",
        "{a:" * 200 + "1" + "}" * 200,
        "\\" * 20_000,
        "int(" * 500,
        "$" * 5_000,
    ),
    *("[" + "{path:x}," * 300 + "]", "\x1b" * 10_000, "é" * 5_000, "a " * 2_000),
)
KEYS = (
    *("hydra.run.dir", "hydra/launcher", "hydra", "defaults", "_target_", "model._target_", ""),
    *("model.", ".model", "model..x", "model@x", "data.blend[0]", "data.blend.0", "a" * 10_000),
    *("\x1b[31m", "日本", "run.name.x", "num_microbatches.x", "++run.steps", "+a", "~run", "--x"),
)


def random_override(chance: random.Random) -> str:
    """Return one override; most of them name a setting or a group that there is."""
    values = chance.choice((NUMBERS, NUMBERS, WORDS, WORDS, SHAPES, LONG))
    value, names = chance.choice(values), [*setting_names(), *sections()]
    kind = chance.random()
    if kind < 0.8:
        return f"{chance.choice(names)}={value}"
    if kind < 0.9:
        return f"{chance.choice(KEYS)}={value}"
    if kind < 0.95:
        name = list(chance.choice(names))
        name[chance.randrange(len(name))] = chance.choice("abc._-[]\x1b é")
        return f"{''.join(name)}={value}"
    return value


def command_lines(seed: int, count: int) -> Iterator[list[str]]:
    """Yield random command lines."""
    chance = random.Random(seed)
    for _ in range(count):
        yield [random_override(chance) for _ in range(chance.choice((1, 1, 1, 2, 3)))]


def _planned(config: RunConfig, overrides: Sequence[str], *rest: object, **more: object) -> int:
    """Stand in for the launch of ranks: what is checked before they start."""
    check_node(wanted_ranks(config.parallel))
    make_plan(config, wanted_ranks(config.parallel))
    return EXIT_OK


def judged(
    main: Callable[[], None], arguments: Sequence[str], *, refuses: bool = False
) -> tuple[str | None, str]:
    """Run a command; return what is wrong with how it ends, None if nothing, and its stderr.

    With `refuses` it must end with 78.
    """
    out, err, code = io.StringIO(), io.StringIO(), None

    def late(*_: object) -> None:
        raise TimeoutError(f"no end within {MOST_SECONDS_OF_A_RUN} s")

    was = signal.signal(signal.SIGALRM, late)
    signal.alarm(MOST_SECONDS_OF_A_RUN)
    started = time.process_time()
    try:
        with (
            mock.patch.object(sys, "argv", ["vp", *arguments]),
            mock.patch.object(launch, "launch", _planned),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as end:
        code = end.code
    except BaseException as error:
        return f"{type(error).__name__}: {error}", err.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, was)
    seconds, said = time.process_time() - started, err.getvalue()
    lines, text = said.splitlines(), out.getvalue() + said
    wrong = None
    if code not in (EXIT_OK, EXIT_CONFIG, *([EXIT_IO] if main is prepare.main else [])):
        wrong = f"exit code {code}: {said[-300:]!r}"
    elif refuses and code != EXIT_CONFIG:
        wrong = f"exit code {code}: it was used"
    elif (
        "Traceback" in text or len(lines) > MOST_LINES or any(len(s) > LONGEST_LINE for s in lines)
    ):
        wrong = f"{len(lines)} lines, the longest of {max(map(len, lines))} characters"
    elif code != EXIT_OK and not lines:
        wrong = f"exit code {code} without a word"
    elif any(printable(line) != line for line in text.split("\n")):
        wrong = f"control characters: {text[:300]!r}"
    elif code != EXIT_OK and seconds > MOST_SECONDS:
        wrong = f"refused after {seconds:.1f} s"
    return wrong, said


@contextlib.contextmanager
def in_empty_directory() -> Iterator[Path]:
    """Work in an empty directory that is also home, so that no path reaches other files."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as root:
        os.chdir(root)
        try:
            with mock.patch.dict(os.environ, {"HOME": root}):
                yield Path(root)
        finally:
            os.chdir(before)


def campaign(seed: int, count: int) -> list[str]:
    """Try `count` random command lines; return a text for each that ended as none may."""
    failures = []
    with in_empty_directory() as root:
        (root / "text").mkdir()
        (root / "text/a.txt").write_text("one two three " * 50)
        for number, words in enumerate(command_lines(seed, count)):
            main, base = (train.main, []) if number % 3 else (simulate.main, [])
            if words[0].startswith("data."):
                main = prepare.main
                base = ["data=text", "data.path=text", "model.vocab_size=300"]
            wrong, _ = judged(main, [*base, *words])
            if wrong is not None:
                shown = " ".join(printable(word)[:100] for word in words)
                failures.append(f"case {number}: {main.__module__} {shown}: {wrong}")
    return failures
