"""The gradients of a rank are aligned views of one tensor, and backward adds to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vp_train.optim.buckets import lay_out
from vp_train.optim.gradients import Gradients

SHAPES = {"a": (3, 5), "b": (64,), "c": (65,), "none": (0, 4), "number": (), "d": (2, 2)}


def parameters_of(dtype):
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in SHAPES.items()
    }


def gradients_of(parameters, max_elements=1):
    """Return gradients with a bucket for each parameter, or more in one."""
    return Gradients(
        parameters,
        lay_out(parameters, [[[name] for name in parameters]], max_elements=max_elements),
    )


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_every_gradient_is_an_aligned_part_of_one_tensor_of_enough_precision(dtype, expected):
    parameters = parameters_of(dtype)
    gradients = gradients_of(parameters)
    assert gradients.dtype is gradients.flat.dtype is expected
    assert not gradients.flat.any()
    begins = []
    for name, parameter in parameters.items():
        view = gradients[name]
        assert view.shape == parameter.shape
        assert view.dtype is expected
        assert view.untyped_storage().data_ptr() == gradients.flat.untyped_storage().data_ptr()
        assert view.storage_offset() % 64 == 0
        assert parameter.grad is view
        begins.append(view.storage_offset())
    assert begins == [0, 64, 128, 256, 256, 320]  # as close as 64 elements allow
    assert gradients.flat.numel() == 384


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_backward_adds_to_them_and_zero_clears_them_in_place(dtype):
    parameters = parameters_of(dtype)
    gradients = gradients_of(parameters)
    where = gradients.flat.data_ptr()
    for count in (1, 2):
        sum(parameter.sum() for parameter in parameters.values()).backward()
        for name in SHAPES:
            assert torch.equal(
                gradients[name], torch.full(SHAPES[name], float(count), dtype=gradients.dtype)
            )
    assert gradients.flat.sum() == 2 * sum(parameter.numel() for parameter in parameters.values())
    parameters["a"].grad = None  # an optimizer may leave None
    gradients.zero()
    assert not gradients.flat.any()
    assert gradients.flat.data_ptr() == where
    for name, parameter in parameters.items():
        assert parameter.grad is gradients[name]


def test_a_bucket_is_one_piece_of_the_same_memory():
    parameters = parameters_of(torch.float32)
    gradients = gradients_of(parameters, max_elements=80)
    pieces = [gradients.of(bucket) for bucket in gradients.layout.buckets]
    assert torch.equal(torch.cat(pieces), gradients.flat)
    assert [bucket.names for bucket in gradients.layout.buckets] == [
        ("a", "b"),
        ("c", "none", "number", "d"),
    ]
    gradients.flat.fill_(1)
    pieces[0].zero_()
    assert not gradients["a"].any()
    assert not gradients["b"].any()
    assert gradients["c"].all()


def test_a_rank_without_parameters_has_an_empty_tensor():
    gradients = gradients_of({})
    assert gradients.flat.numel() == 0
    gradients.zero()
