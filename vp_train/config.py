"""The configuration tree: frozen dataclasses that check their own fields.

Everything here is what a user may set; derived values live in `RunPlan`.  Checks that need two sections, or the world size,
live in `plan`.  Every check raises ConfigError, which names the value and the way out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction

_DTYPES = ("bfloat16", "float16", "float32", "float64")
_DEVICES = ("cpu", "cuda")


class ConfigError(ValueError):
    """A value the user can change.  The command line prints its message, without a traceback, and exits 78."""


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise ConfigError(f"{name}={value} is too small; it must be at least {least}")


def _finite(prefix: str, section: object) -> None:
    """No field of `section` is infinite or not a number."""
    for item in fields(section):  # type: ignore[arg-type]
        value = getattr(section, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{item.name}={value} is not a finite number")


def _fraction(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"{name}={value} is out of range; it must lie in [0, 1)")


def _freeze(section: object, name: str) -> None:
    """A YAML list becomes the tuple its field promises."""
    value = getattr(section, name)
    if value is not None:
        object.__setattr__(section, name, tuple(value))


@dataclass(frozen=True)
class ModelConfig:
    """A decoder.  Flags say what the families differ in: GPT, Llama, Qwen and Gemma are settings of them; see configs/model.

    `head_size` None: hidden_size / num_heads.  `zero_centred_norm`: weights w of an RMSNorm count as 1 + w.
    `activation`: `swiglu`, `geglu` (gated, tanh approximation) or `gelu` (not gated, tanh approximation).
    `linear_bias` is a bias of every linear layer of the layers, `qkv_bias` of the first alone; `qk_norm` an RMSNorm over each
    head of queries and keys; `post_norms` another norm after attention and after the MLP, before the residual is added.
    `attention_softcap` c: scores become c tanh(scores / c); they are q k / sqrt(attention_divisor), None: of head_size.
    `sliding_window`: layers see so many tokens, themselves included, except every `full_attention_every`-th one (None: all
    layers are local), and local layers have a RoPE base of their own, if given.  `positions`: `rope`, or `learned`, a table of
    seq_length rows that stage 0 adds.  `embedding_scale`: embeddings count sqrt(hidden_size) times.
    """

    num_layers: int = 8
    hidden_size: int = 256
    num_heads: int = 8
    num_query_groups: int = 4
    head_size: int | None = None
    ffn_hidden_size: int = 768
    vocab_size: int = 32_768
    seq_length: int = 256
    tied_embeddings: bool = False
    embedding_scale: bool = False
    normalisation: str = "rmsnorm"
    zero_centred_norm: bool = False
    norm_epsilon: float = 1e-5
    post_norms: bool = False
    activation: str = "swiglu"
    linear_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    attention_divisor: float | None = None
    attention_softcap: float | None = None
    sliding_window: int | None = None
    full_attention_every: int | None = None
    positions: str = "rope"
    rope_base: float = 10_000.0
    rope_local_base: float | None = None
    rope_scaling: str = "none"  # linear: angles / rope_factor; llama3: low frequencies only, arXiv 2407.21783
    rope_factor: float = 1.0
    rope_low_frequency: float = 1.0  # with llama3: turns within rope_original_length below which the whole factor counts,
    rope_high_frequency: float = 4.0  # and above which none does
    rope_original_length: int = 8192
    init_std: float = 0.02
    logit_softcap: float | None = None  # c: logits become c tanh(logits / c)

    def __post_init__(self) -> None:
        _finite("model.", self)
        for name in (
            "num_layers",
            "hidden_size",
            "num_heads",
            "num_query_groups",
            "head_size",
            "ffn_hidden_size",
            "vocab_size",
            "seq_length",
            "sliding_window",
            "full_attention_every",
            "rope_factor",
            "rope_original_length",
        ):
            value = getattr(self, name)
            if value is not None:
                _at_least(f"model.{name}", value, 1)
        _choice("model.normalisation", self.normalisation, ("rmsnorm", "layernorm"))
        _choice("model.activation", self.activation, ("swiglu", "geglu", "gelu"))
        _choice("model.positions", self.positions, ("rope", "learned"))
        _choice("model.rope_scaling", self.rope_scaling, ("none", "linear", "llama3"))
        self._check_heads()
        for name in ("logit_softcap", "attention_softcap", "attention_divisor", "rope_base", "rope_local_base"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"model.{name}={value} is too small; it must be above 0, or null for none")
        if not self.norm_epsilon > 0:
            raise ConfigError(f"model.norm_epsilon={self.norm_epsilon} is too small; it must be above 0, for example 1e-05")
        _at_least("model.init_std", self.init_std, 0)
        self._check_pairs()

    def _check_heads(self) -> None:
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} does not split over model.num_heads={self.num_heads}; "
                f"use a multiple of {self.num_heads}, or set model.head_size"
            )
        size = self.head_size or self.hidden_size // self.num_heads
        if self.positions == "rope" and size % 2:
            name = "model.hidden_size / model.num_heads" if self.head_size is None else "model.head_size"
            raise ConfigError(f"{name} = {size} is odd; rotary embeddings need an even head size")
        if self.num_heads % self.num_query_groups:
            raise ConfigError(
                f"model.num_heads={self.num_heads} does not split over model.num_query_groups={self.num_query_groups}; "
                f"use a divisor of {self.num_heads}"
            )

    def _check_pairs(self) -> None:
        """Settings that count only with another one."""
        if self.zero_centred_norm and self.normalisation != "rmsnorm":
            raise ConfigError(
                f"model.zero_centred_norm=true counts only with model.normalisation=rmsnorm, not {self.normalisation}; "
                "drop one of the two"
            )
        if self.qk_norm and self.normalisation != "rmsnorm":
            raise ConfigError(
                f"model.qk_norm=true counts only with model.normalisation=rmsnorm, not {self.normalisation}; "
                "drop one of the two"
            )
        for name in ("full_attention_every", "rope_local_base"):
            if getattr(self, name) is not None and self.sliding_window is None:
                raise ConfigError(
                    f"model.{name}={getattr(self, name)} counts only with model.sliding_window; set it, or drop this"
                )
        for name, unused in (("rope_local_base", None), ("rope_scaling", "none")):
            if getattr(self, name) != unused and self.positions != "rope":
                raise ConfigError(
                    f"model.{name}={getattr(self, name)} counts only with model.positions=rope, not {self.positions}; "
                    "drop one of the two"
                )
        if self.rope_factor != 1 and self.rope_scaling == "none":
            raise ConfigError(
                f"model.rope_factor={self.rope_factor} counts only with model.rope_scaling=linear or llama3; set one of them"
            )
        if self.rope_scaling == "llama3" and not 0 < self.rope_low_frequency < self.rope_high_frequency:
            raise ConfigError(
                f"model.rope_low_frequency={self.rope_low_frequency} and model.rope_high_frequency={self.rope_high_frequency}: "
                "the first must be above 0 and below the second"
            )

    def is_local(self, layer: int) -> bool:
        """Whether this layer, counted from 0 over the whole model, sees only `sliding_window` tokens."""
        every = self.full_attention_every
        return self.sliding_window is not None and (every is None or (layer + 1) % every != 0)


@dataclass(frozen=True)
class ScheduleConfig:
    """The base schedule, by its name in `schedules.generators`, or `auto`: the fastest found under a cap on memory.

    `num_chunks`: stages per rank, where the schedule leaves a choice.  The cap is on the activations and held shards of a rank:
    in GiB, or in microbatches of 1/p of the model's activations; without either it is p + 1 microbatches and two held shards,
    about what 1F1B with one_barrier keeps, or what a single microbatch needs.  `file`: a schedule written before, ours or a CSV
    of torch.distributed.pipelining, in place of the named one; then nothing else here counts.
    """

    name: str = "1f1b"
    num_chunks: int | None = None
    cap_microbatches: float | None = None
    cap_gib: float | None = None
    file: str | None = None

    def __post_init__(self) -> None:
        _finite("schedule.", self)
        if self.num_chunks is not None:
            _at_least("schedule.num_chunks", self.num_chunks, 1)
        for name in ("cap_microbatches", "cap_gib"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"schedule.{name}={value} is too small; it must be above 0")
            if value is not None and self.name != "auto":
                raise ConfigError(
                    f"schedule.{name}={value} counts only with schedule=auto, not {self.name}; drop one of the two"
                )
        if self.cap_gib is not None and self.cap_microbatches is not None:
            raise ConfigError(
                f"schedule.cap_gib={self.cap_gib} and schedule.cap_microbatches={self.cap_microbatches}: set one of the two"
            )

    @property
    def is_solved(self) -> bool:
        """True where the schedule is still to be searched for."""
        return self.name == "auto" and self.file is None


@dataclass(frozen=True)
class VocabConfig:
    """How the input and output layers are split, and which code computes S and T.

    `algorithm` may be `auto` with schedule=auto.  `shards`: rows of each rank; None: as equal as possible, or with `balance` so
    that ranks with less other work take more.  Backends: `chunked` holds the exponentials from S to T; `recompute` holds none
    for `recompute_fraction` of the rows and pays with a fourth matrix product for these; `reference` is the oracle.
    `sum_dtype`: what the shards' terms of dL/dx are summed in.  `float32` (float64 in a run of float64) is as accurate at any
    number of shards as one process; `compute` is run.dtype, which halves the bytes in bfloat16, and each term is rounded.
    """

    algorithm: str = "one_barrier"
    backend: str = "chunked"
    shards: tuple[int, ...] | None = None
    balance: bool = False
    recompute_fraction: float = 1.0
    sum_dtype: str = "float32"

    def __post_init__(self) -> None:
        _finite("vocab.", self)
        _choice("vocab.backend", self.backend, ("chunked", "recompute", "reference"))
        _choice("vocab.sum_dtype", self.sum_dtype, ("float32", "compute"))
        if not 0 <= self.recompute_fraction <= 1:
            raise ConfigError(f"vocab.recompute_fraction={self.recompute_fraction} is out of range; it must lie in [0, 1]")
        if self.recompute_fraction != 1 and self.backend != "recompute":
            raise ConfigError(
                f"vocab.recompute_fraction={self.recompute_fraction} counts only with vocab.backend=recompute, "
                f"not {self.backend}; drop one of the two"
            )
        if self.balance and self.shards is not None:
            raise ConfigError(f"vocab.balance=true and vocab.shards={list(self.shards)}: set one of the two")
        _freeze(self, "shards")


RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class ParallelConfig:
    """Degrees of parallelism, and where the layers go.

    A run has dp x pp x tp ranks: `dp` replicas of the model, each a pipeline of `pp` ranks, each of which is `tp` ranks that
    split its matrices.  One of `pp` and `dp` may be None: what the launcher started leaves for it (of both: `dp` is 1).
    Every replica has num_microbatches of its own.  `placement`: `even`; `balanced`, where the layers do not split
    evenly; or `redistribute`, which takes layers from the last stage to make room for the output layer.  `layers_per_stage`
    overrides all.  `recompute`: what runs again in the backward rather than being kept: `none`, the attention of every layer
    from its input on (`selective`), or the layer (`full`); `recompute_per_stage` says it for each stage.
    `sequence_parallel`: norms and residuals are split over the tensor-parallel ranks as well, by tokens.
    """

    pp: int | None = None
    dp: int | None = None
    tp: int = 1
    placement: str = "even"
    layers_per_stage: tuple[int, ...] | None = None
    recompute: str = "none"
    recompute_per_stage: tuple[str, ...] | None = None
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        _choice("parallel.placement", self.placement, ("even", "balanced", "redistribute"))
        _freeze(self, "recompute_per_stage")
        for name, values in {"recompute": [self.recompute], "recompute_per_stage": self.recompute_per_stage or ()}.items():
            for value in values:
                _choice(f"parallel.{name}", value, RECOMPUTE)
        for name in ("pp", "dp", "tp"):
            if getattr(self, name) is not None:
                _at_least(f"parallel.{name}", getattr(self, name), 1)
        _freeze(self, "layers_per_stage")
        if self.recompute != "none" and self.recompute_per_stage is not None:
            raise ConfigError(
                f"parallel.recompute={self.recompute} and parallel.recompute_per_stage={list(self.recompute_per_stage)}: "
                "set one of the two"
            )

    @property
    def recompute_words(self) -> str:
        return self.recompute if self.recompute_per_stage is None else ", ".join(self.recompute_per_stage)

    def recompute_of(self, stage: int) -> str:
        """What runs again in the backward of `stage`."""
        return self.recompute if self.recompute_per_stage is None else self.recompute_per_stage[stage]


@dataclass(frozen=True)
class LossConfig:
    """What is minimised; see `vocab.loss`.

    `z_loss`: the weight of lse^2 of every token.  `normalisation`: `token`, the mean over all tokens, or `sequence`, the mean
    over sequences of the mean of each.  Validation measures the plain negative log-likelihood, the mean over all tokens.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    normalisation: str = "token"

    def __post_init__(self) -> None:
        _finite("loss.", self)
        _fraction("loss.label_smoothing", self.label_smoothing)
        _at_least("loss.z_loss", self.z_loss, 0)
        _choice("loss.normalisation", self.normalisation, ("token", "sequence"))


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, a learning-rate schedule with warm-up, global gradient clipping.

    `name`: `adamw`, with the whole state in every replica, or `zero1`, with a part of it in each; `offload` keeps that part in
    host memory and updates it there.
    `bucket_mib`: MiB of gradients that are summed over the replicas at a time, as soon as they are complete; a layer or a
    matrix that is larger is summed in one piece.  More makes better use of a link, less leaves less to sum after the last pass.
    `schedule`: `cosine` from lr to min_lr; `wsd` holds lr and decays linearly over the last decay_fraction of the run.
    `min_lr` None: lr / 10.
    """

    name: str = "adamw"
    lr: float = 2e-3
    min_lr: float | None = None
    schedule: str = "cosine"
    warmup_steps: int = 10
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_grad_norm: float = 1.0  # 0 turns clipping off
    offload: bool = False
    bucket_mib: int = 64

    def __post_init__(self) -> None:
        _finite("optim.", self)
        _at_least("optim.bucket_mib", self.bucket_mib, 1)
        _choice("optim.name", self.name, ("adamw", "zero1"))
        _choice("optim.schedule", self.schedule, ("cosine", "wsd"))
        if self.offload and self.name != "zero1":
            raise ConfigError(f"optim.offload=true counts only with optim.name=zero1, not {self.name}; change one of the two")
        for name in ("lr", "warmup_steps", "weight_decay", "clip_grad_norm"):
            _at_least(f"optim.{name}", getattr(self, name), 0)
        if self.min_lr is not None:
            _at_least("optim.min_lr", self.min_lr, 0)
            if self.min_lr > self.lr:
                raise ConfigError(
                    f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}, which decays to it; lower it, or leave it out "
                    "for a tenth of optim.lr"
                )
        for name in ("beta1", "beta2", "decay_fraction"):
            _fraction(f"optim.{name}", getattr(self, name))
        if not self.epsilon > 0:
            raise ConfigError(f"optim.epsilon={self.epsilon} is too small; it must be above 0")

    @property
    def final_lr(self) -> float:
        """The learning rate that the decay ends at: min_lr, or a tenth of lr."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


@dataclass(frozen=True)
class BlendEntry:
    """A corpus of a blend: `name` and `path` as in DataConfig, and how many samples it gives, relative to the others."""

    name: str = "text"
    path: str | None = None
    weight: float = 1.0
    jsonl_field: str | None = None  # None: data.jsonl_field

    def __post_init__(self) -> None:
        _choice("data.blend: name", self.name, ("text", "pystdlib"))
        if self.name == "text" and self.path is None:
            raise ConfigError("data.blend: every corpus needs a path, or name: pystdlib")
        if not 0 < self.weight < math.inf:
            raise ConfigError(
                f"data.blend: weight={self.weight} of {self.path or self.name}; weights must be above 0 and finite, "
                "leave the corpus out if it is to give nothing"
            )


def _count(number: int) -> str:
    return f"{number:,}" if number < 10**15 else "more than 10^15"


_LONGEST_PATTERN = 100_000  # samples after which the turns of a blend's corpora repeat


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the ratio of `weights`, each taken as the decimal number that it prints as.

    Raises ConfigError where their sum is too large for a pattern of turns.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    denominator = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * denominator) for weight in exact]
    whole = [weight // math.gcd(*whole) for weight in whole]
    if sum(whole) > _LONGEST_PATTERN:
        rounded = ", ".join(str(max(round(weight / sum(whole), 3), 0.001)) for weight in whole)
        raise ConfigError(
            f"data.blend: weights {', '.join(map(str, weights))} repeat only after {_count(sum(whole))} samples, at most "
            f"{_LONGEST_PATTERN:,} are kept; round them, for example to {rounded}"
        )
    return tuple(whole)


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from.

    `pystdlib`: the running Python's standard library.  `text`: the text or .jsonl files under `path`, or a corpus that
    vp-prepare has stored there.  `blend`: several of these, listed under `blend`.  `synthetic`: a source of known entropy, any
    vocabulary.  `tokenizer`: a Hugging Face tokenizer.json; None trains one of model.vocab_size tokens.  `end_token`: what that
    tokenizer calls the end of a document; None tries the usual names.  `packing`: with `documents` no token sees another
    document of its sample, and none predicts the next one's first token.
    """

    name: str = "pystdlib"
    path: str | None = None
    blend: tuple[BlendEntry, ...] | None = None
    packing: str = "none"
    tokenizer: str | None = None
    end_token: str | None = None
    jsonl_field: str = "text"
    cache_dir: str = "data-cache"
    validation_fraction: float = 0.05
    seed: int = 1234

    def __post_init__(self) -> None:
        _finite("data.", self)
        _choice("data.name", self.name, ("pystdlib", "text", "blend", "synthetic"))
        _choice("data.packing", self.packing, ("none", "documents"))
        _fraction("data.validation_fraction", self.validation_fraction)
        _at_least("data.seed", self.seed, 0)
        _freeze(self, "blend")
        if self.name == "text" and self.path is None:
            raise ConfigError("data.name=text needs data.path: a directory of text or .jsonl files, or one such file")
        if self.name == "blend" and not self.blend:
            raise ConfigError("data.name=blend needs data.blend: [{path: DIR, weight: 3}, {name: pystdlib, weight: 1}]")
        if self.name != "blend" and self.blend:
            raise ConfigError(f"data.blend counts only with data=blend, not data.name={self.name}; drop one of the two")
        if self.name == "synthetic" and self.packing != "none":
            raise ConfigError(f"data.packing={self.packing} needs documents, which data.name=synthetic has none of; drop it")
        _ = self.weights  # refused here if at all

    @property
    def weights(self) -> tuple[int, ...]:
        """Of the corpora of a blend, or of the only one.  Raises ConfigError like `whole_weights`."""
        return whole_weights([entry.weight for entry in self.blend or ()] or [1.0])


@dataclass(frozen=True)
class CostConfig:
    """Seconds the planner assumes; per pass they follow from FLOPs at `flops_per_second`.

    What was measured replaces that estimate.  All measured figures are for one microbatch: F, B, I and W per layer; S and T of
    a shard together, a fixed part and a part per row; E and G per shard.  `measured_*` say of what, and are compared with the
    run where they are not None: the forward FLOPs of one layer, so that the figures are refused for any other model, sequence
    length or micro-batch size, run.dtype and run.device.  `measured_on` is what vp-plan calls the device.

    A message takes its fixed seconds and, where a bandwidth is told, its bytes through that: hops between stages,
    collectives of the vocabulary, and sums over the tensor-parallel ranks, of which a layer has two forward and two backward.
    """

    flops_per_second: float = 5e10
    hop_seconds: float = 2e-4
    hop_bytes_per_second: float | None = None
    collective_seconds: float = 5e-4
    collective_bytes_per_second: float | None = None
    tensor_seconds: float = 0.0
    tensor_bytes_per_second: float | None = None
    measured_layer_flops: float | None = None
    measured_dtype: str | None = None
    measured_device: str | None = None
    measured_on: str | None = None
    layer_forward_seconds: float | None = None
    layer_backward_seconds: float | None = None
    layer_input_grad_seconds: float | None = None
    layer_weight_grad_seconds: float | None = None
    output_fixed_seconds: float = 0.0  # counts only with output_row_seconds
    output_row_seconds: float | None = None
    lookup_seconds: float | None = None
    lookup_grad_seconds: float | None = None
    rank_slowness: tuple[float, ...] | None = None  # how much longer each rank takes than all this says; None: 1 each

    def __post_init__(self) -> None:
        _finite("cost.", self)
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name.endswith("_per_second") and value is not None:
                _at_least(f"cost.{item.name}", value, 1)
            elif item.name.endswith("_seconds") and value is not None:
                _at_least(f"cost.{item.name}", value, 0)
        for name, choices in (("measured_dtype", _DTYPES), ("measured_device", _DEVICES)):
            if getattr(self, name) is not None:
                _choice(f"cost.{name}", getattr(self, name), choices)
        _freeze(self, "rank_slowness")
        if self.rank_slowness is not None and not all(0 < value < math.inf for value in self.rank_slowness or (0,)):
            raise ConfigError(f"cost.rank_slowness={list(self.rank_slowness)}: every value must be above 0 and finite")

    @property
    def is_measured(self) -> bool:
        """Whether passes of layers or of the output layer take what was measured."""
        return self.layer_forward_seconds is not None or self.output_row_seconds is not None


@dataclass(frozen=True)
class ClusterConfig:
    """The machines a run is planned for; `vp-plan` and `vp-profile` read it.

    `memory_gib`: what one rank may allocate on its GPU.  `*_flops_per_second`: the peak of a GPU by dtype, of which layers and
    vocabulary passes reach `efficiency`, unless `cost` has measured times.  `memory_bytes_per_second`: of a GPU's own memory.
    Links are those of one GPU, in one direction: `node_*` to the others of its node, `network_*` to other nodes.
    With optim.offload also `host_bytes_per_second`, of the link of a GPU to its host, and `host_memory_bytes_per_second`, its
    share of the memory there.
    `overlap`: how much of summing gradients over the replicas, and of gathering parameters, hides behind passes.
    """

    num_nodes: int = 1
    gpus_per_node: int = 4
    memory_gib: float = 4.0
    bfloat16_flops_per_second: float = 1e11
    float16_flops_per_second: float = 1e11
    float32_flops_per_second: float = 1e11
    float64_flops_per_second: float = 5e10
    efficiency: float = 0.5
    memory_bytes_per_second: float = 1e10
    node_seconds: float = 2e-4
    node_bytes_per_second: float = 1e9
    network_seconds: float = 1e-3
    network_bytes_per_second: float = 1e8
    host_bytes_per_second: float = 1e10
    host_memory_bytes_per_second: float = 1e10
    overlap: float = 0.0

    def __post_init__(self) -> None:
        _finite("cluster.", self)
        for item in fields(self):
            value = getattr(self, item.name)
            is_fraction = item.name in ("efficiency", "overlap")
            least = 1 if item.name.endswith("_per_second") or isinstance(value, int) else 0
            _at_least(f"cluster.{item.name}", value, least)
            if is_fraction and value > 1:
                raise ConfigError(f"cluster.{item.name}={value} is out of range; it is a fraction, at most 1")
        for name in ("memory_gib", "efficiency"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"cluster.{name}={getattr(self, name)} is too small; it must be above 0")

    @property
    def num_gpus(self) -> int:
        return self.num_nodes * self.gpus_per_node


_LONGEST_SECONDS = 10_000_000  # to wait for a rank


@dataclass(frozen=True)
class RunSettings:
    """One run: how long, where its files go, what happens when something goes wrong."""

    name: str = "default"
    root: str = "runs"
    steps: int = 90
    seed: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    comm_backend: str = "nccl"  # on cuda; gloo, through host memory, lets several ranks share a GPU
    comm_priority: bool = True  # nccl: communication runs on streams of high priority
    collective_ctas: int = 2  # nccl: most thread blocks of a collective of the vocabulary layers; 0: NCCL's choice
    hop_channels: int = 2  # nccl: most channels of a hop, unless NCCL_MAX_P2P_NCHANNELS is set; 0: NCCL's choice
    deterministic: bool = False  # only algorithms that give the same bits every time; slower on cuda
    log_every: int = 10
    eval_every: int = 30
    eval_microbatches: int = 16
    checkpoint_every: int = 45  # the last step is always saved; 0 turns checkpoints off
    keep_checkpoints: int = 2
    resume: bool = False  # continue from the newest checkpoint of this run directory
    init_from: str | None = None  # weights of another run, or of vp-import, to start from; a resumed run has its own
    trace_step: int = 5  # the step whose passes are timed and written as a trace; 0 turns it off
    on_nonfinite: str = "stop"
    timeout_seconds: float = 300.0  # for a message within a step: a rank that hangs ends the run
    world_timeout_seconds: float = 1800.0  # for what all ranks agree on, at the start and around steps and checkpoints

    def __post_init__(self) -> None:
        _finite("run.", self)
        _choice("run.dtype", self.dtype, _DTYPES)
        _choice("run.device", self.device, _DEVICES)
        _choice("run.comm_backend", self.comm_backend, ("nccl", "gloo"))
        _choice("run.on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        for name in ("steps", "log_every", "keep_checkpoints", "timeout_seconds", "world_timeout_seconds"):
            _at_least(f"run.{name}", getattr(self, name), 1)
        for name in ("timeout_seconds", "world_timeout_seconds"):
            if getattr(self, name) > _LONGEST_SECONDS:
                raise ConfigError(f"run.{name}={getattr(self, name)} is too large; it must be at most {_LONGEST_SECONDS:,}")
        for name in ("eval_every", "eval_microbatches", "checkpoint_every", "trace_step", "collective_ctas", "hop_channels"):
            _at_least(f"run.{name}", getattr(self, name), 0)
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(
                f"run.name={self.name!r} is not a directory name; use letters, digits and dashes, and run.root for the parent"
            )

    def eval_microbatches_of(self, dp_size: int) -> int:
        """How many microbatches of an evaluation each of `dp_size` replicas runs: all run as many, at least one."""
        return max(1, -(-self.eval_microbatches // dp_size))


@dataclass(frozen=True)
class RunConfig:
    """The whole run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    vocab: VocabConfig = field(default_factory=VocabConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    run: RunSettings = field(default_factory=RunSettings)
    num_microbatches: int = 8
    micro_batch_size: int = 1

    def __post_init__(self) -> None:
        _at_least("num_microbatches", self.num_microbatches, 1)
        if self.loss.label_smoothing and self.model.logit_softcap is not None:
            raise ConfigError(
                f"loss.label_smoothing={self.loss.label_smoothing} and model.logit_softcap={self.model.logit_softcap} do not "
                "go together: the sum of capped logits would cost a pass over all of them; set one of the two"
            )
        _at_least("micro_batch_size", self.micro_batch_size, 1)
