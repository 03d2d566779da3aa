"""Images and tasks: sources, splits, and the two decoded caches."""
