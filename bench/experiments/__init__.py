"""Experiments behind statements in the documentation."""
