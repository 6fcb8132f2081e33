"""Sizes by formula are those of the modules; the shares of tensor-parallel ranks make the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.meshes import fake_world
from tests.model.test_stage import (
    FAMILIES,
    MODEL,
    group,  # noqa: F401 - a fixture
    kept_bytes,
    stage,
)
from vp_train.model import shape

DTYPES = (torch.bfloat16, torch.float64)


def family(name, **changes):
    return replace(MODEL, **FAMILIES[name] | changes)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_matrices_and_flops_of_all_shares_are_those_of_the_layer(name):
    model = family(name, num_query_groups=2)
    assert shape.tensor_share(model, 1) is model
    share = shape.tensor_share(model, 2)
    whole = shape.linear_parameters(model)
    assert tuple(2 * size for size in shape.linear_parameters(share)) == whole
    assert sum(whole) == shape.layer_matrix_parameters(model)
    assert 2 * shape.layer_flops(share, 40) == shape.layer_flops(model, 40)
    assert (share.hidden_size, shape.head_size(share)) == (48, shape.head_size(model))


@pytest.mark.parametrize("window", [None, 1, 7, 20, 1000])
def test_a_token_costs_two_flops_per_weight_and_four_per_query_value_and_key(window):
    model = replace(MODEL, sliding_window=window)
    seen = 20 if window is None else min(window, 20)
    for num_tokens in (1, 20, 60):
        expected = 2 * shape.layer_matrix_parameters(model) + 4 * shape.query_size(model) * seen
        assert shape.layer_flops(model, num_tokens) == num_tokens * expected


def test_the_output_layer_counts_as_many_layers_as_the_paper_says():
    h, s, v = 64, 32, 1000
    model = replace(MODEL, hidden_size=h, num_heads=4, num_query_groups=4, ffn_hidden_size=4 * h)
    model = replace(model, activation="gelu", seq_length=s, vocab_size=v)
    assert shape.head_in_layers(model) == pytest.approx(6 * v / (72 * h + 12 * s))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"embedding_scale": True},
        {"embedding_multiplier": 12.0},
        {"positions": "learned"},
        {"positions": "learned", "embedding_multiplier": 12.0},
    ],
    ids=str,
)
def test_a_first_stage_keeps_its_input_where_its_layers_read_another_tensor(
    group,  # noqa: F811
    changes,
    dtype,
    batch,
):
    """A pipeline keeps the input of a stage until its backward, whatever autograd saves."""
    model = replace(MODEL, **changes)
    first = stage(group, range(1), first=True, dtype=dtype, model=model)
    x = torch.randn(20, batch, 48, dtype=dtype, requires_grad=True)
    read = []
    first.layers["0"].register_forward_pre_hook(lambda _, given: read.append(given[0]))
    first(x)
    own = 0 if read[0].data_ptr() == x.data_ptr() else x.untyped_storage().nbytes()
    assert shape.embedding_activation_bytes(model, batch, dtype.itemsize) == own


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["plain", "gpt", "gemma2"])
def test_ranks_that_split_sequences_keep_their_part_of_norms_and_inputs(
    name, recompute, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")  # megatron's collectives ask
    batch, model = 3, family(name, sliding_window=None, full_attention_every=None)
    with fake_world(0, 2):
        part = stage(
            dist.group.WORLD, range(2), model=model, recompute=recompute, split_sequences=True
        )
        x = torch.randn(10, batch, 48, dtype=torch.float64, requires_grad=True)
        kept, y = kept_bytes(part, x)
    share = shape.tensor_share(model, 2)
    bytes_of = shape.layer_activation_bytes(share, batch, 8, recompute=recompute, sequence_ranks=2)
    assert (y.shape, kept) == (x.shape, 2 * bytes_of)


@pytest.mark.parametrize("name", FAMILIES)
def test_on_cuda_attention_keeps_a_log_sum_of_every_head_with_a_softcap_too(name):
    model = family(name)
    here, there = (
        shape.layer_activation_bytes(model, 3, 2, on_cuda=on_cuda) for on_cuda in (False, True)
    )
    capped = model.attention_softcap is not None
    assert there - here == (4 * 3 * 20 * model.num_heads if capped else 0)
