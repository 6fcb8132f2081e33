"""The whole configuration of a run: all sections, and the checks of several."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from vp_train.config.bounds import MOST_MICROBATCHES, MOST_WIDTH
from vp_train.config.cluster import ClusterConfig
from vp_train.config.cost import CostConfig
from vp_train.config.data import DataConfig
from vp_train.config.errors import ConfigError
from vp_train.config.model import ModelConfig
from vp_train.config.optim import LossConfig, OptimConfig
from vp_train.config.parallel import ParallelConfig
from vp_train.config.run import RunSettings
from vp_train.config.schedule import ScheduleConfig, VocabConfig
from vp_train.config.setting import KEY, frozen, setting, setting_of

RAMP_WORDS = "write batch_ramp=[[1000,8],[3000,16]]"


@dataclass(frozen=True)
class RunConfig:
    """The whole configuration of a run."""

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
    num_microbatches: int = setting(
        8, "Microbatches of a step in each replica.", least=1, most=MOST_MICROBATCHES
    )
    micro_batch_size: int = setting(1, "Sequences of a microbatch.", least=1, most=MOST_WIDTH)
    batch_ramp: tuple[list[int], ...] = setting(
        (),
        "Smaller steps at the start: [[1000,8],[3000,16]] takes 8 sequences in each step until "
        "step 1000, 16 until step 3000, then all.",
        least=1,
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            if KEY in item.metadata:
                value = frozen(getattr(self, item.name))
                object.__setattr__(self, item.name, value)
                setting_of(item).check(item.name, value, item.default)
        self._check_ramp()
        if self.run.cuda_graphs:
            refuse_with_graphs("data.packing", self.data.packing, "none")
            refuse_with_graphs("run.linear_dtype", self.run.linear_dtype, "compute")
        if self.run.linear_dtype == "float8" and not self.cluster.float8:
            raise ConfigError(
                "run.linear_dtype=float8 needs GPUs that have it, such as an H100, and those of "
                "this cluster do not (cluster.float8=false); drop run.linear_dtype"
            )
        if self.loss.label_smoothing and self.model.logit_softcap is not None:
            raise ConfigError(
                f"loss.label_smoothing={self.loss.label_smoothing} and "
                f"model.logit_softcap={self.model.logit_softcap} do not go together: the sum of "
                "capped logits would cost a pass over all of them; set one of the two"
            )

    def _check_ramp(self) -> None:
        """Raise ConfigError for a ramp that is none, or that its schedule cannot follow."""
        last = 0
        for pair in self.batch_ramp:
            if len(pair) != 2:
                raise ConfigError(
                    f"batch_ramp: {list(pair)} is not a pair of a step and a number of sequences; "
                    f"{RAMP_WORDS}"
                )
            if pair[0] <= last:
                raise ConfigError(
                    f"batch_ramp: step {pair[0]} comes after step {last}; give the steps in order"
                )
            last = pair[0]
        if self.batch_ramp and (self.schedule.file is not None or self.schedule.name == "auto"):
            words = "schedule=auto" if self.schedule.file is None else "schedule.file"
            raise ConfigError(
                f"batch_ramp needs a schedule for every number of microbatches, and {words} has "
                "one; choose a schedule by name"
            )

    @property
    def eval_sequences(self) -> int:
        """The sequences of a validation, of all replicas: at least one."""
        count = self.run.eval_sequences
        return (
            max(1, self.run.eval_microbatches) * self.micro_batch_size if count is None else count
        )

    def eval_microbatches_of(self, dp_size: int) -> int:
        """Return the evaluation microbatches per replica: the same number in all, at least one."""
        return -(-self.eval_sequences // (self.micro_batch_size * dp_size))

    @property
    def sample_length(self) -> int:
        """The tokens of the pieces of text that are shuffled."""
        return self.data.sample_length or self.model.seq_length


def refuse_with_graphs(name: str, value: object, needed: object) -> None:
    """Raise ConfigError if the setting `name` is not as run.cuda_graphs needs it."""
    if value != needed:
        raise ConfigError(
            f"run.cuda_graphs=true replays passes of {name}={needed}, not of {value}; "
            f"use {name}={needed} or run.cuda_graphs=false"
        )
