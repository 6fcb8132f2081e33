"""Attention by blocks: what a sixteen-bit model must not lose."""

import pytest
import torch

from vp_train.model.attention import Rule, block_attention


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_scores_of_bfloat16_are_scaled_capped_and_normalised_in_float32(softcap):
    """Products are whole numbers that bfloat16 holds, and v is the identity: what comes out are the weights, rounded once."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-3, 4, (16, 1, 1, 16), generator=generator).bfloat16() for _ in range(2))
    weights = block_attention(q, k, torch.eye(16).bfloat16().view(16, 1, 1, 16), Rule(0.3, softcap, None))[:, 0]
    scores = 0.3 * (q[:, 0, 0].double() @ k[:, 0, 0].double().T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    exact = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf).softmax(-1)
    assert scores.abs().max() > 10  # of which bfloat16 keeps no more than a sixteenth
    assert torch.allclose(weights.double(), exact, rtol=2**-8, atol=1e-30)
