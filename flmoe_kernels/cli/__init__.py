"""Commands of `python -m flmoe_kernels`, one module per command."""
