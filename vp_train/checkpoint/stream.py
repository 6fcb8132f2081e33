"""safetensors files one tensor at a time: the library writes from memory, and this from an iterator.

The format (github.com/huggingface/safetensors): the length of a JSON header in 8 bytes, the header, and the bytes of all
tensors in its order.
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

_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor that is not in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_values(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_values * self.dtype.itemsize


def write_tensors(path: Path, described: Sequence[Described], tensors: Iterable[Tensor]) -> None:
    """Write `tensors`, which must be as `described`, one after the other; when it returns they are on the disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for one in described:
        start, stop = stop, stop + one.num_bytes
        header[one.name] = {
            "dtype": _CODES[one.dtype],
            "shape": one.shape,
            "data_offsets": (start, stop),
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for one, tensor in zip(described, tensors, strict=True):
            assert (tensor.shape, tensor.dtype) == (one.shape, one.dtype), one
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def describe_tensors(path: Path) -> Mapping[str, Described]:
    """What a file holds.  Raises ValueError for a file that is not safetensors, or a dtype that is no floating-point one."""
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            kinds = {
                name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    for name, (_, code) in kinds.items():
        if code not in _DTYPES:
            raise ValueError(f"{name} in {path} is {code}; {', '.join(_DTYPES)} can be read")
    return {name: Described(name, shape, _DTYPES[code]) for name, (shape, code) in kinds.items()}


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor; the file is mapped no longer than the tensor lives."""
    with safe_open(path, "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor
