"""The only door to hydra: overrides -> RunConfig, and the settings in words.

Overrides and YAML files are checked for size and depth before hydra or omegaconf parses them.
Nothing is interpolated: `${...}` is refused wherever it stands, also in overrides, since the shell
expands variables, and a file that somebody else wrote must not read the environment.

`python -m vp_train.settings > docs/settings.md` writes the page of all settings.
"""

from vp_train.settings.load import load_config

__all__ = ["load_config"]
