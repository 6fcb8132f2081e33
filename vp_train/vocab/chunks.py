"""How many rows of the vocabulary are processed at once, also for planning: without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChunkSize:
    """The size of a chunk of rows.

    num_bytes: of its logits: enough for fast products, and on a CPU few enough to stay in cache.
    minimum_rows, maximum_rows: whatever the bytes.
    """

    num_bytes: int
    minimum_rows: int
    maximum_rows: int

    def num_rows(self, num_tokens: int, item_bytes: int) -> int:
        """Return the rows of a chunk for so many tokens and bytes per logit."""
        rows = self.num_bytes // (item_bytes * max(1, num_tokens))
        return max(self.minimum_rows, min(rows, self.maximum_rows))

    def logits_bytes(self, num_tokens: int, num_rows: int, item_bytes: int) -> int:
        """Return the bytes of the logits of the largest chunk of a shard of `num_rows`."""
        return item_bytes * num_tokens * min(num_rows, self.num_rows(num_tokens, item_bytes))


# A row of a GPU's chunk fits the registers of one program.  A chunk that fits the L2 cache gains
# nothing: on an H100 (50 MB) 128 MiB take 1 to 3 % less time than 32 MiB, with fewer launches.
# Below 2,048 rows products become slow.
CHUNKS = {
    "cpu": ChunkSize(6 << 20, 1, 1 << 30),
    "cuda": ChunkSize(128 << 20, 2_048, 32_768),
}
PANEL_BYTES = 128 << 20  # of P of the rows that a GPU multiplies at once but does not keep
