"""A resumed run keeps its settings; a path may begin with `~` wherever a value may hold one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vp_train.checkpoint.training import _require_same
from vp_train.commands.train import with_origin
from vp_train.config import ConfigError, LossConfig, ModelConfig, RunConfig
from vp_train.config.cost import CPU_COSTS
from vp_train.config.resume import keeps_on_resume
from vp_train.settings import load_config
from vp_train.settings.files import config_text
from vp_train.settings.resume import check_start, resume_words, weight_words


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Return `started(*overrides)`: the settings of a run called `one`, which has saved them."""
    monkeypatch.chdir(tmp_path)

    def start(*overrides: str) -> RunConfig:
        config = load_config([*overrides, "run.name=one"])
        config.run.directory.mkdir(parents=True)
        (config.run.directory / "config.yaml").write_text(config_text(config))
        return config

    return start


RESUMED = ("run.name=one", "run.resume=true")
BEGINS = "settings of runs/one/config.yaml (runs/one/checkpoints holds no checkpoint: "
BEGINS += "training begins at step 1)"


def test_what_is_not_given_is_as_the_run_has_it(started):
    first = started(
        "vocab=two_barrier",
        "model.vocab_size=65536",
        "optim.lr=1e-3",
        "run.steps=20",
        "num_microbatches=3",
    )
    again = load_config(RESUMED)
    assert (again.model, again.vocab, again.optim) == (first.model, first.vocab, first.optim)
    assert (again.run.steps, again.num_microbatches) == (20, 3)
    assert again.run.resume


def test_what_is_given_counts_even_where_it_is_a_default(started):
    started("optim.lr=1e-3", "model.vocab_size=65536", "parallel.layers_per_stage=[5,3]")
    again = load_config([*RESUMED, "optim.lr=2e-3", "parallel.layers_per_stage=[4,4]"])
    assert again.optim.lr == RunConfig().optim.lr
    assert again.parallel.layers_per_stage == (4, 4)
    assert again.model.vocab_size == 65536


def test_a_group_that_is_given_begins_anew(started):
    started(
        "vocab.shards=[100,32668]",
        "schedule=interleaved",
        "schedule.num_chunks=4",
        "model.num_layers=16",
    )
    again = load_config([*RESUMED, "vocab=none", "schedule=1f1b"])
    assert (again.vocab.algorithm, again.vocab.shards) == ("none", None)
    assert (again.schedule.name, again.schedule.num_chunks) == ("1f1b", None)
    assert again.model.num_layers == 16


def test_a_cluster_that_is_given_sets_what_its_file_sets(started):
    started("run.dtype=float32", "run.steps=7")
    again = load_config([*RESUMED, "cluster=h100_80g_node"])
    assert (again.run.device, again.run.dtype, again.run.steps) == ("cuda", "bfloat16", 7)


def test_a_searched_schedule_is_searched_again(started, tmp_path):
    started("schedule=auto", "schedule.file=runs/one/schedule.txt")
    again = load_config(RESUMED)
    assert again.schedule.is_solved
    assert resume_words(again) == BEGINS


def test_corpora_of_a_blend_are_kept(started):
    first = started("data=blend", "data.blend=[{name:pystdlib,weight:3},{path:a,weight:1}]")
    assert load_config(RESUMED).data == first.data


def test_a_new_run_and_a_moved_one_have_their_own_name(started, tmp_path):
    started("model.vocab_size=65536")
    assert load_config(["run.name=one"]).model.vocab_size == RunConfig().model.vocab_size
    (tmp_path / "runs/one").rename(tmp_path / "runs/two")
    moved = load_config(["run.name=two", "run.resume=true"])
    assert (moved.run.name, moved.model.vocab_size) == ("two", 65536)


def test_settings_of_another_version_are_left_out(started, tmp_path):
    started("optim.lr=1e-3")
    path = tmp_path / "runs/one/config.yaml"
    path.write_text(path.read_text().replace("optim:", "optim:\n  gone: 3"))
    assert load_config(RESUMED).optim.lr == 1e-3


def test_changes_are_said(started):
    started("optim.lr=1e-3", "schedule=gpipe")
    assert resume_words(load_config(["run.name=two"])) is None
    assert resume_words(load_config(RESUMED)) == BEGINS
    words = resume_words(load_config([*RESUMED, "schedule=zb_h1", "run.steps=99"]))
    assert words.splitlines() == [
        f"{BEGINS}, changed here:",
        "  setting        was    now",
        "  schedule.name  gpipe  zb_h1  allowed",
        "  run.steps      90     99     allowed",
    ]


def test_another_file_of_the_schedule_is_said(started, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("")
    started("schedule.file=a.txt")
    words = resume_words(load_config([*RESUMED, "schedule.file=b.txt"]))
    assert words.splitlines()[1:] == [
        "  setting        was    now",
        "  schedule.file  a.txt  b.txt  allowed",
    ]


def test_all_changes_are_said_and_refused_together(started):
    checkpointed(started("batch_ramp=[[3,4]]"))
    given = [*RESUMED, "loss.z_loss=1e-4", "optim.lr=1e-3", "model.seq_length=512", "batch_ramp=[]"]
    config = load_config(given)
    assert resume_words(config, (8, 16)).splitlines() == [
        "settings of runs/one/config.yaml, changed here:",
        "  setting              was      now",
        "  model.seq_length     256      512     refused without run.allow=[sequence]",
        "  loss.z_loss          0.0      0.0001  refused without run.allow=[loss]",
        "  optim.lr             0.002    0.001   allowed",
        "  batch_ramp           [[3,4]]  []      refused without run.allow=[batch]",
        "  sequences of a step  8        16      refused without run.allow=[batch]",
    ]
    with pytest.raises(
        ConfigError,
        match=r"^runs/one has run with model.seq_length=256, loss.z_loss=0.0, batch_ramp=.*, sequen"
        r"ces of a step=8, this command line has 512, 0.0001, \[\], 16; use the same values, "
        r"or give run.allow=\[sequence,loss,batch\]; sequences of a step are num_microbatches x "
        r"micro_batch_size x parallel.dp$",
    ):
        check_start(config, (8, 16))
    allowed = load_config([*given, "run.allow=[batch,loss,sequence]"])
    assert "refused" not in resume_words(allowed, (8, 16))
    check_start(allowed, (8, 16))
    with pytest.raises(ConfigError, match=r"32768, this command line has 500; use the same value$"):
        check_start(load_config([*RESUMED, "model.vocab_size=500", "run.allow=[batch]"]))


def test_the_table_says_refused_where_the_run_will_be(started, tmp_path):
    (tmp_path / "a").mkdir()
    checkpointed(started("data=text", "data.path=a"))

    def verdicts(*given):
        words = resume_words(load_config([*RESUMED, *given]), None, 80)
        return {row.split()[0]: " ".join(row.split()[3:]) for row in words.splitlines()[2:]}

    unless = "refused unless the tokens stay the same"
    assert verdicts("data=pystdlib") == {"data.name": unless, "data.path": unless}
    assert verdicts("data.tokenizer=b", "run.steps=79") == {
        "data.tokenizer": unless,
        "run.steps": "refused, step 80 is done",
    }
    assert verdicts("data=synthetic")["data.name"] == "refused"
    assert verdicts("run.steps=99") == {"run.steps": "allowed"}
    unused = "unused, step 80 is done"
    assert verdicts("run.steps=80", "optim.lr=1e-3", "data=synthetic") == {
        "run.steps": unused,
        "optim.lr": unused,
        "data.name": "refused",
        "data.path": unless,
    }


def test_the_seed_of_what_is_held_out_may_be_typed_as_it_was(started):
    checkpointed(started("data.seed=7"))
    for same in ("data.split_seed=7", "data.split_seed=null"):
        config = load_config([*RESUMED, same])
        check_start(config)
        assert resume_words(config) == "settings of runs/one/config.yaml"
    with pytest.raises(
        ConfigError, match=r"has run with data.split_seed=7, this command line has 8"
    ):
        check_start(load_config([*RESUMED, "data.split_seed=8"]))
    with pytest.raises(
        ConfigError, match=r"has run with data.seed=7, this command line has 8; use"
    ):
        check_start(load_config([*RESUMED, "data.seed=8"]))


def test_samples_keep_the_length_that_they_had(started):
    checkpointed(started("model.seq_length=64", "data=synthetic"))
    assert load_config(RESUMED).data.sample_length is None
    longer = load_config(
        [*RESUMED, "model.seq_length=128", "data=synthetic", "run.allow=[sequence]"]
    )
    assert longer.data.sample_length == longer.sample_length == 64
    (longer.run.directory / "config.yaml").write_text(config_text(longer))
    again = load_config([*RESUMED, "model.seq_length=128", "data=synthetic"])
    assert again.data.sample_length == 64
    assert resume_words(again) == "settings of runs/one/config.yaml"
    other = load_config([*RESUMED, "data.sample_length=128"])
    with pytest.raises(ConfigError, match=r"has run with data.sample_length=64, this command line"):
        check_start(other)


def test_the_words_of_the_first_start_are_no_change(started):
    words = ["schedule=auto", "vocab=auto", "data=synthetic", "batch_ramp=[]", "loss.z_loss=1e-4"]
    words = [*words, "parallel.layers_per_stage=[2,2,2,2]", "run.root=runs"]
    config = started(*words)
    solved = replace(
        config,
        schedule=replace(config.schedule, file="runs/one/schedule.txt"),
        vocab=replace(config.vocab, algorithm="two_barrier"),
    )
    (config.run.directory / "config.yaml").write_text(config_text(solved))
    checkpointed(config)
    again = load_config([*words, *RESUMED])
    assert resume_words(again) == "settings of runs/one/config.yaml"
    check_start(again)


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "- 1",
        "",
        "\0",
        "run: {name: ${oc.env:HOME}}",
        "a: !!python/object/apply:os.system [ls]",
        "a: &x [1]\nb: [*x, *x]",
        "a: " + "[" * 3_000,
        "a: [" + "1, " * 5_000 + "]",
        "#" * 10**6,
        "model: 3",
        "model: {num_layers: 1}",
    ],
    ids=lambda text: text[:20],
)
def test_broken_settings_are_named_with_the_way_out(started, tmp_path, text):
    started()
    (tmp_path / "runs/one/config.yaml").write_text(text)
    with pytest.raises(
        ConfigError,
        match=r"^runs/one/config\.yaml.* delete it and give all settings of the run again$",
    ):
        load_config(RESUMED)


def test_a_saved_value_that_fits_nothing_is_the_files_fault(started, tmp_path):
    started()
    path = tmp_path / "runs/one/config.yaml"
    path.write_text(path.read_text().replace("num_layers: 8", "num_layers: many"))
    with pytest.raises(ConfigError, match=r"^runs/one/config.yaml: .*'many'.*; repair it, or"):
        load_config([*RESUMED, "run.steps=7"])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.path=~/corpus", lambda config: config.data.path),
        ("data.path=~/my corpus", lambda config: config.data.path),
        ("data.tokenizer=~/a.json", lambda config: config.data.tokenizer),
        ("run.root=~", lambda config: config.run.root),
        (
            "data.blend=[{name: pystdlib},{path: ~/corpus,weight:2}]",
            lambda config: config.data.blend[1].path,
        ),
    ],
)
def test_a_path_may_begin_at_home(override, value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    given = ["data=blend"] if "blend" in override else ["data=text", "data.path=x"]
    assert Path(value(load_config([*given, override]))).is_relative_to("/home/someone")
    quoted = load_config(["data=text", "data.path='~/x'"])
    assert quoted.data.path == "~/x", "what is quoted stays as it is"


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (["optim.lr=0.01"], "optim.min_lr=0.005"),
        (["vocab.backend=recompute"], "vocab.recompute_fraction=0.5"),
        (["optim=zero1"], "optim.offload=true"),
        (["schedule=auto"], "schedule.cap_gib=2"),
    ],
)
def test_an_override_need_only_fit_what_the_run_has_saved(started, before, now):
    started(*before)
    name, _, value = now.partition("=")
    section, key = name.split(".")
    config = load_config([*RESUMED, now])
    assert str(getattr(getattr(config, section), key)).lower() == str(
        float(value) if value[0].isdigit() else value
    )


def test_a_group_given_as_a_file_begins_anew(started, tmp_path):
    started("cost.rank_slowness=[1,1,1,2]")
    (tmp_path / "two.yaml").write_text("flops_per_second: 7.0e10\n")
    again = load_config([*RESUMED, "cost=two.yaml"])
    assert (again.cost.flops_per_second, again.cost.rank_slowness) == (7e10, None)


def test_costs_that_were_typed_stay_and_those_of_earlier_versions_were_not(started, tmp_path):
    started("cost.kernel_seconds=0", "cost.hop_seconds=2e-4")
    again = load_config([*RESUMED]).cost
    assert (again.kernel_seconds, again.hop_seconds, again.tensor_seconds) == (0.0, 2e-4, None)
    path = tmp_path / "runs/one/config.yaml"
    saved = OmegaConf.load(path)
    saved.cost.update(CPU_COSTS | {"flops_per_second": 1e11})  # earlier versions saved them all
    OmegaConf.save(saved, path)
    again = load_config([*RESUMED]).cost
    assert (again.kernel_seconds, again.hop_seconds, again.flops_per_second) == (None, None, 1e11)


def test_a_searched_schedule_is_found_again_wherever_the_run_lies(started, tmp_path):
    config = started("schedule=auto", "schedule.file=runs/one/schedule.txt")
    assert not config.schedule.is_solved
    again = load_config([*RESUMED, f"run.root={tmp_path}/runs"])
    assert again.schedule.is_solved


def checkpointed(config: RunConfig) -> None:
    (config.run.directory / "checkpoints/step-00000005").mkdir(parents=True)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("loss.z_loss=1e-4", "loss.z_loss=0.0"),
        ("loss.normalisation=sequence", "loss.normalisation=token"),
        ("model.vocab_size=500", "model.vocab_size=32768"),
        ("data.seed=7", "data.seed=1234"),
        ("data.packing=documents", "data.packing=none"),
        ("run.dtype=bfloat16", "run.dtype=float32"),
    ],
)
def test_what_changes_the_result_is_refused_before_data_is_prepared(started, change, name):
    checkpointed(started())
    with pytest.raises(ConfigError, match=f"^runs/one has run with {name}, this command line has"):
        check_start(load_config([*RESUMED, change]))


def test_without_a_checkpoint_a_resumed_run_may_change(started):
    started()
    check_start(load_config([*RESUMED, "loss.z_loss=1e-4"]))


@pytest.mark.parametrize(
    "change",
    [
        "optim.lr=1",
        "parallel.pp=2",
        "schedule=gpipe",
        "data.cache_dir=x",
        "vocab=none",
        "run.steps=7",
    ],
)
def test_what_may_change_is_no_reason(started, change):
    checkpointed(started())
    check_start(load_config([*RESUMED, change]))


def test_a_run_goes_on_from_no_other_weights(started, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    checkpointed(with_origin(started(f"run.init_from={tmp_path}/a")))
    for same in (f"run.init_from={tmp_path}/a", "run.init_from=a", "run.steps=7"):
        check_start(with_origin(load_config([*RESUMED, same])))
    other = with_origin(load_config([*RESUMED, "run.init_from=b"]))
    with pytest.raises(ConfigError, match=r"^run.init_from=/.*b, but runs/one started from /.*a, "):
        check_start(other)
    (tmp_path / "a").rmdir()
    check_start(other)


@pytest.mark.parametrize("place", ["config.yaml", "model.yaml"])
def test_weights_of_another_model_are_refused_before_data_is_prepared(started, tmp_path, place):
    config = started("model.vocab_size=500")
    origin = config.run.directory
    if place == "model.yaml":
        (origin / "config.yaml").unlink()
        (origin / place).write_text("vocab_size: 500\nseq_length: 256\n")
    for inside in ("", "/checkpoints/step-00000000"):
        (tmp_path / f"runs/one{inside}").mkdir(parents=True, exist_ok=True)
        given = [f"run.init_from=runs/one{inside}", "run.name=two"]
        check_start(load_config([*given, "model.vocab_size=500", "model.seq_length=64"]))
        with pytest.raises(ConfigError, match=r"is with model.vocab_size=500, this command line"):
            check_start(load_config(given))


@pytest.mark.parametrize("place", ["config.yaml", "model.yaml"])
def test_each_setting_by_which_weights_compute_otherwise_is_said(started, tmp_path, place):
    was = ["model.rope_scaling=llama3", "model.rope_factor=8", "model.norm_epsilon=1e-6"]
    was += ["model.sliding_window=64", "model.full_attention_every=2", "model.logit_softcap=30"]
    config = started(*was)
    origin = config.run.directory
    if place == "model.yaml":
        (origin / "config.yaml").unlink()
        lines = (f"{key}: {json.dumps(value)}\n" for key, value in asdict(config.model).items())
        (origin / place).write_text("".join(lines))
    given = ["run.init_from=runs/one", "run.name=two"]
    assert weight_words(load_config([*given, *was])) == []
    harmless = ["model.seq_length=64", "model.init_std=0.1", "model.head_size=32"]
    harmless += ["model.attention_divisor=32"]
    same = load_config([*given, *was, *harmless])
    check_start(same)
    assert weight_words(same) == []
    other = load_config([*given, "model.rope_base=500000"])
    check_start(other)
    assert sorted(weight_words(other)) == [
        "model.full_attention_every: the weights have 2, this run null",
        "model.logit_softcap: the weights have 30.0, this run null",
        "model.norm_epsilon: the weights have 1e-06, this run 1e-05",
        "model.rope_base: the weights have 10000.0, this run 500000.0",
        "model.rope_factor: the weights have 8.0, this run 1.0",
        "model.rope_scaling: the weights have llama3, this run none",
        "model.sliding_window: the weights have 64, this run null",
    ]
    resumed = replace(other, run=replace(other.run, resume=True))
    checkpointed(resumed)
    assert weight_words(resumed) == [], "the run has begun already"


def test_another_width_of_heads_is_another_model(started):
    started()
    given = ["run.init_from=runs/one", "run.name=two"]
    with pytest.raises(ConfigError, match=r"is with model.head_size=null, this command line"):
        check_start(load_config([*given, "model.head_size=64"]))


def test_weights_with_learned_positions_fix_the_sequence(started, tmp_path):
    learned = ["model.positions=learned"]
    started(*learned, "model.seq_length=64")
    given = [*learned, "run.init_from=runs/one", "run.name=two"]
    check_start(load_config([*given, "model.seq_length=64"]))
    with pytest.raises(ConfigError) as caught:
        check_start(load_config([*given, "model.seq_length=32"]))
    assert str(caught.value) == (
        "run.init_from=runs/one is with model.seq_length=64, this command line has 32; "
        "use the same value"
    )


def test_learned_positions_forbid_another_sequence_whatever_is_allowed(started):
    config = started("model.positions=learned", "model.seq_length=64")
    (config.run.directory / "checkpoints/step-00000005").mkdir(parents=True)
    given = ["model.positions=learned", "run.name=one", "run.resume=true", "run.allow=[sequence]"]
    check_start(load_config([*given, "model.seq_length=64"]))
    with pytest.raises(ConfigError, match=r"; model.positions=learned has weights for each posi"):
        check_start(load_config([*given, "model.seq_length=32"]))


def test_a_run_that_is_not_there_is_said_to_begin(started):
    config = load_config(["run.name=two", "run.resume=true"])
    assert resume_words(config).startswith("runs/two holds no run: NOTHING IS RESUMED, a new ")
    assert resume_words(load_config(["run.name=two"])) is None


def test_a_checkpoint_from_before_a_setting_has_its_default():
    ours = {"model": asdict(ModelConfig()), "loss": asdict(LossConfig())}
    before = {"model": {"num_layers": ModelConfig().num_layers}}
    _require_same(before, ours, Path("step-00000001"), RunConfig(), keeps_on_resume)
    ours["model"]["pre_norms"] = False
    with pytest.raises(
        ConfigError, match=r"was saved with model\.pre_norms=true, this run has false"
    ):
        _require_same(before, ours, Path("step-00000001"), RunConfig(), keeps_on_resume)
