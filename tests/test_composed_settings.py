"""Settings are what hydra composes, whether it composes them itself or not."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest

from vp_train.config import ConfigError, RunConfig
from vp_train.settings import choices, compose, load_config
from vp_train.settings.tree import group_choices

CONFIGS = Path(__file__).parents[1] / "configs"


def covering_sets():
    """Every choice that builds on others alone, and sets in which every choice occurs, seeded."""
    random, groups = Random(0), group_choices()
    files = {(name, one): CONFIGS / name / f"{one}.yaml" for name in groups for one in groups[name]}
    alone = [
        [f"{name}={one}"]
        for (name, one), file in files.items()
        if re.search("^defaults:|@package", file.read_text(), re.M)
    ]
    orders = {name: random.sample(one, len(one)) for name, one in groups.items()}
    every = range(max(map(len, groups.values())))
    sets = [
        [
            f"{name}={order[row % len(order)]}"
            for name, order in orders.items()
            if row < len(order) or random.random() < 0.5
        ]
        for row in every
    ]
    return [*alone, *sets]


@pytest.mark.parametrize("words", covering_sets(), ids=" ".join)
def test_sets_of_choices_give_what_hydra_composes(words):
    assert compose._composed_here(words) == compose._hydra_composed(words)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["model.num_layers=3", "model=nano", "model.num_layers=5", "run.steps=7"],
        ["parallel.layers_per_stage=[4,4]", "schedule=v_half", "num_microbatches=3"],
        ["data=blend", "data.blend=[{name:pystdlib,weight:3},{path:a,weight:1}]"],
        ["batch_ramp=[[3,4]]", "batch_ramp=[]", "vocab.shards=null", "run.name='a, b'"],
        ["cluster=h100_80g_node", "run.dtype=float32", "optim.lr=1e-3"],
    ],
)
def test_groups_that_are_composed_once_give_what_hydra_composes(words):
    composed = compose._hydra_composed(words)
    for _ in range(2):  # the second time from what was kept
        assert compose._composed_here(words) == composed


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["run.steps=7", "model.num_layers=3", "parallel.layers_per_stage=[1,2]"],
        ["optim=wsd", "optim.lr=0.5", "data=pystdlib"],
        ["cluster=h100_80g_node", "run.dtype=float16"],
        ["cost=a100", "cluster=h200_141g_node", "schedule=v_half"],
    ],
)
def test_saved_settings_with_choices_on_top_give_what_hydra_composes(words):
    sections, saved = group_choices(), asdict(load_config(["optim=zero1", "data=synthetic"]))
    anew = {"model", *(word.partition("=")[0] for word in words)} & sections.keys()
    settings = {name: value for name, value in saved.items() if name not in anew}
    resumed = compose.Saved(settings, anew)
    composed = compose._composed_here(words, resumed)
    assert composed == compose._hydra_composed(words, resumed)
    assert composed.num_microbatches == saved["num_microbatches"]


def test_saved_settings_that_a_choice_would_choose_anew_are_left_to_hydra():
    saved = compose.Saved(asdict(load_config([])), {"cost"})
    assert compose._composed_here(["cost=a100_4b"], saved) is None
    with pytest.raises(ConfigError, match="Could not override 'model'"):
        compose.composed_config(["cost=a100_4b"], saved)


WHOLE = "# @package _global_\n"
NEW_CHOICES = {
    "optim/twice.yaml": "defaults: [wsd]\nlr: 0.5",
    "optim/last.yaml": "defaults: [_self_, wsd]\nlr: 0.5\nschedule: cosine",
    "optim/other.yaml": "# @package model\nhidden_size: 128",
    "optim/asks.yaml": "defaults: [{override /model: nano}]\nlr: 0.5",
    "optim/asks_whole.yaml": f"{WHOLE}defaults: [{{override /model: nano}}]\noptim: {{lr: 0.5}}",
    "cost/asks.yaml": f"{WHOLE}defaults: [{{override /optim: zero1}}]\nrun: {{steps: 3}}",
    "cost/asks_on.yaml": f"{WHOLE}defaults: [asks]\nrun: {{steps: 4}}",
    "cost/asks_asking.yaml": f"{WHOLE}defaults: [{{override /optim: asks_whole}}]",
    "cluster/nodes.yaml": f"{WHOLE}defaults: [h100_80g_node]\nrun: {{dtype: float32}}",
    "cluster/mixed.yaml": f"{WHOLE}defaults: [laptop]\nrun: {{dtype: float32}}",
    "cluster/whole.yaml": "defaults: [h100_80g_node]\nnum_nodes: 2",
    "cluster/absolute.yaml": "defaults: [/optim: wsd]\nnum_nodes: 2",
    "new/one.yaml": "a: 1",
}


@pytest.fixture
def with_new_choices(tmp_path, monkeypatch):
    """configs/ with NEW_CHOICES, and nothing that was read before."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    for name, text in NEW_CHOICES.items():
        (tmp_path / "configs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "configs" / name).write_text(text)
    (tmp_path / "configs/__init__.py").touch()
    place = tmp_path / "configs/__init__.py"
    spec = importlib.util.spec_from_file_location("vp_train.configs", place)
    monkeypatch.setitem(sys.modules, spec.name, importlib.util.module_from_spec(spec))
    kept = (choices.of_choices, choices._of_choice, choices._ours)
    for one in kept:
        one.cache_clear()
    yield
    for one in kept:
        one.cache_clear()


def test_new_choices_give_what_hydra_composes_or_are_left_to_it(with_new_choices):
    """Also those that build on others, ask for choices of other groups or set them."""
    taken = []
    for words in (
        *([name.replace("/", "=").removesuffix(".yaml")] for name in NEW_CHOICES),
        ["cost=asks", "optim=wsd"],
        ["cost=asks", "optim=asks_whole"],
    ):
        if (ours := compose._composed_here(words)) is not None:
            taken.append(" ".join(words))
            assert ours == compose._hydra_composed(words), words
    assert taken == [
        *("optim=twice", "optim=last", "optim=asks_whole"),
        *("cost=asks", "cost=asks_on", "cluster=nodes", "cost=asks optim=wsd"),
    ]


@pytest.mark.parametrize(
    "word", ["optim.lr=1,2", "optim.lrr=1", "lrr=1", "model=none", "optim.lr='a"]
)
def test_what_cannot_be_composed_is_left_to_hydra(word):
    assert compose._composed_here(["model=nano", word]) is None


def test_choices_alone_do_not_load_hydra():
    code = """
import sys
from vp_train.settings import load_config
load_config(["model=nano", "optim=zero1", "cluster=h100_80g_node"])
assert "hydra" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_change_of_composed_settings_does_not_reach_the_next(tmp_path):
    compose._composed_here(["model=nano"]).optim.lr = 7.0
    assert load_config(["model=nano"]).optim.lr == RunConfig().optim.lr
