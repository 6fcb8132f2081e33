"""Bad input ends vp-import and vp-export with one line that names it, and exit code 78.

model=FILE.yaml reads the settings of a model from a file.
"""

from __future__ import annotations

import sys

import pytest

from vp_train.commands import convert
from vp_train.commands.convert import export_model, import_model
from vp_train.config import ConfigError, ModelConfig
from vp_train.settings import load_config


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (
            import_model,
            ["nowhere", "out"],
            "vp-import: nowhere/config.json is not there; give the directory of a model",
        ),
        (
            import_model,
            ["mistralai/Mistral-7B-v0.1", "out"],
            "vp-import: mistralai/Mistral-7B-v0.1 is not there; give the directory of a model. "
            "Names of the Hugging Face hub are not downloaded: hf download "
            "mistralai/Mistral-7B-v0.1 --local-dir DIR does it, then give DIR",
        ),
        (
            import_model,
            ["nowhere"],
            "vp-import: the following arguments are required: DST; see vp-import --help",
        ),
        (
            import_model,
            ["nowhere", "out", "--data", "nothing"],
            "vp-import: --data nothing is not there; give a file or a directory of text",
        ),
        (
            export_model,
            ["nowhere", "out"],
            "vp-export: nowhere is not a directory; give that of a run, of vp-import, or of one "
            "checkpoint",
        ),
        (
            export_model,
            ["a", "b", "--dtype", "int8"],
            "vp-export: --dtype int8 is not known; choose one of bfloat16, float16, float32",
        ),
        (
            export_model,
            ["a", "b", "--max-shard-gb", "0"],
            "vp-export: --max-shard-gb=0.0 must be above 0 and finite",
        ),
        (
            export_model,
            ["a", "b", "--max-shard-gb", "inf"],
            "vp-export: --max-shard-gb=inf must be above 0 and finite",
        ),
        (
            export_model,
            ["a", "b", "--max-shard-gb", "nan"],
            "vp-export: --max-shard-gb=nan must be above 0 and finite",
        ),
        (
            export_model,
            [".", "."],
            "vp-export: . cannot be replaced as a whole; "
            "give a directory within it, for example model",
        ),
    ],
)
def test_bad_words_are_one_line(command, words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(SystemExit) as left:
        command()
    assert left.value.code == 78
    error = capsys.readouterr().err.strip()
    assert error.startswith(message)
    assert len(error.splitlines()) == 1


def test_progress_is_a_line_every_ten_seconds_and_none_for_what_is_quick(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(convert.time, "monotonic", lambda: now)
    say = convert._NowAndThen()
    for now in (101.0, 109.0, 110.5, 119.0, 121.0):
        say(f"at {now:g}")
    assert capsys.readouterr().err == "at 110.5\nat 121\n"


@pytest.mark.parametrize(
    ("millions", "named"), [(0.4, "its smallest model, of 125 M"), (125, "this size")]
)
def test_the_rate_of_a_small_import_is_that_of_the_smallest_model(millions, named):
    assert named in convert._rate_words(round(millions * 1e6))


def test_help_is_not_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["vp-export", "--help"])
    with pytest.raises(SystemExit) as left:
        export_model()
    assert left.value.code == 0
    assert "--max-shard-gb" in capsys.readouterr().out


def test_a_model_file_sets_what_it_holds_and_words_after_it_win(tmp_path):
    (tmp_path / "model.yaml").write_text(
        "norm_epsilon: 1e-06\nhidden_size: 64\nsliding_window: null\nqk_norm: true\n"
    )
    read = load_config([f"model={tmp_path}/model.yaml", "model.hidden_size=128"]).model
    assert read == ModelConfig(hidden_size=128, norm_epsilon=1e-6, qk_norm=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "model.yaml is not there; vp-import SRC DST writes one, or choose one of "),
        ("- 1\n", "model.yaml: line 1 begins no setting"),
        ("a: [\n", "model.yaml is not YAML (line 2: did not find expected node content)"),
        ("num_layers: 2\na: [1\nb: 2\n", "model.yaml is not YAML (line 3: "),
        ("hidden: 3\n", "model.hidden is not a setting; did you mean"),
        ("num_layers: 0\n", "model.num_layers=0 is too small"),
    ],
)
def test_a_bad_model_file_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "model.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config([f"model={tmp_path}/model.yaml"])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
