"""Helpers for peers: torch.compile, TF32."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

import torch

from flmoe_kernels.profile.shapes import is_cuda

# A scan over sizes needs one graph per shape.
_RECOMPILE_LIMIT = 64


def prepare_compiler() -> None:
    """Allow one graph per shape of a scan, and graphs whose backward can run many times."""
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    functorch: Any = importlib.import_module("torch._functorch.config")
    if hasattr(functorch, "donated_buffer"):
        functorch.donated_buffer = False


@contextlib.contextmanager
def tf32(device: str) -> Iterator[None]:
    """Use TF32 for float32 products on a GPU, as published training code does."""
    before = torch.get_float32_matmul_precision()
    if is_cuda(device):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
