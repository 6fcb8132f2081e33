"""The text of a run whose weights come from elsewhere: it needs the tokenizer they know."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vp_train.config import ConfigError, DataConfig, RunConfig
from vp_train.config.typed import shell_word
from vp_train.data.corpus import (
    Corpus,
    begin_with,
    ordinary_warnings,
    prepare_all,
    tokenizer_warnings,
)
from vp_train.data.tokenizer import (
    begin_by_files,
    begin_of_run,
    token_of,
    tokenizer_hash,
)
from vp_train.durable import UnreadableError, checkpoints_in, homes


def prepare_run(config: RunConfig, progress: bool) -> tuple[Corpus, ...]:
    """Prepare the corpora of a run, like `prepare_all`, with the tokenizer of its first weights.

    Raises ConfigError, before anything is tokenized, for text that would have another tokenizer
    than the one beside the weights of run.init_from.  Weights of a run on synthetic data have none.
    """
    origin = _origin(config)
    kept = None if origin is None else _find(origin, "tokenizer.json")
    wanted = "or data.other_tokenizer=true if another one is wanted"
    is_prepared = _is_prepared(config.data)
    give = "give "
    if is_prepared:  # its tokens cannot change
        give = "give the text instead of the prepared corpus, with "
    if kept is not None:
        give = f"{give}{shell_word('data.tokenizer', str(kept))}, {wanted}"
    if origin is not None and _find(origin, "model.yaml") and config.data.tokenizer is None:
        if kept is None:
            raise ConfigError(
                f"run.init_from={origin} is an import without a tokenizer.json; "
                f"give data.tokenizer=FILE, the one that its weights know, {wanted}"
            )
        if config.data.name != "blend" and not is_prepared:
            raise ConfigError(
                f"the weights of run.init_from={origin} do not know a tokenizer that is trained "
                f"on this text; add {shell_word('data.tokenizer', str(kept))}, {wanted}"
            )

    def accept(tokenizer: Path) -> None:
        if kept is not None:
            _require_same(tokenizer, kept, give)

    return prepare_all(config.data, config.model.vocab_size, progress, accept)


def begin_warnings(config: RunConfig, corpora: Sequence[Corpus]) -> list[str]:
    """Return what is doubtful about the token in front of each document.

    It may be one that a text has too, or not that of the weights of run.init_from, or, where those
    do not say, not the one that the tokenizer puts in front of a text.
    """
    return [*ordinary_warnings(corpora), *_begins_of_another(config, corpora)]


def _begins_of_another(config: RunConfig, corpora: Sequence[Corpus]) -> list[str]:
    origin = _origin(config)
    if not corpora or origin is None or (place := _find(origin, "tokenizer.json")) is None:
        return tokenizer_warnings(config.data, corpora)
    is_import = _find(origin, "model.yaml") is not None
    token = (begin_by_files if is_import else begin_of_run)(place.parent)
    if begin_with(corpora, token) or (is_import and token is None):
        return []
    begin = corpora[0].manifest.begin_token
    ours = None if begin is None else token_of(corpora[0].tokenizer, begin)
    theirs = f", those of the weights of run.init_from={origin} with {token or 'none'}"
    if is_import:
        theirs = f"; the tokenizer of run.init_from={origin} puts {token} in front of a text"
    way_out = "data.begin_token=null"
    if token is not None:
        way_out = shell_word("data.begin_token", token)
    return [
        f"documents begin with {ours or 'no token'}{theirs}; where the model expects that, "
        f"add {way_out}"
    ]


def _origin(config: RunConfig) -> Path | None:
    """Return where the weights come from, None if they are new, or the run has gone on since."""
    run, data = config.run, config.data
    if run.init_from is None or data.other_tokenizer or data.name == "synthetic":
        return None
    if run.resume and checkpoints_in(run.checkpoints):
        return None  # its text is compared with that of its checkpoint
    return Path(run.init_from).expanduser()


def _find(origin: Path, name: str) -> Path | None:
    """Return the file `name` of a run or an import, or of the one that a checkpoint is in."""
    return next((path / name for path in homes(origin) if (path / name).is_file()), None)


def _is_prepared(data: DataConfig) -> bool:
    """Return whether the text, or some of a blend, is a corpus that is already prepared."""
    paths = [data.path] if data.blend is None else [entry.path for entry in data.blend]
    given = [Path(path).expanduser() for path in paths if path is not None]
    return any((path / "tokens.idx").is_file() for path in given)


def _require_same(ours: Path, kept: Path, way_out: str) -> None:
    try:
        hashes = [tokenizer_hash(path) for path in (ours, kept)]
    except UnreadableError as error:
        raise ConfigError(f"data.tokenizer={error}; give the path of a tokenizer.json") from None
    if hashes[0] != hashes[1]:
        raise ConfigError(
            f"the text is tokenized by {ours} (hash {hashes[0]}), but the weights of run.init_from "
            f"know {kept} (hash {hashes[1]}); {way_out}"
        )
