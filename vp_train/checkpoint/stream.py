"""Reading and writing safetensors files one tensor at a time.

The library can only write tensors that are all in memory.  `write_tensors` takes an iterator.  The
format (github.com/huggingface/safetensors) has three parts: the length of a JSON header as 8 bytes,
the header, and the bytes of all tensors in the header's order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vp_train.durable import open_new, open_regular, plain, write_all

_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True, slots=True)
class Described:
    """The name, shape and dtype of a tensor that is not in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_values(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """The size in bytes."""
        return self.num_values * self.dtype.itemsize


def write_tensors(path: Path, described: Sequence[Described], tensors: Iterable[Tensor]) -> None:
    """Write `tensors` to a new safetensors file one after the other, and sync it to disk.

    `tensors` must match `described` in order, shape and dtype.  Raises OSError.
    """
    descriptor = open_new(path)
    try:
        write_all(descriptor, header_of(described))
        for entry, tensor in zip(described, tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == (entry.shape, entry.dtype), entry
            write_all(descriptor, tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def header_of(described: Sequence[Described]) -> bytes:
    """Return the beginning of a safetensors file, whose values follow in the order of `described`.

    Its length is a multiple of 8 bytes.  Raises ValueError for a dtype that is not one of float64,
    float32, float16 and bfloat16.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for entry in described:
        if entry.dtype not in _CODES:
            raise ValueError(f"{entry.name} is {entry.dtype}; {', '.join(_DTYPES)} can be written")
        start, stop = stop, stop + entry.num_bytes
        header[entry.name] = {
            "dtype": _CODES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": (start, stop),
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head


def describe_tensors(path: Path) -> Mapping[str, Described]:
    """Return the tensors that a safetensors file holds, by name, without reading their values.

    Raises ValueError if the file is not a complete safetensors file, or if a tensor's dtype is not
    one of float64, float32, float16 and bfloat16.
    """
    try:
        with open_regular(path, follow=False):  # the library would wait for the writer of a pipe
            pass
        with safe_open(path, "pt") as file:
            names = file.keys()  # `file` is no mapping: iterating over it is not possible
            slices = {name: file.get_slice(name) for name in names}
            kinds = {
                name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {plain(str(error))}") from None
    for name, (_, code) in kinds.items():
        if code not in _DTYPES:
            raise ValueError(f"{plain(name)} in {path} is {code}; {', '.join(_DTYPES)} can be read")
    return {name: Described(name, shape, _DTYPES[code]) for name, (shape, code) in kinds.items()}


def read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor.  The file stays memory-mapped only as long as the tensor lives."""
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor
