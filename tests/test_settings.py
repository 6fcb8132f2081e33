"""A setting declares default, bounds and meaning once; checks, help and pages follow."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import fields, replace
from pathlib import Path

import pytest

from schedules.generators import GENERATORS
from schedules.vocab import VOCAB_ALGORITHMS
from vp_train.commands.train import _train
from vp_train.config import BlendEntry, ConfigError, RunConfig, RunSettings
from vp_train.config.setting import Setting, setting_of
from vp_train.config.typed import override, typed
from vp_train.settings import load_config
from vp_train.settings.files import config_text
from vp_train.settings.help import section_help, setting_help, settings_help, settings_page
from vp_train.settings.resume import refuse_misspelt, resume_words
from vp_train.settings.saved import saved_words
from vp_train.settings.tree import ENTRIES, group_choices, sections, setting_names

SECTIONS = sections() | {"blend": BlendEntry}
ALL = [(name, item) for name, section in SECTIONS.items() for item in fields(section)]
ALL += [("", item) for item in fields(RunConfig) if item.name not in SECTIONS]
NEEDED = {"blend": {"path": "a"}}
BOUNDED = [(name, item) for name, item in ALL if setting_of(item).allowed]


def named(case):
    return ".".join(filter(None, [case[0], case[1].name]))


def test_a_setting_says_what_it_means_in_a_sentence():
    for case in ALL:
        meaning = setting_of(case[1]).meaning
        assert meaning.endswith("."), named(case)
        assert len(meaning) <= 140, named(case)


def test_a_value_beyond_a_bound_is_refused_with_that_bound():
    for name, item in BOUNDED:
        setting, default = setting_of(item), item.default
        setting.check("x", default, default)
        bad = [("maybe", setting.choices)] if setting.choices else []
        bad += [
            (bound, setting.allowed)
            for bound in (setting.above, setting.below)
            if bound is not None
        ]
        bad += [(setting.least - 1, setting.allowed)] if setting.least is not None else []
        bad += [(setting.most + 1, setting.allowed)] if setting.most is not None else []
        assert bad, item.name
        for value, _ in bad:
            with pytest.raises(ConfigError, match=rf"^x={value!r}") as caught:
                setting.check("x", value, default)
            bounds = [
                f"{bound:,}"
                for bound in (setting.least, setting.above, setting.most, setting.below)
                if bound is not None
            ]
            assert any(words in str(caught.value) for words in (*setting.choices, *bounds))
            built = SECTIONS[name](**NEEDED.get(name, {})) if name else RunConfig()
            with pytest.raises(ConfigError):  # also in its section
                replace(built, **{item.name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_number_is_infinite(value):
    with pytest.raises(ConfigError, match="finite number"):
        Setting("Any.").check("x", value, 1.0)


def test_bounds_hold_for_every_element_and_null_where_it_is_the_default():
    setting = Setting("Some.", above=0)
    setting.check("x", (1.0, 2.0), None)
    setting.check("x", None, None)
    for value in ((1.0, 0.0), (float("nan"),)):
        with pytest.raises(ConfigError):
            setting.check("x", value, None)
    with pytest.raises((ConfigError, TypeError)):
        setting.check("x", None, 1.0)


def test_help_has_every_setting_with_its_value_and_meaning():
    config = load_config(["model.num_layers=12"])
    short = settings_help(config, setting_names())
    pages = {name: section_help(name, config) for name in SECTIONS if name != "blend"}
    assert "model.num_layers=12 " in short
    for name, item in ALL:
        setting = setting_of(item)
        if name == "blend":
            continue
        assert f"{named((name, item))}=" in short
        assert setting.meaning in short
        if name:
            full = pages[name]
            assert f"\n{name}.{item.name}=" in full
            assert setting.meaning in full
            for words in (*setting.choices, setting.unit):
                assert words in full


@pytest.mark.parametrize("name", ENTRIES)
def test_help_of_a_list_of_entries_has_their_settings_and_an_example_that_works(name):
    page = setting_help(name, load_config([]))
    for item in fields(ENTRIES[name][0]):
        assert re.search(rf"\n    {item.name}=.*  {re.escape(setting_of(item).meaning)}", page)
    (example,) = re.findall("'([^']*)'", page)
    assert example.startswith(f"{name}=")
    words = [example, "data=blend"] if name == "data.blend" else [example]
    assert len(getattr(load_config(words).data, name.removeprefix("data."))) == 2


def test_groups_of_names_have_the_names_of_the_tables():
    assert set(group_choices()["schedule"]) == {*GENERATORS, "auto"}
    assert set(group_choices()["vocab"]) == {*VOCAB_ALGORITHMS, "auto"}
    assert "one of 1f1b, auto, gpipe" in setting_help("schedule.name", RunConfig())
    assert "one of auto, naive, none" in setting_help("vocab.algorithm", RunConfig())


@pytest.mark.parametrize(
    ("name", "close"),
    [("mien", "mine"), ("nope", None), ("ac", "ab"), ("zb", None), ("zz", None)],
)
def test_a_name_that_no_run_has_is_answered_with_the_closest(tmp_path, name, close):
    for time, other in enumerate(("oldest", "old", "mine", "ab")):
        (tmp_path / other).mkdir()
        (tmp_path / other / "config.yaml").write_text("")
        os.utime(tmp_path / other / "config.yaml", (0, 1_000 * time))
    words = resume_words(
        load_config([f"run.root={tmp_path}", f"run.name={name}", "run.resume=true"])
    )
    hint = f"did you mean run.name={close}?" if close else "the newest runs there: ab, mine, old"
    assert words.startswith(
        f"{tmp_path}/{name} holds no run ({hint}): NOTHING IS RESUMED, a new one begins at step 1"
    )


@pytest.mark.parametrize(
    ("words", "is_refused"),
    [
        (["run.name=p5", "run.resume=true"], True),
        (["run.name=p5", "run.resume=true", "run.steps=8"], True),
        (["run.name=p5", "run.resume=true", "model=nano"], False),
        (["run.name=p5", "run.resume=true", "+model.num_layers=2"], False),
        (["run.name=p5"], False),
        (["run.name=zzz", "run.resume=true"], False),
        (["run.name=p4", "run.resume=true"], False),
        (["run.name=p6", "run.resume=true"], False),  # it has begun, and left nothing
    ],
)
def test_a_misspelt_name_starts_no_other_run(tmp_path, monkeypatch, words, is_refused):
    (tmp_path / "p4").mkdir()
    (tmp_path / "p4/config.yaml").write_text("")
    (tmp_path / "p6").mkdir()
    name = next(word for word in words if "name" in word).partition("=")[2]
    settings = RunSettings(root=str(tmp_path), name=name, resume="run.resume=true" in words)
    words = [f"run.root={tmp_path}", *words]
    if not is_refused:
        refuse_misspelt(settings, words)
        return
    said = (
        f"{tmp_path}/p5 holds no run; did you mean run.name=p4? run.resume=false starts a new one"
    )
    with pytest.raises(ConfigError, match=re.escape(said)):
        refuse_misspelt(settings, words)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(ConfigError, match=re.escape(said)):
        _train(load_config(words), words, {})


def test_a_batch_job_starts_the_run_that_is_not_there(tmp_path, monkeypatch):
    (tmp_path / "job-1").mkdir()
    (tmp_path / "job-1/config.yaml").write_text("")
    begun = []
    monkeypatch.setattr("vp_train.commands.launch.launch", lambda *_, **__: begun.append(1) or 0)
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    words = [f"run.root={tmp_path}", "run.name=job-2", "run.resume=true"]
    assert _train(load_config(words), words, {}) == 0
    assert begun == [1]


def test_the_page_of_settings_is_the_one_that_is_generated():
    page = Path(__file__).parents[1] / "docs" / "settings.md"
    assert page.read_text() == settings_page(), (
        "run: python -m vp_train.settings > docs/settings.md"
    )


@pytest.mark.parametrize(
    "text",
    [
        "a=b",
        "x (1).txt",
        " a ",
        "it's",
        'a"b',
        "é/中文",
        "a#b;c",
        "a[1]{2}",
        "true",
        "007",
        "1e3",
    ],
)
def test_a_text_is_taken_as_it_is_written(text):
    assert load_config(["data=text", f"data.path={text}"]).data.path == text
    assert load_config([f"run.name={text.replace('/', '')}"]).run.name == text.replace("/", "")


def test_a_path_at_home_may_have_any_letters(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a=b")
    assert load_config(["data=text", "data.path=~/x (1)"]).data.path == "/home/a=b/x (1)"


@pytest.mark.parametrize("text", ["a,b", "{a}", "~/a,b", r"a\'b"])
def test_a_text_that_must_be_quoted_is_told_how(text):
    with pytest.raises(ConfigError, match="quote it for the shell and for hydra: ") as caught:
        load_config(["data=text", f"data.path={text}"])
    (word,) = shlex.split(str(caught.value).partition("for hydra: ")[2])
    assert load_config(["data=text", word]).data.path == os.path.expanduser(text).replace("'", "")


@pytest.mark.parametrize("text", ["a'b", r"a\'b", "a\\", r"\\'", "'", "a\\b", r"'\'"])
def test_an_override_sets_any_text(text):
    assert load_config(["data=text", override("data.path", text)]).data.path == text


@pytest.mark.parametrize(
    "text",
    [
        *("plain", "2024", "1e-3", "true", "a/b.c-d", "x y", "é", " a", "a ", "a=b (c)#"),
        *("null", "~", "a:~b", "x=~y", "it's", "'a'", "a,b", "a\\b", "[a", "{a}"),
    ],
)
def test_a_typed_override_sets_the_text_and_is_quoted_only_where_it_must_be(text):
    word = typed("run.name", text) if "/" not in text else typed("run.root", text)
    settings = load_config([word]).run
    assert (settings.root if "/" in text else settings.name) == text
    is_read_otherwise = text in ("null", "'a'") or any(sign in text for sign in "~,\\[{")
    assert word.partition("=")[2].startswith("'") == is_read_otherwise


def test_entries_of_lists_are_shown_as_they_are_typed(tmp_path):
    words = "[{name:wiki,path:val/wiki},{name:code,path:val/code,jsonl_field:body}]"
    config = load_config(["data=text", "data.path=a", f"data.validation={words}"])
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert saved_words(tmp_path / "config.yaml")["data.validation"] == words


def test_a_path_in_a_blend_that_must_be_quoted_is_told_how():
    with pytest.raises(ConfigError, match=r"quote a path with other signs ") as caught:
        load_config(["data=blend", "data.blend=[{path:/data/a=b},{path:c}]"])
    (word,) = shlex.split(str(caught.value).partition("/-_.: ")[2])
    blend = load_config(["data=blend", word]).data.blend
    assert [entry.path for entry in blend] == ["/data/a=b", "c"]


@pytest.mark.parametrize("name", ENTRIES)
def test_a_list_of_entries_whose_braces_the_shell_has_expanded_is_answered_with_quotes(name):
    (word,) = shlex.split(ENTRIES[name][1])
    expanded = subprocess.run(["bash", "-c", f"printf '%s\n' {word}"], capture_output=True)
    words = expanded.stdout.decode().splitlines()
    assert len(words) == 4
    with pytest.raises(ConfigError, match="the shell expands braces without quotes") as caught:
        load_config(words)
    assert str(caught.value).endswith(f"; write {ENTRIES[name][1]}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data.path=/text", "add data=text"),
        ("data.blend=[{path:/text}]", "add data=blend"),
        ("data.jsonl_field=body", "does not count with data=pystdlib"),
        ("data=synthetic data.tokenizer=t.json", "does not count with data=synthetic"),
        ("data=synthetic data.end_token=<end>", "does not count with data=synthetic"),
        ("data=synthetic data.cache_dir=/x", "data.cache_dir=/x does not count with data=synth"),
        ("data=synthetic data.workers=2", "data.workers=2 does not count with data=synthetic"),
        ("data=synthetic data.validation_fraction=0.1", "fraction=0.1 does not count with data=s"),
    ],
)
def test_data_that_would_not_be_used_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        load_config(words.split())


def test_a_setting_of_data_that_is_used_or_left_as_it_is_passes():
    load_config(["data=synthetic", "data.jsonl_field=text", "data.tokenizer=null"])
    load_config(["data.jsonl_field=body", "data.validation=[{name:wiki,path:/wiki}]"])


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("batch_ramp=[2,2]", r"is not a list of pairs, .*; write batch_ramp=\[\[1000,8\],\["),
        ("batch_ramp=[[2,a]]", r"is not a list of pairs, .*; write batch_ramp="),
        ("lr=1e-3", r"did you mean optim\.lr\?$"),
        ("run.allow=batch", r"^run\.allow=batch is not a list; write run\.allow=\[batch\]$"),
        ("run.allow=bach", r"is not a list of texts; choose one of batch, sequence, loss$"),
        ("run.profile_steps=3", r"is not a list; write run\.profile_steps=\[3\]$"),
        ("run.profile_steps=1e1", r"is not a list; write run\.profile_steps=\[10\]$"),
        ("run.profile_steps=0", r"is not a list of whole numbers; each must be at least 1$"),
        ("parallel.layers_per_stage=2", r"is not a list; write parallel\.layers_per_stage=\[2\]$"),
        ("parallel.recompute_per_stage=full", r"write parallel\.recompute_per_stage=\[full\]$"),
        ("cluster=h100", r"did you mean h100_80g_node\?"),
        ("schedule=zb", r"did you mean zb_h1 or zb_h2 or zb_v\?"),
    ],
)
def test_a_wrong_setting_is_answered_in_our_words(word, said):
    with pytest.raises(ConfigError, match=said):
        load_config([word])
