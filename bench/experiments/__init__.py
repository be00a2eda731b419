"""Experiments behind statements in the README and in bench/results/NOTES.md."""
