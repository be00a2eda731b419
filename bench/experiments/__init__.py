"""Experiments whose results back sentences of the README and of bench/results/NOTES.md."""
