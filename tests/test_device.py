"""A rank's device is the same one in every thread."""

import threading
from dataclasses import dataclass

import pytest
import torch

from vp_train.assembly import rank_device
from vp_train.config import RunConfig, RunSettings
from vp_train.tensors.streams import CudaStreams


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


class Gpus:
    """Two GPUs as CUDA presents them to torch: every thread has a current one, at first GPU 0."""

    def __init__(self):
        self._thread, self.started = threading.local(), set()

    @property
    def current(self):
        return getattr(self._thread, "device", 0)

    def exchange(self, device):
        """Make `device` current; this starts CUDA on it."""
        self.started.add(device)
        return self.exchange_if_started(device)

    def exchange_if_started(self, device):
        before, self._thread.device = self.current, device
        return before

    def stream_of(self, device=None):
        device = self.current if device is None else device.index
        own = getattr(self._thread, "streams", {})
        return own.get(device, Stream(torch.device("cuda", device)))

    def set_stream(self, stream):
        if stream.device.index != self.current:
            self.exchange(stream.device.index)
        self._thread.streams = getattr(self._thread, "streams", {}) | {stream.device.index: stream}


@dataclass(eq=False)
class Stream:
    device: torch.device
    priority: int = 0


@pytest.fixture
def gpus(monkeypatch):
    gpus = Gpus()
    for name, fake in {
        "_exchange_device": gpus.exchange,
        "_maybe_exchange_device": gpus.exchange_if_started,
        "_get_device_index": lambda device, *_, **__: getattr(device, "index", gpus.current),
        "current_stream": gpus.stream_of,
        "set_stream": gpus.set_stream,
        "Stream": Stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return gpus


def test_a_thread_that_uses_a_side_stream_starts_no_other_gpu(gpus):
    """CUDA takes memory of every GPU on which it starts; all ranks of a node would share GPU 0."""
    own, found = torch.device("cuda", 1), []
    gpus.exchange(1)
    streams = CudaStreams(own)

    def beside():
        with streams.beside("batch"):
            found.append((gpus.current, torch.cuda.current_stream()))
        found.append((gpus.current, torch.cuda.current_stream(own)))

    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    (device, stream), (after, usual) = found
    assert (device, stream.device, stream.priority) == (1, own, -1)
    assert (after, usual.priority) == (0, 0)
    assert gpus.started == {1}
