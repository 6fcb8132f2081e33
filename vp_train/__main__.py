"""`python -m vp_train`: the same as `vp-train`; torchrun starts its ranks this way."""

from vp_train.commands.start import train

train()
