"""What torch has allocated: on CUDA its allocator knows; on a CPU every storage is counted from its first operation on."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were, `peak`, since the tensors that existed before.

    Operations run slower under it.  What libraries allocate for themselves is not torch's and does not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def add_existing(self) -> None:
        """Count all tensors there are."""
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # looking at all objects wakes deprecated ones
            for item in gc.get_objects():
                if type(item) in (Tensor, torch.nn.Parameter):
                    self._add(item)

    def _add(self, tensor: Tensor) -> None:
        if tensor.is_meta:  # a size and no memory
            return
        storage = tensor.untyped_storage()
        if id(storage) not in self._sizes and storage.nbytes():
            self._sizes[id(storage)] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._drop, id(storage))
            self.peak = max(self.peak, self._now)

    def _drop(self, key: int) -> None:
        self._now -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result


def leave_compiled_code_alone() -> None:
    """For this process: compiled code would be taken apart if it were watched, and allocate what it never does."""
    compiler = torch.compile

    def compile_function(*arguments: Any, **options: Any) -> Callable[..., Any]:
        compiled = compiler(*arguments, **options)

        def run(*tensors: Any) -> Any:
            with _disable_current_modes():
                return compiled(*tensors)  # type: ignore[no-untyped-call]

        return run

    torch.compile = compile_function
