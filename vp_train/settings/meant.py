"""What somebody may have meant by a word that is no setting."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vp_train.config.setting import setting_of
from vp_train.durable import similar_names
from vp_train.settings.checks import LONGEST_KEY
from vp_train.settings.elsewhere import NAMES, OPTIONS, WAYS
from vp_train.settings.tree import field_of, group_choices, kind_of, sections, setting_names

_FILE = "a file of settings is written settings={}, in YAML as --print-config prints it"


def close_names(word: str) -> list[str]:
    """Return the settings that somebody may mean by `word`, the likeliest first, at most two."""
    names, plain = setting_names(), word.lower().replace("-", "_")
    if plain in (*sections(), *names):
        return [plain]
    last = plain.rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    if same:
        return same[:2]
    if last in NAMES:
        return [NAMES[last]]
    if (written := re.match(r"write ([a-z_.]+)=", WAYS.get(last, ""))) is not None:
        return [written[1]]
    section, dot, _ = plain.rpartition(".")
    if section in sections():
        lasts = [name.rpartition(".")[2] for name in names if name.startswith(f"{section}.")]
        return [f"{section}.{one}" for one in similar_names(last, lasts, 2)]
    if dot and not difflib.get_close_matches(section, sections()):
        return []  # of another framework: a guess would only look right
    close = difflib.get_close_matches(word, names if dot else [*names, *sections()], n=2)
    if close or dot:
        return close
    of_last = {name.rpartition(".")[2]: name for name in reversed(names)}
    return [of_last[one] for one in difflib.get_close_matches(last, of_last, n=2, cutoff=0.75)]


def way_elsewhere(name: str, value: str) -> str | None:
    """Return what to write instead of the setting `name` of another framework with this value.

    It is None if the table has nothing to say, and for names of ours.
    """
    if name.replace("-", "_") in setting_names():
        return None
    way = WAYS.get(name.lower().replace("-", "_").rpartition(".")[2])
    return None if way is None else way.replace("{}", value or "...")


def instead_of_option(word: str, after: str, known_options: Sequence[str]) -> str:
    """Return what to write instead of an option that is none, and a semicolon; else nothing.

    The word `after` it is its value if it has no other.
    """
    name, equals, value = word.lstrip("-").partition("=")
    if not equals and after and "=" not in after and not re.match("-[^0-9.]", after):
        value = after
    option = OPTIONS.get(name.lower().replace("-", "_"))
    if option not in known_options and name not in sections():
        option = next(iter(difflib.get_close_matches(word, known_options, n=1, cutoff=0.75)), None)
    if option in known_options:
        return f"did you mean {option}? "
    if re.match(r"(config|cfg|conf|settings)\b|config_|config-", name):
        return f"{_FILE.format(value or 'FILE.yaml')}; "
    if difflib.get_close_matches(re.sub("[-_]", "", name.lower()), ["dryrun"], cutoff=0.8):
        plan = "vp-plan with the same settings says what a run would do and starts nothing; "
        stop = "--preflight stops before step 1; " if "--preflight" in known_options else ""
        return plan + stop
    if (way := way_elsewhere(name, value)) is not None:
        return f"{way}; "
    names = close_names(name)
    if not names or len(name) == 1:
        return ""
    return f"write {names[0]}={_value_here(names[0], value) or '...'}; "


def _value_here(name: str, value: str) -> str:
    """Return the value of another framework as the setting `name` takes it."""
    if name not in setting_names():
        return value
    if not value and kind_of(name) is bool:
        return "true"
    is_choice = value.lower() in setting_of(field_of(name)[0]).choices
    return value.lower() if is_choice else value


def instead_of_word(word: str, before: str) -> str:
    """Return what to write instead of a word without `=` that stands behind the word `before`."""
    if word and before.endswith("=") and before.count("=") == 1:
        return f"write {before}{word} without a blank"
    if word in setting_names():
        return f"write key=value without blanks, here {word}=..."
    groups = [name for name, choices in group_choices().items() if word in choices]
    if groups and word != "default":
        return f"write {groups[0]}={word}"
    path = Path(os.path.expanduser(word))
    if path.suffix in (".yaml", ".yml", ".toml"):
        return _FILE.format("FILE.yaml" if path.suffix == ".toml" else word)
    if 0 < len(word) < LONGEST_KEY and path.exists():
        return f"for text of your own write data=text data.path={word}"
    if word in ("help", "version"):
        return f"write --{word}"
    return "write key=value, e.g. run.steps=100"


def choice_of_group(word: str) -> str | None:
    """Return `optim=wsd` for `optim.name=wsd`: the choice of a group that a setting was given."""
    name, _, value = word.partition("=")
    group, dot, _ = name.partition(".")
    return f"{group}={value}" if dot and value in group_choices().get(group, ()) else None
