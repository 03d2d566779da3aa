"""Heads and fine-tuning."""
