"""Code is compiled before the first step, in any thread, and not at all if that is turned off."""

import os
from dataclasses import replace
from threading import Thread
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from tests.local import run_locally
from tests.pipeline.truth import random_batch
from vp_train import assembly
from vp_train.assembly import compile_layers, may_compile
from vp_train.config import ConfigError, ModelConfig, ParallelConfig, RunConfig, RunSettings
from vp_train.planning.plan import make_plan
from vp_train.tensors import compiling

CONFIG = RunConfig(
    model=ModelConfig(
        num_layers=1,
        hidden_size=32,
        num_heads=2,
        num_query_groups=1,
        ffn_hidden_size=48,
        vocab_size=101,
        seq_length=16,
    ),
    run=RunSettings(dtype="bfloat16", compile="on", eval_microbatches=2),
    num_microbatches=2,
    micro_batch_size=2,
)


def test_neither_a_step_nor_a_validation_compiles(traced):
    batch = random_batch(CONFIG, 1)

    def work(rank, model, together):
        built = len(traced)
        assert not model.gradients.flat.any()
        model.train_step(*batch)
        model.evaluator.step(*batch)
        return built, len(traced)

    ((built, after),) = run_locally(CONFIG, make_plan(CONFIG, 1), work)
    assert 0 < built == after


def test_ranks_of_a_process_compile_no_layer_that_it_has_compiled(traced, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model = replace(CONFIG.model, num_layers=3, sliding_window=4, full_attention_every=2)
    config = replace(CONFIG, model=model)
    compile_layers(replace(config, parallel=ParallelConfig(tp=2)))
    compile_layers(replace(config, run=replace(config.run, deterministic=True)))
    with patch.dict(os.environ, TORCHINDUCTOR_COMPILE_THREADS="2"):
        compile_layers(config)
    assert not traced
    compile_layers(config)
    before = len(traced)
    run_locally(config, make_plan(config, 3), lambda rank, built, together: None)
    assert 0 < before == len(traced)


def test_where_torch_cannot_compile_only_auto_goes_on_and_no_tensor_parallel_rank(
    monkeypatch, capsys
):
    import torch._dynamo

    class Broken:
        def warm_up(self, micro_batch_size):
            raise torch._dynamo.exc.InternalTorchDynamoError(
                "C++ compile error\n\na.cpp: error: no"
            )

    given_up = []
    monkeypatch.setattr(assembly, "give_up", lambda: given_up.append(True))
    weights = SimpleNamespace(stages={0: Broken()})
    for setting, tp in (("on", 1), ("auto", 2)):
        run = replace(CONFIG.run, compile=setting)
        config = replace(CONFIG, run=run, parallel=ParallelConfig(tp=tp))
        with pytest.raises(ConfigError, match=r"C\+\+ compile error: a\.cpp: error: no; run\."):
            assembly._warm_up(config, weights, None, None)
        assert not given_up
    config = replace(CONFIG, run=replace(CONFIG.run, compile="auto"))
    assembly._warm_up(config, weights, None, None)
    assert given_up
    assert capsys.readouterr().err.startswith(
        "going on without compiling, more slowly: C++ compile"
    )


@pytest.mark.parametrize("keeps_signature", [True, False], ids=["torch 2.13", "torch 2.11"])
def test_every_thread_compiles_as_many_shapes(traced, monkeypatch, keeps_signature):
    """The limit of dynamo's settings, 8, counts in each thread anew."""
    if not keeps_signature:
        monkeypatch.delattr(torch.compile, "__wrapped__")
    double = compiling.compiled_as_marked(lambda x: x * 2)

    def work():
        for size in range(2, 14):
            double(torch.ones(size))

    thread = Thread(target=work)
    thread.start()
    thread.join()
    assert len(traced) == 12


def test_turned_off_nothing_is_compiled(traced):
    config = replace(CONFIG, run=replace(CONFIG.run, compile="off", linear_dtype="float8"))
    batch = random_batch(config, 1)

    def work(rank, model, together):
        return model.train_step(*batch)

    with patch.dict(os.environ):
        compiling.turn_off(os.environ)
        (loss,) = run_locally(config, make_plan(config, 1), work)
        assert not may_compile(replace(config.run, compile="auto"))
        assert not compiling.compiles_on(torch.device("cuda"))
    assert loss.isfinite()
    assert not traced


@pytest.mark.parametrize(
    ("settings", "compiles"),
    [
        (RunSettings(), False),
        (RunSettings(compile="on"), True),
        (RunSettings(dtype="bfloat16"), True),
        (RunSettings(dtype="bfloat16", compile="off"), False),
        (RunSettings(device="cuda"), True),
        (RunSettings(device="cuda", compile="off"), False),
    ],
)
def test_a_run_compiles_on_cuda_in_16_bits_or_if_it_is_asked_to(traced, settings, compiles):
    assert may_compile(settings) is compiles


def test_what_was_given_up_runs_plainly_and_kernels_go_on(traced):
    import torch._dynamo

    with torch._dynamo.config.patch(disable=False):
        has_compiler = compiling.has_cpp_compiler()
        compiling.give_up()
        assert torch.equal(compiling.compiled(torch.sin)(torch.ones(3)), torch.ones(3).sin())
        assert compiling.has_cpp_compiler() == has_compiler
    assert not traced
