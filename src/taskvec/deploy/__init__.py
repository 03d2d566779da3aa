"""The model that a study keeps, ready to use."""
