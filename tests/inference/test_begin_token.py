"""The token in front of the documents of a run comes in front of what its model reads."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer

import vp_train
from tests.inference.trained import SENTENCE, WORDS, command, records
from tests.training import run_command
from vp_train.commands.score import main
from vp_train.data.tokenizer import tokenizer_hash
from vp_train.failures import EXIT_CONFIG
from vp_train.hf.convert import export_checkpoint
from vp_train.inference.generation import generate
from vp_train.inference.opening import open_run

TEXT = "the cat sat on the mat"


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run whose corpus has the token; its own settings do not name it."""
    place = tmp_path_factory.mktemp("begun")
    (place / "text").mkdir()
    for number in range(20):
        (place / f"text/{number}.txt").write_text(SENTENCE * 20)
    words = [*WORDS, "data=text", "parallel.pp=1", "run.name=one"]
    run_command([*words, "data.path=text", "data.begin_token=<|endoftext|>"], place, 1)
    (corpus,) = (place / "data-cache").glob("text-*")
    run_command([*words[:-1], f"data.path={corpus}", "run.name=stored"], place, 1)
    return place / "runs"


@pytest.mark.parametrize("name", ["one", "stored"])
def test_a_document_is_scored_behind_it(begun, name):
    run = open_run(begun / name)
    ids = run.tokenizer.encode(TEXT).ids
    begin = run.tokenizer.token_to_id("<|endoftext|>")
    assert run.begin_ids == [begin]
    (found,) = vp_train.score(run, [TEXT])
    assert len(found) == len(ids)
    assert torch.equal(found, vp_train.score(run, [torch.tensor([begin, *ids])])[0])
    bare = torch.tensor(ids)
    assert len(vp_train.score(run, [bare])[0]) == len(ids) - 1, "ids are taken as they are"
    told = list(generate(run, TEXT, 4))
    assert told == list(generate(run, torch.tensor([begin, *ids]), 4))
    assert list(generate(run, "", 4)) == list(generate(run, torch.tensor([begin]), 4))


def test_the_command_counts_every_byte_unless_it_is_told_otherwise(begun, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    words = ("vp-score", begun / "one", tmp_path / "a.txt", "--json")
    _, out, _ = command(main, capsys, *words)
    assert records(out)[0]["bytes"] == len(TEXT)
    _, out, _ = command(main, capsys, *words, "data.begin_token=null")
    assert records(out)[0]["bytes"] < len(TEXT)
    code, _, errors = command(main, capsys, *words, "data.begin_token=<none>")
    assert code == EXIT_CONFIG
    assert "no token data.begin_token=<none>" in errors


def test_an_export_names_it(begun, tmp_path):
    for name in ("one", "stored"):
        export_checkpoint(begun / name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        words = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        assert words["bos_token"] == "<|endoftext|>"
        assert words["add_bos_token"] is True
        assert config["bos_token_id"] == open_run(begun / name).begin_ids[0]
        read = AutoTokenizer.from_pretrained(tmp_path / name)
        ids = open_run(begun / name).tokenizer.encode(TEXT).ids
        assert read(TEXT).input_ids == [config["bos_token_id"], *ids]
        origin = begun / name / "tokenizer.json"
        assert tokenizer_hash(tmp_path / name / "tokenizer.json") == tokenizer_hash(origin)
