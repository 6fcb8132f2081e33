"""A tokenizer goes with its weights: import, training and export keep them together."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from tests.hf import models
from tests.training import run_command
from vp_train.commands.convert import export_model, import_model
from vp_train.config import ConfigError, DataConfig, ModelConfig, RunConfig, RunSettings
from vp_train.data import prepare_run
from vp_train.data.tokenizer import load_tokenizer, tokenizer_hash, train_tokenizer
from vp_train.hf.convert import export_checkpoint, import_checkpoint
from vp_train.hf.tokenizer import _with_end
from vp_train.settings import load_config

VOCAB = 300
TEXTS = ["the quick brown fox", "jumps over the lazy dog", "again and again and again"] * 9
KEPT = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus")
    lines = [json.dumps({"text": text + " " + text}) for text in TEXTS * 8]
    (path / "a.jsonl").write_text("\n".join(lines) + "\n")
    return path


def tokenizer_file(path, texts=TEXTS, end="<|endoftext|>"):
    """Write a tokenizer.json whose texts end with `end`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    train_tokenizer(texts, VOCAB).save(str(path))
    path.write_text(path.read_text().replace("<|endoftext|>", end))
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Return the import of a model of transformers that has a tokenizer and a chat template."""
    root = tmp_path_factory.mktemp("imported")
    end = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    models.make("llama", vocab_size=VOCAB, **end).save_pretrained(root / "theirs")
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file(root / "made.json", end="<end>")),
        eos_token="<end>",
        pad_token="<end>",
    )
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(root / "theirs")
    import_checkpoint(root / "theirs", root / "ours")
    return root / "ours"


def command(monkeypatch, capsys, entry, *words):
    """Run a command as typed, and return what it prints."""
    monkeypatch.setattr(sys, "argv", [entry.__name__, *map(str, words)])
    with pytest.raises(SystemExit) as left:
        entry()
    said = capsys.readouterr()
    assert left.value.code == 0, said.err
    return said.out


def generated(directory):
    """Return the text that transformers alone makes of a directory, and the ids it knows."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokens = tokenizer("the quick", return_tensors="pt")
    with torch.no_grad():
        made = model.generate(**tokens, max_new_tokens=3, do_sample=False)
    assert len(tokenizer.decode(made[0])) > len("the quick")
    own = load_tokenizer(directory / "tokenizer.json", VOCAB)
    assert tokens["input_ids"][0].tolist() == own.encode("the quick").ids
    return tokenizer, model


def test_from_scratch_to_transformers_and_on_by_the_printed_command(
    corpus, tmp_path, monkeypatch, capsys
):
    """A model that was trained here carries its tokenizer out, in, through training, and again."""
    monkeypatch.chdir(tmp_path)
    quick = ("run.steps=1", "run.eval_every=0", "run.trace_step=0", "num_microbatches=2")
    shape = (f"model.vocab_size={VOCAB}", "model.num_layers=2", "model.hidden_size=16")
    shape = (*shape, "model.num_heads=2", "model.num_query_groups=1", "model.ffn_hidden_size=24")
    text = ("data=text", f"data.path={corpus}")
    run_command((*shape, *text, *quick, "model.seq_length=16"), tmp_path, num_ranks=1)
    end = load_tokenizer(tmp_path / "runs/default/tokenizer.json", VOCAB).token_to_id(
        "<|endoftext|>"
    )
    said = command(monkeypatch, capsys, export_model, "runs/default", "out")
    assert f"the run ends its documents with token {end};" in said
    tokenizer, model = generated(tmp_path / "out")
    for ids in (tokenizer, model.config, model.generation_config):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (end, end, end)
    written = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert written.items() <= GenerationConfig.from_model_config(model.config).to_dict().items()

    said = command(monkeypatch, capsys, import_model, "out", "in", "--data", corpus)
    typed = shlex.split(next(line for line in said.splitlines() if line.startswith("vp-train ")))
    assert {"data.tokenizer=in/tokenizer.json", "model.seq_length=16", "optim.lr=6e-05"} < {*typed}
    run_command((*typed[1:], *quick), tmp_path)
    command(monkeypatch, capsys, export_model, "runs/in", "out2")
    command(monkeypatch, capsys, import_model, "out2", "in2")
    assert tokenizer_hash(tmp_path / "in2/tokenizer.json") == tokenizer_hash(
        tmp_path / "out/tokenizer.json"
    )
    for name in KEPT[1:]:
        assert (tmp_path / "in2" / name).read_text() == (tmp_path / "out" / name).read_text()


def trained(directory, imported, *, tokenizer, end_token=None, packing="none"):
    """Write what a run with the weights of an import leaves, with its own tokenizer beside."""
    directory.mkdir()
    shutil.copytree(imported / "step-00000000", directory / "checkpoints" / "step-00000000")
    path = directory / "checkpoints/step-00000000/manifest.json"
    from tests.reliability.checkpoints import body_of, sign

    body = body_of(path.parent)
    body["state"]["config"]["data"] = {"end_token": end_token, "packing": packing}
    sign(path.parent, body)
    if tokenizer is not None:
        shutil.copy(tokenizer, directory / "tokenizer.json")
    return directory


def exported(source, target, **options):
    done = export_checkpoint(source, target, **options)
    config = json.loads((target / "config.json").read_text())
    return done, config


def test_what_an_import_knows_of_text_comes_back_from_a_run_with_its_tokenizer(imported, tmp_path):
    run = trained(
        tmp_path / "run", imported, tokenizer=imported / "tokenizer.json", end_token="<end>"
    )
    done, config = exported(run, tmp_path / "out", origins=[imported])
    assert (done.end, config["eos_token_id"], config["pad_token_id"]) == (0, 0, 0)
    for name in (*KEPT[1:], "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == (imported / name).read_text()


def test_an_import_that_no_run_has_trained_goes_out_with_its_tokenizer(imported, tmp_path):
    done, config = exported(imported, tmp_path / "out")
    assert (done.end, config["eos_token_id"]) == (None, 0)
    for name in (*KEPT, "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == (imported / name).read_text()


def test_ids_that_belong_to_another_tokenizer_are_not_exported(imported, tmp_path):
    other = tokenizer_file(tmp_path / "tokenizer.json", ["zebras dance"] * 50)
    run = trained(tmp_path / "run", imported, tokenizer=other, packing="documents")
    done, config = exported(run, tmp_path / "out", origins=[imported])
    assert (done.end, config["eos_token_id"], config["bos_token_id"]) == (0, 0, None)
    assert not (tmp_path / "out/chat_template.jinja").exists()
    words = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert (words["eos_token"], words["bos_token"]) == ("<|endoftext|>", None)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id == 0


def test_the_end_of_documents_is_among_the_ids_that_end_a_text(imported, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(imported, theirs)
    for name in ("config.json", "generation_config.json"):
        values = json.loads((theirs / name).read_text())
        (theirs / name).write_text(json.dumps(values | {"eos_token_id": [7, 8]}))
    run = trained(
        tmp_path / "run", imported, tokenizer=imported / "tokenizer.json", end_token="<end>"
    )
    _, config = exported(run, tmp_path / "out", origins=[theirs])
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == [0, 7, 8]


def test_the_files_of_a_tokenizer_come_from_where_documents_end_alike(imported, tmp_path):
    first = trained(tmp_path / "first", imported, tokenizer=imported / "tokenizer.json")
    (first / "tokenizer_config.json").write_text('{"eos_token": "fox"}')
    run = trained(tmp_path / "run", imported, tokenizer=imported / "tokenizer.json")
    (run / "tokenizer_config.json").write_text('{"eos_token": "the"}')
    exported(run, tmp_path / "out", origins=[first])
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["eos_token"] == "the"


def test_an_import_names_an_end_of_documents_that_has_no_usual_name(
    imported, monkeypatch, capsys, tmp_path
):
    said = command(monkeypatch, capsys, import_model, imported.parent / "theirs", tmp_path / "in")
    (word,) = [word for word in shlex.split(said) if word.startswith("data.end_token=")]
    assert load_config(["data=text", "data.path=x", word]).data.end_token == "<end>"


@pytest.mark.parametrize(
    ("written", "ids", "end"),
    [
        ("the", 50256, "the"),
        ({"content": "the"}, 50256, "the"),
        ("the", 0, "the"),
        ("none such", 50256, None),
        ("none such", 0, "<end>"),
        (None, [50256, -1, 0], "<end>"),
    ],
)
def test_an_import_reads_the_end_of_a_text_beside_its_tokenizer(
    imported, monkeypatch, capsys, tmp_path, written, ids, end
):
    """The ids of config.json count after that, and may lie outside of the vocabulary."""
    theirs = tmp_path / "theirs"
    shutil.copytree(imported.parent / "theirs", theirs)
    config = json.loads((theirs / "config.json").read_text()) | {"eos_token_id": ids}
    (theirs / "config.json").write_text(json.dumps(config))
    (theirs / "tokenizer_config.json").write_text(json.dumps({"eos_token": written}))
    said = command(monkeypatch, capsys, import_model, theirs, tmp_path / "in")
    assert (f"data.end_token={end}" in said.replace("'", "")) == (end is not None)
    unknown = "does not say which token ends a text; add data.end_token=TOKEN"
    assert (unknown in said) == (end is None)


@pytest.mark.parametrize("adds", [False, True])
def test_an_import_proposes_the_token_that_its_tokenizer_begins_texts_with(
    imported, monkeypatch, capsys, tmp_path, adds
):
    theirs = tmp_path / "theirs"
    shutil.copytree(imported.parent / "theirs", theirs)
    words = json.loads((theirs / "tokenizer_config.json").read_text())
    words |= {"bos_token": "the", "add_bos_token": adds}
    (theirs / "tokenizer_config.json").write_text(json.dumps(words))
    said = command(monkeypatch, capsys, import_model, theirs, tmp_path / "in")
    found = [word for word in shlex.split(said) if word.startswith("data.begin_token=")]
    assert found == (["data.begin_token=the"] if adds else [])
    assert ("puts the in front of a text; the command puts it" in said) == adds


def test_without_a_tokenizer_the_printed_command_says_what_it_needs(
    imported, monkeypatch, capsys, tmp_path
):
    shutil.copytree(imported.parent / "theirs", tmp_path / "theirs")
    (tmp_path / "theirs/tokenizer.json").unlink()
    said = command(monkeypatch, capsys, import_model, tmp_path / "theirs", tmp_path / "in")
    assert "has no tokenizer.json; put the path of the model's own for TOKENIZER.json" in said


def test_a_tokenizer_that_was_cut_off_is_copied_and_named(imported, monkeypatch, capsys, tmp_path):
    theirs = tmp_path / "theirs"
    shutil.copytree(imported.parent / "theirs", theirs)
    (theirs / "tokenizer.json").write_text((theirs / "tokenizer.json").read_text()[:-9])
    for program, target in ((import_model, "in"), (export_model, "out")):
        said = command(monkeypatch, capsys, program, theirs, tmp_path / target)
        assert f"{target}/tokenizer.json is not a tokenizer.json: EOF" in said
        theirs = tmp_path / target


def config_of(origin, corpus, cache, **data):
    return RunConfig(
        model=ModelConfig(vocab_size=VOCAB),
        data=DataConfig(name="text", path=str(corpus), cache_dir=str(cache), **data),
        run=RunSettings(init_from=str(origin), root=str(cache / "runs")),
    )


def refused(config):
    with pytest.raises(ConfigError) as caught:
        prepare_run(config, progress=False)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_text_of_another_tokenizer_than_that_of_the_weights_is_refused(imported, corpus, tmp_path):
    own = {"tokenizer": str(imported / "tokenizer.json"), "end_token": "<end>"}
    config = config_of(imported, corpus, tmp_path, **own)
    (corpora,) = prepare_run(config, progress=False)
    # The tokenizer counts, wherever it lies and however it is written.
    (tmp_path / "again.json").write_text(
        json.dumps(json.loads((imported / "tokenizer.json").read_text()) | {"padding": None})
    )
    prepare_run(
        config_of(imported, corpus, tmp_path, **own | {"tokenizer": str(tmp_path / "again.json")}),
        progress=False,
    )
    prepare_run(config_of(imported, corpora.path, tmp_path), progress=False)

    ways_out = f"data.tokenizer={imported}/tokenizer.json, or data.other_tokenizer=true"
    for place in (imported, imported / "step-00000000"):
        assert ways_out in refused(config_of(place, corpus, tmp_path))
    other = tokenizer_file(tmp_path / "other.json", ["zebras dance"] * 50)
    fresh = config_of(imported, corpus, tmp_path, tokenizer=str(other))
    message = refused(fresh)
    assert message.startswith(f"the text is tokenized by {other} (hash {tokenizer_hash(other)}), ")
    assert ways_out in message
    (prepared,) = prepare_run(replace(fresh, run=RunSettings()), progress=False)
    # The tokens of a prepared corpus stay, so only its text helps.
    for given in ({}, {"tokenizer": str(other)}):
        message = refused(config_of(imported, prepared.path, tmp_path, **given))
        assert f"; give the text instead of the prepared corpus, with {ways_out}" in message
    wanted = replace(fresh, data=replace(fresh.data, other_tokenizer=True))
    assert prepare_run(wanted, progress=False)


def test_a_second_run_on_other_text_is_refused_before_its_text_is_tokenized(corpus, tmp_path):
    """Without data.tokenizer one is trained on its text; it is not that of the first run."""
    tokenizer_file(tmp_path / "runs/one/tokenizer.json")
    config = config_of(tmp_path / "runs/one", corpus, tmp_path / "cache")
    assert f"data.tokenizer={tmp_path}/runs/one/tokenizer.json, or" in refused(config)
    assert not list((tmp_path / "cache").glob("text-*"))


def test_an_import_without_a_tokenizer_needs_one_to_be_given(imported, corpus, tmp_path):
    shutil.copytree(imported, tmp_path / "bare")
    (tmp_path / "bare/tokenizer.json").unlink()
    message = refused(config_of(tmp_path / "bare", corpus, tmp_path))
    assert "is an import without a tokenizer.json; give data.tokenizer=FILE" in message
    given = {"tokenizer": str(imported / "tokenizer.json"), "end_token": "<end>"}
    assert prepare_run(config_of(tmp_path / "bare", corpus, tmp_path, **given), progress=False)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [({}, 5), ({"eos_token_id": 7}, [5, 7]), ({"eos_token_id": [7, 5]}, [7, 5])],
)
def test_the_token_that_ends_a_document_joins_those_that_end_a_text(ends, expected):
    ids = {"bos_token_id": 1, **ends}
    assert _with_end(ids, 5, after_end=False) == {**ids, "eos_token_id": expected}
