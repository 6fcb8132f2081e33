"""Saved activations in host memory: what a forward pass saves waits there for its backward.

`HostLink.keep` returns the `SavedActivations` of one forward pass.  Their hooks collect what
autograd saves while they are active.  Four operations of the program then move it:

- `offload` begins to copy it to the host, on a side stream that has waited for the passes;
- `offloaded` lets the passes wait for that copy, and drops the tensors on the device;
- `reload` takes device memory and begins to copy it back, on another side stream;
- `restored` lets the passes wait for that.  From then on the backward finds its tensors.

On a CPU each copy has ended when the call returns.  The originals are dropped nevertheless, so
operations in a wrong order fail there as they would on a GPU.

A storage is copied once, however many saved tensors are views of it, and only the part that they
cover.  What does not belong to the pass stays where it is: parameters and buffers, and tensors of
integers, which hold the bounds of documents or the state of a random generator.

Lifetimes follow the third part of the rule in `tensors.streams`: a copy holds what it reads and
writes until the passes have waited for it.  So nothing is lent, and the memory of an offloaded
tensor can be used again from a known operation on, however far the host is ahead of the device.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor, nn

from vp_train.tensors.alignment import HOST_BLOCK_BYTES, rounded_up
from vp_train.tensors.streams import Mark, Streams, with_index

_ALIGNMENT = 512  # bytes; as torch aligns memory on a GPU
TO_HOST, FROM_HOST = "to host", "from host"  # side streams


class OffloadOrderError(RuntimeError):
    """The error if activations are moved or read at a wrong point of the program."""


class Owner(Protocol):
    """An owner of parameters and buffers, such as a stage."""

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def buffers(self) -> Iterator[Tensor]: ...


class _Place(StrEnum):
    """The places where the activations of a pass can be."""

    ON_DEVICE = "on the device"
    LEAVING = "on their way to the host"
    ON_HOST = "on the host"
    RETURNING = "on their way back"
    BACK = "back on the device"


class HostMemory:
    """Blocks of host memory, all of one size, that are used again and again.

    There are as many as were ever needed at the same time.  pinned: whether the memory is locked,
    without which a GPU cannot copy beside its other work.
    """

    def __init__(self, *, pinned: bool, block_bytes: int = HOST_BLOCK_BYTES) -> None:
        self.block_bytes = block_bytes
        self._pinned = pinned
        self._free: list[Tensor] = []
        self._num_blocks = 0

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all blocks."""
        return self._num_blocks * self.block_bytes

    @property
    def used_bytes(self) -> int:
        """Return the bytes of the blocks that are in use."""
        return self.num_bytes - len(self._free) * self.block_bytes

    def take(self) -> Tensor:
        """Return a block: uint8 [block_bytes].  Raises MemoryError if the host has no more."""
        if self._free:
            return self._free.pop()
        try:
            block = torch.empty(self.block_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError as error:
            if "out of memory" not in str(error) and "allocate memory" not in str(error):
                raise  # such as an error of earlier work on the GPU
            raise MemoryError(
                f"the host has no memory for more than {self.num_bytes / 2**30:.1f} GiB of this "
                "rank's activations; lower parallel.offload_activations"
            ) from error
        self._num_blocks += 1
        return block

    def give(self, blocks: list[Tensor]) -> None:
        """Take back blocks that nothing reads or writes any more."""
        self._free += blocks


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A copy between device and host that was issued; it holds what it reads and writes.

    mark: its end on its stream, None on a CPU, where it has ended.
    """

    streams: Streams
    mark: Mark
    pairs: Sequence[tuple[Tensor, Tensor]]

    def wait(self) -> Tensor:
        """Let the current stream wait for the copy; return a tensor that was copied."""
        self.streams.follow(self.mark)
        return self.pairs[-1][0] if self.pairs else torch.empty(0)

    def is_completed(self) -> bool:
        return self.mark is None or bool(self.mark.query())


class HostLink:
    """The link between one rank and its host memory."""

    def __init__(
        self, streams: Streams, device: torch.device, block_bytes: int = HOST_BLOCK_BYTES
    ) -> None:
        self.device, self._streams = with_index(device), streams
        self.memory = HostMemory(pinned=device.type == "cuda", block_bytes=block_bytes)
        self.moved_bytes = 0  # so far, in either direction

    def keep(self, name: str, owned: Collection[int]) -> SavedActivations:
        """Return empty `SavedActivations` of the forward pass `name`.

        owned: the data pointers of storages that never leave the device.
        """
        return SavedActivations(self, name, owned)

    def copy(self, side: str, pairs: Sequence[tuple[Tensor, Tensor]]) -> HostCopy:
        """Copy the second tensor of each pair to the first, on the side stream `side`.

        The copies begin when the passes have done what was issued before.
        """
        ready = self._streams.mark()
        with self._streams.beside(side):
            self._streams.follow(ready)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
                self.moved_bytes += target.nbytes
            return HostCopy(self._streams, self._streams.mark(), pairs)


class _Storage:
    """The part of a storage that saved tensors cover: its bytes from `first` to `last`.

    tensor: one of those tensors, until the copy to the host has ended.
    slices: where the bytes are on the host, in order.
    memory: where the bytes come back to; with `is_back` they are there.
    """

    __slots__ = ("first", "is_back", "kept", "last", "memory", "slices", "tensor")

    def __init__(self, kept: str, tensor: Tensor) -> None:
        self.kept = kept
        self.tensor: Tensor | None = tensor
        self.first, self.last = _range_of(tensor)
        self.slices: list[Tensor] = []
        self.memory: Tensor | None = None
        self.is_back = False

    @property
    def num_bytes(self) -> int:
        return self.last - self.first

    def cover(self, tensor: Tensor) -> None:
        """Widen the part so that it covers `tensor` too."""
        first, last = _range_of(tensor)
        self.first, self.last = min(self.first, first), max(self.last, last)

    def saved_bytes(self) -> Tensor:
        """Return the part as it was saved: uint8 [num_bytes]."""
        assert self.tensor is not None
        whole = torch.empty(0, dtype=torch.uint8, device=self.tensor.device)
        return whole.set_(self.tensor.untyped_storage(), self.first, (self.num_bytes,), (1,))


@dataclass(frozen=True, slots=True)
class _Saved:
    """The stand-in that autograd keeps for a saved tensor."""

    storage: _Storage
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """Return the tensor.  Raises OffloadOrderError if it is not back on the device."""
        memory = self.storage.memory
        if memory is None or not self.storage.is_back:
            raise OffloadOrderError(
                f"a backward reads what {self.storage.kept} kept, but that is not back on the "
                f"device; the program lacks restored:{self.storage.kept} before it"
            )
        offset = self.offset - self.storage.first // self.dtype.itemsize
        return memory.view(self.dtype).as_strided(self.shape, self.stride, offset)


class SavedActivations:
    """The activations that the offloaded layers of one forward pass keep, and their place.

    It holds the tensors until `restored`.  After that only the autograd graph does, and frees each
    of them as soon as the backward has read it.
    """

    def __init__(self, link: HostLink, name: str, owned: Collection[int]) -> None:
        self._link, self._name, self._owned = link, name, owned
        self._storages: dict[int, _Storage] = {}
        self._blocks: list[Tensor] = []
        self._left = 0  # bytes of the last block that are not used
        self._place = _Place.ON_DEVICE
        self._copy: HostCopy | None = None  # the last one
        self.num_bytes = 0  # that are moved; known when the forward pass has ended

    @property
    def device_bytes(self) -> int:
        """Return the bytes that are held on the device."""
        return 0 if self._place is _Place.ON_HOST else self.num_bytes

    @property
    def copying(self) -> HostCopy | None:
        """Return the copy that was issued last, None if it ended when it was issued."""
        return None if self._copy is None or self._copy.mark is None else self._copy

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Within this context keep here what autograd saves."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield
        self.num_bytes = sum(storage.num_bytes for storage in self._storages.values())

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        # A saved output belongs to the graph: kept as it is, graph and hook would be a cycle.
        tensor = tensor.detach()
        key = tensor.untyped_storage().data_ptr()
        storage = self._storages.get(key)
        if storage is not None:
            storage.cover(tensor)
        elif key in self._owned or not self._is_moved(tensor):
            return tensor
        else:
            storage = self._storages[key] = _Storage(self._name, tensor)
        offset = int(tensor.storage_offset())
        return _Saved(storage, tensor.dtype, tensor.shape, tensor.stride(), offset)

    def _is_moved(self, tensor: Tensor) -> bool:
        return (
            tensor.is_floating_point() and tensor.device == self._link.device and tensor.numel() > 0
        )

    def offload(self) -> None:
        """Begin to copy everything to the host, after the work of the passes so far."""
        self._advance("offload", _Place.ON_DEVICE, _Place.LEAVING)
        for storage in self._storages.values():
            storage.slices = self._room(storage.num_bytes)
        pairs = [
            pair
            for storage in self._storages.values()
            for pair in zip(storage.slices, _cut(storage.saved_bytes(), storage), strict=True)
        ]
        self._copy = self._link.copy(TO_HOST, pairs)

    def offloaded(self) -> None:
        """Let the passes wait for the copy to the host, and free the device memory."""
        self._advance("offloaded", _Place.LEAVING, _Place.ON_HOST)
        self._end_copy()
        for storage in self._storages.values():
            storage.tensor = None

    def reload(self) -> None:
        """Take device memory, and begin to copy everything back."""
        self._advance("reload", _Place.ON_HOST, _Place.RETURNING)
        pairs: list[tuple[Tensor, Tensor]] = []
        for storage in self._storages.values():
            # A multiple of the size of any value, so that it can be viewed as any dtype.
            size = rounded_up(storage.num_bytes, 16)
            storage.memory = torch.empty(size, dtype=torch.uint8, device=self._link.device)
            pairs += zip(_cut(storage.memory, storage), storage.slices, strict=True)
        self._copy = self._link.copy(FROM_HOST, pairs)

    def restored(self) -> None:
        """Let the passes wait until everything is back, for the backward to read."""
        self._advance("restored", _Place.RETURNING, _Place.BACK)
        self._end_copy()
        for storage in self._storages.values():
            storage.slices, storage.is_back = [], True
        self._storages.clear()
        self._link.memory.give(self._blocks)  # what is next copied there waits for the passes
        self._blocks = []

    def _end_copy(self) -> None:
        assert self._copy is not None
        self._copy.wait()
        self._copy = None

    def _advance(self, operation: str, expected: _Place, then: _Place) -> None:
        if self._place is not expected:
            raise OffloadOrderError(
                f"{operation}:{self._name} comes while its activations are {self._place}, "
                f"not {expected}; check the program"
            )
        self._place = then

    def _room(self, num_bytes: int) -> list[Tensor]:
        """Return parts of blocks that have `num_bytes` together."""
        slices, size = [], self._link.memory.block_bytes
        while num_bytes:
            if not self._left:
                self._blocks.append(self._link.memory.take())
                self._left = size
            count = min(num_bytes, self._left)
            start = size - self._left
            slices.append(self._blocks[-1][start : start + count])
            num_bytes -= count
            self._left -= rounded_up(count, _ALIGNMENT)
        return slices


def storages_of(stage: Owner) -> frozenset[int]:
    """Return the data pointers of the storages of a stage's parameters and buffers."""
    tensors = (*stage.parameters(), *stage.buffers())
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)


def _unpack(saved: Tensor | _Saved) -> Tensor:
    return saved.tensor() if isinstance(saved, _Saved) else saved


def _cut(memory: Tensor, storage: _Storage) -> Iterable[Tensor]:
    """Return the parts of `memory`, uint8 [n], that are as long as the slices of `storage`."""
    memory = memory[: storage.num_bytes]
    if len(storage.slices) == 1:
        return (memory,)
    return torch.split(memory, [len(part) for part in storage.slices])


def _range_of(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor begins and ends in its storage: bytes, the first one aligned."""
    num_items = tensor.numel()
    if not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        num_items = 1 + sum((size - 1) * stride for size, stride in steps)
    first = int(tensor.storage_offset()) * tensor.itemsize
    return first - first % _ALIGNMENT, first + num_items * tensor.itemsize
