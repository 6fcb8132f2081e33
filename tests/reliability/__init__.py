"""Campaigns of faults: `python -m tests.reliability` runs the long forms, CI short ones."""
