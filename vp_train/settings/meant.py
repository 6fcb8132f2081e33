"""What somebody may have meant by a word that is no setting."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from vp_train.config.setting import setting_of
from vp_train.config.typed import for_shell, shell_word
from vp_train.durable import similar_names
from vp_train.settings.checks import LONGEST_KEY
from vp_train.settings.elsewhere import NAMES, OPTIONS, WAYS
from vp_train.settings.tree import (
    YAML_ENDINGS,
    field_of,
    group_choices,
    kind_of,
    sections,
    setting_names,
)

_FILE = "a file of settings is written {}, in YAML as --print-config prints it"


def close_names(word: str) -> list[str]:
    """Return the settings that somebody may mean by `word`, the likeliest first, at most two."""
    names, plain = setting_names(), _plain(word)
    if plain in (*sections(), *names):
        return [plain]
    if plain in NAMES:
        return [NAMES[plain]]
    section, dot, last = plain.rpartition(".")
    groups = difflib.get_close_matches(section, sections(), n=1)
    same = [name for name in names if name.rpartition(".")[2] == last]
    own = [name for name in same if dot and [name.rpartition(".")[0]] == groups]
    if own or len(same) == 1 or (same and not dot):
        return (own or same)[:2]
    if same:
        return []  # several: a guess would only look right
    if last in NAMES:
        return [NAMES[last]]
    if (written := re.match(r"write ([a-z_.]+)=", _of_table(WAYS, plain) or "")) is not None:
        return [written[1]]
    if section in sections():
        lasts = [name.rpartition(".")[2] for name in names if name.startswith(f"{section}.")]
        return [f"{section}.{one}" for one in similar_names(last, lasts, 2)]
    if dot:  # of a section that is spelt alike, or of another framework
        alike = [name for name in names if name.rpartition(".")[0] in groups]
        of_last = {name.rpartition(".")[2]: name for name in alike}
        return [of_last[one] for one in difflib.get_close_matches(last, of_last, n=2, cutoff=0.75)]
    if close := difflib.get_close_matches(word, [*names, *sections()], n=2):
        return close
    of_last = {name.rpartition(".")[2]: name for name in reversed(names)}
    return [of_last[one] for one in difflib.get_close_matches(last, of_last, n=2, cutoff=0.75)]


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")


def _of_table(table: Mapping[str, str], name: str) -> str | None:
    """Return what a table says of a name of another framework, with or without its section."""
    plain = _plain(name)
    return table.get(plain, table.get(plain.rpartition(".")[2]))


def way_elsewhere(name: str, value: str) -> str | None:
    """Return what to write instead of the setting `name` of another framework with this value.

    It is None if the table has nothing to say, and for names of ours.
    """
    if name.replace("-", "_") in setting_names():
        return None
    way = _of_table(WAYS, name)
    if way is None:
        return None
    return re.sub(r"\S*{}\S*", lambda word: _filled(word[0], value), way)


def _filled(word: str, value: str) -> str:
    """Return a word of the table with a value as one types it in a shell."""
    end = "," if word.endswith(",") else ""
    filled = word.removesuffix(",").replace("{}", value or "...")
    return (for_shell(filled) if value else filled) + end


def instead_of_option(word: str, name: str, value: str, known_options: Sequence[str]) -> str:
    """Return what to write instead of an option that is none; empty if nothing is like it.

    `word` begins as `--name`, and `value` is what stands behind it, if that is one.
    """
    option = OPTIONS.get(_plain(name))
    if option not in known_options and name not in sections():
        option = next(iter(difflib.get_close_matches(word, known_options, n=1, cutoff=0.75)), None)
    if option in known_options:
        return f"did you mean {option}?"
    if re.match(r"(config|cfg|conf|settings)\b|config_|config-", name.rpartition(".")[2]):
        return _FILE.format(shell_word("settings", value or "FILE.yaml"))
    if difflib.get_close_matches(re.sub("[-_]", "", name.lower()), ["dryrun"], cutoff=0.8):
        plan = "vp-plan with the same settings says what a run would do and starts nothing"
        stop = "; --preflight stops before step 1" if "--preflight" in known_options else ""
        return plan + stop
    if (way := way_elsewhere(name, value)) is not None:
        return way
    names = close_names(name)
    if not names or len(name) == 1:
        return ""
    return f"write {written(names[0], value)}"


def written(name: str, value: str) -> str:
    """Return what sets `name` to a value of another framework, as one types it in a shell."""
    if name in setting_names():
        if not value and kind_of(name) is bool:
            value = "true"
        if value.lower() in setting_of(field_of(name)[0]).choices:
            value = value.lower()
    elif value not in group_choices().get(name, ()) and not value.endswith(YAML_ENDINGS):
        value = ""
    return for_shell(f"{name}={value}") if value else f"{name}=..."


def instead_of_word(word: str) -> str:
    """Return what to write instead of a word without `=`."""
    if word in setting_names():
        return f"write key=value without blanks, here {word}=..."
    groups = [name for name, choices in group_choices().items() if word in choices]
    if groups and word != "default":
        return f"write {groups[0]}={word}"
    path = Path(os.path.expanduser(word))
    if path.suffix in (*YAML_ENDINGS, ".toml"):
        file = "FILE.yaml" if path.suffix == ".toml" else word
        return _FILE.format(shell_word("settings", file))
    if 0 < len(word) < LONGEST_KEY and path.exists():
        return f"for text of your own write data=text {shell_word('data.path', word)}"
    if word in ("help", "version"):
        return f"write --{word}"
    return "write key=value, e.g. run.steps=100"


def choice_of_group(word: str) -> str | None:
    """Return `optim=wsd` for `optim.name=wsd`: the choice of a group that a setting was given."""
    name, _, value = word.partition("=")
    group, dot, _ = name.partition(".")
    return f"{group}={value}" if dot and value in group_choices().get(group, ()) else None
