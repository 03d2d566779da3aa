"""Content-addressed steps: what is done is not done again."""
