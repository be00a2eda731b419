"""The commands of `python -m flmoe_kernels`, a module each; cli.py puts them together."""
