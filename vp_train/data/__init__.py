"""The data of a run.  `prepare_all` tokenizes the corpora, `open_source` makes batches of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vp_train.data.corpus import Corpus, describe, prepare, prepare_all
    from vp_train.data.source import Batch, Source, open_source

__all__ = ["Batch", "Corpus", "Source", "describe", "open_source", "prepare", "prepare_all"]


def __getattr__(name: str) -> object:
    """Import what is asked for: reading documents loads no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "source" if name in ("Batch", "Source", "open_source") else "corpus"
    return getattr(import_module(f"{__name__}.{home}"), name)
