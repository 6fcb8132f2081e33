"""Shards cover the vocabulary once, whatever its size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vp_train.vocab.shard import split_rows


@given(st.integers(1, 300), st.integers(1, 9))
def test_default_shards_are_those_of_torch_chunk(vocab_size, num_shards):
    shards = split_rows(vocab_size, num_shards)
    expected = [len(chunk) for chunk in torch.arange(vocab_size).chunk(num_shards)]
    assert [shard.num_rows for shard in shards] == expected + [0] * (num_shards - len(expected))
    assert [row for shard in shards for row in range(shard.start, shard.stop)] == list(
        range(vocab_size)
    )


@pytest.mark.parametrize("sizes", [[50, 51], [100], [101, -1], [33, 33, 34]])
def test_sizes_that_do_not_add_up_are_refused_with_the_numbers(sizes):
    with pytest.raises(ValueError, match=r"give 2 sizes of at least 0 that add up to 100"):
        split_rows(100, 2, sizes)


def test_each_token_is_owned_once():
    ids = torch.randint(0, 101, (3, 500), generator=torch.Generator().manual_seed(0))
    shards = split_rows(101, 4, [0, 60, 1, 40])
    found = torch.full_like(ids, -1)
    for shard in shards:
        for microbatch, owned in enumerate(shard.owned(ids, ids.device)):
            assert (found[microbatch, owned.positions] == -1).all()
            found[microbatch, owned.positions] = owned.rows + shard.start
    assert torch.equal(found, ids)
