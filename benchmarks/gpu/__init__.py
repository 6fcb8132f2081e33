"""The steps of `gpu_check.py`, by what they check."""
