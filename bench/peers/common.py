"""Helpers for peers: torch.compile, TF32, package versions."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
from collections.abc import Iterator
from typing import Any

import torch

from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.shapes import is_cuda

# A scan over sizes needs one graph per shape.
_RECOMPILE_LIMIT = 64


def prepare_compiler() -> None:
    """Allow one graph per shape of a scan, and graphs whose backward can run many times."""
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    functorch: Any = importlib.import_module("torch._functorch.config")
    if hasattr(functorch, "donated_buffer"):
        functorch.donated_buffer = False


def compile_unavailable_reason(case: Case) -> str:
    """Why torch.compile cannot generate code for this case's device on this machine, or ""."""
    if is_cuda(case.device):
        missing = importlib.util.find_spec("triton") is None
        return "torch.compile needs the package triton on a GPU" if missing else ""
    names = (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")
    has_compiler = any(name and shutil.which(name) for name in names)
    return "" if has_compiler else "torch.compile needs a C++ compiler on a CPU"


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
