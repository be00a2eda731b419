"""Helpers for peers: torch.compile, TF32, versions of packages."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.shapes import is_cuda

# One graph per shape of a scan over sizes.
_RECOMPILE_LIMIT = 64


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for static shapes."""
    prepare_compiler()
    return torch.compile(function, dynamic=False)


def prepare_compiler() -> None:
    """Room for every shape of a scan, and graphs that can be kept and run backward many times."""
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    functorch: Any = importlib.import_module("torch._functorch.config")
    if hasattr(functorch, "donated_buffer"):
        functorch.donated_buffer = False


def compile_unavailable_reason(case: Case) -> str:
    """Why torch.compile cannot generate code for this case's device here, or ""."""
    if is_cuda(case.device):
        missing = importlib.util.find_spec("triton") is None
        return "torch.compile needs the package triton for a GPU" if missing else ""
    names = (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")
    found = any(name and shutil.which(name) for name in names)
    return "" if found else "torch.compile needs a C++ compiler for a CPU"


@contextlib.contextmanager
def tf32(device: str) -> Iterator[None]:
    """float32 products on a GPU's TF32 units, as published training code uses them."""
    before = torch.get_float32_matmul_precision()
    if is_cuda(device):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
