"""The command: one subcommand, one call."""
