"""The imports of the ranks of tests: their processes are forked from one that has made them."""

import gc
import os
from importlib import import_module

from vp_train.quiet import quiet_deprecations, quiet_megatron
from vp_train.settings import load_config

os.environ.setdefault("DS_ACCELERATOR", "cpu")
quiet_deprecations()
with quiet_megatron():
    import_module("megatron.core.models.gpt.gpt_layer_specs")
for _heavy in (
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which imports torch's compiler
    "setuptools",  # for deepspeed.ops
    "torch._dynamo",
    "torch.utils.tensorboard",
    "vp_train.train",
    "vp_train.commands.launch",
    "vp_train.report.page",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "jinja2.loaders",
):
    import_module(_heavy)
for _groups in ("", "model=nano"):  # imports hydra, and reads files that need not be read again
    for _more in ("", "data=synthetic", "data=text data.path=text", "cluster=h100_80g_node"):
        load_config([*_groups.split(), *_more.split()])

gc.collect()
gc.freeze()  # collections in the ranks would visit, and so copy, the pages of every object
