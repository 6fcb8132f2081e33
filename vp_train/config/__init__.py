"""The configuration tree: frozen dataclasses whose fields describe and check themselves.

Everything here is what a user may set; derived values live in `RunPlan`.  A field declares its
type, default, bounds, unit and meaning once.  The checks, `--help` and `docs/settings.md` follow
from that.  Checks of two fields are in `__post_init__`.  Checks that need two sections or the world
size are in `planning.plan`.  Every check raises ConfigError, which names the value and the way out.
"""

from vp_train.config.cluster import ClusterConfig
from vp_train.config.cost import CostConfig
from vp_train.config.data import BlendEntry, DataConfig, ValidationEntry
from vp_train.config.errors import ConfigError, printable
from vp_train.config.model import ModelConfig
from vp_train.config.optim import LossConfig, OptimConfig
from vp_train.config.parallel import ParallelConfig
from vp_train.config.run import RunSettings
from vp_train.config.schedule import ScheduleConfig, VocabConfig
from vp_train.config.whole import RunConfig

__all__ = [
    "BlendEntry",
    "ClusterConfig",
    "ConfigError",
    "CostConfig",
    "DataConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RunConfig",
    "RunSettings",
    "ScheduleConfig",
    "ValidationEntry",
    "VocabConfig",
    "printable",
]
