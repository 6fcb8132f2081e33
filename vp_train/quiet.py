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

_JIT = "megatron.core.jit"


def quiet_deprecations() -> None:
    """Silence torch's deprecation warnings about collectives for the rest of this process.

    megatron-core and DeepSpeed call collectives by their former names.
    """
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)


@contextmanager
def quiet_megatron() -> Iterator[None]:
    """Import or build megatron-core's modules inside, without its warnings and its compiler.

    Megatron compiles functions that our layers never call.  For that it would import torch's
    compiler, a second of CPU time in every process.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)
    sys.modules.setdefault(_JIT, _jit_without_compiler())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _jit_without_compiler() -> ModuleType:
    """Return a module in the place of Megatron's, as its `disable_jit_fuser` would leave it."""
    module = ModuleType(_JIT)
    module.__dict__["jit_fuser"] = lambda function: function
    return module
