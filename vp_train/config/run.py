"""The section `run`: one run, its files and its devices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vp_train.config.bounds import DEVICES, DTYPES, LINEAR_DTYPES, MOST_MICROBATCHES, MOST_WIDTH
from vp_train.config.errors import ConfigError
from vp_train.config.figures import PROGRESS
from vp_train.config.setting import check_section, setting

_LONGEST_SECONDS = 10_000_000  # the longest timeout
PERMISSIONS = ("batch", "sequence", "loss")
SETTLED_STEP = 5  # of a process: whatever warms up is over
TRACKERS = ("wandb", "mlflow")


@dataclass(frozen=True)
class RunSettings:
    """One run: its length, its files, its devices, and what to do when something goes wrong."""

    name: str = setting("default", "Directory of the run, in root.")
    root: str = setting("runs", "Directory of all runs.")
    steps: int = setting(90, "Optimizer steps.", unit="steps", least=1)
    seed: int = setting(1, "Seed of the initial weights.")
    dtype: str = setting(
        "float32",
        "Dtype of weights and activations; gradients and optimizer state are at least float32.",
        choices=DTYPES,
    )
    linear_dtype: str = setting(
        "compute",
        "Dtype of the products y and dx of the decoder's linear layers; compute: run.dtype; "
        "float8 needs run.dtype=bfloat16 (see memory.md).",
        choices=LINEAR_DTYPES,
    )
    float8_scales: str = setting(
        "row",
        "With linear_dtype=float8: a scale for each token and each row or column of a weight, or "
        "one for each tensor.",
        choices=("row", "tensor"),
    )
    device: str = setting("cpu", "Where the ranks compute.", choices=DEVICES)
    comm_backend: str = setting(
        "nccl",
        "Library of communication on cuda; "
        "gloo goes through host memory and lets several ranks share a GPU.",
        choices=("nccl", "gloo"),
    )
    comm_priority: bool = setting(True, "nccl: communication runs on streams of high priority.")
    collective_ctas: int = setting(
        2,
        "nccl: maximum thread blocks of a vocabulary collective; 0: NCCL's choice.",
        least=0,
        most=1_024,
    )
    hop_channels: int = setting(
        2,
        "nccl: maximum channels of a hop unless NCCL_MAX_P2P_NCHANNELS is set; 0: NCCL's choice.",
        least=0,
        most=1_024,
    )
    compile: str = setting(
        "auto",
        "Compile; auto: where it pays, on cuda or in 16 bits on a CPU, with a compiler; "
        "on: all elementwise work but LayerNorm, GELU; off: nothing.",
        choices=("auto", "on", "off"),
    )
    cuda_graphs: bool = setting(
        False,
        "Replay the passes of layers as CUDA graphs: less for the host to do, some more memory.",
    )
    deterministic: bool = setting(
        False, "Use only algorithms with bitwise reproducible results; slower on cuda."
    )
    log_every: int = setting(10, "Steps between two lines of progress.", unit="steps", least=1)
    progress: tuple[str, ...] = setting(
        (
            *("loss", "grad_norm", "learning_rate", "interval_tokens_per_second"),
            *("bubble_mean", "left", "peak_bytes"),
        ),
        "Figures of such a line, in this order; monitoring.md has their meaning.",
        choices=PROGRESS,
    )
    eval_every: int = setting(
        30, "Steps between two validations; 0 turns them off.", unit="steps", least=0
    )
    eval_microbatches: int = setting(
        16,
        "Microbatches of a validation, of all replicas; of each set of data.validation.",
        least=0,
        most=MOST_MICROBATCHES,
    )
    eval_sequences: int | None = setting(
        None,
        "Sequences of a validation instead of eval_microbatches: the same ones for every "
        "micro_batch_size.",
        least=1,
        most=MOST_WIDTH,
    )
    checkpoint_every: int = setting(
        45,
        "Steps between two checkpoints; the last step has one too; 0 turns them off.",
        unit="steps",
        least=0,
    )
    checkpoint_minutes: float = setting(
        0.0,
        "Minutes between two checkpoints, besides checkpoint_every; 0 turns them off.",
        unit="min",
        least=0,
    )
    max_minutes: float = setting(
        0.0,
        "Minutes after which the run saves a checkpoint and exits with 75; 0: no limit.",
        unit="min",
        least=0,
    )
    keep_checkpoints: int = setting(2, "Newest checkpoints that are kept.", least=1)
    resume: bool = setting(False, "Go on from the newest checkpoint of this run.")
    allow: tuple[str, ...] = setting(
        (),
        "What may change in a resumed run: batch, the sequences of a step; sequence, their "
        "length, rotary embeddings and windows; loss.",
        choices=PERMISSIONS,
    )
    init_from: str | None = setting(
        None,
        "Directory of a run or of vp-import with the initial weights; a resumed run has its own.",
    )
    trace_step: int = setting(
        SETTLED_STEP,
        "Step whose passes are timed and written as a trace; a resumed run that has done it times "
        f"step {SETTLED_STEP} of its own, if it gets there; 0: none.",
        least=0,
    )
    trackers: tuple[str, ...] = setting(
        (), "Services that get the metrics too; each is an extra to install.", choices=TRACKERS
    )
    project: str = setting("vp_train", "Project of a run at its trackers.")
    report: bool = setting(
        True, "Write report.html at the end; without the extra `plot` there is none."
    )
    profile_steps: tuple[int, ...] = setting(
        (), "Steps that torch's profiler records, in profile/ of the run.", least=1
    )
    profile_ranks: tuple[int, ...] = setting(
        (0,), "Ranks whose profile_steps are recorded.", least=0
    )
    on_nonfinite: str = setting(
        "stop",
        "What to do at a loss or gradient that is not finite; "
        "go_back: to the last checkpoint, leaving out the data since then.",
        choices=("stop", "skip", "go_back"),
    )
    on_spike: str = setting(
        "apply",
        "What to do at a finite spike of the loss or of the gradient norm: apply the step and say "
        "so, or as for on_nonfinite.",
        choices=("apply", "stop", "skip", "go_back"),
    )
    spike_loss_factor: float = setting(
        2.0,
        "Times the median of the last 64 steps from which a loss is a spike, after 16 steps.",
        above=1,
    )
    spike_norm_factor: float = setting(
        10.0,
        "Times the median of the last 64 steps that a norm of gradients must be to be a spike.",
        above=1,
    )
    timeout_seconds: float = setting(
        300.0,
        "Longest wait for a message within a step; a rank that hangs ends the run.",
        unit="s",
        least=1,
        most=_LONGEST_SECONDS,
    )
    world_timeout_seconds: float = setting(
        1800.0,
        "Longest wait of all ranks for each other at the start, around steps and at checkpoints, "
        "and for a disk on which a save does not get on.",
        unit="s",
        least=1,
        most=_LONGEST_SECONDS,
    )

    def __post_init__(self) -> None:
        check_section("run.", self)
        if self.linear_dtype == "float8" and self.dtype != "bfloat16":
            raise ConfigError(
                f"run.linear_dtype=float8 needs run.dtype=bfloat16, not {self.dtype}, which is not "
                "scaled to float8; set run.dtype=bfloat16, or drop run.linear_dtype"
            )
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(
                f"run.name={self.name!r} is not a directory name; "
                "it has no / and no dot at its beginning; run.root is for the parent"
            )

    @property
    def directory(self) -> Path:
        """The directory of the run's files."""
        return Path(self.root).expanduser() / self.name

    @property
    def checkpoints(self) -> Path:
        """The directory of the run's checkpoints."""
        return self.directory / "checkpoints"

    @property
    def saves(self) -> bool:
        """Return whether the run writes checkpoints at all."""
        return self.checkpoint_every > 0 or self.checkpoint_minutes > 0

    def is_due(self, step: int, every: int) -> bool:
        """Return whether something that happens every `every` steps, and at the end, is due."""
        return every > 0 and (step % every == 0 or step == self.steps)

    @property
    def profiles(self) -> Path:
        """The directory of what torch's profiler recorded."""
        return self.directory / "profile"
