"""What somebody may have meant by a word that is no setting."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from vp_train.settings.checks import LONGEST_KEY
from vp_train.settings.tree import group_choices, sections, setting_names

# Names of settings in other frameworks, and what people call them.
_ELSEWHERE = {
    **dict.fromkeys(("learning_rate", "max_lr"), "optim.lr"),
    **dict.fromkeys(("lr_warmup_iters", "warmup_iters", "warmup"), "optim.warmup_steps"),
    **dict.fromkeys(("train_iters", "max_steps", "max_iters", "iterations"), "run.steps"),
    **dict.fromkeys(("save_interval", "save_every", "save_steps"), "run.checkpoint_every"),
    **dict.fromkeys(("eval_interval", "eval_steps"), "run.eval_every"),
    **dict.fromkeys(("log_interval", "logging_steps"), "run.log_every"),
    **dict.fromkeys(("output_dir", "out_dir", "save_dir", "save"), "run.root"),
    **dict.fromkeys(("precision", "bf16", "fp16"), "run.dtype"),
    **dict.fromkeys(("load", "init", "from_pretrained"), "run.init_from"),
    **dict.fromkeys(("n_layer", "n_layers", "num_hidden_layers", "layers"), "model.num_layers"),
    **dict.fromkeys(("n_head", "n_heads", "num_attention_heads", "heads"), "model.num_heads"),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads"), "model.num_query_groups"),
    **dict.fromkeys(("n_embd", "d_model", "hidden_dim", "dim"), "model.hidden_size"),
    **dict.fromkeys(("d_ff", "intermediate_size"), "model.ffn_hidden_size"),
    **dict.fromkeys(("block_size", "context_length", "max_seq_len"), "model.seq_length"),
    **dict.fromkeys(("sequence_length", "max_position_embeddings"), "model.seq_length"),
    **dict.fromkeys(("tensor_model_parallel_size", "tp_size"), "parallel.tp"),
    **dict.fromkeys(("pipeline_model_parallel_size", "pp_size"), "parallel.pp"),
    **dict.fromkeys(("data_parallel_size", "dp_size"), "parallel.dp"),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulate"), "num_microbatches"),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size"), "micro_batch_size"),
    **dict.fromkeys(("global_batch_size", "gbs"), "num_microbatches"),
    **dict.fromkeys(("data_path", "dataset", "train_data"), "data.path"),
    **dict.fromkeys(("tokenizer_path", "tokenizer_name", "tokenizer_model"), "data.tokenizer"),
    # The rest is of Megatron-LM (docs/from_megatron.md).
    "num_virtual_stages_per_pipeline_rank": "schedule.num_chunks",
    "num_layers_per_virtual_pipeline_stage": "schedule.num_chunks",
    "decoder_first_pipeline_num_layers": "parallel.layers_per_stage",
    "rampup_batch_size": "batch_ramp",
    "use_distributed_optimizer": "optim.name",
    "overlap_grad_reduce": "optim.overlap_sums",
    "overlap_param_gather": "optim.overlap_gathers",
    "optimizer_cpu_offload": "optim.offload",
    "recompute_granularity": "parallel.recompute",
    "recompute_num_layers": "parallel.recompute_per_stage",
    "kv_channels": "model.head_size",
    "position_embedding_type": "model.positions",
    "rotary_base": "model.rope_base",
    "normalization": "model.normalisation",
    "swiglu": "model.activation",
    "disable_bias_linear": "model.linear_bias",
    "add_qkv_bias": "model.qkv_bias",
    "qk_layernorm": "model.qk_norm",
    "untie_embeddings_and_output_weights": "model.tied_embeddings",
    "init_method_std": "model.init_std",
    "fp8_format": "run.linear_dtype",
    "lr_decay_style": "optim.schedule",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_eps": "optim.epsilon",
    "clip_grad": "optim.clip_grad_norm",
    "eval_iters": "run.eval_microbatches",
    "exit_duration_in_mins": "run.max_minutes",
    "distributed_timeout_minutes": "run.timeout_seconds",
    "check_for_nan_in_loss_and_grad": "run.on_nonfinite",
    "split": "data.validation_fraction",
}
# Options of other launchers, and ours.
_OPTIONS_ELSEWHERE = {
    **dict.fromkeys(("nproc_per_node", "nprocs", "num_processes", "num_gpus", "gpus"), "--ranks"),
    **dict.fromkeys(("nnodes", "num_nodes", "num_machines"), "--nodes"),
    **dict.fromkeys(("node_rank", "machine_rank"), "--node"),
    **dict.fromkeys(("master_addr", "rdzv_endpoint", "main_process_ip"), "--head"),
    "multirun": "-m",
    "output": "--out",
}
_FILE = "a file of settings is written settings={}, in YAML as --print-config prints it"


def close_names(word: str) -> list[str]:
    """Return the settings that somebody may mean by `word`, the likeliest first, at most two."""
    if word in sections():
        return [word]
    names, last = setting_names(), word.lower().replace("-", "_").rpartition(".")[2]
    same = [name for name in names if name.rpartition(".")[2] == last]
    if same:
        return same[:2]
    if last in _ELSEWHERE:
        return [_ELSEWHERE[last]]
    close = difflib.get_close_matches(word, names if "." in word else [*names, *sections()], n=2)
    if close or "." in word:
        return close
    of_last = {name.rpartition(".")[2]: name for name in reversed(names)}
    return [of_last[one] for one in difflib.get_close_matches(last, of_last, n=2, cutoff=0.75)]


def instead_of_option(word: str, after: str, known_options: Sequence[str]) -> str:
    """Return what to write instead of an option that is none, and a semicolon; else nothing.

    The word `after` it is its value if it has no other.
    """
    name, equals, value = word.lstrip("-").partition("=")
    if not equals and after and "=" not in after and not re.match("-[^0-9.]", after):
        value = after
    option = _OPTIONS_ELSEWHERE.get(name.lower().replace("-", "_"))
    if option not in known_options and name not in sections():
        option = next(iter(difflib.get_close_matches(word, known_options, n=1, cutoff=0.75)), None)
    if option in known_options:
        return f"did you mean {option}? "
    if re.match(r"(config|cfg|conf|settings)\b|config_|config-", name):
        return f"{_FILE.format(value or 'FILE.yaml')}; "
    if difflib.get_close_matches(re.sub("[-_]", "", name.lower()), ["dryrun"], cutoff=0.8):
        way = "vp-plan with the same settings says what a run would do and starts nothing; "
        return f"{way}--preflight stops before step 1; " if "--preflight" in known_options else way
    names = close_names(name)
    if names and len(name) > 1:
        return f"write {names[0]}={value or '...'}; "
    return ""


def instead_of_word(word: str, before: str) -> str:
    """Return what to write instead of a word without `=` that stands behind the word `before`."""
    if word and before.endswith("=") and before.count("=") == 1:
        return f"write {before}{word} without a blank"
    if word in setting_names():
        return f"write key=value without blanks, here {word}=..."
    groups = [name for name, choices in group_choices().items() if word in choices]
    if groups and word != "default":
        return f"write {groups[0]}={word}"
    path = Path(os.path.expanduser(word))
    if path.suffix in (".yaml", ".yml", ".toml"):
        return _FILE.format("FILE.yaml" if path.suffix == ".toml" else word)
    if 0 < len(word) < LONGEST_KEY and path.exists():
        return f"for text of your own write data=text data.path={word}"
    if word in ("help", "version"):
        return f"write --{word}"
    return "write key=value, e.g. run.steps=100"


def choice_of_group(word: str) -> str | None:
    """Return `optim=wsd` for `optim.name=wsd`: the choice of a group that a setting was given."""
    name, _, value = word.partition("=")
    group, dot, _ = name.partition(".")
    return f"{group}={value}" if dot and value in group_choices().get(group, ()) else None
