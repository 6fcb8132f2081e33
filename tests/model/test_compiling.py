"""Code is compiled before the first step, in any thread, and not at all if that is turned off."""

import os
import re
import threading
import time
from dataclasses import replace
from threading import Thread
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.aot_compile import AOTCompiledFunction

from tests.local import run_locally
from tests.meshes import fake_world
from tests.model.conftest import compiled_by
from tests.pipeline.truth import random_batch
from vp_train.assembly import (
    _missing,
    build_rank,
    compile_layers,
    compiled_parts,
    fuse_of_layers,
)
from vp_train.config import ConfigError, ModelConfig, ParallelConfig, RunConfig, RunSettings
from vp_train.mesh import build_mesh
from vp_train.model import shape
from vp_train.model.stage import Stage
from vp_train.planning.plan import make_plan
from vp_train.tensors import compiling
from vp_train.vocab.output import OutputLayer

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
# Nothing of its layers can be compiled.
BARE = replace(CONFIG.model, normalisation="layernorm", activation="gelu", positions="learned")


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("setting", "tp", "words"),
    [
        ("on", 1, r"run\.compile=on, but torch cannot compile: .*: a\.cpp: error: no; set run"),
        ("auto", 2, r"run\.compile=auto, but torch cannot compile on tensor-parallel ranks: "),
        ("auto", 1, ""),
    ],
)
def test_where_torch_cannot_compile_only_auto_goes_on_and_no_tensor_parallel_rank(
    monkeypatch, capsys, setting, tp, words
):
    def broken(graph, inputs):
        raise RuntimeError("C++ compile error\n\na.cpp: error: no")

    monkeypatch.setattr(shape, "_PAYS_ON_CPU", 1)
    run = replace(CONFIG.run, compile=setting)
    model = replace(CONFIG.model, num_query_groups=tp)
    config = replace(CONFIG, model=model, run=run, parallel=ParallelConfig(tp=tp))
    plan = make_plan(config, tp)
    losses = []
    with compiled_by(broken, monkeypatch), fake_world(0, tp):
        mesh = build_mesh(plan.degrees, plan.problem)
        if words:
            with pytest.raises(ConfigError, match=words):
                build_rank(config, plan, mesh)
            return
        rank = build_rank(config, plan, mesh)
        assert not rank.gradients.flat.any()
        batch = random_batch(config, 1)
        # On CUDA a backward runs in threads of autograd.
        thread = Thread(target=lambda: losses.append(rank.train_step(*batch)))
        thread.start()
        thread.join()
    assert [loss.isfinite() for loss in losses] == [True]
    assert "going on without compiling, more slowly: " in capsys.readouterr().err


@pytest.mark.parametrize("keeps_signature", [True, False], ids=["torch 2.13", "torch 2.11"])
def test_every_thread_compiles_as_many_shapes_where_torch_makes_no_code_ahead_of_time(
    monkeypatch, keeps_signature
):
    """The limit of dynamo's settings, 8, counts in each thread anew."""
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward  # which cannot be code made ahead of time

    def work():
        for size in range(2, 14):
            x = torch.ones(size)
            assert torch.equal(double(x), 2 * x)

    with compiled_by(backend, monkeypatch):
        if not keeps_signature:
            monkeypatch.delattr(torch.compile, "__wrapped__")
        double = compiling.compiled_for_tokens(lambda x: x * 2)
        thread = Thread(target=work)
        thread.start()
        thread.join()
    assert len(made) == 2 * 12


def test_guards_are_evaluated_once_for_metadata_that_is_new(traced, monkeypatch):
    """A call of known metadata finds its code, whichever thread has made it."""
    checks = []
    check = AOTCompiledFunction.guard_check

    def counting(self, *arguments):
        checks.append(len(arguments))
        return check(self, *arguments)

    monkeypatch.setattr(AOTCompiledFunction, "guard_check", counting)
    monkeypatch.setattr(AOTCompiledFunction, "__call__", None)  # it would evaluate them again
    scaled = compiling.compiled_for_tokens(lambda x, weight, factor: x * weight * factor)
    cases = [  # and how many were made by then
        (5, 3, 4, torch.float32, 0, 2.0, 1),
        (5, 3, 4, torch.float32, 0, 2.0, 1),
        (7, 2, 4, torch.float32, 0, 2.0, 1),
        (7, 2, 4, torch.float64, 0, 2.0, 2),
        (7, 2, 6, torch.float32, 0, 2.0, 3),
        (7, 2, 4, torch.float32, 0, 3.0, 4),
        (7, 2, 4, torch.int64, 0, 2, 5),
        (7, 2, 4, torch.int64, 0, 2.0, 6),
        (7, 2, 4, torch.float32, 1, 2.0, 7),
        (7, 1, 4, torch.float32, 0, 2.0, 8),
    ]

    def work(expected=None):
        for s, b, width, dtype, turned, factor, made in cases:
            shape = (b, s) if turned else (s, b)
            x = torch.arange(s * b * width, dtype=dtype).view(*shape, width).transpose(0, turned)
            weight = torch.full((width,), 2, dtype=dtype)
            y = scaled(x, weight, factor)
            assert y.dtype is (x * factor).dtype
            assert torch.equal(y, x * weight * factor)
            assert len(traced) == (made if expected is None else expected)

    work()
    evaluated = len(checks)
    assert evaluated > 0
    thread = Thread(target=work, args=(len(traced),))
    thread.start()
    thread.join()
    assert len(checks) == evaluated


@pytest.mark.slow
def test_code_that_torch_really_makes_is_found_by_a_table():
    """Layers would only be slower where torch changes how it compiles ahead of time."""
    added = compiling.compiled_for_tokens(lambda x, y: (x + y).relu())
    for s in (3, 5):
        x = torch.randn(s, 2, 4)
        assert torch.equal(added(x, -x.flip(0)), (x - x.flip(0)).relu())
    assert len(added._made_ahead) == 1
    assert [*added._table.values()] == 2 * [added._made_ahead[0].fn]


def test_more_shapes_than_the_limit_run_as_torch_operations(traced, monkeypatch):
    monkeypatch.setattr(compiling, "_SHAPES", 3)
    double = compiling.compiled_for_tokens(lambda x: x * 2)
    for size in range(2, 9):
        x = torch.ones(size)
        assert torch.equal(double(x), 2 * x)
    assert len(traced) == 3


def test_output_layers_are_warmed_up_where_triton_runs_although_nothing_is_compiled(monkeypatch):
    """Kernels of the vocabulary would be compiled within step 1, where other ranks wait."""
    warmed, config = [], replace(CONFIG, run=replace(CONFIG.run, compile="off"))
    monkeypatch.setattr(OutputLayer, "warm_up", lambda layer, tokens: warmed.append(tokens))
    monkeypatch.setattr(Stage, "warm_up", None)  # not called
    for runs in (False, True):
        monkeypatch.setattr("vp_train.assembly.runs_triton", lambda device, runs=runs: runs)
        run_locally(config, make_plan(config, 1), lambda rank, model, together: None)
        tokens = config.micro_batch_size * config.model.seq_length
        assert warmed == ([tokens] * 2 if runs else [])


@pytest.mark.parametrize(
    "words",
    [
        "No valid triton configs. OutOfResources: out of resource: shared memory",
        "No triton configs are available",
    ],
)
def test_a_run_goes_on_where_a_gpu_has_no_room_for_a_compiled_kernel(monkeypatch, capsys, words):
    """torch finds out when it launches the kernel, and its error is not one of a compiler."""

    def launch(*arguments):
        raise RuntimeError(words)

    monkeypatch.setattr(shape, "_PAYS_ON_CPU", 1)
    config = replace(CONFIG, run=replace(CONFIG.run, compile="auto"))
    batch = random_batch(config, 1)
    with compiled_by(lambda graph, inputs: launch, monkeypatch):
        (loss,) = run_locally(
            config, make_plan(config, 1), lambda rank, model, _: model.train_step(*batch)
        )
    assert loss.isfinite()
    assert f"going on without compiling, more slowly: {words}" in capsys.readouterr().err


def test_another_error_of_the_warm_up_ends_the_run(monkeypatch):
    def broken(stage, micro_batch_size):
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(Stage, "warm_up", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_locally(CONFIG, make_plan(CONFIG, 1), lambda rank, model, together: None)


def test_turned_off_nothing_is_compiled(traced):
    config = replace(CONFIG, run=replace(CONFIG.run, compile="off", linear_dtype="float8"))
    batch = random_batch(config, 1)

    def work(rank, model, together):
        return model.train_step(*batch)

    with patch.dict(os.environ):
        compiling.turn_off(os.environ)
        (loss,) = run_locally(config, make_plan(config, 1), work)
        assert not compiled_parts(replace(config, run=replace(config.run, compile="auto")))
        assert not compiling.compiles_on(torch.device("cuda"))
    assert loss.isfinite()
    assert not traced


@pytest.mark.parametrize(
    ("settings", "parts", "without_headers"),
    [
        (RunSettings(), [], []),
        (RunSettings(compile="on"), ["layers"], []),
        (RunSettings(dtype="bfloat16"), ["kernels in C++"], ["kernels in C++"]),
        (
            RunSettings(dtype="bfloat16", compile="on"),
            ["layers", "kernels in C++"],
            ["kernels in C++"],
        ),
        (RunSettings(dtype="bfloat16", compile="off"), [], []),
        (RunSettings(device="cuda"), ["kernels of a GPU"], []),
        (RunSettings(device="cuda", compile="on"), ["layers", "kernels of a GPU"], []),
        (RunSettings(device="cuda", compile="off"), [], []),
    ],
)
def test_a_run_compiles_on_cuda_in_16_bits_or_if_it_is_asked_to(
    traced, monkeypatch, settings, parts, without_headers
):
    """Headers of Python count only where layers are compiled; without them `on` is refused."""
    monkeypatch.setattr(compiling, "has_triton", lambda: True)
    config = replace(CONFIG, run=settings)
    assert [*compiled_parts(config)] == parts
    monkeypatch.setattr(compiling, "_finds_headers", lambda: False)
    assert [*compiled_parts(config)] == without_headers
    if settings.compile == "on":
        with pytest.raises(ConfigError, match=r"install the headers of Python, or set run\."):
            fuse_of_layers(config)
    for finds in (False, True):
        monkeypatch.setattr(compiling, "_finds_headers", lambda finds=finds: finds)
        of_kernels = without_headers if not finds else [part for part in parts if part != "layers"]
        bare = replace(config, model=BARE)
        assert [*compiled_parts(bare)] == of_kernels
        assert bool(_missing(bare)) == (not finds and "kernels of a GPU" in parts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "pays_from", "setting", "model", "words"),
    [
        (["_finds_compiler"], 1, "auto", CONFIG.model, "install a C++ compiler"),
        (["_finds_compiler"], 1 << 40, "auto", CONFIG.model, "install a C++ compiler"),  # kernels
        (["_finds_compiler"], 1, "on", BARE, "install a C++ compiler"),  # and only kernels
        (["_finds_headers"], 1, "auto", CONFIG.model, "install the headers of Python"),
        (["_finds_headers"], 1 << 40, "auto", CONFIG.model, ""),
        (["_finds_headers"], 1, "on", BARE, ""),
        ([], 1, "auto", CONFIG.model, ""),
    ],
)
def test_a_run_says_what_to_install_to_be_faster(
    traced, monkeypatch, capsys, missing, pays_from, setting, model, words
):
    monkeypatch.setattr(shape, "_PAYS_ON_CPU", pays_from)
    for name in missing:
        monkeypatch.setattr(compiling, name, lambda: False)
    config = replace(CONFIG, model=model, run=replace(CONFIG.run, compile=setting))
    run_locally(config, make_plan(config, 1), lambda rank, model, together: None)
    said = capsys.readouterr().err
    assert said.count("to be faster, ") == bool(words)
    assert words in said


def test_what_was_given_up_runs_plainly_and_kernels_go_on(traced):
    sine = compiling.compiled(torch.sin)
    compiling.give_up()
    assert torch.equal(sine(torch.ones(3)), torch.ones(3).sin())
    assert not traced
    assert not compiling.compiles_on(torch.device("cpu"))
    assert compiling.has_cpp_compiler()


def test_compiling_is_announced_if_it_takes_long_and_leaves_no_thread(monkeypatch, capsys):
    threads = threading.active_count()
    with compiling.announced(["layers"]):
        pass
    monkeypatch.setattr(compiling, "_SILENT_SECONDS", 0.0)
    with compiling.announced([]):
        pass
    assert not capsys.readouterr().out
    monkeypatch.setattr(compiling, "_EVERY_SECONDS", {False: 0.01})
    out = ""
    with compiling.announced(["layers", "kernels in C++"]):
        while "so far" not in out:
            time.sleep(0.01)
            out += capsys.readouterr().out
    said, *alive, took = (out + capsys.readouterr().out).splitlines()
    assert said.startswith("compile   layers, kernels in C++: ")
    assert all(re.fullmatch(r"compile   \d+ s so far", line) for line in alive)
    assert re.fullmatch(r"compile   took \d+\.\d s", took)
    assert threading.active_count() == threads
