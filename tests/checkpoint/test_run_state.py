"""The state of a run in a manifest is read within its bounds, and compared setting by setting."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.reliability.checkpoints import body_of, sign, two
from vp_train.checkpoint import training
from vp_train.checkpoint.manifest import MANIFEST, MOST_STEPS, Manifest, saved_batch, saved_settings
from vp_train.checkpoint.training import Progress, _opened, _RunState
from vp_train.config import ConfigError, DataConfig, LossConfig, ModelConfig, RunConfig, RunSettings
from vp_train.config.resume import FREE_DATA, keeps_on_resume
from vp_train.config.run import PERMISSIONS

BATCH = "dp * num_microbatches * micro_batch_size"
CONFIG = {"model": {"seq_length": 8}, "batch": {BATCH: 6}}
STEP, MOST_TOKENS, HUGE = 5, 2**60, sys.float_info.max
PROGRESS = {"tokens": 0, "losses": [], "norms": [], "spikes": 0, "skipped": 0}
STATE = {
    "step": STEP,
    "updates": 2,
    "loss_scale": [4.0, 7],
    "config": CONFIG,
    "contents": [],
    "progress": PROGRESS,
}


def read(**changes):
    """Return the state in a manifest with `changes`."""
    return _RunState.of(Manifest(STEP, STATE | changes, {}))


def read_progress(**changes):
    return read(progress=PROGRESS | changes).progress


def earlier(left_out=0, batch=6, length=8):
    """Return what an earlier version has saved: the steps that were left out, and no tokens."""
    config = {"model": {"seq_length": length}, "batch": {BATCH: batch}}
    progress = {"left_out": left_out, "losses": [], "norms": []}
    return {"progress": progress, "config": config}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"updates": 0},
        {"updates": STEP},
        {"loss_scale": [1, 0]},
        {"loss_scale": [5e-324, MOST_STEPS]},
        {"loss_scale": [HUGE, 1]},
        {"contents": ["a", ""]},
        {"progress": None},
        {"progress": PROGRESS | {"tokens": MOST_TOKENS, "spikes": MOST_STEPS}},
        {"progress": PROGRESS | {"skipped": MOST_STEPS, "losses": [HUGE, -HUGE, 0]}},
        earlier(0, 0, 0),
        earlier(1, 1, MOST_STEPS),
    ],
    ids=str,
)
def test_all_that_a_run_can_save_is_read(changes):
    state = read(**changes)
    assert list(state.loss_scale) == (STATE | changes)["loss_scale"]
    assert state.updates == (STATE | changes)["updates"]


WRONG = {
    "step": (STEP + 1, STEP - 1, None, "5"),
    "updates": (-1, STEP + 1, 2.0, True, None),
    "loss_scale": (
        *([0, 7], [-1.0, 7], [float("nan"), 7], [float("inf"), 7], [True, 7], ["1", 7]),
        *([4.0, -1], [4.0, MOST_STEPS + 1], [4.0, 7.0], [4.0, True]),
        *([4.0], [4.0, 7, 7], {"0": 1}, None),
    ),
    "contents": ("ab", [1], ["a", None], None, {"a": 1}),
    "config": (None, [], {"model": 1}, {"model": {}, "data": []}),
    "progress": (
        *(1, [], PROGRESS | {"more": 1}, {k: v for k, v in PROGRESS.items() if k != "norms"}),
        *(PROGRESS | {"tokens": value} for value in (-1, MOST_TOKENS + 1, 1.0, True, None)),
        *(
            PROGRESS | {name: value}
            for name in ("spikes", "skipped")
            for value in (-1, MOST_STEPS + 1, 1.0, True)
        ),
        *(
            PROGRESS | {name: value}
            for name in ("losses", "norms")
            for value in ([True], ["1"], [float("nan")], [float("-inf")], [10**400], (), {}, 1.0)
        ),
    ),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in WRONG for value in WRONG[name]], ids=str
)
def test_a_state_that_no_run_saves_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=rf"^state\.{name}"):
        read(**{name: value})


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("value", [-1, MOST_STEPS + 1, 1.0, True, None])
def test_an_earlier_version_has_counts_too(place, value):
    counts = [1, 1, 1]
    counts[place] = value
    with pytest.raises(ValueError, match=r"^state\..* is .*, not a count"):
        read(**earlier(*counts))


def test_the_steps_of_an_earlier_version_and_those_left_out_count_all_their_tokens():
    found = read(**earlier(2, 6, 8)).progress
    assert found == Progress(tokens=(STEP + 2) * 6 * 8)


def test_a_damaged_state_is_refused_by_the_path_of_its_manifest_and_once(tmp_path):
    two(tmp_path)
    path = tmp_path / "step-00000002"
    for reading in (_RunState.of, saved_settings):
        with pytest.raises(ConfigError) as caught:
            _opened(path, reading)
        assert str(caught.value).startswith(f"{path / MANIFEST} is damaged: state.")
    body = body_of(path)
    sign(path, body | {"format": 1})
    with pytest.raises(ConfigError) as caught:
        _opened(path, saved_settings)
    assert str(caught.value).count("is damaged") == str(caught.value).count(MANIFEST) == 1
    sign(path, body | {"state": STATE | {"step": 2}})
    assert _opened(path, saved_settings)[1] == _opened(path, _RunState.of)[1].config == CONFIG


def test_the_batch_is_that_of_the_newest_checkpoint_that_can_be_read(tmp_path):
    two(tmp_path)
    assert saved_batch(tmp_path) is None  # neither has settings
    for step, batch in ((1, 4), (2, 8)):
        path = tmp_path / f"step-0000000{step}"
        sign(path, body_of(path) | {"state": {"config": {"batch": {BATCH: batch}}}})
    assert saved_batch(tmp_path) == 8
    (path / MANIFEST).write_text("damaged")
    assert saved_batch(tmp_path) == 4
    for state in ({"config": {}}, {"config": {"batch": {BATCH: "4"}}}, {"config": {"batch": {}}}):
        first = tmp_path / "step-00000001"
        sign(first, body_of(first) | {"state": state})
        assert saved_batch(tmp_path) is None


PATH = Path("runs/x")


def refusal(saved, ours, allowed=()):
    """Return why a run with the settings `ours` does not go on from `saved`, empty if it does."""
    try:
        config = RunConfig(run=RunSettings(allow=tuple(allowed)))
        training._require_same(saved, ours, PATH, config, keeps_on_resume)
    except ConfigError as error:
        return str(error)
    return ""


def settings(config, num_replicas=2):
    return training._settings(config, num_replicas)


def test_every_setting_of_a_run_is_kept_as_json_and_equal_to_itself():
    ours = settings(RunConfig())
    assert json.loads(json.dumps(ours)) == ours
    assert ours["batch"][BATCH] == 2 * RunConfig().num_microbatches * RunConfig().micro_batch_size
    assert refusal(ours, ours) == ""


@pytest.mark.parametrize("section", ["model", "data", "loss", "run", "batch"])
def test_any_other_value_of_any_setting_is_refused_with_both_and_the_way_out(section):
    ours = settings(RunConfig())
    for key, value in ours[section].items():
        saved = ours | {section: ours[section] | {key: "other"}}
        said = refusal(saved, ours)
        if f"{section}.{key}" in FREE_DATA:
            assert said == "", "the text is compared by its hashes"
            continue
        if (section, key) == ("data", "synthetic"):
            assert "runs/x was trained on data=synthetic; use the same data" in said
            back = refusal(ours | {section: ours[section] | {key: False}}, saved)
            assert "runs/x was not trained on data=synthetic" in back
            continue
        assert said.startswith("runs/x was saved with ")
        assert "=other, this run has " in said
        assert f"{key.replace('dp *', '* ')}".split("*")[-1].strip() in said or key == "weights"
        permission = {"batch": "batch", "loss": "loss"}.get(section)
        if f"{section}.{key}" in ("model.seq_length",):
            permission = "sequence"
        assert ("parallel.dp is not set" in said) == (section == "batch")
        if permission is not None:
            assert f"or give run.allow=[{permission}]" in said
            assert refusal(saved, ours, [permission]) == ""
        elif section != "model":  # some of them may be allowed
            assert "run.allow" not in said
        others = [word for word in PERMISSIONS if f"run.allow=[{word}]" not in said]
        assert refusal(saved, ours, others) == said, value


def test_positions_with_weights_keep_their_number_whatever_is_allowed():
    model = ModelConfig(positions="learned")
    config = RunConfig(model=model, run=RunSettings(allow=("sequence",)))
    ours = settings(config)
    saved = ours | {"model": ours["model"] | {"seq_length": model.seq_length + 1}}
    with pytest.raises(ConfigError, match=r"with model\.seq_length=.*; use the same value$"):
        training._require_same(saved, ours, PATH, config, keeps_on_resume)


def test_a_setting_that_an_earlier_version_did_not_have_was_its_default():
    for section, default in (
        ("model", ModelConfig()),
        ("data", DataConfig()),
        ("loss", LossConfig()),
    ):
        ours = settings(RunConfig())
        for key in ours[section]:
            before = {name: value for name, value in ours[section].items() if name != key}
            saved = ours | {section: before}
            if hasattr(default, key):
                usual = json.loads(json.dumps(getattr(default, key)))
                assert refusal(saved, ours | {section: ours[section] | {key: usual}}) == "", key
            other = refusal(saved, ours | {section: ours[section] | {key: "other"}})
            is_free = f"{section}.{key}" in FREE_DATA
            assert is_free or "other" in other or key == "synthetic", key


def test_an_earlier_version_had_a_plain_loss_samples_of_a_sequence_and_no_ramp():
    config = RunConfig()
    ours = settings(config)
    saved = {
        "model": ours["model"],
        "data": {key: value for key, value in ours["data"].items() if key != "sample_length"},
        "run": ours["run"],
        "batch": {BATCH: ours["batch"][BATCH]},
    }
    completed = training._completed(saved)
    assert completed["data"]["sample_length"] == config.model.seq_length
    assert completed["batch"] == {BATCH: ours["batch"][BATCH], "batch_ramp": []}
    assert completed["loss"] == ours["loss"]
    assert training._completed(ours) == ours  # nothing that is there is replaced


@pytest.mark.parametrize(
    ("was", "now", "is_same"),
    [((7, None), (7, 7), True), ((7, 7), (7, None), True), ((7, None), (7, 8), False)],
)
def test_a_seed_of_what_is_held_out_counts_by_what_it_is(was, now, is_same):
    saved, ours = (
        settings(RunConfig(data=DataConfig(seed=seed, split_seed=split)))
        for seed, split in (was, now)
    )
    for before in (saved, saved | {"data": saved["data"] | {"split_seed": was[1]}}):
        words = refusal(training._completed(before), ours)
        assert words == "" if is_same else "data.split_seed=7, this run has 8" in words


@pytest.mark.parametrize(
    ("saved", "ours", "which"),
    [
        (["a"], ["b"], "the text or its tokenizer is"),
        (["a"], [], "the text or its tokenizer is"),
        (["a", "b"], ["a"], "the text or its tokenizer is"),
        (["a", "b"], ["b", "b"], "the text or tokenizer of data.blend[0] is"),
        (
            ["a", "b", "c"],
            ["a", "x", "y"],
            "the text or tokenizer of data.blend[1], data.blend[2] is",
        ),
        (["a", "b"], ["b", "a"], "the text or tokenizer of data.blend[0], data.blend[1] is"),
    ],
)
def test_another_text_is_refused_by_the_corpora_that_changed(saved, ours, which):
    training._require_same_text(saved, tuple(saved), PATH, DataConfig())
    with pytest.raises(ConfigError) as caught:
        training._require_same_text(saved, ours, PATH, DataConfig())
    assert str(caught.value).startswith(f"{which} not what runs/x was trained on; bring that back")
    assert "run.init_from=runs/x run.name=NAME" in str(caught.value)


@pytest.mark.parametrize(
    ("was", "now", "word"),
    [
        (None, "<s>", "bring that back: data.begin_token=null"),
        ("<s>", None, 'bring that back: "data.begin_token=<s>"'),
    ],
)
def test_a_text_that_begins_otherwise_is_refused_by_the_token(was, now, word):
    data = DataConfig(begin_token=now)
    with pytest.raises(ConfigError) as caught:
        training._require_same_text(["a"], ["b"], PATH, data, was)
    assert f"; {word}; or " in str(caught.value)
