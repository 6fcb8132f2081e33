"""Real passes and bytes of single ranks of a job, measured on one device, as costs for planning."""
