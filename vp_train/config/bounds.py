"""Bounds and choices that several sections share."""

from __future__ import annotations

DTYPES = ("bfloat16", "float16", "float32", "float64")
LINEAR_DTYPES = ("compute", "float8")
DEVICES = ("cpu", "cuda")
# Bounds that no real run meets.  They stop a slip of the keyboard before a plan is made: published
# models have at most 200 layers and 300 thousand tokens of vocabulary, runs at most a few hundred
# thousand GPUs, 64 pipeline ranks, and some thousand microbatches in a step.
MOST_LAYERS = 10_000
MOST_WIDTH = 10_000_000
MOST_TOKENS = 100_000_000  # of a vocabulary, or of a sequence
MOST_REPLICAS = 100_000
MOST_RANKS_OF_A_MODEL = 1_024  # of a pipeline, or of a tensor-parallel group
MOST_MICROBATCHES = 65_536
# Of gradients, at least, in a stage with as many layers: nothing hides the sum of the last one.
BUCKETS_PER_STAGE = 8
