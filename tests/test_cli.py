"""A bad value on the command line is one short message with the way out, and exit code 78."""

from __future__ import annotations

import os
import re
import signal
import time
import tomllib
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from schedules.vocab import VOCAB_ALGORITHMS
from tests.programs import finished
from vp_train.commands import prepare, start
from vp_train.commands.command import OF_A_STEP, Command, configured
from vp_train.commands.train import main, with_origin
from vp_train.config import ConfigError
from vp_train.planning.plan import make_plan
from vp_train.settings import load_config
from vp_train.settings.files import config_text
from vp_train.settings.tree import sections, setting_names

VOCABS = ", ".join(sorted(["auto", *VOCAB_ALGORITHMS]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "vocab=tree",
            f"vocab=tree is not known; choose one of {VOCABS}",
        ),
        ("model.vocabsize=3", "model.vocabsize is not a setting; did you mean model.vocab_size"),
        ("stepz=3", "stepz is not a setting"),
        ("a=1", "a is not a setting; vp-train --help lists all, and with a name those of model, "),
        ("cost.zzzzz=1", "cost.zzzzz is not a setting; vp-train --help cost lists those of cost"),
        ("chunks=2", "chunks is not a setting; did you mean schedule.num_chunks?"),
        (
            "model.vocab_size=abc",
            "model.vocab_size=abc is not a whole number; it must lie in [1, 100,000,000]",
        ),
        ("num_microbatches=1e3", "; it must lie in [1, 65,536]; write num_microbatches=1000"),
        ("run.steps=4.0", "run.steps=4.0 is not a whole number; it must be at least 1; write run."),
        ("run.steps=null", "run.steps=null is not a whole number; it must be at least 1"),
        ("optim.lr=fast", "optim.lr=fast is not a number; it must be at least 0"),
        ("run.resume=maybe", "run.resume=maybe is not true or false"),
        ("num_microbatches=x", "num_microbatches=x is not a whole number; it must lie in [1, 65,"),
        ("vocab.shards=[a]", "vocab.shards=[a] is not a list of whole numbers or null; see vp-"),
        ("schedule.name=[a]", "schedule.name=[a] is not text; see vp-train --help schedule.name"),
        ("parallel=16", "one of its choices (balanced, default, redistribute); for one value"),
        ("run.steps=0", "run.steps=0 is too small; it must be at least 1"),
        ("run.steps", "'run.steps' is not an override; write key=value"),
        ("loss.z_loss=[", "'loss.z_loss=[' is not an override"),
        (
            "+model._target_=os.system",
            "+model._target_=os.system: settings cannot be added or removed",
        ),
        ("model._target_=os.system", "model._target_ is not a setting"),
        ("--steps", "--steps is not an option"),
        (
            "model.hidden_size=100",
            "model.hidden_size=100 does not split over model.num_heads=8; use a multiple of 8",
        ),
        (
            "model.num_query_groups=3",
            "does not split over model.num_query_groups=3; use a divisor of 8",
        ),
        (
            "data.name=web",
            "data.name='web' is not known; choose one of pystdlib, text, blend, synthetic",
        ),
        ("vocab=one_barier", "vocab=one_barier is not known (did you mean one_barrier?); choose"),
        ("model=smal", "model=smal is not known (did you mean small?); choose one of gemma2_9b"),
        ("optim.name=zero", "optim.name='zero' is not known (did you mean zero1?); choose one of"),
        ("optim.name=wsd", "choose one of adamw, zero1; did you mean optim=wsd?"),
        ("model.name=gpt_4b", "model.name is not a setting; did you mean model=gpt_4b?"),
        ("data=text", "data.name=text needs data.path"),
        ("optim.beta1=1.5", "optim.beta1=1.5 is out of range"),
        (
            "run.timeout_seconds=1e18",
            "run.timeout_seconds=1e+18 is too large; it must be at most 10,000,000",
        ),
        ("optim.min_lr=3e-3", "optim.min_lr=0.003 is above optim.lr=0.002"),
        ("optim.lr=nan", "optim.lr=nan is not a finite number"),
        ("loss.z_loss=inf", "loss.z_loss=inf is not a finite number"),
        ("model.logit_softcap=inf", "model.logit_softcap=inf is not a finite number"),
        ("model=1", "model=1: a group takes the name of one of its choices"),
        ("run=1", "run=1: a group takes the name of one of its choices (default)"),
        ("optim=null", "optim=null: a group takes the name of one of its choices"),
        ("data=true", "data=true: a group takes the name of one of its choices"),
        ("run.name=a/b", "run.name='a/b' is not a directory name"),
        ("num_microbatches=1000000", "num_microbatches=1000000 is too large; it must be at most"),
        ("model.num_layers=1e23", "model.num_layers=1e23 is not a whole number; it must lie in"),
        (
            "model.num_layers=99999",
            "model.num_layers=99999 is too large; it must be at most 10,000",
        ),
        ("parallel.pp=100000", "parallel.pp=100000 is too large; it must be at most 1,024"),
        ("run.steps=99999999999999999999", "is too large for any use; it must be at most 9,223,"),
        ("optim.lr=1e31", "optim.lr=1e+31 is too large for any use; it must be at most 1e+30"),
        ("run.name='\x1b[31m'", r"run.name=\x1b[31m has the control character \x1b"),
        ("run.root='a\u202eb'", r"run.root=a\u202eb has the control character \u202e"),
        ("run.root=''", "run.root is empty; give a value"),
        ("run.root=a/" + "x" * 300, "xxx has a name of more than 255 bytes"),
        ("run.root=~no-such-user/x", "begins with the home of somebody who is not known here"),
        ("run.root=" + "x" * 5_000, "xxx has 5,000 characters; at most 2,048 are allowed"),
        ("run.root=" + "x" * 10**6, "have 1,000,009 characters; at most 65,536 are read"),
        ("vocab.shards=[" + "1," * 3_000 + "]", "have 3,002 commas, brackets and quotes"),
        ("vocab.shards=" + "[" * 20 + "]" * 20, "is nested 20 deep; no setting is"),
        ("run.name=${oc.env:HOME}", "${...} is not expanded in settings"),
        ("hydra.searchpath=[file:///]", "hydra.searchpath is not a setting"),
        ("data@model=text", "data@model is not a setting"),
        ("model={}", "model={}: a group takes the name of one of its choices"),
        ("model=[nano,small]", "a group takes the name of one of its choices"),
        (
            "data.blend.0=3",
            "entries of data.blend are not set one by one; write 'data",
        ),
        ("data.blend=3", "data.blend=3 is not a list of corpora; write 'data.blend=[{path:DIR,"),
        ("data.blend={path:a}", "data.blend={path:a} is not a list of corpora; write 'data.blend"),
        ("data.blend=[a]", "data.blend[0]=a is not a corpus; write 'data.blend=[{path:DIR,"),
        ("data.blend=[{path:a},null]", "data.blend[1]=None is not a corpus; write 'data.blend="),
        ("data.blend=[{path:[a]}]", "data.blend[0].path=[a] is not text or null; write 'data."),
        (
            "data.blend=[{path:a},{path:b,weight:x}]",
            "data.blend[1].weight=x is not a number; write 'data.blend=[{path:DIR,weight:3}",
        ),
        ("data.blend=[{path:a,weight:true}]", "data.blend[0].weight=true is not a number; write"),
        ("data.blend=[{path:a,wight:1}]", "data.blend[0].wight is not known (did you mean weight?"),
        ("model=/dev/zero", "model=/dev/zero is not known; choose one of gemma2_9b, "),
        ("model=/dev/zero", "or give a file of settings whose name ends with .yaml"),
        ("x" * 300 + "=1", "xxx is not a setting"),
        ("lr=1", "lr is not a setting; did you mean optim.lr?"),
        ("optim.learning_rate=1", "is not a setting; did you mean optim.lr?"),
        ("n_layer=2", "n_layer is not a setting; did you mean model.num_layers?"),
        ("--model.num_layers=2", "is not an option; write model.num_layers=2; there are"),
        ("--model", "is not an option; write model=...; there are"),
        ("--config", "is not an option; a file of settings is written settings=FILE.yaml, in YAML"),
        ("--settings=a.yaml", "is not an option; a file of settings is written settings=a.yaml, "),
        (
            "global_batch_size=32",
            "write num_microbatches=..., the global batch / (parallel.dp x ",
        ),
        (
            "--global-batch-size=32",
            "write num_microbatches=..., the global batch / (parallel.dp x ",
        ),
        ("--parallelism.pipeline_parallel_degree=4", "; write parallel.pp=4; there are"),
        ("--run.seed=3", "; write run.seed=3; there are"),
        ("--seed=3", "; write run.seed=3 for the weights, data.seed=3 for the order of samples; "),
        ("--recompute-activations", "; write parallel.recompute=selective; there are"),
        ("--num-experts=8", "; vp_train has no experts (docs/limits.md); there are"),
        ("--context-parallel-size=2", "; vp_train has no context parallelism (docs/limits.md); "),
        ("--attention-dropout=0.1", "; vp_train has no dropout (docs/from_megatron.md); there are"),
        ("--checkpoint.interval=9", "; write run.checkpoint_every=9; there are"),
        ("--checkpoint.folder=out", "; write run.root=out; there are"),
        ("--model.name=nano", "; write model=nano; there are"),
        ("--model.flavor=8B", "; write model=...; there are"),
        ("--optimizer.name=AdamW", "; write optim.name=adamw; there are"),
        ("--compile.enable", "; write run.compile=on; auto"),
        ("--activation_checkpoint.mode=full", "; write parallel.recompute=full; there are"),
        ("--training.dataset=c4", "have no names here: write data=text data.path=..."),
        ("--lr_scheduler.decay_ratio=0.3", "; write optim=wsd optim.decay_fraction=0.3; there"),
        ("--job.config_file=a.yaml", "; a file of settings is written settings=a.yaml, in YAML"),
        ("--eval-iters=9", "=..., the iterations x the microbatches of all replicas; there are"),
        ("--data-path=a b", '; write "data.path=a b" data=text; there are'),
        ("mine.yaml", "'mine.yaml' is not an override; a file of settings is written settings=mi"),
        ("v_half", "'v_half' is not an override; write schedule=v_half"),
        ("=3", "'=3' is not an override; write key=value without blanks"),
        ("run.steps=100,", "drop the comma at the end: run.steps=100"),
        ("run.steps=1,000", "a number has no commas (run.steps=1000)"),
        ("vocab.shards=1,2", "a list is written vocab.shards=[1,2]"),
        ("run.dtype=fp16", "is not known (did you mean float16?)"),
        ("run.device=gpu", "is not known (did you mean cuda?)"),
        ("schedule=1F1B", "is not known (did you mean 1f1b?)"),
        ("data.path=x", "data.path=x counts only with data=text, not data.name=pystdlib"),
        ("data=/dev/zero", "for text of your own: data=text data.path=/dev/zero"),
    ],
)
def test_a_bad_override_is_named_with_the_way_out(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config([override])
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_two_choices_of_a_group_are_refused_and_of_two_values_of_a_setting_the_last_counts(
    tmp_path,
):
    (tmp_path / "mine.yaml").write_text("num_layers: 4\n")
    of_file = f"model={tmp_path}/mine.yaml"
    for first, second in (("vocab=none", "vocab=naive"), (of_file, "model=small")):
        with pytest.raises(ConfigError) as caught:
            load_config([first, "run.steps=3", second])
        assert str(caught.value) == (
            f"{first} and {second}: a group has one choice; drop one of the two"
        )
    nano = load_config(["model=nano"])
    assert load_config(["model=nano", "model=nano"]) == nano
    twice = load_config(["model=nano", "num_microbatches=2", "num_microbatches=4"])
    assert twice == replace(nano, num_microbatches=4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run.steps= 7", "write run.steps=7 without blanks"),
        ("run.steps =7", "write run.steps=7 without blanks"),
        ("run.steps = 7", "write run.steps=7 without blanks"),
        ("run.steps 7", "write run.steps=7 without blanks"),
        ("model nano", "write model=nano without blanks"),
        ("settings a.yaml", "write settings=a.yaml without blanks"),
        ("run.stepz = 7", "write run.steps=7 without blanks"),
        ("--run.steps 7", "write run.steps=7; there are"),
        ("--run.steps = 7", "write run.steps=7; there are"),
        ("--x = 7", "write key=value without blanks; there are"),
        ("data.path=my text", 'for one value write "data.path=my text", else write data=text'),
        ("data.blend=[{path:a b},{path:c}]", 'value write "data.blend=[{path:a b},{path:c}]"'),
    ],
)
def test_blanks_are_answered_with_what_to_type(line, message):
    with pytest.raises(ConfigError) as caught:
        load_config(["optim.lr=1", *line.split(), "run.seed=3"])
    assert message in str(caught.value)


def test_all_words_that_are_not_known_are_answered_at_once():
    words = ["--lr", "3e-4", "--bf16", "run.stps=3", "v_half", "run.seed=1", "--foo", "1", "2"]
    with pytest.raises(ConfigError) as caught:
        load_config(words, ("--ranks",))
    assert str(caught.value) == (
        "5 words are not known; --lr: write optim.lr=3e-4; --bf16: write run.dtype=bfloat16; "
        "run.stps: did you mean run.steps? 'v_half': write schedule=v_half; --foo: nothing is like "
        "it; there are --ranks, --help and --print-config, all else is key=value"
    )
    with pytest.raises(ConfigError, match=r"^7 words are .*; and 2 more; there are"):
        load_config([*words, "stepz=1", "stepy=1"])


def test_a_setting_of_another_framework_is_not_guessed_from_its_last_word_alone():
    for option in ("model.name", "compile.name", "lr_scheduler.decay_rat", "optimizer.fused"):
        with pytest.raises(ConfigError) as caught:
            load_config([f"--{option}", "1"])
        assert re.search("not an option; (there|write model=)", str(caught.value))


def test_an_option_of_another_launcher_is_answered_with_ours():
    for typed in ("--nproc_per_node", "--nproc-per-node=4", "--num-gpus"):
        with pytest.raises(
            ConfigError, match=r"is not an option; did you mean --ranks\? there are"
        ):
            load_config([typed], ("--nodes", "--ranks"))


@pytest.mark.parametrize("word", ["--dryrun", "--dry-run=true", "--dry_run", "--DryRun", "--dyrun"])
def test_whoever_wants_a_run_without_a_run_is_told_of_the_plan_and_the_preflight(word):
    with pytest.raises(
        ConfigError, match=r"; vp-plan with the same settings .*; --preflight stops"
    ):
        load_config([word], ("--ranks", "--preflight"))
    with pytest.raises(ConfigError, match=r"; vp-plan with .* starts nothing; there are --json"):
        load_config([word], ("--json",))


FLOAT8 = ["model=nano", "run.dtype=bfloat16", "run.linear_dtype=float8"]


@pytest.mark.parametrize(
    ("overrides", "num_ranks", "message"),
    [
        (
            ["model.num_layers=7"],
            4,
            "model.num_layers=7 does not split over 4 stages; use parallel.placement=balanced",
        ),
        (
            ["parallel.layers_per_stage=[4,4]"],
            4,
            "it needs 4 counts of at least 0 that add up to model.num_layers=8",
        ),
        (["parallel.pp=3"], 4, "parallel.pp=3 needs a multiple of 3 ranks, but 4 were started"),
        (
            ["parallel.dp=2", "parallel.pp=2"],
            8,
            "parallel.dp=2 x parallel.pp=2 needs 4 ranks, but 8 were started",
        ),
        (
            ["loss.label_smoothing=0.1", "model.logit_softcap=30"],
            4,
            "model.logit_softcap=30.0 do not go together",
        ),
        (
            ["vocab.recompute_fraction=0.5"],
            4,
            "counts only with vocab.backend=recompute, not chunked; drop one of the two",
        ),
        (
            ["run.linear_dtype=float8"],
            2,
            "run.linear_dtype=float8 needs run.dtype=bfloat16, not float32",
        ),
        (
            ["cluster=a100_80g_node", "run.linear_dtype=float8"],
            8,
            "run.linear_dtype=float8 needs GPUs that have it, such as an H100",
        ),
        (
            [*FLOAT8, "model.ffn_hidden_size=72", "parallel.tp=1"],
            4,
            "model.ffn_hidden_size is 72, and a scaled product needs a multiple of 16; change",
        ),
        (
            [*FLOAT8, "model.ffn_hidden_size=48", "parallel.tp=2"],
            4,
            "model.ffn_hidden_size is 24 on each of parallel.tp=2 ranks, and a scaled product",
        ),
        (
            [*FLOAT8, "model.hidden_size=72", "model.head_size=16"],
            4,
            "run.linear_dtype=float8: model.hidden_size is 72, and",
        ),
        (
            [*FLOAT8, "model.num_query_groups=1", "model.head_size=12"],
            4,
            "the width of queries, keys and values is 72, and",
        ),
        (["vocab.shards=[1,2]"], 2, "give 2 sizes of at least 0 that add up to 32768"),
        (["vocab=none", "vocab.shards=[1,2]"], 2, "needs a sharded vocabulary"),
        (
            ["vocab.algorithm=tree"],
            2,
            "vocab.algorithm=tree is not known; choose one of none, naive",
        ),
        (["schedule.name=xyz"], 2, "schedule.name=xyz is not known; choose one of gpipe, 1f1b"),
        (
            ["schedule.name=1f1bb"],
            2,
            "schedule.name=1f1bb is not known (did you mean 1f1b?); choose one of gpipe, 1f1b",
        ),
        (
            ["vocab.algorithm=one_barier"],
            2,
            "vocab.algorithm=one_barier is not known (did you mean one_barrier?); choose one of",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_named(overrides, num_ranks, message):
    with pytest.raises(ConfigError) as caught:
        make_plan(load_config(overrides), num_ranks)
    assert message in str(caught.value)


def test_lists_and_groups_reach_the_configuration():
    config = load_config(
        [
            "vocab=two_barrier",
            "optim=wsd",
            "model=nano",
            "parallel.layers_per_stage=[3,1]",
            "run.resume=true",
        ]
    )
    assert config.vocab.algorithm == "two_barrier"
    assert config.optim.schedule == "wsd"
    assert config.parallel.layers_per_stage == (3, 1)
    assert config.run.resume


def command(*arguments, **environment):
    return finished(main, *arguments, variables=environment)


def test_help_names_every_setting_and_the_commands():
    done = command("--help")
    assert done.returncode == 0
    for word in (
        "one_barrier",
        "model.vocab_size=32768",
        "optim.clip_grad_norm=1.0",
        "torchrun --nproc-per-node",
        "run.resume=true",
        "in turn; no setting twice",  # which a sweep refuses
    ):
        assert word in done.stdout


@pytest.mark.parametrize("columns", [None, 60])
def test_help_is_no_wider_than_the_terminal_but_for_examples(capsys, monkeypatch, columns):
    if columns is not None:
        monkeypatch.setattr("vp_train.commands.command.text_width", lambda: columns)
    made = Command("vp-x", "does x", lambda *_: 0, "  vp-x data=text " + "a" * 200)
    for words in (["--help"], ["--help", "run"], ["--help", "run.seed"]):
        assert configured(made, words) == 0
        lines = capsys.readouterr().out.partition(made.examples)[0].splitlines()
        wide = [line for line in lines if len(line) > (columns or 100)]
        assert all(len(line.split()) == 1 for line in wide)


def test_help_of_a_command_shows_the_settings_that_count_for_it(capsys):
    made = Command("vp-x", "does x", lambda *_: 0, "", reads=("data", "run.root"))
    configured(made, ["--help", "optim.lr=3"])
    names = set(re.findall(r"^  ([a-z_]+\.[a-z_]+)=", capsys.readouterr().out, re.MULTILINE))
    assert names == {*(name for name in setting_names() if name.startswith("data.")), "run.root"}


def test_a_command_that_names_what_counts_for_it_names_settings_and_groups():
    names = {*sections(), *setting_names()}
    assert {*OF_A_STEP} <= names
    assert {*prepare._READS} <= names


def test_help_on_files_takes_a_group_that_counts_for_the_command(capsys):
    for reads, group in ((("data", "model.vocab_size"), "model"), (OF_A_STEP, "cluster")):
        configured(Command("vp-x", "does x", lambda *_: 0, "", reads=reads), ["--help"])
        assert f"A group takes a file of its own too: {group}=FILE.yaml." in capsys.readouterr().out


def test_help_on_settings_says_how_they_are_written_and_names_all_groups(capsys):
    configured(Command("vp-x", "does x", lambda *_: 0, ""), ["--help", "settings"])
    page = capsys.readouterr().out
    for name in sections():
        assert re.search(rf"^  {name} +[A-Z].*\.$", page, re.MULTILINE)
    assert "settings=FILE.yaml takes" in page
    assert "group.name=value" in page
    assert "docs/settings.md" in page


@pytest.mark.parametrize(
    ("text", "words", "is_said"),
    [
        ("bfloat16_flops_per_second: 9.89e14\n", [], True),
        ("bfloat16_flops_per_second: 9.89e14\n", ["run.dtype=float16"], True),
        ("bfloat16_flops_per_second: 9.89e14\n", ["run.device=cpu"], False),
        ("run: {device: cuda}\ncluster: {bfloat16_flops_per_second: 9.89e14}\n", [], False),
        ("run: {device: cpu}\ncluster: {bfloat16_flops_per_second: 9.89e14}\n", [], False),
        ("memory_gib: 8\n", [], False),
    ],
)
def test_a_cluster_of_gpus_that_leaves_ranks_on_cpus_says_so(
    tmp_path, capsys, text, words, is_said
):
    (tmp_path / "mine.yaml").write_text(text)
    made = Command("vp-x", "does x", lambda *_: 0, "")
    assert configured(made, [f"cluster={tmp_path}/mine.yaml", *words]) == 0
    said = "vp-x: the cluster has the peak of GPUs, but run.device=cpu is the default"
    assert capsys.readouterr().err.startswith(said) == is_said


def test_help_of_a_group_says_what_its_settings_mean_and_take():
    done = command("--help", "optim", "optim.lr=1e-4")
    assert done.returncode == 0
    assert (
        "optim.lr=0.0001\n"
        "    Learning rate after the warm-up.\n"
        "    (float; at least 0; default 0.002)" in done.stdout
    )
    assert "one of adamw, zero1" in done.stdout
    assert "model." not in done.stdout


@pytest.mark.parametrize(
    ("name", "page"),
    [
        (
            "optim.lr",
            "optim.lr=0.002\n"
            "    Learning rate after the warm-up.\n"
            "    (float; at least 0; default 0.002)\n",
        ),
        ("num_microbatches", "num_microbatches=8 "),
    ],
)
def test_help_of_one_setting_is_about_it_alone(name, page):
    done = command("--help", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(page)
    assert done.stdout.count("=") == 1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optimm", "optimm is not a setting or group of settings; did you mean optim?"),
        ("optim.lrr", "optim.lrr is not a setting; did you mean optim.lr?"),
        ("parallel.pq", "parallel.pq is not a setting; did you mean parallel.pp?"),
        ("parallel.zq", "parallel.zq is not a setting; vp-train --help names all"),
        ("xyzzy", "xyzzy is not a setting or group of settings; vp-train --help names all"),
    ],
)
def test_help_of_what_is_not_there_names_what_is_close(name, words):
    done = command("--help", name)
    assert (done.returncode, done.stderr.strip()) == (78, f"vp-train: {words}")


def test_the_launcher_refuses_a_bad_plan_in_one_line_before_any_rank_starts(tmp_path):
    (tmp_path / "default/checkpoints/step-00000001").mkdir(parents=True)  # which is told later
    done = command("model.num_layers=7", f"run.root={tmp_path}")
    assert done.returncode == 78
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert "or model.num_layers=4 or 8" in done.stderr


def test_a_rank_under_torchrun_says_it_once():
    quiet = command("run.steps=0", RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    loud = command("run.steps=0", RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    assert quiet.returncode == loud.returncode == 78
    assert quiet.stderr == ""
    assert len(loud.stderr.strip().splitlines()) == 1


def test_a_resumed_run_remembers_what_it_started_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imported").mkdir()
    first = with_origin(load_config(["run.init_from=imported", "run.name=one"]))
    assert first.run.init_from == str(tmp_path / "imported"), "wherever it is read from"
    (tmp_path / "runs/one").mkdir(parents=True)
    (tmp_path / "runs/one/config.yaml").write_text(config_text(first))
    assert (
        with_origin(load_config(["run.resume=true", "run.name=one"])).run.init_from
        == first.run.init_from
    )
    assert with_origin(load_config(["run.name=one"])).run.init_from is None
    (tmp_path / "imported").rmdir()
    assert with_origin(load_config(["run.resume=true", "run.name=one"])).run.init_from is None, (
        "nothing to follow any more"
    )


SCRIPTS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
    "scripts"
]


def interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)


def interrupted(name, module, function):
    """Start a command whose function in a module of ours is a Ctrl-C."""
    setattr(import_module(module), function, interrupt)
    getattr(start, name)()


@pytest.mark.parametrize("command", SCRIPTS)
def test_ctrl_c_while_a_command_imports_ends_it_without_a_word(command):
    module, _, name = SCRIPTS[command].partition(":")
    assert module == start.__name__
    assert command == "vp-" + name.removesuffix("_model")
    done = finished(partial(interrupted, name, module, "import_module"))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_later_is_an_exception_that_a_command_may_handle():
    done = finished(partial(interrupted, "plan", "vp_train.commands.command", "load_config"))
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGINT, "", "")
