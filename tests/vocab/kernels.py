"""Compare the Triton kernels with torch in float64.

`test_cuda` also runs this in a new process with Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import astuple

import torch

from vp_train.vocab import rows
from vp_train.vocab.shard import Shard

SHAPES = (
    (5, 33),
    (2, 5_000),
    (3, 1),
    (0, 7),
    (2, 32_769),  # longer than `_WHOLE`
)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def compare_fold(shape, device):
    """Compare `fold` on two chunks, the second of which gets the statistics of the first.

    Targets lie in the first chunk, in the second, or in neither.
    """
    from vp_train.vocab import triton_rows

    generator = torch.Generator().manual_seed(0)
    num_rows, num_columns = shape
    for softcap in (None, 5.0):
        for dtype in _DTYPES:
            ours = rows.Statistics.none(torch.empty(num_rows, device=device), torch.float32)
            true = rows.Statistics.none(torch.empty(num_rows), torch.float64)
            columns = torch.randint(-1, 2 * num_columns + 1, (num_rows,), generator=generator)
            for chunk in range(2):
                logits = torch.randn(shape, generator=generator) * 4
                written, expected = (
                    torch.empty(shape, dtype=dtype, device=device),
                    torch.empty(shape).double(),
                )
                column = columns - chunk * num_columns
                # In a run, float32 is written in place.
                given = logits.clone().to(device)
                out = given if dtype is torch.float32 else written
                ours, rescale = triton_rows.fold(given, ours, column.to(device), out, softcap)
                true, right = rows.fold(logits.double(), true, column, expected, softcap)
                relative = 1e-5 if dtype is torch.float32 else 8e-3
                assert torch.allclose(out.cpu().double(), expected, rtol=relative, atol=1e-6), (
                    shape,
                    softcap,
                    dtype,
                )
                for mine, other in zip(
                    (*astuple(ours), rescale), (*astuple(true), right), strict=True
                ):
                    assert torch.allclose(mine.cpu().double(), other, rtol=1e-5, atol=1e-6), (
                        shape,
                        softcap,
                        dtype,
                    )


def compare_input_term(shape, device):
    """Compare `input_term` for owned and other targets, with and without the optional terms."""
    from vp_train.vocab import triton_rows

    generator = torch.Generator().manual_seed(1)
    num_tokens, hidden = shape
    for dtype in _DTYPES:
        weight = torch.randn(11, hidden, generator=generator).to(dtype)
        ids = torch.randint(0, 22, (1, num_tokens), generator=generator)
        factor, scale, gain = (torch.randn(num_tokens, generator=generator) for _ in range(3))
        shared, product = (
            torch.randn(hidden, generator=generator),
            torch.randn(shape, generator=generator),
        )
        (true,) = Shard(5, 16).owned(ids, torch.device("cpu"))
        for of_targets in (0.9, scale):
            for more in ({}, {"shared": shared, "gain": gain}):
                ours = triton_rows.input_term(
                    product.clone().to(device),
                    factor.to(device),
                    weight.to(device),
                    true.row_of_token.to(device),
                    of_targets if isinstance(of_targets, float) else of_targets.to(device),
                    *(
                        more[name].to(device) if name in more else None
                        for name in ("shared", "gain")
                    ),
                )
                wide = {name: value.double() for name, value in more.items()}
                scales = of_targets if isinstance(of_targets, float) else of_targets.double()
                expected = rows.input_term(
                    product.double(), factor.double(), weight.double(), true, scales, **wide
                )
                assert torch.allclose(ours.cpu().double(), expected, rtol=1e-5, atol=1e-5), (
                    shape,
                    dtype,
                )


def compare_targets(shape, device):
    """Compare `scale` and `subtract_targets`, where several tokens have the same target."""
    from vp_train.vocab import triton_rows

    generator = torch.Generator().manual_seed(2)
    num_tokens, hidden = shape
    for dtype in _DTYPES:
        x = torch.randn(shape, generator=generator).to(dtype)
        factor, grad = (
            torch.randn(num_tokens, generator=generator),
            torch.randn(3, hidden, generator=generator),
        )
        ids = torch.randint(0, 6, (1, num_tokens), generator=generator)
        (owned,) = Shard(2, 5).owned(ids, torch.device("cpu"))
        out = triton_rows.scale(
            x.to(device), factor.to(device), torch.empty(shape, dtype=dtype, device=device)
        )
        exact = x.double() * factor.double()[:, None]
        assert torch.allclose(
            out.cpu().double(), exact, rtol=1e-6 if dtype is torch.float32 else 8e-3
        ), (shape, dtype)
        ours, true = grad.clone().to(device), grad.double()
        places = (owned.positions.to(device), owned.rows.to(device))
        triton_rows.subtract_targets(ours, x.to(device), *places, factor.to(device))
        rows.subtract_targets(true, x.double(), owned, factor.double())
        assert torch.allclose(ours.cpu().double(), true, rtol=1e-5, atol=1e-5), (shape, dtype)
