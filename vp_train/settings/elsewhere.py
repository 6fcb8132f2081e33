"""Settings and options of other frameworks, and what people call them, with ours."""

from __future__ import annotations

# Settings by their names elsewhere, where they take the same values.
NAMES = {
    **dict.fromkeys(("learning_rate", "max_lr"), "optim.lr"),
    **dict.fromkeys(("lr_warmup_iters", "warmup_iters", "warmup"), "optim.warmup_steps"),
    **dict.fromkeys(("train_iters", "max_steps", "max_iters", "iterations"), "run.steps"),
    **dict.fromkeys(("save_interval", "save_every", "save_steps"), "run.checkpoint_every"),
    **dict.fromkeys(("eval_interval", "eval_steps"), "run.eval_every"),
    **dict.fromkeys(("log_interval", "logging_steps"), "run.log_every"),
    **dict.fromkeys(("output_dir", "out_dir", "save_dir", "save"), "run.root"),
    "precision": "run.dtype",
    **dict.fromkeys(("init", "from_pretrained"), "run.init_from"),
    **dict.fromkeys(("n_layer", "n_layers", "num_hidden_layers", "layers"), "model.num_layers"),
    **dict.fromkeys(("n_head", "n_heads", "num_attention_heads", "heads"), "model.num_heads"),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads"), "model.num_query_groups"),
    **dict.fromkeys(("n_embd", "d_model", "hidden_dim", "dim"), "model.hidden_size"),
    **dict.fromkeys(("d_ff", "intermediate_size"), "model.ffn_hidden_size"),
    **dict.fromkeys(("block_size", "context_length", "max_seq_len", "seq_len"), "model.seq_length"),
    **dict.fromkeys(("sequence_length", "max_position_embeddings"), "model.seq_length"),
    **dict.fromkeys(
        ("tensor_model_parallel_size", "tensor_parallel_degree", "tp_size"), "parallel.tp"
    ),
    **dict.fromkeys(
        ("pipeline_model_parallel_size", "pipeline_parallel_degree", "pp_size"), "parallel.pp"
    ),
    **dict.fromkeys(
        ("data_parallel_size", "data_parallel_replicate_degree", "dp_size"), "parallel.dp"
    ),
    **dict.fromkeys(("gradient_accumulation_steps", "accumulate"), "num_microbatches"),
    **dict.fromkeys(
        ("batch_size", "local_batch_size", "per_device_train_batch_size"), "micro_batch_size"
    ),
    **dict.fromkeys(("tokenizer_path", "tokenizer_name", "tokenizer_model"), "data.tokenizer"),
    # The rest is of Megatron-LM (docs/from_megatron.md).
    "num_virtual_stages_per_pipeline_rank": "schedule.num_chunks",
    "overlap_grad_reduce": "optim.overlap_sums",
    "overlap_param_gather": "optim.overlap_gathers",
    "optimizer_cpu_offload": "optim.offload",
    "recompute_granularity": "parallel.recompute",
    "kv_channels": "model.head_size",
    "position_embedding_type": "model.positions",
    "rotary_base": "model.rope_base",
    "normalization": "model.normalisation",
    "add_qkv_bias": "model.qkv_bias",
    "qk_layernorm": "model.qk_norm",
    "init_method_std": "model.init_std",
    "lr_decay_style": "optim.schedule",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "adam_eps": "optim.epsilon",
    "clip_grad": "optim.clip_grad_norm",
    "exit_duration_in_mins": "run.max_minutes",
    "data_cache_path": "data.cache_dir",
    "window_size": "model.sliding_window",
    # And these are of torchtitan.
    "max_norm": "optim.clip_grad_norm",
    "log_freq": "run.log_every",
    "decay_type": "optim.schedule",
    "checkpoint.interval": "run.checkpoint_every",
    **dict.fromkeys(("checkpoint.folder", "job.dump_folder"), "run.root"),
    "training.mixed_precision_param": "run.dtype",
    "checkpoint.keep_latest_k": "run.keep_checkpoints",
    "checkpoint.initial_load_path": "run.init_from",
    **dict.fromkeys(("model.name", "model.flavor"), "model"),
    "activation_checkpoint.mode": "parallel.recompute",
    "validation.freq": "run.eval_every",
    # A name alone is most often that of a run.
    "name": "run.name",
}
_NO_CONTEXT = "vp_train has no context parallelism (docs/limits.md)"
_NO_EXPERTS = "vp_train has no experts (docs/limits.md)"
_NO_DROPOUT = "vp_train has no dropout (docs/from_megatron.md)"
_BATCH = "write num_microbatches=..., the global batch / (parallel.dp x micro_batch_size)"
_DECAY = "the decay of the learning rate ends with the run: write run.steps=..."
_TOKENIZER = "write data.tokenizer=..., the path of a tokenizer.json"
_PACKING = "write data.packing=documents"
_EVALUATION = "write run.eval_microbatches=..., the iterations x the microbatches of all replicas"
# What to say of those that take other values here, or that are missing.  {} is the value as typed.
WAYS = {
    **dict.fromkeys(("global_batch_size", "gbs"), _BATCH),
    **dict.fromkeys(("data_path", "dataset", "train_data"), "write data.path={} data=text"),
    **dict.fromkeys(("context_parallel_size", "context_parallel_degree", "cp"), _NO_CONTEXT),
    **dict.fromkeys(("expert_model_parallel_size", "expert_parallel_degree"), _NO_EXPERTS),
    **dict.fromkeys(("num_experts", "moe_router_topk", "ep"), _NO_EXPERTS),
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "dropout"), _NO_DROPOUT),
    **dict.fromkeys(("lr_decay_iters", "lr_decay_samples"), _DECAY),
    "train_samples": "write run.steps=..., the samples / the sequences of a step",
    "lr_warmup_samples": "write optim.warmup_steps=..., the samples / the sequences of a step",
    "lr_warmup_fraction": "write optim.warmup_steps=..., the fraction x run.steps",
    "seed": "write run.seed={} for the weights, data.seed={} for the order of samples",
    "load": "write run.init_from={} for the weights alone; to go on with a run write "
    "run.name=... run.resume=true",
    **dict.fromkeys(("eval_iters", "validation.steps"), _EVALUATION),
    "training.dataset": "corpora have no names here: write data=text data.path=..., a directory or "
    "file of text",
    "decay_ratio": "write optim=wsd optim.decay_fraction={}",
    "min_lr_factor": "write optim.min_lr=..., the factor x optim.lr",
    "checkpoint.enable": "write run.checkpoint_every=..., steps",
    "metrics.enable_wandb": "write run.trackers=[wandb]",
    "compile.enable": "write run.compile=on; auto, the default, compiles where that pays",
    "split": "write data.validation_fraction=..., a part as 0.05",
    "tensorboard_dir": "TensorBoard reads run.root/run.name/tensorboard; write run.root=...",
    "rampup_batch_size": "write batch_ramp=..., a list of [step,sequences]",
    "num_layers_per_virtual_pipeline_stage": "write schedule.num_chunks=..., the layers / "
    "(parallel.pp x that)",
    "decoder_first_pipeline_num_layers": "write parallel.layers_per_stage=[...], the layers of "
    "every stage",
    "recompute_num_layers": "write parallel.recompute_per_stage=[...], one word for every stage",
    "recompute_activations": "write parallel.recompute=selective",
    "use_distributed_optimizer": "write optim.name=zero1",
    "bf16": "write run.dtype=bfloat16",
    "fp16": "write run.dtype=float16",
    "fp8_format": "write run.linear_dtype=float8",
    "swiglu": "write model.activation=swiglu, the default",
    "disable_bias_linear": "write model.linear_bias=false, the default",
    "untie_embeddings_and_output_weights": "write model.tied_embeddings=false, the default",
    "use_flash_attn": "attention is flash attention wherever torch has it; drop this",
    "make_vocab_size_divisible_by": "a vocabulary needs no padding; drop this",
    "distributed_timeout_minutes": "write run.timeout_seconds=..., in seconds",
    "check_for_nan_in_loss_and_grad": "write run.on_nonfinite=stop, the default",
    **dict.fromkeys(("tokenizer_type", "vocab_file", "merge_file"), _TOKENIZER),
    **dict.fromkeys(("reset_position_ids", "reset_attention_mask"), _PACKING),
    **dict.fromkeys(("profile_freq", "profile_step_start"), "write run.profile_steps=[{}]"),
    "mock_data": "write data=synthetic",
    "decoder_last_pipeline_num_layers": "write parallel.layers_per_stage=[...], the layers of "
    "every stage",
    "group_query_attention": "write model.num_query_groups=...",
    "data_parallel_shard_degree": "vp_train has no FSDP (docs/limits.md); optim.name=zero1 shards "
    "the optimizer",
    "pipeline_parallel_schedule": "write schedule=..., for instance 1f1b, interleaved or zb_v",
    "async_save": "a step waits for a copy of a checkpoint only; drop this",
    "use_mcore_models": "layers are those of megatron-core; drop this",
}
# Options of other launchers, and ours.
OPTIONS = {
    **dict.fromkeys(("nproc_per_node", "nprocs", "num_processes", "num_gpus", "gpus"), "--ranks"),
    **dict.fromkeys(("nnodes", "num_nodes", "num_machines"), "--nodes"),
    **dict.fromkeys(("node_rank", "machine_rank"), "--node"),
    **dict.fromkeys(("master_addr", "rdzv_endpoint", "main_process_ip"), "--head"),
    "multirun": "-m",
    "output": "--out",
}
