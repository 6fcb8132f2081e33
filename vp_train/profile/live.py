"""The bytes that torch has allocated on a CPU.

On CUDA torch's allocator knows them.  On a CPU every storage is counted from the first operation
that returns it.
"""

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
    """A dispatch mode that counts the bytes of live storages; `peak` is their largest number.

    Operations run slower under it.  Memory that libraries allocate for themselves does not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._sizes: dict[int, int] = {}

    def add_existing(self) -> None:
        """Count all tensors that exist already."""
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # touching deprecated objects warns
            for item in gc.get_objects():
                if type(item) in (Tensor, torch.nn.Parameter):
                    self._add(item)

    def _add(self, tensor: Tensor) -> None:
        if tensor.is_meta:  # it has a size but no memory
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
    """Exempt compiled code of this process from dispatch modes; call it before anything compiles.

    Under a mode compiled code would run operation by operation and allocate more than it does.
    """
    compiler = torch.compile

    def compile_function(*arguments: Any, **options: Any) -> Callable[..., Any]:
        compiled: Any = compiler(*arguments, **options)

        def compile_ahead(example: Any) -> Any:
            made = compiled.aot_compile(example)
            made.fn = _without_modes(made.fn)
            return made

        run: Any = _without_modes(compiled)
        run.aot_compile = compile_ahead
        return run  # type: ignore[no-any-return]

    torch.compile = compile_function


def _without_modes(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with _disable_current_modes():
            return function(*arguments)  # type: ignore[no-untyped-call, unused-ignore]

    return run
