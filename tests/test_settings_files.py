"""A file of settings counts as if its settings were typed before all other words."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vp_train.commands import launch
from vp_train.commands.nodes import OneNode
from vp_train.commands.place import Place
from vp_train.config import ConfigError
from vp_train.settings import load_config
from vp_train.settings.files import config_text, expanded, leaves
from vp_train.settings.tree import SETS_TOO, group_choices, sections

CONFIGS = files("vp_train.configs")
PRESETS = [(group, choice) for group, choices in group_choices().items() for choice in choices]
# Choices that need another setting, and those that a copy cannot have: nothing, or other choices.
NEEDS = {
    ("vocab", "auto"): ["schedule=auto"],
    ("data", "blend"): ["data.blend=[{name:pystdlib}]"],
    ("data", "text"): ["data.path=/x"],
}
NO_COPY = {
    *(("cost", choice) for choice in ("cpu", "a100_4b")),
    *(("optim", choice) for choice in ("wsd", "zero1")),
    *(("cluster", choice) for choice in ("a100_40g_node", "h200_141g_node")),
}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["cluster=h100_80g_node", "model=gpt_4b", "schedule=v_half", "run.resume=true"],
        ["batch_ramp=[[3,4],[9,6]]", "parallel.layers_per_stage=[2,1,1,2]", "optim.lr=1e-5"],
        ["data=text", r"data.path='/a b/c\,d=(e)#'", "run.name='007'", "run.trackers=[mlflow]"],
        [
            "data=blend",
            "data.blend=[{name:pystdlib,weight:3},{path:'/x y/z=1,2',weight:0.5}]",
            "data.validation=[{name:wiki,path:'it\\'s'}]",
        ],
    ],
)
def test_what_print_config_prints_is_taken_as_a_file(tmp_path, words):
    config = load_config(words)
    (tmp_path / "run.yaml").write_text(config_text(config))
    word = f"settings={tmp_path}/run.yaml"
    assert load_config([word]) == config
    assert expanded(expanded([word])) == expanded([word])


def test_words_win_over_a_file_wherever_they_stand_and_a_later_file_over_an_earlier(tmp_path):
    (tmp_path / "a.yaml").write_text("run: {steps: 3, name: a}\nmodel: nano\noptim.lr: 0.5\n")
    (tmp_path / "b.yaml").write_text("run: {name: b}\n")
    of_files = [f"settings={tmp_path}/a.yaml", f"settings={tmp_path}/b.yaml"]
    wanted = load_config(["model=nano", "run.name=b", "optim.lr=0.5", "run.steps=7"])
    for words in (["run.steps=7", *of_files], [*of_files, "run.steps=7"]):
        assert load_config(words) == wanted


@pytest.mark.parametrize("choice", ["cluster=laptop", "cluster=h100_80g_node", "model=small"])
def test_a_group_that_is_chosen_drops_what_a_file_sets_of_it(tmp_path, choice):
    words = ["cluster=a100_40g_node", "run.dtype=float16", "model=nano", "run.steps=7"]
    (tmp_path / "run.yaml").write_text(config_text(load_config(words)))
    group = choice.partition("=")[0]
    kept = [
        word for word in words if word.partition("=")[0] not in (group, *SETS_TOO.get(group, ()))
    ]
    assert load_config([f"settings={tmp_path}/run.yaml", choice]) == load_config([*kept, choice])


@pytest.mark.parametrize("preset", sorted({*PRESETS} - NO_COPY), ids="=".join)
def test_a_copy_of_a_preset_is_taken_as_a_file_of_its_group(tmp_path, preset):
    group, choice = preset
    (tmp_path / "mine.yaml").write_text((CONFIGS / group / f"{choice}.yaml").read_text())
    (tmp_path / "run.yaml").write_text(f"{group}: {tmp_path}/mine.yaml\n")
    more = NEEDS.get(preset, [])
    wanted = load_config([f"{group}={choice}", *more])
    assert load_config([f"{group}={tmp_path}/mine.yaml", *more]) == wanted
    assert load_config([f"settings={tmp_path}/run.yaml", *more]) == wanted


def test_groups_are_sections_and_what_their_choices_set_of_others_is_declared():
    assert {*group_choices()} == {*sections()} - {"loss"}
    for group, choice in PRESETS:
        text = (CONFIGS / group / f"{choice}.yaml").read_text()
        if "@package _global_" not in text or (group, choice) in NO_COPY:
            continue
        names = {name for name, _ in leaves(OmegaConf.create(text))}
        others = {name for name in names if not name.startswith(f"{group}.")}
        assert others == {*SETS_TOO[group]}, choice


def test_values_of_one_setting_win_over_the_file_of_a_group_wherever_they_stand(tmp_path):
    (tmp_path / "mine.yaml").write_text("num_layers: 6\n")
    words = ["model.num_layers=8", f"model={tmp_path}/mine.yaml"]
    for typed in (words, words[::-1]):
        assert load_config(typed).model.num_layers == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {num_layers: 3}", ": modle.num_layers is not a setting; did you mean model.num_"),
        ("run: {dtype: fp16}", ": run.dtype='fp16' is not known (did you mean float16?)"),
        ("model: gpt_5b", ": model=gpt_5b is not known (did you mean gpt_7b?)"),
        ("model: null", ": model=null: a group takes the name of one of its choices"),
        (
            "model: none.yaml",
            ": model=none.yaml is not there; vp-import SRC DST writes one, or",
        ),
        ("settings: other.yaml", ": settings is not a setting"),
        ("data: {blend: {path: a}}", ": data.blend.path='a': entries of data.blend are not set"),
        ("run: {name: '${oc.env:HOME}'}", ": line 1 ${oc.env:HOME} is not expanded in settings"),
        ("a: &b [1]", ": line 1 has anchors or aliases"),
        ("a: [1", " is not YAML (line 2"),
        ("", " holds no settings"),
        ("# only words", " holds no settings"),
        ("[1, 2]", ": line 1 begins no setting; write one `key: value` per line"),
        ("run.steps=3", ": line 1 begins no setting; write one `key: value` per line"),
        ("run:\n  steps: 3\n  steps: 4", " is not YAML (line 3: found duplicate key steps)"),
        ("run:\n\tsteps: 3", " is not YAML (line 2: a tab begins it; indent with blanks)"),
        ("a: 1\n---\nb: 2", " is not YAML (line 2: expected a single document in the stream but"),
        (
            "defaults: [{model: nano}]",
            ": it has `defaults`; write the choices of groups as `model:",
        ),
        ("run: {stps: 3}\nmodle: {x: 3}", ": 2 words are not known; run.stps: did you mean run.st"),
        ("a: !!python/object:os.system 1", ": line 1 has the tag"),
        ("x: [" + "[1]," * 1_200 + "]", ": the overrides x=[[1],"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_config([f"settings={file}", "run.steps=7"])
    assert str(caught.value).startswith(f"settings={file}")
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_answered_with_one_that_is(tmp_path):
    (tmp_path / "mine.yml").write_text("num_layers: 2\n")
    (tmp_path / "run.yaml").write_text("model: mine.yml\n")
    for word, said in (
        (f"settings={tmp_path}/rum.yaml", f"did you mean settings={tmp_path}/run.yaml?"),
        (f"model={tmp_path}/mien.yaml", f"did you mean model={tmp_path}/mine.yml?"),
        ("model=other.yaml", "; vp-import SRC DST writes one, or choose one of gemma"),
        ("settings=", "settings= names no file; give a file as --print-config"),
        ("settings=a.yaml,b c.yaml", 'words: settings=a.yaml "settings=b c.yaml"'),
        (f"settings={tmp_path}", "is a directory, not a file; give a file as --print-config"),
        ("optim=other.yaml", "is not there; choose one of adamw, wsd, zero1"),
        (f"settings={tmp_path}/run.yaml", f"the command runs: write model: {tmp_path}/mine.yml"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config([word])
        assert said in str(caught.value)


def test_the_file_of_a_group_may_end_with_yml(tmp_path):
    for ending in ("yaml", "yml"):
        (tmp_path / f"mine.{ending}").write_text("num_layers: 6\n")
        (tmp_path / "run.yml").write_text(f"model: {tmp_path}/mine.{ending}\n")
        for word in (f"model={tmp_path}/mine.{ending}", f"settings={tmp_path}/run.yml"):
            assert load_config([word]).model.num_layers == 6


def test_a_word_that_is_wrong_is_not_blamed_on_a_file(tmp_path):
    (tmp_path / "run.yaml").write_text("vocab: auto\n")  # needs schedule=auto
    with pytest.raises(ConfigError, match=r"^run\.stps is not a setting"):
        load_config([f"settings={tmp_path}/run.yaml", "schedule=auto", "run.stps=7"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {num_layers: 3}\nrun: {steps: 3}\n", r"run\.steps is no setting of model; sett"),
        ("defaults: [nano]\nmodel: {num_layers: 3}\n", r"it has `defaults`; write the values"),
        ("defaults: [nano]\nnum_layers: 3\n", r"it has `defaults`; write the values"),
    ],
)
def test_a_file_of_one_group_sets_no_other(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"^model=.*run.yaml: {message}"):
        load_config([f"model={tmp_path}/run.yaml"])


def test_a_file_counts_on_a_resumed_run_like_words(tmp_path):
    config = load_config(["model=nano", "optim=wsd", f"run.root={tmp_path}", "run.name=one"])
    config.run.directory.mkdir()
    (config.run.directory / "config.yaml").write_text(config_text(config))
    (tmp_path / "more.yaml").write_text("run: {steps: 200}\noptim: adamw\n")
    where = [f"run.root={tmp_path}", "run.name=one", "run.resume=true"]
    again = load_config([f"settings={tmp_path}/more.yaml", *where])
    assert again == load_config([*where, "run.steps=200", "optim=adamw"])
    assert (again.model, again.optim.schedule) == (config.model, "cosine")


def test_ranks_get_what_was_in_the_files_when_they_were_launched(tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("run: {steps: 3}\nmodel: nano\n")
    words = [f"settings={tmp_path}/run.yaml", "num_microbatches=4"]
    config, given = load_config(words), []
    monkeypatch.setattr(launch, "_checked", lambda *_, **__: ([], None))
    monkeypatch.setattr(launch, "starts_by_fork", lambda _: False)
    monkeypatch.setattr(launch, "new_process", lambda command: given.append(command))
    monkeypatch.setattr(launch, "run_job", lambda _, job: job.starter(False))
    monkeypatch.setattr(launch, "_left", lambda *_: 0)
    news = OneNode(Place(host="here"))
    launch._launch(news, config, words, lambda _: None, 1, 0, trains=True)
    (tmp_path / "run.yaml").unlink()
    (command,) = given
    assert load_config(command[command.index("vp_train") + 1 :]) == config


def test_the_file_in_the_quickstart_is_taken(tmp_path):
    page = (Path(__file__).parent.parent / "docs/quickstart.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    (tmp_path / "run.yaml").write_text(text)
    words = ["model=nano", "cluster=h100_80g_node", "parallel.pp=4", "parallel.tp=2"]
    wanted = load_config([*words, "optim.lr=3e-4", "num_microbatches=32"])
    assert load_config([f"settings={tmp_path}/run.yaml"]) == wanted
