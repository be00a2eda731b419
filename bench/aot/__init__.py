"""Ahead-of-time compile report of every Triton kernel; needs no GPU: python -m bench.aot."""
