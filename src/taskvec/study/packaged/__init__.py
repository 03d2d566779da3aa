"""Packaged studies, run by name."""
