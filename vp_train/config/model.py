"""The section `model`."""

from __future__ import annotations

from dataclasses import dataclass

from vp_train.config.bounds import MOST_LAYERS, MOST_TOKENS, MOST_WIDTH
from vp_train.config.errors import ConfigError
from vp_train.config.setting import check_section, setting


@dataclass(frozen=True)
class ModelConfig:
    """A decoder.  GPT, Llama, Qwen, Gemma and others are settings of these; see configs/model."""

    num_layers: int = setting(8, "Decoder layers.", least=1, most=MOST_LAYERS)
    hidden_size: int = setting(256, "Width of the residual stream.", least=1, most=MOST_WIDTH)
    num_heads: int = setting(8, "Attention heads.", least=1, most=MOST_WIDTH)
    num_query_groups: int = setting(
        4, "Heads of keys and values, as in GQA.", least=1, most=MOST_WIDTH
    )
    head_size: int | None = setting(
        None, "Width of a head; null: hidden_size / num_heads.", least=1, most=MOST_WIDTH
    )
    ffn_hidden_size: int = setting(768, "Inner width of the MLP.", least=1, most=MOST_WIDTH)
    vocab_size: int = setting(32_768, "Tokens of the vocabulary.", least=1, most=MOST_TOKENS)
    seq_length: int = setting(256, "Tokens of a sequence.", least=1, most=MOST_TOKENS)
    tied_embeddings: bool = setting(False, "The input and the output layer share one matrix.")
    embedding_scale: bool = setting(False, "Multiply embeddings by sqrt(hidden_size).")
    embedding_multiplier: float = setting(
        1.0, "Multiply embeddings by this too, before learned positions.", above=0
    )
    normalisation: str = setting("rmsnorm", "Kind of all norms.", choices=("rmsnorm", "layernorm"))
    zero_centred_norm: bool = setting(False, "RMSNorm scales by 1 + w instead of its weight w.")
    norm_epsilon: float = setting(1e-5, "Added to the variance in a norm.", above=0)
    pre_norms: bool = setting(
        True, "Norms before attention and MLP; false, as in OLMo 2, needs post_norms."
    )
    post_norms: bool = setting(
        False, "Norms after attention and MLP too, before the residual is added."
    )
    residual_multiplier: float = setting(
        1.0, "The outputs of attention and MLP times this are added to the residual.", above=0
    )
    activation: str = setting(
        "swiglu",
        "Activation of the MLP: swiglu or geglu, which are gated, or gelu; "
        "geglu and gelu use the tanh approximation.",
        choices=("swiglu", "geglu", "gelu"),
    )
    linear_bias: bool = setting(False, "Biases in all linear layers of the decoder.")
    qkv_bias: bool = setting(False, "A bias in the linear layer of queries, keys and values.")
    qk_norm: bool = setting(False, "An RMSNorm over each head of queries and keys.")
    qk_norm_whole: bool = setting(
        False,
        "With qk_norm: over all heads of the queries together, and over all of the keys; "
        "needs parallel.tp=1.",
    )
    attention_divisor: float | None = setting(
        None, "Scores are q k / sqrt(attention_divisor); null: head_size.", above=0
    )
    attention_softcap: float | None = setting(None, "c: scores become c tanh(scores / c).", above=0)
    sliding_window: int | None = setting(
        None,
        "Tokens that a local layer attends to, its own included; null: no layer is local.",
        unit="tokens",
        least=1,
    )
    full_attention_every: int | None = setting(
        None,
        "With sliding_window: every n-th layer attends to all tokens; null: no layer does.",
        unit="layers",
        least=1,
    )
    positions: str = setting(
        "rope",
        "Rotary embeddings, or a learned table of seq_length rows that stage 0 adds.",
        choices=("rope", "learned"),
    )
    rope_base: float = setting(10_000.0, "Base of the angles of rotary embeddings.", above=0)
    rope_local_base: float | None = setting(
        None, "Base of the angles in local layers; null: rope_base.", above=0
    )
    rope_scaling: str = setting(
        "none",
        "linear divides all angles by rope_factor, llama3 (arXiv 2407.21783) and yarn "
        "(arXiv 2309.00071) only low frequencies.",
        choices=("none", "linear", "llama3", "yarn"),
    )
    rope_factor: float = setting(1.0, "Divisor of rope_scaling.", least=1)
    rope_low_frequency: float = setting(
        1.0,
        "llama3, yarn: frequencies with fewer turns than this within rope_original_length are "
        "divided by the whole rope_factor.",
    )
    rope_high_frequency: float = setting(
        4.0,
        "llama3, yarn: frequencies with more turns than this are not divided; usual for yarn: 32.",
    )
    rope_original_length: int = setting(
        8192, "llama3, yarn: sequence length before scaling.", unit="tokens", least=1
    )
    rope_attention_factor: float | None = setting(
        None,
        "yarn: queries and keys are multiplied by this; null: 0.1 ln(rope_factor) + 1.",
        above=0,
    )
    init_std: float = setting(0.02, "Standard deviation of initial weights.", least=0)
    logit_divisor: float = setting(1.0, "Logits are divided by this, before the softcap.", above=0)
    logit_softcap: float | None = setting(None, "c: logits become c tanh(logits / c).", above=0)

    def __post_init__(self) -> None:
        check_section("model.", self)
        self._check_heads()
        self._check_pairs()

    def _check_heads(self) -> None:
        if self.head_size is None and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"model.hidden_size={self.hidden_size} does not split over "
                f"model.num_heads={self.num_heads}; "
                f"use a multiple of {self.num_heads}, or set model.head_size"
            )
        size = self.head_size or self.hidden_size // self.num_heads
        if self.positions == "rope" and size % 2:
            name = (
                "model.hidden_size / model.num_heads"
                if self.head_size is None
                else "model.head_size"
            )
            raise ConfigError(f"{name} = {size} is odd; rotary embeddings need an even head size")
        if self.num_heads % self.num_query_groups:
            raise ConfigError(
                f"model.num_heads={self.num_heads} does not split over "
                f"model.num_query_groups={self.num_query_groups}; use a divisor of {self.num_heads}"
            )

    def _check_pairs(self) -> None:
        """Raise ConfigError for a setting that counts only with another one."""
        if self.zero_centred_norm and self.normalisation != "rmsnorm":
            raise ConfigError(
                "model.zero_centred_norm=true counts only with model.normalisation=rmsnorm, "
                f"not {self.normalisation}; drop one of the two"
            )
        if self.qk_norm and self.normalisation != "rmsnorm":
            raise ConfigError(
                "model.qk_norm=true counts only with model.normalisation=rmsnorm, "
                f"not {self.normalisation}; drop one of the two"
            )
        if not self.pre_norms and not self.post_norms:
            raise ConfigError(
                "model.pre_norms=false counts only with model.post_norms=true; "
                "layers without any norm do not train"
            )
        if self.qk_norm_whole and (self.zero_centred_norm or not self.qk_norm):
            raise ConfigError(
                "model.qk_norm_whole=true counts only with model.qk_norm=true and "
                "model.zero_centred_norm=false; set these, or drop it"
            )
        for name in ("full_attention_every", "rope_local_base"):
            if getattr(self, name) is not None and self.sliding_window is None:
                raise ConfigError(
                    f"model.{name}={getattr(self, name)} counts only with model.sliding_window; "
                    "set it, or drop this"
                )
        for name, unused in (("rope_local_base", None), ("rope_scaling", "none")):
            if getattr(self, name) != unused and self.positions != "rope":
                raise ConfigError(
                    f"model.{name}={getattr(self, name)} counts only with model.positions=rope, "
                    f"not {self.positions}; drop one of the two"
                )
        if self.rope_factor != 1 and self.rope_scaling == "none":
            raise ConfigError(
                f"model.rope_factor={self.rope_factor} counts only with "
                "model.rope_scaling=linear, llama3 or yarn; set one of them"
            )
        if self.rope_scaling == "yarn" and (
            self.rope_local_base is not None or self.rope_base <= 1
        ):
            raise ConfigError(
                f"model.rope_scaling=yarn needs model.rope_base={self.rope_base} above 1 and "
                f"model.rope_local_base={self.rope_local_base} null; change those, or drop it"
            )
        if self.rope_attention_factor is not None and self.rope_scaling != "yarn":
            raise ConfigError(
                f"model.rope_attention_factor={self.rope_attention_factor} counts only with "
                f"model.rope_scaling=yarn, not {self.rope_scaling}; drop one of the two"
            )
        if (
            self.rope_scaling in ("llama3", "yarn")
            and not 0 < self.rope_low_frequency < self.rope_high_frequency
        ):
            raise ConfigError(
                f"model.rope_low_frequency={self.rope_low_frequency} and "
                f"model.rope_high_frequency={self.rope_high_frequency}: "
                "the first must be above 0 and below the second"
            )

    def is_local(self, layer: int) -> bool:
        """Return whether this layer attends only to `sliding_window` tokens.

        Layers are counted from 0 over the whole model.
        """
        every = self.full_attention_every
        return self.sliding_window is not None and (every is None or (layer + 1) % every != 0)
