"""A validated study, its plan and its steps."""
