"""Every preset has the published size, and its family trains with its real vocabulary."""

from dataclasses import replace

import pytest

from tests.pipeline.equivalence import assert_equivalent, assert_equivalent_locally
from vp_train.config import (
    ConfigError,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    RunSettings,
    ScheduleConfig,
)
from vp_train.model import shape
from vp_train.settings import load_config

PUBLISHED = {
    "gpt2": 124_439_808,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "gemma_7b": 8_537_680_896,
    "gemma2_9b": 9_241_705_984,
    "gemma3_1b": 999_885_952,
    "gemma3_12b": 11_766_034_176,
}
LAYERS_OF_THE_PAPER = {
    "gpt_4b": 4e9,
    "gpt_10b": 10e9,
    "gpt_21b": 21e9,
    "gpt_7b": 7e9,
    "gpt_16b": 16e9,
    "gpt_30b": 30e9,
}


def preset(name):
    return load_config([f"model={name}"]).model


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    assert shape.num_parameters(preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("name", LAYERS_OF_THE_PAPER)
def test_presets_of_the_paper_have_about_the_parameters_of_their_names(name):
    model = preset(name)
    layers = model.num_layers * shape.layer_parameters(model)
    # The names are rounded, and may or may not count the vocabulary.
    assert layers == pytest.approx(LAYERS_OF_THE_PAPER[name], rel=0.13)
    assert model.hidden_size == 128 * model.num_heads


def tiny(name, **changes):
    """Return the preset with few small layers and a short window, and its whole vocabulary."""
    model = preset(name)
    groups = (
        2
        if 1 < model.num_query_groups < model.num_heads
        else 4 // (model.num_heads // model.num_query_groups)
    )
    return replace(
        model,
        num_layers=3,
        hidden_size=8,
        num_heads=4,
        num_query_groups=groups,
        head_size=None if model.head_size is None else 4,
        ffn_hidden_size=12,
        seq_length=6,
        sliding_window=None if model.sliding_window is None else 3,
        full_attention_every=None if model.full_attention_every is None else 2,
        init_std=0.3,
        **changes,
    )


def config_of(model, *, layers=(2, 1), schedule="1f1b", recompute="none", pp=2, tp=1, dp=1):
    return RunConfig(
        model=model,
        parallel=ParallelConfig(dp=dp, pp=pp, tp=tp, layers_per_stage=layers, recompute=recompute),
        schedule=ScheduleConfig(schedule),
        optim=OptimConfig(lr=1e-2, warmup_steps=1, clip_grad_norm=0.5),
        run=RunSettings(dtype="float64"),
        num_microbatches=2,
        micro_batch_size=2,
    )


@pytest.mark.parametrize(
    "name", ["gpt2", "llama3_8b", "qwen2_5_7b", "qwen3_8b", "gemma_7b", "gemma3_12b"]
)
def test_each_family_trains_with_its_real_vocabulary_as_one_process_does(name):
    """Gemma 2 has the vocabulary of Gemma; its layers are below."""
    assert tiny(name).vocab_size == preset(name).vocab_size > 50_000
    assert_equivalent_locally(2, [config_of(tiny(name))], 1e-9)


def test_split_backward_recomputation_and_an_empty_first_stage_change_nothing():
    configs = []
    for name in ("gpt2", "qwen2_5_7b", "gemma2_9b", "gemma3_12b"):
        model = replace(tiny(name), vocab_size=101)
        configs.append(config_of(model, schedule="zb_h1", layers=(0, 3)))
        configs.append(config_of(model, schedule="v_half", layers=(1, 1, 0, 1), recompute="full"))
    assert_equivalent_locally(2, configs, 1e-9)


def test_tensor_parallel_ranks_split_biases_and_share_the_norms_of_heads(ranks):
    names = ("gpt2", "qwen2_5_7b", "qwen3_8b", "gemma2_9b", "gemma3_12b")
    smaller = [replace(tiny(name), vocab_size=101) for name in names]
    assert_equivalent(
        ranks,
        2,
        [config_of(model, layers=None, pp=1, tp=2, schedule="zb_h1") for model in smaller],
        1e-9,
    )


def test_replicas_sum_biases_and_positions_too(ranks):
    model = replace(tiny("gpt2"), vocab_size=101)
    assert_equivalent(
        ranks,
        2,
        [config_of(model, layers=None, pp=1, dp=2, schedule=name) for name in ("1f1b", "zb_h1")],
        1e-9,
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"activation": "relu"},
            "model.activation='relu' is not known; choose one of swiglu, geglu, gelu",
        ),
        (
            {"normalisation": "none"},
            "model.normalisation='none' is not known; choose one of rmsnorm, layernorm",
        ),
        (
            {"positions": "alibi"},
            "model.positions='alibi' is not known; choose one of rope, learned",
        ),
        (
            {"rope_scaling": "dynamic"},
            "model.rope_scaling='dynamic' is not known; choose one of none, linear, llama3, yarn",
        ),
        ({"head_size": 7}, "model.head_size = 7 is odd; rotary embeddings need an even head size"),
        ({"sliding_window": 0}, "model.sliding_window=0 is too small; it must be at least 1"),
        ({"norm_epsilon": -1.0}, "model.norm_epsilon=-1.0 is too small; it must be above 0"),
        ({"norm_epsilon": 0.0}, "model.norm_epsilon=0.0 is too small; it must be above 0"),
        ({"init_std": -0.02}, "model.init_std=-0.02 is too small; it must be at least 0"),
        ({"rope_base": float("inf")}, "model.rope_base=inf is not a finite number"),
        ({"norm_epsilon": float("nan")}, "model.norm_epsilon=nan is not a finite number"),
        (
            {"attention_softcap": 0.0},
            "model.attention_softcap=0.0 is too small; it must be above 0",
        ),
        (
            {"zero_centred_norm": True, "normalisation": "layernorm"},
            "model.zero_centred_norm=true counts only with "
            "model.normalisation=rmsnorm, not layernorm",
        ),
        (
            {"qk_norm": True, "normalisation": "layernorm"},
            "model.qk_norm=true counts only with model.normalisation=rmsnorm",
        ),
        (
            {"pre_norms": False},
            "model.pre_norms=false counts only with model.post_norms=true",
        ),
        (
            {"qk_norm_whole": True},
            "model.qk_norm_whole=true counts only with model.qk_norm=true",
        ),
        (
            {"rope_attention_factor": 1.1},
            "model.rope_attention_factor=1.1 counts only with model.rope_scaling=yarn, not none",
        ),
        (
            {"rope_scaling": "yarn", "rope_local_base": 5.0, "sliding_window": 3},
            "model.rope_scaling=yarn needs model.rope_base=10000.0 above 1 and "
            "model.rope_local_base=5.0 null",
        ),
        (
            {"full_attention_every": 2},
            "model.full_attention_every=2 counts only with model.sliding_window",
        ),
        (
            {"rope_local_base": 1e4},
            "model.rope_local_base=10000.0 counts only with model.sliding_window",
        ),
        (
            {"rope_factor": 8.0},
            "model.rope_factor=8.0 counts only with model.rope_scaling=linear, llama3 or yarn",
        ),
        (
            {"rope_scaling": "linear", "positions": "learned"},
            "model.rope_scaling=linear counts only with model.positions=rope",
        ),
        (
            {"rope_scaling": "llama3", "rope_low_frequency": 4.0},
            "model.rope_low_frequency=4.0 and model.rope_high_frequency=4.0: "
            "the first must be above 0 and below the second",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_way_out(settings, message):
    with pytest.raises(ConfigError) as caught:
        ModelConfig(**settings)
    assert str(caught.value).startswith(message)
