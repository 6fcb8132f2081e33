"""The tokenizer of an export, and the ids of the tokens that begin, end and pad its texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vp_train.config import ConfigError
from vp_train.data.tokenizer import (
    LARGEST_TOKENIZER,
    begin_of,
    begin_of_run,
    end_of,
    front_of,
    token_in,
    token_of,
    tokenizer_config,
    tokenizer_hash,
    with_front_token,
)
from vp_train.durable import UnreadableError, read_text
from vp_train.hf.files import copy, existing, file_in, read_object

TOKENIZER = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
    ),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
GENERATION = "generation_config.json"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_JSON, _CONFIG, _SPECIAL_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"


@dataclass(frozen=True, slots=True)
class RunText:
    """What the settings of a run say about its text.

    end_token, begin_token: data.end_token and data.begin_token.
    after_end: whether a document sees the end of the one before it.
    longest: tokens of a sequence.
    """

    end_token: str | None
    after_end: bool
    longest: int
    begin_token: str | None = None


@dataclass(frozen=True, slots=True)
class TextFiles:
    """The files beside the weights of an export that are about text.

    directory: has the files of the tokenizer, None if there are none.
    ids: the values of SPECIAL, as far as they are known.
    end: the token that ends the documents of the run, None if that is not known.
    generation: the content of generation_config.json, None if there is none.
    generated: the content of tokenizer_config.json where the directory has none.
    begin: the token in front of the documents of the run, None if there was none.
    strange: the token that the tokenizer puts in front of a text, but the run did not.
    """

    directory: Path | None
    ids: Mapping[str, Any]
    end: int | None
    generation: Mapping[str, Any] | None
    generated: Mapping[str, object] | None
    begin: str | None = None
    strange: str | None = None

    def write(self, target: Path) -> None:
        """Write the files into directory `target`."""
        if self.directory is not None:
            copy(self.directory, target, TOKENIZER)
        for name, content in ((GENERATION, self.generation), (_CONFIG, self.generated)):
            if content is not None:
                (target / name).write_text(json.dumps(content, indent=2) + "\n")
        if self.begin is not None:
            _begin_texts(target, self.begin)


def find_text(
    given: Path | None,
    near: Sequence[Path],
    far: Sequence[Path],
    text: RunText | None,
    model_type: str,
) -> TextFiles:
    """Find the tokenizer of an export, and the ids that are true of it.

    The tokenizer is that of `given`, else the first of `near` (the run, or the import) and `far`
    (where its weights and data came from, the nearest first).  Its other files and the special ids
    come from any of these directories that has the same tokenizer, from one with the same end of
    documents if possible.  The end of the documents of `text` is always among the ids that end a
    text, and alone if nothing else is known.  Raises ConfigError for files that are not what they
    are called.
    """
    # The files of an import say more than those of the runs after it.
    everywhere = [*([] if given is None else [given]), *far[::-1], *near]
    own = _first(([] if given is None else [given]) or [*near, *far])
    kept = _first(near)
    known = None if own is None else _hash(own)
    is_own = kept is None or _hash(kept) == known
    end = end_of(own, _end_name(kept, text)) if own is not None and text and is_own else None
    same = [place for place in everywhere if known is None or _hash_in(place) == known]
    directory = given
    if directory is None:
        name = None if own is None or end is None else token_of(own, end)
        found = [place for place in same if file_in(place, _CONFIG) is not None]
        found += [place for place in same if existing(place, TOKENIZER)]
        directory = next((place for place in found if _eos(place) == name), (*found, None)[0])
    ids = _special(everywhere, same, model_type, end)
    begin = None
    if own is not None and text and is_own:
        begin = begin_of(own, _begin_name(kept, text))
    if end is not None and text is not None:
        ids = _with_end(ids, end, after_end=text.after_end)
        ids |= {} if begin is None else {"bos_token_id": begin}
    generated = None
    has_config = directory is not None and file_in(directory, _CONFIG) is not None
    if own is not None and end is not None and text is not None and not has_config:
        generated = tokenizer_config(
            own, end, begin=begin, longest=text.longest, after_end=text.after_end
        )
    first = None if own is None or begin is None else token_of(own, begin)
    strange = front_of(own) if own is not None and end is not None and first is None else None
    return TextFiles(
        directory, ids, end, _generation(same, ids, end), generated, begin=first, strange=strange
    )


def _begin_texts(directory: Path, token: str) -> None:
    """Let the tokenizer of a directory put `token` in front of each text."""
    path = directory / _JSON
    path.write_text(with_front_token(read_text(path, LARGEST_TOKENIZER), token), encoding="utf-8")
    for name, new in (
        (_CONFIG, {"bos_token": token, "add_bos_token": True}),
        (_SPECIAL_MAP, {"bos_token": token}),
    ):
        file = file_in(directory, name)
        if file is not None:
            file.write_text(json.dumps(read_object(file) | new, indent=2) + "\n")


def unusual_end(directory: Path) -> str | None:
    """Return the token that ends a text by the files of a model, if no usual name would find one.

    It is what data.end_token must be for the tokenizer of this directory.  tokenizer_config.json
    counts before config.json, whose ids may be those of another vocabulary.
    """
    path, config = file_in(directory, _JSON), file_in(directory, "config.json")
    if path is None or end_of(path, None) is not None:
        return None
    name = _eos(directory)
    if name is not None and end_of(path, name) is not None:
        return name
    ends = [] if config is None else _ends(read_object(config))
    found = (token_of(path, end) for end in ends if type(end) is int and 0 <= end < 1 << 31)
    return next((token for token in found if token is not None), None)


def _first(directories: Sequence[Path]) -> Path | None:
    found = (file_in(directory, _JSON) for directory in directories)
    return next((path for path in found if path is not None), None)


def _hash(path: Path) -> str:
    try:
        return tokenizer_hash(path)
    except UnreadableError as error:
        raise ConfigError(str(error)) from None


def _hash_in(directory: Path) -> str | None:
    path = file_in(directory, _JSON)
    return None if path is None else _hash(path)


def _eos(directory: Path) -> str | None:
    """Return the token that ends a text by tokenizer_config.json, None if it does not say."""
    path = file_in(directory, _CONFIG)
    return None if path is None else token_in(read_object(path), "eos_token")


def _end_name(kept: Path | None, text: RunText | None) -> str | None:
    """Return the token that the run says its documents end with; older runs name it in settings."""
    name = None if kept is None else _eos(kept.parent)
    return text.end_token if name is None and text is not None else name


def _begin_name(kept: Path | None, text: RunText) -> str | None:
    """Return the token that the run has put in front of its documents, None if there is none."""
    token = None if kept is None else begin_of_run(kept.parent)
    return text.begin_token if token is None else token


def _special(
    everywhere: Sequence[Path], same: Sequence[Path], model_type: str, end: int | None
) -> dict[str, Any]:
    """Return the special ids of the first config.json of this model_type that has any.

    One beside another tokenizer is passed over, and one without a tokenizer counts only if it knows
    the end of the documents.
    """
    for directory in everywhere:
        path = file_in(directory, "config.json")
        config = {} if path is None else read_object(path)
        ids = {key: config[key] for key in SPECIAL if config.get(key) is not None}
        if not ids or config.get("model_type") != model_type:
            continue
        bare = file_in(directory, _JSON) is None and (end is None or end in _ends(ids))
        if directory in same or bare:
            return {key: value for key, value in config.items() if key in SPECIAL}
    return {}


def _ends(ids: Mapping[str, Any]) -> list[Any]:
    value = ids.get("eos_token_id")
    return list(value) if isinstance(value, list) else [] if value is None else [value]


def _with_end(ids: dict[str, Any], end: int, *, after_end: bool) -> dict[str, Any]:
    if not ids:
        begin = end if after_end else None
        return {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end}
    others = _ends(ids)
    if end in others:
        return ids
    return ids | {"eos_token_id": [end, *others] if others else end}


def _generation(
    same: Sequence[Path], ids: Mapping[str, Any], end: int | None
) -> dict[str, Any] | None:
    """Return the generation settings that belong to the tokenizer, with the ids where none do."""
    for directory in same:
        path = file_in(directory, GENERATION)
        if path is not None:
            settings = read_object(path)
            others = _ends(settings)
            if end is None or end in others:
                return settings
            return settings | {"eos_token_id": [end, *others] if others else end}
    if end is None:
        return None
    return {"_from_model_config": True} | {k: v for k, v in ids.items() if v is not None}
