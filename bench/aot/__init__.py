"""Ahead-of-time compile report of all Triton kernels, without a GPU: python -m bench.aot."""
