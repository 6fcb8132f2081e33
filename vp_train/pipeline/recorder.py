"""Measures a step: when each pass ran, and the bytes it left behind for later passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from schedules.ir import Kind, Pass
from schedules.timeline import Span


def when_computed() -> float:
    """The seconds at which this rank's passes on a GPU have been computed.  Waits for them, not for messages under way."""
    torch.cuda.current_stream().synchronize()
    return time.perf_counter()


@dataclass
class Recorder:
    """An observer of one step of one rank.

    `clock` returns seconds, on CUDA `when_computed`: a recorded step is slower than the others.
    `held_bytes` is what the output layer holds from S for T.  Storage of `parameters` is not activation memory.
    """

    rank: int
    clock: Callable[[], float]
    held_bytes: Callable[[], int]
    parameters: list[nn.Parameter]
    started_at: float = 0.0
    spans: list[Span] = field(default_factory=list)
    peak_bytes: int = 0
    _saved: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in self.parameters}

    @contextmanager
    def observe(self, item: Pass) -> Iterator[None]:
        """Time `item`; count what autograd saves in F, until the B of the same stage and microbatch has run."""
        start = self.clock() - self.started_at
        if item.kind is Kind.F:
            storages: dict[int, int] = {}

            def pack(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._weights:
                    storages[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
            self._saved[item.stage, item.microbatch] = sum(storages.values())
        else:
            yield
        end = self.clock() - self.started_at
        self.spans.append(Span(self.rank, str(item), item.kind.value, item.stage, item.microbatch, start, end))
        if item.kind in (Kind.B, Kind.I):  # what I leaves for W is among held_bytes
            self._saved.pop((item.stage, item.microbatch), None)
        self.peak_bytes = max(self.peak_bytes, sum(self._saved.values()) + self.held_bytes())
