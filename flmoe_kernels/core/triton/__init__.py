"""Launches, launch tables, Philox and tuning of the Triton kernels."""
