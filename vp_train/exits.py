"""Exit codes: whatever starts jobs decides by them whether to start a run again."""

EXIT_OK = 0
EXIT_INTERNAL = 70  # a bug, or a peer that died
EXIT_IO = 74  # disk full, directory not writable
EXIT_TIME = 75  # a search ran out of time without a result; a longer one may have one
EXIT_CONFIG = 78  # something the user must change, a diverging run included; starting again cannot help
EXIT_HANG = 124  # a rank did not answer in time
