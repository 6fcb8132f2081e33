"""Libraries come without what a run does not need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vp_train import quiet
from vp_train.commands import launch
from vp_train.config import RunConfig, RunSettings
from vp_train.quiet import quiet_megatron

ROOT = Path(__file__).parents[1]


def test_megatron_s_functions_are_not_compiled_behind_our_back():
    with quiet_megatron():
        from megatron.core.activations import squared_relu
    assert squared_relu.__module__ == "megatron.core.activations"
    assert not hasattr(squared_relu, "_torchdynamo_orig_callable")


def test_what_megatron_did_not_get_can_be_imported_afterwards(monkeypatch):
    monkeypatch.setattr(quiet, "_UNUSED", {"no_such_module": ("Name",), "json": ("Name",)})
    monkeypatch.setattr(quiet, "_optional", lambda: ("wsgiref", "pathlib"))
    monkeypatch.delitem(sys.modules, "wsgiref", raising=False)
    with quiet_megatron():
        from json import dumps
        from pathlib import Path

        from no_such_module import Name

        with pytest.raises(ImportError):
            import wsgiref
    import wsgiref

    assert wsgiref
    assert Name.__name__ == "Name"
    assert dumps(str(Path("a"))) == '"a"'
    assert "no_such_module" not in sys.modules


HEAVY = ("sympy", "torch._dynamo", "setuptools", "tensorboard", "triton")
TRAINED = """
import sys

import torch

from vp_train.config import OptimConfig
from vp_train.optim.adamw import MOMENTS, FusedAdamW, fresh_state
from vp_train.quiet import quiet_megatron

with quiet_megatron():
    import megatron.core.models.gpt.gpt_layer_specs
weight = torch.nn.Parameter(torch.ones(2, 2))
weight.grad = torch.ones(2, 2)
state = {weight: fresh_state({moment: torch.zeros(2, 2) for moment in MOMENTS})}
FusedAdamW([weight], [], state, OptimConfig()).step(0.1)
sys.exit(str([name for name in sys.argv[1:] if name in sys.modules] or ""))
"""


@pytest.mark.slow
def test_layers_and_their_update_need_no_compiler_and_no_computer_algebra():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRAINED, *HEAVY],
        check=False,
        timeout=100,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    ("settings", "waits"),
    [
        (RunSettings(dtype="float32"), False),
        (RunSettings(dtype="bfloat16"), False),  # a small model
        (RunSettings(dtype="float32", compile="on"), True),
        (RunSettings(dtype="bfloat16", compile="off"), False),
    ],
)
def test_ranks_whose_layers_compile_nothing_do_not_wait_for_a_compiler(
    monkeypatch, settings, waits
):
    imported = []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(launch, "import_module", imported.append)
    launch.import_for_ranks(RunConfig(run=settings))
    assert "vp_train.train" in imported
    assert ("torch._dynamo" in imported) == waits
