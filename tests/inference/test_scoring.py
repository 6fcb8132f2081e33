"""The public API: a run of any layout is opened and scores text as its evaluation does."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

import vp_train
from tests.inference.trained import SENTENCE, WORDS, command, records
from tests.vocab.test_memory import growth
from vp_train.commands.score import Score, main
from vp_train.config import ConfigError, DataConfig
from vp_train.config.typed import override
from vp_train.data import describe, prepare
from vp_train.data.tokenizer import train_tokenizer
from vp_train.inference.layout import opening_of
from vp_train.inference.opening import open_run, opened
from vp_train.settings import load_config
from vp_train.tensors import kernels
from vp_train.tensors.compiling import has_cpp_compiler


def test_text_is_scored_in_three_lines(trained):
    run = vp_train.open_run(trained)
    seen, other = vp_train.score(run, ["the cat sat on the mat", "qzx!!#%& vwy~"])
    assert seen.dtype is torch.float32
    assert seen.mean() > other.mean()
    assert run.checkpoint.name == "step-00000004"
    assert run.end_token not in run.tokenizer.encode("a<|endoftext|>b").ids, "as in training"
    ids = torch.tensor(run.tokenizer.encode("the cat sat on the mat").ids)
    assert torch.equal(vp_train.score(run, [ids])[0], seen)
    assert len(seen) == len(ids) - 1


def test_scores_are_the_log_softmax_of_the_model(trained):
    """Plain torch agrees token by token, in float64, for a text of several windows."""
    run = vp_train.open_run(trained / "checkpoints" / "step-00000004", dtype="float64")
    width, model = run.config.model.seq_length, run.model
    ids = torch.randint(0, 300, (2 * width + 7,), generator=torch.Generator().manual_seed(0))
    (found,) = vp_train.score(run, [ids])
    assert found.shape == (2 * width + 6,)
    weights = {name: parameter.detach() for name, parameter in model.parameters.items()}
    expected = []
    for start in range(0, len(ids) - 1, width):
        tokens, labels = ids[start : start + width], ids[start + 1 : start + width + 1]
        with torch.no_grad():
            hidden = model.stages[0](weights["embedding.weight"][tokens][:, None])[:, 0]
            logits = hidden @ weights["output.weight"].T
        expected.append(logits.log_softmax(-1)[: len(labels)].gather(1, labels[:, None])[:, 0])
    assert torch.allclose(found.double(), torch.cat(expected), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_is_opened_in_the_memory_of_its_parameters(trained, dtype):
    """Beside them a tensor is read and converted at a time: no gradients, masters or moments."""
    opened_runs = []
    grown = growth(lambda: opened_runs.append(vp_train.open_run(trained, dtype=dtype)))
    parameters = opened_runs[0].model.parameters.values()
    own = sum(parameter.nbytes for parameter in parameters)
    largest = 4 * max(parameter.numel() for parameter in parameters)
    assert own <= grown < own + 4 * largest


def test_what_cannot_be_scored_is_said(trained, tmp_path):
    run = vp_train.open_run(trained)
    assert [
        len(scores)
        for scores in vp_train.score(run, [torch.tensor([5]), torch.tensor([], dtype=torch.int64)])
    ] == [0, 0]
    for texts, message in (
        ("the cat", "texts is a list"),
        (torch.tensor([1, 2]), "texts is a list"),
        ([[1, 2]], "int64 tensor"),
        ([torch.tensor([1.0, 2.0])], "int64 tensor"),
        ([torch.tensor([[1, 2]])], "int64 tensor"),
    ):
        with pytest.raises(TypeError, match=message):
            vp_train.score(run, texts)
    with pytest.raises(ConfigError, match=r"nope is not a directory.*; give that of a run"):
        vp_train.open_run(tmp_path / "nope")
    with pytest.raises(IndexError, match="300"):
        vp_train.score(run, [torch.tensor([1, 300])])
    with pytest.raises(ConfigError, match=r"has no config\.yaml; give the directory of a run"):
        vp_train.open_run(tmp_path)
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        vp_train.open_run(tmp_path)


@pytest.mark.parametrize("name", ["embedding.weight", "output.weight"])
def test_weights_that_are_not_numbers_are_refused_as_generation_refuses_them(trained, name):
    run = vp_train.open_run(trained)
    with torch.no_grad():
        run.model.parameters[name].fill_(math.nan)
    said = []
    for call in (vp_train.score, lambda run, texts: list(vp_train.generate(run, *texts, 1))):
        with pytest.raises(ConfigError, match="logits are not numbers; take another") as caught:
            call(run, ["the cat sat"])
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_gpu_that_is_not_there_is_named(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="no GPU here; compute on the device cpu"):
        vp_train.open_run(trained, device="cuda")
    (tmp_path / "a.txt").write_text("the cat sat")
    code, _, said = score_command(capsys, trained, tmp_path / "a.txt", "--device", "cuda")
    assert code == 78
    assert "torch finds no GPU here" in said


def test_the_package_imports_nothing_heavy():
    code = "import sys, vp_train; loaded = sorted({'torch', 'hydra'} & set(sys.modules)); "
    code += "print(loaded, hasattr(vp_train, 'no'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"
    assert set(vp_train.__all__) <= set(dir(vp_train)) | set(vp_train._HOMES)


def test_a_step_is_simulated_from_settings():
    config = vp_train.load_config(["model=nano", "parallel.pp=2", "num_microbatches=4"])
    outcome = vp_train.simulate(config)
    assert outcome.timeline.makespan > 0
    assert json.dumps(outcome.timeline.makespan)


def score_command(capsys, *words):
    return command(main, capsys, "vp-score", *words)


@pytest.mark.skipif(not has_cpp_compiler(), reason="needs a C++ compiler")
@pytest.mark.parametrize("setting", ["auto", "off"])
def test_run_compile_counts_for_vp_score_too(trained, tmp_path, capsys, monkeypatch, setting):
    (tmp_path / "a.txt").write_text("the cat sat on the mat")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    called, run = [], kernels.run
    monkeypatch.setattr(kernels, "run", lambda name, *rest: called.append(name) or run(name, *rest))
    words = [f"run.compile={setting}", "--dtype", "bfloat16"]
    code, _, _ = score_command(capsys, trained, tmp_path / "a.txt", *words)
    assert code == 0
    assert bool(called) == (setting == "auto")


def test_vp_score_sums_what_score_returns(trained, tmp_path, capsys):
    lines = ["the cat sat on the mat", "", "qzx!!#%& \u00fcber vwy~", "q"]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    texts = [{"text": line} for line in lines if line]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, texts)))
    code, out, _ = score_command(capsys, trained, tmp_path / "a.txt", "--lines", "--json")
    assert code == 0
    *found, total = map(json.loads, out.splitlines())
    assert [entry["document"] for entry in found] == [f"{tmp_path}/a.txt:{n}" for n in (1, 3, 4)]
    run = vp_train.open_run(trained)
    expected = [row.double().sum().item() for row in vp_train.score(run, [lines[0], lines[2]])]
    assert [entry["logprob"] for entry in found] == pytest.approx([*expected, 0.0])
    assert total["logprob"] == pytest.approx(sum(expected))
    assert found[2]["perplexity"] is None
    size = len(lines[2].encode())
    assert size - 4 <= found[1]["bytes"] < size, "all but the first token"
    bits = -expected[1] / math.log(2) / found[1]["bytes"]
    assert found[1]["bits_per_byte"] == pytest.approx(bits)
    assert found[0]["perplexity"] == pytest.approx(math.exp(-expected[0] / found[0]["tokens"]))
    code, table, _ = score_command(capsys, trained, tmp_path / "a.jsonl")
    assert code == 0
    assert table.splitlines()[0].split() == [
        "tokens",
        "log-prob",
        "perplexity",
        "bits/byte",
        "document",
    ]
    assert table.splitlines()[-1].split()[0] == str(total["tokens"])
    _, out, _ = score_command(capsys, trained, tmp_path / "a.txt", "--json")
    assert len(out.splitlines()) == 2, "the whole file is one document"


def test_every_token_is_scored_once_from_the_context_that_was_asked_for(trained):
    """A token is predicted as at the end of a text that holds no more than its window."""
    run = opened(opening_of(trained, ["model.seq_length=8"], dtype="float64"))
    ids = torch.randint(0, 300, (21,), generator=torch.Generator().manual_seed(3))

    def alone(i, first):
        return vp_train.score(run, [ids[first : i + 2]])[0][-1]

    for context, begins in ((8, lambda i: max(0, i - 7)), (1, lambda i: i // 8 * 8)):
        (found,) = vp_train.score(run, [ids], context=context)
        expected = torch.stack([alone(i, begins(i)) for i in range(20)])
        assert torch.allclose(found, expected, atol=1e-12)
    windows = [(0, 8), (4, 12), (8, 16), (12, 20)]  # of 8 tokens, at least 5 before a label
    (found,) = vp_train.score(run, [ids], context=5)
    for i in range(20):
        first = next(start for start, stop in windows if i < stop)
        assert torch.isclose(found[i], alone(i, first), atol=1e-12)
    for context in (0, 9):
        with pytest.raises(ConfigError, match=r"context of . tokens is not in \[1, 8\]"):
            vp_train.score(run, [ids], context=context)


def test_lines_end_with_a_newline_or_crlf_and_a_byte_order_mark_is_no_text(
    trained, tmp_path, capsys
):
    lines = ["the cat\u2028sat", "", "  ", "on the mat"]
    (tmp_path / "a.txt").write_bytes("\n".join(lines).encode())
    (tmp_path / "b.txt").write_bytes("\ufeff".encode() + "\r\n".join([*lines, ""]).encode())
    found = {}
    for name in ("a.txt", "b.txt"):
        _, out, _ = score_command(capsys, trained, tmp_path / name, "--lines", "--json")
        found[name] = [entry | {"document": entry["document"][-1]} for entry in records(out)]
        assert [entry["document"] for entry in found[name]] == ["1", "4", "l"]
    assert found["a.txt"] == found["b.txt"]
    _, out, _ = score_command(capsys, trained, tmp_path, "--lines", "--json")
    assert len(out.splitlines()) == 5, "the files of a directory"


def test_vp_score_leaves_out_what_vp_prepare_does_and_says_so_alike(trained, tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for name in ("a.txt", ".hidden", "b.docx"):
        (text / name).write_text(SENTENCE)
    (text / "c.jsonl").write_text('{"content": "the cat"}')
    _, out, said = score_command(capsys, trained, text, "--json")
    assert len(out.splitlines()) == 2
    data = DataConfig(name="text", path=str(text), cache_dir=str(tmp_path / "cache"))
    _, _, _, *left_out = describe(prepare(data, 300, progress=False)).splitlines()
    assert len(left_out) == 3
    assert [line for line in said.splitlines() if line.startswith("left out")] == left_out


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda path: None,
            "does not exist; give a file of text, .jsonl or a table, or a directory",
        ),
        (lambda path: path.write_text("{}\n[]"), "holds no text; --field names the field"),
        (lambda path: path.write_text("{"), "left out, lines that are not JSON"),
    ],
)
def test_vp_score_refuses_what_it_cannot_read(trained, tmp_path, capsys, make, words):
    path = tmp_path / "a.jsonl"
    make(path)
    code, _, said = score_command(capsys, trained, path)
    assert code == 78
    assert words in said
    assert len(said.splitlines()) <= 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr=1"], "optim.lr does not count here; only some of parallel"),
        (["b.txt"], "'b.txt' is not key=value; one FILE goes, or one directory of files"),
        (["--context", "x"], "--context x is not a whole number in"),
        (["--dtype", "int8"], "--dtype int8 is not known; choose one of bfloat16"),
        (["parallel.tp=3"], "does not split over parallel.tp=3"),
        (["--context", "0"], "context of 0 tokens"),
    ],
)
def test_vp_score_refuses_settings_that_do_not_count_or_fit(
    trained, tmp_path, capsys, words, message
):
    (tmp_path / "a.txt").write_text("the cat")
    code, _, said = score_command(capsys, trained, tmp_path / "a.txt", *words)
    assert code == 78
    assert message in said.splitlines()[-1]
    assert not any("step-" in line for line in said.splitlines())  # the model was not opened


def test_an_import_is_scored_like_the_run_of_its_weights(trained, tmp_path, capsys):
    text, place = tmp_path / "a.txt", tmp_path / "an import"
    text.write_text(SENTENCE)
    checkpoint = max((trained / "checkpoints").glob("step-*"))
    shutil.copytree(checkpoint, place / checkpoint.name)
    model = asdict(load_config(WORDS).model)
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in model.items()]
    (place / "model.yaml").write_text("".join(lines))
    shutil.copy(trained / "tokenizer.json", place)
    wanted = score_command(capsys, trained, text, "--json")[1]
    for path in (place, place / checkpoint.name):
        code, out, said = score_command(capsys, path, text, "--json")
        assert (code, out) == (0, wanted), said


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, -1e6])
def test_a_score_without_a_finite_perplexity_is_strict_json(logprob):
    line = Score("a", 1, 1, logprob).as_json()
    assert json.loads(line, parse_constant=pytest.fail)["perplexity"] is None


def test_a_named_tokenizer_counts_before_that_of_the_run(trained, tmp_path):
    path = tmp_path / "other.json"
    train_tokenizer(["the cat"], 258).save(str(path))
    assert open_run(trained).tokenizer.get_vocab_size() != 258
    run = opened(opening_of(trained, [override("data.tokenizer", str(path))]))
    assert run.tokenizer.get_vocab_size() == 258
    path.unlink()
    with pytest.raises(ConfigError, match=r"data.tokenizer=.*other.json is not there"):
        opened(opening_of(trained, [override("data.tokenizer", str(path))]))
