"""The data of a run.  `prepare_all` tokenizes the corpora, `open_source` makes batches of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vp_train.data.corpus import Corpus, describe, prepare, prepare_all, prepare_validation
    from vp_train.data.origin import prepare_run
    from vp_train.data.source import Batch, Source, open_source

__all__ = [
    "Batch",
    "Corpus",
    "Source",
    "describe",
    "open_source",
    "prepare",
    "prepare_all",
    "prepare_run",
    "prepare_validation",
]
_HOMES = {"Batch": "source", "Source": "source", "open_source": "source", "prepare_run": "origin"}


def __getattr__(name: str) -> object:
    """Import what is asked for: reading documents loads no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'corpus')}"), name)
