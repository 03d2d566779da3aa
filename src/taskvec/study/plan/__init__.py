"""A study as a list of steps: who reads what."""
