"""The encoder's operators through Triton: the functions of encoder/cpu.py, on tensors of a GPU."""

from .fused import (
    add_linear,
    fits,
    norm_linear,
    norm_linear_backward,
    norm_mlp,
    norm_mlp_backward,
)
from .linear import linear, linear_backward
from .mlp import mlp, mlp_backward
from .rows import (
    norm,
    norm_backward,
    pool,
    pool_backward,
    views_backward,
    views_of,
)

__all__ = [
    "add_linear",
    "fits",
    "linear",
    "linear_backward",
    "mlp",
    "mlp_backward",
    "norm",
    "norm_backward",
    "norm_linear",
    "norm_linear_backward",
    "norm_mlp",
    "norm_mlp_backward",
    "pool",
    "pool_backward",
    "views_backward",
    "views_of",
]
