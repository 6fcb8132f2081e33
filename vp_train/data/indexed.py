"""Megatron-core's indexed datasets: written, checked and sampled here, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vp_train.config import ConfigError
from vp_train.quiet import quiet_megatron


@dataclass(frozen=True, slots=True)
class EndOnly:
    """What GPTDataset wants of a tokenizer; a pad id of -1 occurs in no text, so nothing is padding."""

    eod: int
    vocab_size: int
    pad: int = -1

    @property
    def unique_identifiers(self) -> dict[str, int]:
        return {"eod": self.eod}


def write_dataset(prefix: Path, documents: Iterable[list[int]], vocab_size: int) -> tuple[int, int]:
    """Write `prefix`.bin and .idx, one sequence per document; how many documents and tokens there were."""
    with quiet_megatron():
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=token_dtype(vocab_size))
    num_documents = num_tokens = 0
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
        num_documents += 1
        num_tokens += len(tokens)
    builder.finalize(f"{prefix}.idx")
    return num_documents, num_tokens


def token_dtype(vocab_size: int) -> type[np.integer[Any]]:
    """The smallest type megatron reads that holds every token."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def check_tokens(prefix: Path, vocab_size: int) -> None:
    """Read every token.  Raises ConfigError with file, offset (in tokens) and token for the first outside [0, vocab_size)."""
    tokens = np.memmap(f"{prefix}.bin", dtype=token_dtype(vocab_size), mode="r")
    for start in range(0, len(tokens), 1 << 24):
        block = tokens[start : start + (1 << 24)]
        if int(block.max()) >= vocab_size or int(block.min()) < 0:
            offset = start + int(np.argmax((block >= vocab_size) | (block < 0)))
            raise ConfigError(
                f"{prefix}.bin: token {int(tokens[offset])} at offset {offset} is outside [0, {vocab_size}); "
                f"delete {prefix.parent}, it will be built again"
            )


@dataclass(frozen=True, slots=True)
class Share:
    """Some documents of a corpus: their numbers, int32 and ascending, and how many tokens they hold."""

    documents: np.ndarray
    num_tokens: int


def split_documents(prefix: Path, validation_fraction: float, seed: int) -> tuple[Share, Share]:
    """The documents for training and those for validation.

    Validation takes documents at random up to its fraction of the tokens, at least one and never the last.  Documents larger
    than the whole fraction come last, the smallest first.
    """
    dataset = _open_dataset(prefix)  # owns the memory that its lengths are a view of
    lengths = np.array(dataset.sequence_lengths, dtype=np.int64)
    target = validation_fraction * lengths.sum()
    order = np.random.default_rng(seed).permutation(len(lengths)).astype(np.int32)
    order = order[np.argsort(np.maximum(lengths[order], target), kind="stable")]
    num_validation = int(np.searchsorted(np.cumsum(lengths[order]), target, side="right"))
    if validation_fraction > 0:
        num_validation = min(max(num_validation, 1), len(lengths) - 1)
    validation, training = np.sort(order[:num_validation]), np.sort(order[num_validation:])
    return Share(training, int(lengths[training].sum())), Share(validation, int(lengths[validation].sum()))


def build_samples(
    prefix: Path, share: Share, num_samples: int, seq_length: int, seed: int, tokens: EndOnly, *, training: bool
) -> Any:
    """A GPTDataset of at least `num_samples` shuffled samples of seq_length + 1 tokens; documents repeat when they run out.

    `share` must hold the tokens of one sample.
    """
    assert share.num_tokens > seq_length
    with quiet_megatron():
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.utils import Split

        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            split="1,0,0",
            # In memory: a cached index knows nothing of the documents chosen here, and only global rank 0 would write it.
            path_to_cache="",
            tokenizer=tokens,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        split = Split.train if training else Split.valid
        return GPTDataset(_open_dataset(prefix), str(prefix), share.documents, num_samples, split, config)


def _open_dataset(prefix: Path) -> Any:
    with quiet_megatron():
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(str(prefix))
