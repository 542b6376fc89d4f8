"""How many bytes a run takes, what fits, and what to change."""
