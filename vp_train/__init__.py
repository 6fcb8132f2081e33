"""Pretraining with pipeline and vocabulary parallelism.

What a program or a notebook needs: settings, a simulated step, a trained model that scores text.
Everything else is a command; see README.md.
"""

from __future__ import annotations

TYPE_CHECKING = False  # not from typing: Ctrl-C before `commands/start.py` is a traceback

if TYPE_CHECKING:
    from vp_train.commands.simulate import simulate_step as simulate
    from vp_train.inference.generation import generate
    from vp_train.inference.opening import OpenRun, open_run
    from vp_train.inference.scoring import score
    from vp_train.settings import load_config

__all__ = ["OpenRun", "generate", "load_config", "open_run", "score", "simulate"]

_HOMES = {
    "load_config": ("vp_train.settings", "load_config"),
    "simulate": ("vp_train.commands.simulate", "simulate_step"),
    "OpenRun": ("vp_train.inference.opening", "OpenRun"),
    "open_run": ("vp_train.inference.opening", "open_run"),
    "generate": ("vp_train.inference.generation", "generate"),
    "score": ("vp_train.inference.scoring", "score"),
}


def __getattr__(name: str) -> object:
    """Import what is asked for: `import vp_train` alone loads neither torch nor hydra."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)
