"""Pytest plugin, and clocks and facts of the machine that `flmoe_kernels.profile` uses without pytest."""

from importlib.util import find_spec

if find_spec("pytest") is not None:
    from .plugin import *  # noqa: F403
