"""The text of a run that goes on: its tokens may still lie in the cache when its files changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vp_train.checkpoint.manifest import read_manifest
from vp_train.config import ConfigError, DataConfig, RunConfig
from vp_train.config.typed import shell_word
from vp_train.data.manifest import MANIFEST
from vp_train.durable import checkpoints_in

_OF_VALIDATION = "data.validation, "  # how errors about a named set begin


@contextmanager
def advising_kept_text(config: RunConfig) -> Iterator[None]:
    """Let a ConfigError about the text of a resumed run say how the run goes on without it."""
    try:
        yield
    except ConfigError as error:
        kept = kept_corpora(config.data, _contents_of(config))
        is_named = any(str(place) in str(error) for place in kept)  # as it is damaged
        if not kept or is_named or str(error).startswith(_OF_VALIDATION):
            raise
        raise ConfigError(f"{error}; {kept_words(config.data, kept)}") from None


def kept_corpora(data: DataConfig, contents: Sequence[str]) -> tuple[Path, ...]:
    """Return the corpora of a run, () if data.cache_dir does not have all of them.

    contents: their hashes, see `Source.contents`.
    """
    cache_dir = Path(data.cache_dir).expanduser()
    hashes = [one for one in contents if one.isalnum()]
    places = [next(cache_dir.glob(f"*-{one}/{MANIFEST}"), None) for one in hashes]
    found = tuple(place.parent for place in places if place is not None)
    return found if len(found) == len(contents) else ()


def kept_words(data: DataConfig, kept: Sequence[Path]) -> str:
    """Say with which settings a run goes on with its corpora."""
    if data.blend is not None:
        places = ", ".join(map(str, kept))
        return f"to go on with the tokens that the run had, give as paths of data.blend {places}"
    name = "" if data.name == "text" else "data=text "
    word = shell_word("data.path", str(kept[0]))
    return f"to go on with the tokens that the run had, add {name}{word}"


def _contents_of(config: RunConfig) -> Sequence[str]:
    """Return the hashes of the corpora of a run to be resumed, () if it is a new one."""
    found = checkpoints_in(config.run.checkpoints) if config.run.resume else []
    if found:
        with suppress(ValueError, OSError):
            contents = read_manifest(found[-1][1]).state.get("contents")
            return [one for one in contents if isinstance(one, str)] if contents else ()
    return ()
