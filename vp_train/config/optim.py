"""The sections `loss` and `optim`."""

from __future__ import annotations

from dataclasses import dataclass

from vp_train.config.errors import ConfigError
from vp_train.config.setting import check_section, setting

# Parameters and the learning rate that GPT-3 models of that size had (arXiv 2005.14165, table 2.1).
_RATES = (
    *((125e6, 6e-4), (350e6, 3e-4), (760e6, 2.5e-4), (1.3e9, 2e-4)),
    *((2.7e9, 1.6e-4), (6.7e9, 1.2e-4), (13e9, 1e-4), (175e9, 0.6e-4)),
)
SMALLEST = _RATES[0][0]  # parameters; GPT-3 has no smaller model
_LARGE = 1e9  # parameters of a model that the default rate is too high for


@dataclass(frozen=True)
class LossConfig:
    """The loss that training minimises; see `vocab.loss`.

    Validation measures the plain negative log-likelihood, the mean over all tokens.
    """

    label_smoothing: float = setting(
        0.0, "Part of the target that is spread over the vocabulary.", least=0, below=1
    )
    z_loss: float = setting(
        0.0, "Weight of the squared log-sum-exp of every token's logits.", least=0
    )
    normalisation: str = setting(
        "token",
        "token: mean over all tokens; sequence: mean over the sequences' means.",
        choices=("token", "sequence"),
    )

    def __post_init__(self) -> None:
        check_section("loss.", self)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, a learning-rate schedule with warm-up, global gradient clipping."""

    name: str = setting(
        "adamw",
        "adamw keeps the whole state in every replica; zero1 shards it over the replicas.",
        choices=("adamw", "zero1"),
    )
    lr: float = setting(2e-3, "Learning rate after the warm-up.", least=0)
    min_lr: float | None = setting(
        None, "Learning rate that the decay ends at; null: a tenth of lr.", least=0
    )
    schedule: str = setting(
        "cosine",
        "cosine decays from lr to min_lr; wsd holds lr and decays linearly at the end of the run.",
        choices=("cosine", "wsd"),
    )
    warmup_steps: int = setting(10, "Steps in which the rate rises to lr.", unit="steps", least=0)
    decay_fraction: float = setting(
        0.2, "wsd: part of the run in which the rate falls.", least=0, below=1
    )
    weight_decay: float = setting(0.1, "Decoupled weight decay of matrices.", least=0)
    beta1: float = setting(0.9, "Decay of the running mean of gradients.", least=0, below=1)
    beta2: float = setting(0.95, "Decay of the running mean of their squares.", least=0, below=1)
    epsilon: float = setting(1e-8, "Added to the root of the mean square.", above=0)
    clip_grad_norm: float = setting(
        1.0, "Largest norm of all gradients; 0 turns clipping off.", least=0
    )
    offload: bool = setting(False, "zero1: keep the state in host memory and update it there.")
    overlap_sums: bool = setting(
        True, "Sum a bucket of gradients over the replicas beside the passes that follow it."
    )
    overlap_gathers: bool = setting(
        True, "zero1: gather the new parameters beside the first passes of the next step."
    )
    bucket_mib: int = setting(
        64,
        "Largest size of a gradient bucket, which also has at most an eighth of a stage; "
        "a larger MLP or attention is reduced in one piece.",
        unit="MiB",
        least=1,
        most=1 << 20,
    )

    def __post_init__(self) -> None:
        check_section("optim.", self)
        if self.offload and self.name != "zero1":
            raise ConfigError(
                f"optim.offload=true counts only with optim.name=zero1, not {self.name}; "
                "change one of the two"
            )
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ConfigError(
                f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}, which decays to it; "
                "lower it, or leave it out for a tenth of optim.lr"
            )

    @property
    def final_lr(self) -> float:
        """The learning rate that the decay ends at: min_lr, or a tenth of lr."""
        return self.lr / 10 if self.min_lr is None else self.min_lr


def usual_rate(num_parameters: int) -> float:
    """Return the learning rate that GPT-3 models of about this size had."""
    return next((rate for most, rate in _RATES if num_parameters <= most), _RATES[-1][1])


def rate_advice(optim: OptimConfig, num_parameters: int) -> str | None:
    """Return that a large model has the default learning rate, in words, else None."""
    if optim.lr != OptimConfig().lr or num_parameters <= _LARGE:
        return None
    return (
        f"optim.lr={optim.lr:g} is the default, which is for small models; GPT-3 had about "
        f"optim.lr={usual_rate(num_parameters):g} for this size"
    )
