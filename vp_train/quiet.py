"""Libraries without what a run does not need: warnings that users cannot act on, a compiler.

The warnings are about CUDA packages that are not installed, and about names that torch has changed.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_JIT = "megatron.core.jit"
# Modules of Megatron's that its layers import and ours never use, and the names that are imported
# from them: replicas, what torch is to unpickle, and a cache for inference.
_UNUSED = {
    "megatron.core.distributed": ("DistributedDataParallel",),
    "megatron.core.safe_globals": ("register_safe_globals",),
    "megatron.core.inference.contexts.dynamic_context": (
        "ActiveRequestCountOverflowError",
        "BlockOverflowError",
        "ContextOverflowError",
        "DynamicInferenceContext",
        "RequestOverflowError",
        "TokenOverflowError",
    ),
}


def quiet_deprecations() -> None:
    """Silence torch's deprecation warnings about collectives for the rest of this process.

    megatron-core and DeepSpeed call collectives by their former names.
    """
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Import or build megatron-core's modules inside, without its warnings and what we never use.

    Megatron compiles functions that our layers never call.  For that it would import torch's
    compiler, a second of CPU time in every process.  The rest would take 70 to 130 MiB of memory in
    every rank: distributed tensors with their computer algebra, builders of extensions,
    TensorBoard, and on a CPU Triton.  Other code may import all of it afterwards.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)
    sys.modules.setdefault(_JIT, _jit_without_compiler())
    hidden: dict[str, Any] = {name: _empty(name, classes) for name, classes in _UNUSED.items()}
    hidden |= dict.fromkeys(_optional())  # the import of None fails, as if not installed
    hidden = {name: module for name, module in hidden.items() if name not in sys.modules}
    sys.modules.update(hidden)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, module in hidden.items():
            if sys.modules.get(name) is module:
                sys.modules.pop(name, None)


def _optional() -> tuple[str, ...]:
    """Return modules that Megatron takes if they are installed and that our layers do without."""
    import torch

    names = ("torch.distributed._tensor", "torch.utils.tensorboard")
    # torch keeps whether there is Triton, so it must not be hidden where torch may use it.
    return names if torch.version.cuda else (*names, "triton")


def _empty(name: str, classes: tuple[str, ...]) -> ModuleType:
    """Return a module of classes without content."""
    module = ModuleType(name)
    module.__dict__.update({each: type(each, (), {}) for each in classes})
    return module


def _jit_without_compiler() -> ModuleType:
    """Return a module in the place of Megatron's, as its `disable_jit_fuser` would leave it."""
    module = ModuleType(_JIT)
    module.__dict__["jit_fuser"] = lambda function: function
    return module
