"""Rows in; PNG and PDF out."""
