"""The encoder's operators through Triton: the functions of encoder/cpu.py, on tensors of a GPU."""

from .linear import linear, linear_backward
from .rows import (
    gelu,
    gelu_backward,
    norm,
    norm_backward,
    pool,
    pool_backward,
    views_backward,
    views_of,
)

__all__ = [
    "gelu",
    "gelu_backward",
    "linear",
    "linear_backward",
    "norm",
    "norm_backward",
    "pool",
    "pool_backward",
    "views_backward",
    "views_of",
]
