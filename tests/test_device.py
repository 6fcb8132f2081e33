"""A rank's device is the same one in every thread."""

import pytest
import torch

from vp_train.assembly import rank_device
from vp_train.config import RunConfig, RunSettings


@pytest.mark.parametrize("index", [0, 3])
def test_a_gpu_has_its_index(monkeypatch, index):
    """A device without an index would be GPU 0 in a thread that has not called set_device."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: index)
    for backend in ("nccl", "gloo"):
        config = RunConfig(run=RunSettings(device="cuda", comm_backend=backend))
        assert rank_device(config) == torch.device("cuda", index)


def test_a_cpu_needs_no_index(monkeypatch):
    monkeypatch.delattr(torch.cuda, "current_device")  # nor anything of CUDA
    assert rank_device(RunConfig()) == torch.device("cpu")
