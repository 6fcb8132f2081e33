"""Where tokens come from.  `prepare` runs once per corpus, `open_source` once per rank."""

from vp_train.data.corpus import Corpus, describe, prepare
from vp_train.data.source import Batch, Source, open_source

__all__ = ["Batch", "Corpus", "Source", "describe", "open_source", "prepare"]
