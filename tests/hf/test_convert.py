"""Imported and exported models have the same logits and loss as transformers computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from tests.hf import models
from tests.meshes import mesh_for
from tests.training import run_command, save_run, uncompiled
from vp_train.assembly import build_rank
from vp_train.checkpoint.saver import save_stream
from vp_train.checkpoint.stream import Described, describe_tensors, read_tensor, write_tensors
from vp_train.checkpoint.training import Progress, load_weights
from vp_train.commands.convert import export_model, import_model
from vp_train.config import (
    ConfigError,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RunSettings,
    VocabConfig,
)
from vp_train.hf import convert
from vp_train.hf.convert import export_checkpoint, import_checkpoint
from vp_train.metrics.run_directory import RunDirectory
from vp_train.planning.plan import make_plan

SEQUENCES, LENGTH = 4, 40
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return made(name): it saves and imports a model of transformers, once for all tests.

    It returns the model, the directory of transformers, and the result of the import.
    """
    done = {}

    def get(name):
        if name not in done:
            root = tmp_path_factory.mktemp("model")
            model = models.make(name)
            model.save_pretrained(root / "theirs")
            done[name] = model, root / "theirs", import_checkpoint(root / "theirs", root / "ours")
        return done[name]

    return get


def tokens_and_labels():
    ids = torch.randint(0, 111, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return ids[:, :-1], ids[:, 1:]


def config_of(model, *, dtype="float32", optimizer="adamw", **parallel):
    learned = model.positions == "learned"
    return RunConfig(
        model=model if learned else replace(model, seq_length=LENGTH),
        vocab=VocabConfig("one_barrier"),
        parallel=ParallelConfig(placement="balanced", **parallel),
        optim=OptimConfig(name=optimizer),
        run=RunSettings(eval_microbatches=SEQUENCES // 2, seed=77, dtype=dtype),
        num_microbatches=SEQUENCES // 2,
        micro_batch_size=2,
    )


def evaluate(rank, num_ranks, config, path):
    """Return loss and token log-likelihoods of a model with the weights of `path`."""
    plan = make_plan(config, num_ranks)
    model = build_rank(config, plan, mesh_for(plan))
    load_weights(path, config, model)
    tokens, labels = (values.view(-1, 2, LENGTH) for values in tokens_and_labels())
    loss, logprobs = model.evaluator.step(tokens, labels), model.evaluator.logprobs(tokens, labels)
    if loss is None or logprobs is None:
        return None, None
    return loss.item(), logprobs.flatten(0, 1)


@pytest.mark.parametrize(("number", "name"), list(enumerate(models.CONFIGS)))
def test_our_evaluation_of_an_imported_model_is_that_of_transformers(made, ranks, number, name):
    """Every other model is split over its layers, the others over their matrices if they can be."""
    _, directory, imported = made(name)
    tokens, labels = tokens_and_labels()
    with models.in_double(), torch.no_grad():
        logits = models.double(directory)(tokens).logits
    expected = torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
    alone = imported.model.num_query_groups % 2 or imported.model.qk_norm_whole
    parallel = {"pp": 1, "tp": 2} if number % 2 and not alone else {"pp": 2}
    config = config_of(imported.model, dtype="float64", **parallel)
    answers = ranks(2).run(evaluate, config, imported.checkpoint)
    loss, logprobs = next(answer for answer in answers if answer[0] is not None)
    assert loss == pytest.approx(-expected.mean().item(), abs=1e-9)
    assert logprobs.shape == expected.shape
    assert (logprobs - expected).abs().max() < 1e-9


@pytest.mark.parametrize("name", models.CONFIGS)
def test_transformers_finds_the_same_logits_in_an_exported_model(made, name, tmp_path):
    theirs, _, imported = made(name)
    export_checkpoint(imported.checkpoint, tmp_path / "back", shard_bytes=30_000)
    back = models.load(str(tmp_path / "back"))
    assert type(back) is type(theirs)
    tokens, _ = tokens_and_labels()
    with torch.no_grad():
        assert (back(tokens).logits - theirs(tokens).logits).abs().max() < 1e-4
    for key in KEPT:
        assert getattr(back.config, key) == getattr(theirs.config, key)


def weights_in(directory):
    return {
        name: read_tensor(path, name)
        for path in directory.glob("*.safetensors")
        for name in describe_tensors(path)
    }


@pytest.mark.parametrize(("number", "name"), list(enumerate(models.CONFIGS)))
def test_there_and_back_is_exact_in_the_same_dtype(number, name, tmp_path):
    """Every other model is in 16 bits."""
    dtype = (torch.float32, torch.bfloat16)[number % 2]
    models.make(name, dtype).save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    before, after = weights_in(tmp_path / "theirs"), weights_in(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(
        tensor.dtype is dtype and torch.equal(tensor, before[key]) for key, tensor in after.items()
    )
    assert [path.name for path in (tmp_path / "back").glob("*.safetensors")] == [
        "model.safetensors"
    ]
    assert not list(tmp_path.glob(".writing*"))


def save_again(rank, num_ranks, config, path, directory):
    plan = make_plan(config, num_ranks)
    mesh = mesh_for(plan)
    model = build_rank(config, plan, mesh)
    load_weights(path, config, model)
    save_run(directory, 1, config, model, mesh, (), Progress())


@pytest.mark.parametrize(
    "options",
    [
        {"pp": 2},
        {"pp": 1, "tp": 2},
        {"pp": 2, "dtype": "bfloat16"},
        {"pp": 1, "dp": 2, "optimizer": "zero1"},
    ],
)
@pytest.mark.parametrize("name", ["llama with biases", "gemma3"])
def test_what_ranks_have_split_is_exported_whole(made, ranks, name, options, tmp_path):
    """The export has the dtype of the trained weights, which is wider than that of the forward."""
    theirs, _, imported = made(name)
    ranks(2).run(
        uncompiled,
        save_again,
        config_of(imported.model, **options),
        imported.checkpoint,
        tmp_path / "checkpoints",
    )
    export_checkpoint(tmp_path, tmp_path / "back")
    back, before = weights_in(tmp_path / "back"), theirs.state_dict()
    assert all(torch.equal(tensor, before[key]) for key, tensor in back.items())
    assert sum(tensor.numel() for tensor in back.values()) == theirs.num_parameters()


def test_an_export_may_have_another_dtype(made, tmp_path):
    theirs, _, imported = made("qwen3")
    export_checkpoint(imported.checkpoint, tmp_path / "half", dtype="bfloat16")
    half, whole = weights_in(tmp_path / "half"), theirs.state_dict()
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in half.items())
    assert sum(tensor.numel() for tensor in half.values()) == theirs.num_parameters()
    assert json.loads((tmp_path / "half/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_values_that_another_dtype_cannot_hold_are_refused_by_name(made, tmp_path):
    _, theirs, _ = made("llama")
    name, weights = "model.layers.1.mlp.down_proj.weight", weights_in(theirs)
    weights[name][0, 3] = 1e6  # the largest of float16 is 65,504
    source = write_model(tmp_path / "source", theirs, weights)
    imported = import_checkpoint(source, tmp_path / "ours")
    message = refused(export_checkpoint, imported.checkpoint, tmp_path / "half", dtype="float16")
    assert message.startswith(f"{name} has values that float16 cannot hold")
    assert not (tmp_path / "half").exists()
    export_checkpoint(imported.checkpoint, tmp_path / "whole", dtype="bfloat16")
    assert weights_in(tmp_path / "whole")[name][0, 3] == torch.tensor(1e6).bfloat16()


def test_tokenizer_files_go_along(made, tmp_path):
    _, theirs, _ = made("llama")
    shutil.copytree(theirs, tmp_path / "theirs")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "theirs" / name).write_text("{}" if "config" in name else f'"{name}"')
    imported = import_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert imported.tokenizer == tmp_path / "ours/tokenizer.json"
    shutil.copytree(imported.checkpoint, tmp_path / "run/checkpoints/step-00000000")
    for source, tokenizer in (
        (tmp_path / "ours", None),
        (imported.checkpoint, None),
        (tmp_path / "run", tmp_path / "theirs"),
        (tmp_path / "run", tmp_path / "theirs/tokenizer_config.json"),
    ):
        written = export_checkpoint(source, tmp_path / "back", tokenizer=tokenizer).files
        assert {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"} < set(written)
        assert (tmp_path / "back/tokenizer.json").read_text() == '"tokenizer.json"'
        shutil.rmtree(tmp_path / "back")
    with pytest.raises(ConfigError, match="no tokenizer files there"):
        export_checkpoint(imported.checkpoint, tmp_path / "back", tokenizer=tmp_path / "run")


def write_run(directory, imported, *, tokenizer=None, init_from=None, seq_length=LENGTH):
    """Write a run directory with the weights of an import, as if trained with `seq_length`."""
    path = next(imported.checkpoint.glob("*.safetensors"))
    described = describe_tensors(path)
    model = asdict(replace(imported.model, seq_length=seq_length))
    state = {"config": {"model": model, "data": {"tokenizer": tokenizer and str(tokenizer)}}}
    tensors = (read_tensor(path, name) for name in described)
    RunDirectory(RunSettings(root=str(directory.parent), name=directory.name))
    (directory / "checkpoints").mkdir()
    save_stream(directory / "checkpoints", 1, list(described.values()), tensors, state)
    (directory / "config.yaml").write_text(f"run:\n  init_from: {init_from or 'null'}\n")
    return directory


def exported_config(monkeypatch, capsys, source, target):
    """Run vp-export.  Returns the config.json that it wrote, and its output."""
    monkeypatch.setattr(sys, "argv", ["vp-export", str(source), str(target)])
    with pytest.raises(SystemExit) as left:
        export_model()
    assert left.value.code == 0
    return json.loads((target / "config.json").read_text()), capsys.readouterr().out


def test_an_export_knows_what_the_import_knew_however_many_runs_ago(
    made, tmp_path, monkeypatch, capsys
):
    _, _, imported = made("llama")
    shutil.copytree(imported.checkpoint.parent, tmp_path / "imported")
    (tmp_path / "imported/tokenizer.json").write_text('"of the import"')
    first = write_run(
        tmp_path / "first", imported, init_from=tmp_path / "imported" / imported.checkpoint.name
    )
    second = write_run(tmp_path / "second", imported, init_from=first)
    for source in (first, second, second / "checkpoints", second / "checkpoints/step-00000001"):
        config, said = exported_config(monkeypatch, capsys, source, tmp_path / "back")
        assert [config.get(key) for key in KEPT] == [3, 5, 7, 64]
        assert "max_position_embeddings" not in said
        assert (tmp_path / "back/tokenizer.json").read_text() == '"of the import"'
        assert [path.name for path in (tmp_path / "back").glob("model*")] == ["model.safetensors"]
        shutil.rmtree(tmp_path / "back")
    (first / "config.json").write_text(
        '{"model_type": "llama", "max_position_embeddings": null, "bos_token_id": null}'
    )
    # A config.json without values is passed over.
    assert exported_config(monkeypatch, capsys, second, tmp_path / "back")[0] == config
    shutil.rmtree(tmp_path / "back")
    longer = write_run(tmp_path / "longer", imported, init_from=first, seq_length=128)
    assert (
        exported_config(monkeypatch, capsys, longer, tmp_path / "long")[0][
            "max_position_embeddings"
        ]
        == 128
    )
    shutil.rmtree(tmp_path / "imported")
    config, said = exported_config(monkeypatch, capsys, second, tmp_path / "back")
    assert [config.get(key) for key in KEPT] == [None, None, None, LENGTH]
    notice = f"max_position_embeddings={LENGTH} is model.seq_length; "
    assert f"{notice}write more into config.json" in said


def test_runs_that_started_from_each_other_end_the_search(made, tmp_path, monkeypatch, capsys):
    _, _, imported = made("llama")
    for name, other in (("one", "two"), ("two", "one")):
        write_run(tmp_path / name, imported, init_from=tmp_path / other)
    assert (
        exported_config(monkeypatch, capsys, tmp_path / "one", tmp_path / "back")[0][
            "max_position_embeddings"
        ]
        == LENGTH
    )


def test_an_export_follows_no_settings_of_a_run_that_was_copied_here(
    made, tmp_path, monkeypatch, capsys
):
    _, theirs, imported = made("llama")
    shutil.copytree(theirs, tmp_path / "private")
    private = tmp_path / "private/tokenizer.json"
    private.write_text("{}")
    run = write_run(
        tmp_path / "run", imported, tokenizer=private, init_from=imported.checkpoint.parent
    )
    shutil.copytree(run, tmp_path / "unpacked")
    config, said = exported_config(monkeypatch, capsys, tmp_path / "unpacked", tmp_path / "back")
    assert not (tmp_path / "back/tokenizer.json").exists()
    assert [config.get(key) for key in KEPT] == [None, None, None, LENGTH]
    for words in (f"data.tokenizer={private}", "run.init_from="):
        assert f"{words}" in said
    assert f"since {tmp_path / 'unpacked'} was copied here" in said
    run.rename(tmp_path / "moved")
    config, said = exported_config(monkeypatch, capsys, tmp_path / "moved", tmp_path / "whole")
    assert (tmp_path / "whole/tokenizer.json").exists()
    assert [config.get(key) for key in KEPT] == [3, 5, 7, 64]
    assert "copied" not in said


def test_a_tokenizer_tells_its_ids_but_not_how_far_the_model_reaches(
    made, tmp_path, monkeypatch, capsys
):
    _, theirs, imported = made("llama")
    shutil.copytree(theirs, tmp_path / "other")
    (tmp_path / "other/tokenizer.json").write_text("{}")
    run = write_run(tmp_path / "run", imported, tokenizer=tmp_path / "other/tokenizer.json")
    config, said = exported_config(monkeypatch, capsys, run, tmp_path / "back")
    assert [config.get(key) for key in KEPT] == [3, 5, 7, LENGTH]
    assert "max_position_embeddings=40 is model.seq_length" in said
    export_checkpoint(run, tmp_path / "told", tokenizer=tmp_path / "other")
    config = json.loads((tmp_path / "told/config.json").read_text())
    assert [config.get(key) for key in KEPT] == [3, 5, 7, LENGTH]


def test_commands_import_train_and_export(made, tmp_path, monkeypatch, capsys):
    """The commands lead from one Hugging Face directory to another, used as they print it."""
    _, theirs, _ = made("gemma2")
    monkeypatch.chdir(tmp_path)

    def command(entry, *words):
        monkeypatch.setattr(sys, "argv", [entry.__name__, *words])
        with pytest.raises(SystemExit) as left:
            entry()
        said = capsys.readouterr()
        assert left.value.code == 0, said.err
        return said.out

    printed = command(import_model, str(theirs), "imported")
    model_word, init_word = next(
        line for line in printed.splitlines() if line.startswith("vp-train ")
    ).split()[1:3]
    settings = (
        "parallel.pp=2",
        "parallel.placement=balanced",
        "model.seq_length=32",
        "run.steps=1",
        "run.eval_every=0",
    )
    words = (
        model_word,
        init_word,
        "data=synthetic",
        "optim.warmup_steps=0",
        "optim.lr=0",
        "optim.min_lr=0",
        *settings,
    )
    run_command(words, tmp_path)
    said = command(export_model, "runs/default", "exported")
    assert "max_position_embeddings" not in said
    # The run does not know these values, but its import does.
    config = json.loads((tmp_path / "exported/config.json").read_text())
    assert [config[key] for key in KEPT] == [3, 5, 7, 64]
    before, after = weights_in(theirs), weights_in(tmp_path / "exported")
    assert before.keys() == after.keys()
    # A step with learning rate 0 changes nothing.
    assert all(torch.equal(after[name], before[name]) for name in before)


def refused(call, *arguments, **options):
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **options)
    return str(caught.value)


def test_what_is_not_read_is_refused_by_name(made, tmp_path):
    _, theirs, _ = made("llama")

    def variant(name, **changes):
        shutil.copytree(theirs, tmp_path / name)
        config = json.loads((theirs / "config.json").read_text()) | changes
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return refused(import_checkpoint, tmp_path / name, tmp_path / "ours")

    assert (
        "model_type='mixtral' ['MixtralForCausalLM'] is not known; vp-import reads llama, qwen2"
        in variant("architecture", model_type="mixtral", architectures=["MixtralForCausalLM"])
    )
    assert "rope_type=longrope is not supported" in variant(
        "longrope", rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}
    )
    assert "the activation relu is not supported for llama" in variant("relu", hidden_act="relu")
    assert "quantization_config={'bits': 4} is not supported" in variant(
        "bits", quantization_config={"bits": 4}
    )
    assert "attention_bias=True with mlp_bias=False is not supported" in variant(
        "bias", attention_bias=True
    )
    assert variant("wide", intermediate_size=50).startswith(
        "model.layers.0.mlp.gate_proj.weight is [48, 32] in "
    )
    assert "but [50, 32] by its config.json" in variant("wide2", intermediate_size=50)
    assert "model.layers.3.input_layernorm.weight and 8 more, which this architecture" in variant(
        "few", num_hidden_layers=3
    )
    assert "has no model.layers.4.input_layernorm.weight and 8 more" in variant(
        "many", num_hidden_layers=5
    )
    assert "config.json has no hidden_size" in variant("without", hidden_size=None)
    assert variant("kind", hidden_size="32").startswith(
        f'{tmp_path}/kind/config.json: hidden_size="32" must be'
    )
    (tmp_path / "kind/config.json").write_text("{")
    assert refused(import_checkpoint, tmp_path / "kind", tmp_path / "ours").startswith(
        f"{tmp_path}/kind/config.json is not JSON"
    )
    assert not (tmp_path / "ours").exists()


def test_missing_tensors_broken_files_and_pickles_are_refused(made, tmp_path):
    _, theirs, _ = made("llama")
    weights = weights_in(theirs)

    def directory(name):
        (tmp_path / name).mkdir()
        shutil.copy(theirs / "config.json", tmp_path / name)
        return tmp_path / name

    lacking = directory("lacking")
    left = {
        name: tensor
        for name, tensor in weights.items()
        if name != "model.layers.2.self_attn.k_proj.weight"
    }
    described = [
        Described(name, tuple(tensor.shape), tensor.dtype) for name, tensor in left.items()
    ]
    write_tensors(lacking / "model.safetensors", described, left.values())
    message = refused(import_checkpoint, lacking, tmp_path / "ours")
    assert (
        "has no model.layers.2.self_attn.k_proj.weight, which its config.json asks for" in message
    )

    pickled = directory("pickled")
    torch.save(weights, pickled / "pytorch_model.bin")
    assert "in pytorch_model.bin, a pickle" in refused(
        import_checkpoint, pickled, tmp_path / "ours"
    )

    cut = directory("cut")
    (cut / "model.safetensors").write_bytes((theirs / "model.safetensors").read_bytes()[:-7])
    assert "is not a whole safetensors file" in refused(import_checkpoint, cut, tmp_path / "ours")

    half = directory("half")
    index = {"weight_map": dict.fromkeys(weights, "model-00002-of-00002.safetensors")}
    (half / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names model-00002-of-00002.safetensors, which" in refused(
        import_checkpoint, half, tmp_path / "ours"
    )

    assert "has neither model.safetensors nor" in refused(
        import_checkpoint, directory("empty"), tmp_path / "ours"
    )
    assert "config.json is not there" in refused(
        import_checkpoint, tmp_path / "nowhere", tmp_path / "ours"
    )
    assert "is not empty" in refused(import_checkpoint, theirs, half)


def write_model(directory, theirs, weights, index=None):
    """Write a model with the config.json of `theirs` and these weights in one file.

    `index`, if given, is written next to it.
    """
    directory.mkdir()
    shutil.copy(theirs / "config.json", directory)
    described = [
        Described(name, tuple(tensor.shape), tensor.dtype) for name, tensor in weights.items()
    ]
    write_tensors(directory / "model.safetensors", described, weights.values())
    if index is not None:
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (["a"], 'weight_map=["a"] must be an object'),
        (None, "weight_map=null must be an object"),
        ({"a": 5}, "a is in 5; it must be the name of a file beside the index"),
        (
            {"a": "../theirs/model.safetensors"},
            'a is in "../theirs/model.safetensors"; it must be the name of a file beside',
        ),
        (
            {"a": "/etc/passwd"},
            'a is in "/etc/passwd"; it must be the name of a file beside the index',
        ),
        ({"a": ".."}, 'a is in ".."; it must be the name of a file beside the index'),
        ({"a": ""}, 'a is in ""; it must be the name of a file beside the index'),
    ],
)
def test_an_index_names_files_beside_it(made, tmp_path, weight_map, message):
    _, theirs, _ = made("llama")
    source = write_model(tmp_path / "source", theirs, {}, {"weight_map": weight_map})
    assert message in refused(import_checkpoint, source, tmp_path / "ours")


def test_a_tensor_must_be_in_the_file_that_the_index_says(made, tmp_path):
    _, theirs, _ = made("llama")
    weights = weights_in(theirs)
    index = {
        "weight_map": dict.fromkeys(weights, "model.safetensors")
        | {"model.norm.weight": "other.safetensors"}
    }
    source = write_model(tmp_path / "source", theirs, weights, index)
    write_tensors(
        source / "other.safetensors",
        [Described("spare.attn.bias", (1,), torch.float32)],
        [torch.ones(1)],
    )
    assert "has no model.norm.weight, which its config.json asks for" in refused(
        import_checkpoint, source, tmp_path / "ours"
    )


def test_queries_keys_and_values_of_two_dtypes_are_refused(made, tmp_path):
    _, theirs, _ = made("llama")
    name = "model.layers.1.self_attn.k_proj.weight"
    weights = weights_in(theirs)
    source = write_model(tmp_path / "source", theirs, weights | {name: weights[name].bfloat16()})
    message = refused(import_checkpoint, source, tmp_path / "ours")
    names = f"{name}, model.layers.1.self_attn.v_proj.weight"
    assert f"{names} are bfloat16, float32 in {source}; they must have one" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_and_nothing_is_written(made, tmp_path, value):
    _, theirs, _ = made("llama")
    name = "model.layers.1.self_attn.k_proj.weight"
    weights = weights_in(theirs)
    weights[name][3, 2] = value
    source = write_model(tmp_path / "source", theirs, weights)
    message = refused(import_checkpoint, source, tmp_path / "ours")
    assert message.startswith(f"{name} in {source / 'model.safetensors'} has values that are not")
    assert not (tmp_path / "ours").exists()


def test_copies_and_buffers_that_some_files_hold_are_passed_over(made, tmp_path):
    _, theirs, imported = made("qwen2")
    weights, buffers = (
        weights_in(theirs),
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    )
    assert imported.model.tied_embeddings
    buffers["lm_head.weight"] = weights["model.embed_tokens.weight"]
    again = import_checkpoint(
        write_model(tmp_path / "source", theirs, weights | buffers), tmp_path / "ours"
    )
    assert again.num_parameters == imported.num_parameters
    source = write_model(tmp_path / "more", theirs, weights | {"model.extra.weight": torch.ones(1)})
    assert "has model.extra.weight, which this architecture does not have" in refused(
        import_checkpoint, source, tmp_path / "x"
    )


def test_an_output_layer_that_is_not_the_embedding_is_untied_as_in_transformers(
    made, tmp_path, monkeypatch, capsys
):
    _, theirs, _ = made("smollm")
    weights = weights_in(theirs)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    source = write_model(tmp_path / "source", theirs, weights)
    monkeypatch.setattr(sys, "argv", ["vp-import", str(source), str(tmp_path / "ours")])
    with pytest.raises(SystemExit):
        import_model()
    assert "imported with model.tied_embeddings=false" in capsys.readouterr().out
    export_checkpoint(tmp_path / "ours", tmp_path / "back")
    assert torch.equal(weights_in(tmp_path / "back")["lm_head.weight"], weights["lm_head.weight"])
    tokens, _ = tokens_and_labels()
    with torch.no_grad():
        before, after = (
            models.load(str(tmp_path / name))(tokens).logits for name in ("source", "back")
        )
    assert torch.equal(before, after)
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].contiguous()
    source = write_model(tmp_path / "shorter", theirs, weights)
    assert "lm_head.weight is [110, 32]" in refused(import_checkpoint, source, tmp_path / "x")


def test_a_decoder_without_the_prefix_of_its_names_is_read(made, tmp_path):
    """The published GPT-2 has such names, and buffers with its masks."""
    for name in ("gpt2", "smollm"):
        _, theirs, imported = made(name)
        bare = {key.partition(".")[2]: tensor for key, tensor in weights_in(theirs).items()}
        bare["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        source = write_model(tmp_path / name, theirs, bare)
        again = import_checkpoint(source, tmp_path / f"{name}-ours")
        assert again.model == imported.model
        ours, before = (weights_in(place.checkpoint) for place in (again, imported))
        assert all(torch.equal(tensor, before[key]) for key, tensor in ours.items())


def test_an_export_is_of_the_architecture_that_was_imported(made, tmp_path):
    """A Mistral or Phi-3 without a window computes as a Llama does."""
    for name in ("phi3", "mistral without a window", "smollm", "gpt2"):
        _, theirs, imported = made(name)
        export_checkpoint(imported.checkpoint, tmp_path / name)
        before, after = (
            json.loads((place / "config.json").read_text()) for place in (theirs, tmp_path / name)
        )
        assert after["model_type"] == before["model_type"]
        assert after["architectures"] == before["architectures"]


def test_what_fails_midway_leaves_nothing_and_says_where_and_what_it_needs(
    made, tmp_path, monkeypatch
):
    _, theirs, imported = made("llama")

    def full(*arguments):
        assert list(tmp_path.glob(".writing-*")) == [tmp_path / ".writing-new"]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "read_tensor", full)
    monkeypatch.setattr(convert, "write_tensors", full)
    for call, source in ((import_checkpoint, theirs), (export_checkpoint, imported.checkpoint)):
        with pytest.raises(
            OSError,
            match=rf"^{tmp_path}/new was not made: No space left on device; .* [1-9][0-9.]* .iB$",
        ):
            call(source, tmp_path / "new")
        assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_be_replaced_is_refused_before_anything_is_read(
    made, tmp_path, monkeypatch
):
    _, theirs, imported = made("llama")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "link").symlink_to("empty")
    monkeypatch.chdir(tmp_path / "empty")
    for call, source in ((import_checkpoint, theirs), (export_checkpoint, imported.checkpoint)):
        assert ". cannot be replaced as a whole; give a directory within it" in refused(
            call, source, Path()
        )
        # The link leads to the working directory.
        assert "link cannot be replaced as a whole" in refused(call, source, tmp_path / "link")
        assert "file is not a directory" in refused(call, source, tmp_path / "file")
        assert "is a link to" in refused(call, source, tmp_path / "dangling")
        assert "is a link to" in refused(call, source, tmp_path / "round")
        with monkeypatch.context() as patched:
            patched.chdir(tmp_path)
            patched.setattr(Path, "is_mount", lambda path: path.name == "empty")
            assert "cannot be replaced as a whole" in refused(call, source, tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())
    monkeypatch.chdir(tmp_path)
    assert import_checkpoint(theirs, tmp_path / "link").checkpoint.is_dir()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "empty/model.yaml").is_file()
    assert not list(tmp_path.glob(".writing-*"))


def test_progress_counts_to_all_that_is_written(made, tmp_path):
    _, theirs, imported = made("llama")
    for call, source in ((import_checkpoint, theirs), (export_checkpoint, imported.checkpoint)):
        said = []
        call(source, tmp_path / call.__name__, progress=said.append)
        assert len(said) > 20
        assert said[-1] == "0.0 of 0.0 GB written"
    said = []
    assert list(
        convert._counted(
            [torch.ones(10**8, dtype=torch.int8).expand(5, -1)] * 2, 10**9, said.append
        )
    )
    assert said == ["0.5 of 1.0 GB written", "1.0 of 1.0 GB written"]


def test_models_that_no_architecture_has_are_not_exported(tmp_path):
    model = ModelConfig(
        num_layers=1,
        hidden_size=8,
        num_heads=2,
        num_query_groups=2,
        activation="gelu",
        positions="learned",
    )
    weights = [Described("parameter:final_norm.weight", (8,), torch.float32)]
    save_stream(tmp_path, 1, weights, [torch.ones(8)], {"config": {"model": {**vars(model)}}})
    message = refused(export_checkpoint, tmp_path, tmp_path / "back")
    assert message.startswith("no Hugging Face architecture here is this model; the nearest, ")
    assert "model.activation=gelu" in message
    assert "model.positions=learned" in message
    assert "holds no checkpoint" in refused(
        export_checkpoint, tmp_path / "nowhere", tmp_path / "back"
    )


def load_into(rank, num_ranks, config, path):
    plan = make_plan(config, num_ranks)
    try:
        load_weights(path, config, build_rank(config, plan, mesh_for(plan)))
    except ConfigError as error:
        return str(error)
    return "loaded"


def test_weights_of_another_model_are_refused_with_both_values(made, ranks):
    _, _, imported = made("llama")

    def answer(**changes):
        config = config_of(replace(imported.model, **changes), pp=1)
        return ranks(1).run(load_into, config, imported.checkpoint)[0]

    assert answer(rope_base=5e5) == "loaded"
    _, _, learned = made("gpt2")
    shorter = config_of(replace(learned.model, seq_length=LENGTH), pp=1)
    message = ranks(1).run(load_into, shorter, learned.checkpoint)[0]
    assert f"was saved with model.seq_length=64, this run has {LENGTH}" in message
    assert "was saved with model.ffn_hidden_size=48, this run has 50" in answer(ffn_hidden_size=50)
    assert "was saved with model.activation=swiglu, this run has geglu" in answer(
        activation="geglu"
    )
    assert "was saved with model.num_layers=4, this run has 5" in answer(num_layers=5)


_MEASURED = """
import sys
from pathlib import Path
from vp_train.hf.convert import export_checkpoint, import_checkpoint
root = Path(sys.argv[1])
def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))
def both(name):
    import_checkpoint(root / name, root / f"{name}-ours")
    export_checkpoint(root / f"{name}-ours", root / f"{name}-back", shard_bytes=40_000_000)
both("small")
Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current size
before = resident("VmRSS")
both("large")
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is reset by /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    from vp_train.hf.families import config_of as hugging_face
    from vp_train.hf.names import entries

    sizes = []
    for name, num_layers in (("small", 1), ("large", 40)):
        model = ModelConfig(
            num_layers=num_layers,
            hidden_size=256,
            num_heads=4,
            ffn_hidden_size=1024,
            vocab_size=4096,
        )
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(hugging_face(model)))
        shapes = {
            key: shape for entry in entries(model) for key, shape in entry.their_shapes.items()
        }
        described = [Described(key, shape, torch.float32) for key, shape in shapes.items()]
        write_tensors(
            tmp_path / name / "model.safetensors",
            described,
            (torch.ones(shape) for shape in shapes.values()),
        )
        sizes.append(sum(tensor.num_bytes for tensor in described))
    largest = 4096 * 256 * 4
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, tmp_path],
        text=True,
        capture_output=True,
        timeout=100,
        check=True,
    )
    assert sizes[1] > 35 * largest
    assert int(done.stdout) < 5 * largest
