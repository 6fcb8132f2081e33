"""Real passes and bytes of single ranks of a job, measured on one device; what they cost, for the planner."""
