"""Prompts are continued until the end of a document, by the command as from Python."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vp_train
from tests.inference.trained import SENTENCE, command, records
from tests.programs import finished
from vp_train.commands.generate import main
from vp_train.commands.score import _print_scores
from vp_train.config import ConfigError
from vp_train.data.documents import Document
from vp_train.inference.generation import generate
from vp_train.inference.layout import opening_of
from vp_train.inference.opening import opened

PROMPT = "the cat sat"


def generate_command(capsys, *words):
    return command(main, capsys, "vp-generate", *words)


def test_a_continuation_ends_with_the_token_that_ends_a_document(trained):
    run = vp_train.open_run(trained)
    assert run.tokenizer.id_to_token(run.end_token) == "<|endoftext|>"
    tokens = list(vp_train.generate(run, PROMPT, 4, temperature=1.0, seed=1))
    assert len(tokens) == 4
    name = run.tokenizer.id_to_token(tokens[1])
    config = replace(run.config, data=replace(run.config.data, end_token=name))
    ending = replace(run, config=config)
    found = list(vp_train.generate(ending, PROMPT, 4, temperature=1.0, seed=1))
    assert found == tokens[: 1 + tokens.index(tokens[1])]


def test_an_empty_prompt_begins_a_document(trained):
    run = vp_train.open_run(trained)
    from_end = torch.tensor([run.end_token])
    assert list(generate(run, "", 3)) == list(generate(run, from_end, 3))
    with pytest.raises(IndexError, match="token 300 is not in the vocabulary"):
        list(generate(run, torch.tensor([300]), 1))


def test_a_token_sees_at_most_seq_length_tokens(trained):
    run = opened(opening_of(trained, ["model.seq_length=8"]))
    ids = torch.tensor(run.tokenizer.encode(SENTENCE * 2).ids)
    assert len(ids) > 16
    assert list(generate(run, ids, 1)) == list(generate(run, ids[-8:], 1))


def test_vp_generate_prints_text_as_python_generates_tokens(trained, tmp_path, capsys, monkeypatch):
    run = vp_train.open_run(trained)
    tokens = list(vp_train.generate(run, PROMPT, 5))
    code, out, _ = generate_command(capsys, trained, "--prompt", PROMPT, "--tokens", 5, "--json")
    assert code == 0
    begun = run.tokenizer.encode(PROMPT).ids
    text = run.tokenizer.decode([*begun, *tokens], skip_special_tokens=False)
    ended = tokens[-1] == run.end_token
    assert records(out) == [
        {"prompt": PROMPT, "text": text[len(PROMPT) :], "tokens": tokens, "ended": ended}
    ]
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\nthe dog\n")
    _, out, _ = generate_command(
        capsys, trained, "--tokens", 5, "--file", tmp_path / "prompts.txt", "--temperature", 0
    )
    first, second = out.split("\n\n")
    assert first == text
    assert second.startswith("the dog")
    with open(tmp_path / "prompts.txt") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert generate_command(capsys, trained, "--tokens", 5, "--file", "-")[1] == out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "0"], "--tokens 0 is not a whole number"),
        (["--temperature", "-1"], "--temperature -1 is not a number of at least 0; write"),
        (["--temperature", "abc"], "for example --temperature 0.8"),
        (["--temperature", "inf"], "--temperature inf is not a number"),
        (["--dtype", "int8"], "--dtype int8 is not known; choose one of bfloat16"),
        (["--top-k", "3"], "--top-k counts only with a --temperature above 0"),
        (["--top-k", "x", "--temperature", "1"], "--top-k x is not a whole number"),
        (["--seed", "-1"], "--seed -1 is not a whole number in [0, "),
        (["--seed", "x"], "write for example --seed 1"),
        (["--file", "nowhere"], "--file nowhere is not a file"),
        (["--prompt", "a\udcff"], "the prompt a\\udcff is not UTF-8; give a text in UTF-8"),
        (["run.steps=3"], "run.steps does not count here"),
        (["Once upon"], "'Once upon' is not key=value; give a prompt as --prompt TEXT"),
    ],
)
def test_vp_generate_refuses_what_makes_no_sense(trained, capsys, words, message):
    code, _, said = generate_command(capsys, trained, *words)
    assert code == 78
    assert message in said
    assert len(said.splitlines()) == 1


def test_the_line_of_a_prompt_that_is_not_utf8_is_named(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_bytes(b"one\n\ntwo\xff\nthree\n")
    with open(tmp_path / "prompts.txt") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        code, _, said = generate_command(capsys, trained, "--file", "-")
    assert (code, "line 3 of the input is not UTF-8" in said) == (78, True)
    code, _, said = generate_command(capsys, trained, "--file", str(tmp_path / "prompts.txt"))
    assert (code, "prompts.txt (line 3)" in said) == (78, True)


def test_a_run_without_a_tokenizer_wants_one(trained, capsys):
    run = vp_train.open_run(trained)
    without = replace(run, tokenizer=None)
    with pytest.raises(ConfigError, match=r"give one with data.tokenizer=PATH"):
        list(generate(without, "the cat", 1))
    documents, options = [Document("a", ("the cat",))], SimpleNamespace(json=False, context=1)
    with pytest.raises(ConfigError, match=r"give one with data.tokenizer=PATH"):
        _print_scores(without, documents, options, is_first=True)
    assert capsys.readouterr().out == "", "no table before the error"


def main_without_threads():
    """Run the command, which must leave no thread of gloo to Python's shutdown."""
    try:
        main()
    finally:
        threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
        assert not [name for name in threads if "gloo" in name]


def test_the_command_starts_the_ranks_of_a_layout(trained):
    """Four draws on two pipeline ranks and on one process are the same."""
    words = [str(trained), "--prompt", PROMPT, "--tokens", "4", "--temperature", "1", "--json"]
    words += ["--dtype", "float64"]
    here = finished(main_without_threads, *words)
    done = finished(main, *words, "parallel.pp=2")
    assert here.returncode == done.returncode == 0, here.stderr + done.stderr
    assert done.stdout == here.stdout
    assert "dp=1 x pp=2 x tp=1" in done.stderr
    assert len(json.loads(here.stdout)["tokens"]) == 4
