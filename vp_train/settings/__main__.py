"""Write docs/settings.md to standard output."""

from vp_train.settings.help import settings_page

print(settings_page(), end="")
