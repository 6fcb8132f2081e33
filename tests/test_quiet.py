"""Libraries come without what a run does not need."""

from __future__ import annotations

from vp_train.quiet import quiet_megatron


def test_megatron_s_functions_are_not_compiled_behind_our_back():
    with quiet_megatron():
        from megatron.core.activations import squared_relu
    assert squared_relu.__module__ == "megatron.core.activations"
    assert not hasattr(squared_relu, "_torchdynamo_orig_callable")
