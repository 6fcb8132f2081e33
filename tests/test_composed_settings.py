"""Settings are what hydra composes, whether it reads the choices of groups again or not."""

from __future__ import annotations

from dataclasses import asdict

import hydra
import pytest

from vp_train.config import ConfigError, RunConfig
from vp_train.settings import compose, load_config


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
    for _ in range(2):  # the second time from what was kept
        assert compose._composed_once(words) == compose._hydra_composed(words)


def test_overrides_of_saved_settings_give_what_hydra_composes():
    saved = asdict(load_config(["data=text", "data.path=a", "optim=zero1", "schedule=v_half"]))
    for words in (
        [],
        ["optim.lr=1e-3", "run.steps=7"],
        ["vocab.shards=null", "batch_ramp=[[3,4]]"],
    ):
        given = words, compose.Saved(saved, {"optim.lr"})
        assert compose._composed_once(*given) == compose._hydra_composed(*given)
        assert compose._composed_once(words, compose.Saved(saved, {"optim"})) is None


@pytest.mark.parametrize("word", ["optim.lr=1,2", "optim.lrr=1", "model=none", "optim.lr='a"])
def test_what_cannot_be_composed_is_left_to_hydra(word):
    assert compose._composed_once(["model=nano", word]) is None


def test_a_change_of_composed_settings_does_not_reach_the_next():
    compose._composed_once(["model=nano"]).optim.lr = 7.0
    assert load_config(["model=nano"]).optim.lr == RunConfig().optim.lr


def test_on_saved_settings_a_group_that_is_chosen_begins_anew_with_its_choice():
    saved = asdict(load_config(["optim=zero1", "optim.lr=0.5", "model=nano", "run.steps=7"]))
    del saved["optim"]
    found = compose.composed_config(["optim=wsd"], compose.Saved(saved, {"optim"}))
    assert found.optim == load_config(["optim=wsd"]).optim
    assert (found.model.num_layers, found.run.steps) == (saved["model"]["num_layers"], 7)


def test_a_choice_that_would_choose_another_group_is_refused_on_saved_settings():
    saved = compose.Saved(asdict(load_config([])), {"cost"})
    with pytest.raises(ConfigError, match="cost=a100_4b chooses a model, and a resumed"):
        compose.composed_config(["cost=a100_4b"], saved)


def test_hydra_keeps_its_own_settings():
    """A program of hydra may load settings, too."""
    compose._hydra_composed(["model=nano"])
    with hydra.initialize_config_module("vp_train.configs", version_base="1.3"):
        composed = hydra.compose("config", overrides=[], return_hydra_config=True)
    assert composed.hydra.launcher
