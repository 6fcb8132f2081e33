"""Where every command starts: Ctrl-C while it imports ends it at once, without a traceback.

Nothing can catch KeyboardInterrupt before the imports, and libraries would swallow it.  So the
system's own handler serves until the command itself begins (`guarded` in `command.py`).
"""

from __future__ import annotations

import signal
from functools import partial
from importlib import import_module


def _start(module: str, function: str = "main") -> None:
    """Import a module of the commands and call its function."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    getattr(import_module(f"vp_train.commands.{module}"), function)()


train = partial(_start, "train")
prepare = partial(_start, "prepare")
simulate = partial(_start, "simulate")
plan = partial(_start, "plan")
profile = partial(_start, "profile")
report = partial(_start, "report")
explain = partial(_start, "explain")
score = partial(_start, "score")
generate = partial(_start, "generate")
import_model = partial(_start, "convert", "import_model")
export_model = partial(_start, "convert", "export_model")
