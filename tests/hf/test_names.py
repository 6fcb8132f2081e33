"""The rows of Hugging Face's tensors go where megatron-core has them, and back."""

from dataclasses import replace

import pytest
import torch

from vp_train.config import ModelConfig
from vp_train.hf.names import entries
from vp_train.model import shape

MODEL = ModelConfig(
    num_layers=2, hidden_size=12, num_heads=6, num_query_groups=2, ffn_hidden_size=5, vocab_size=7
)
MODELS = [
    MODEL,
    replace(MODEL, tied_embeddings=True, linear_bias=True, num_query_groups=6),
    replace(MODEL, qk_norm=True, post_norms=True, head_size=4, num_query_groups=1),
    replace(MODEL, qkv_bias=True),
]


def test_queries_keys_and_values_lie_together_by_group():
    """Six heads of two rows in two query groups: q0 q1 q2 k0 v0, q3 q4 q5 k1 v1."""
    entry = next(
        entry
        for entry in entries(MODEL)
        if entry.ours.endswith("layers.0.layer.self_attention.linear_qkv.weight")
    )
    q, k, v = (
        first + torch.arange(rows)[:, None].expand(-1, 12)
        for first, rows in ((0, 12), (100, 4), (200, 4))
    )
    rows = entry.join([q, k, v])[:, 0].tolist()
    assert rows == [0, 1, 2, 3, 4, 5, 100, 101, 200, 201, 6, 7, 8, 9, 10, 11, 102, 103, 202, 203]


@pytest.mark.parametrize("model", MODELS)
def test_splitting_undoes_joining(model):
    for entry in entries(model):
        theirs = [torch.randn(size) for size in entry.their_shapes.values()]
        ours = entry.join(theirs)
        assert ours.shape == entry.shape
        assert all(torch.equal(*both) for both in zip(entry.split(ours), theirs, strict=True))


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_has_one_entry_and_every_name_of_theirs_one_use(model):
    everything = list(entries(model))
    assert sum(torch.Size(entry.shape).numel() for entry in everything) == shape.num_parameters(
        model
    )
    names = [name for entry in everything for name in entry.theirs]
    assert len(set(names)) == len(names)
    assert len({entry.ours for entry in everything}) == len(everything)
