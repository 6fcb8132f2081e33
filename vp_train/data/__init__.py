"""Where tokens come from.  `prepare_all` runs once per run, `open_source` once per rank."""

from vp_train.data.corpus import Corpus, describe, prepare, prepare_all
from vp_train.data.source import Batch, Source, open_source

__all__ = ["Batch", "Corpus", "Source", "describe", "open_source", "prepare", "prepare_all"]
