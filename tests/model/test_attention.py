"""Attention by blocks is precise in bfloat16; on a GPU one kernel computes packed documents."""

import pytest
import torch

from vp_train.model.attention import Documents, Rule, attend_documents, block_attention

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_scores_of_bfloat16_are_scaled_capped_and_normalised_in_float32(softcap):
    """The products are integers that bfloat16 represents, and v is the identity.

    So the outputs are the attention weights, rounded once.
    """
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-3, 4, (16, 1, 1, 16), generator=generator).bfloat16() for _ in range(2))
    weights = block_attention(
        q, k, torch.eye(16).bfloat16().view(16, 1, 1, 16), Rule(0.3, softcap, None)
    )[:, 0]
    scores = 0.3 * (q[:, 0, 0].double() @ k[:, 0, 0].double().T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    exact = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf).softmax(-1)
    assert scores.abs().max() > 10  # where bfloat16 is no more precise than 1/16
    assert torch.allclose(weights.double(), exact, rtol=2**-8, atol=1e-30)


@on_gpu
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_packed_documents_on_a_gpu_are_attended_to_one_by_one(groups, window):
    """Compare values and gradients with `block_attention` in float64."""
    lengths, heads, size = (1, 300, 7, 64, 2), 4, 64
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), count, size) for count in (heads, groups, groups)]
    given = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    dy = torch.randn(sum(lengths), heads * size, generator=generator).bfloat16()
    ours = [tensor.cuda().requires_grad_() for tensor in given]
    context = attend_documents(*ours, Documents.on(torch.device("cuda"), lengths), 0.2, window)
    assert context is not None
    context.backward(dy.cuda())
    exact = [tensor.double().requires_grad_() for tensor in given]
    pieces = zip(*(tensor[:, None].split(lengths) for tensor in exact), strict=True)
    rule = Rule(0.2, None, window)
    expected = torch.cat([block_attention(*piece, rule)[:, 0] for piece in pieces])
    expected.backward(dy.double())
    pairs = [
        (context, expected),
        *((mine.grad, true.grad) for mine, true in zip(ours, exact, strict=True)),
    ]
    for mine, true in pairs:
        # At least 1: with a window of one token the gradients of q and k are 0.
        largest = max(true.abs().max().item(), 1.0)
        assert torch.allclose(mine.cpu().double(), true, rtol=2e-2, atol=2e-2 * largest)


def test_on_a_cpu_no_kernel_takes_packed_documents():
    q = torch.zeros(3, 1, 8, dtype=torch.bfloat16)
    assert attend_documents(q, q, q, Documents.on(torch.device("cpu"), (1, 2)), 1.0, None) is None
