"""Bits per byte are the nats of all labels over the bytes that they stand for."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from vp_train.metrics.bits import BitsPerByte


def mesh_of(others, place=(0, 0)):
    """Return the mesh of a rank whose exchanges also have the rows `others`."""

    def all_gather(own):
        return torch.stack([own, *torch.tensor(others, dtype=own.dtype).reshape(-1, 2)])

    steps = SimpleNamespace(all_gather=all_gather)
    return SimpleNamespace(pipeline_rank=place[0], tensor_rank=place[1], steps=steps)


LABELS = torch.tensor([[[0, 2, -100], [1, 1, -100]]])
SOURCE = SimpleNamespace(byte_lengths=torch.tensor([3, 1, 5]))  # 4 labels of 10 bytes


@pytest.mark.parametrize(
    ("others", "place", "labels", "num_bytes"),
    [
        ([], (0, 0), 4, 10),
        ([[6, 20]], (0, 0), 10, 30),  # of another replica
        ([[6, 20]], (1, 0), 6, 20),  # the first rank of a replica counts for it
        ([[6, 20]], (0, 1), 6, 20),
    ],
)
def test_labels_and_bytes_of_all_replicas_count_once(others, place, labels, num_bytes):
    bits = BitsPerByte(SOURCE, mesh_of(others, place))
    for loss in (math.log(2), 3.0):
        found = bits.of("a", LABELS, loss)
        assert found == pytest.approx(loss / math.log(2) * labels / num_bytes)


def test_a_set_is_counted_once_and_every_set_by_itself():
    bits = BitsPerByte(SOURCE, mesh_of([]))
    assert bits.of("a", LABELS, 1.0) == bits.of("a", LABELS[..., :1], 1.0)
    assert bits.of("b", LABELS[..., :1], 1.0) != bits.of("a", LABELS, 1.0)


def test_without_bytes_there_are_no_bits():
    unknown = SimpleNamespace(byte_lengths=None)
    assert BitsPerByte(unknown, mesh_of([])).of("a", LABELS, 1.0) is None
    assert BitsPerByte(SOURCE, mesh_of([])).of("a", torch.full((1, 1, 2), -100), 1.0) is None
