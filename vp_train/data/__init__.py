"""The data of a run.  `prepare_all` tokenizes the corpora, `open_source` makes batches of them."""

from vp_train.data.corpus import Corpus, describe, prepare, prepare_all
from vp_train.data.source import Batch, Source, open_source

__all__ = ["Batch", "Corpus", "Source", "describe", "open_source", "prepare", "prepare_all"]
