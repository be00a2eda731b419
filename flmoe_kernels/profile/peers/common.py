"""What the peers of several operators share: torch.compile, autocast, TF32, draws."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flmoe_kernels.profile.cases import Case
from flmoe_kernels.profile.shapes import is_cuda

# One graph per shape of a scan over sizes.
_RECOMPILE_LIMIT = 64


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the very shapes that come."""
    prepare_compiler()
    return torch.compile(function, dynamic=False)


def prepare_compiler() -> None:
    """Room for every shape of a scan, and graphs that can be kept and run backward many times."""
    torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
    functorch: Any = importlib.import_module("torch._functorch.config")
    if hasattr(functorch, "donated_buffer"):
        functorch.donated_buffer = False


def compile_lack(case: Case) -> str:
    """Why torch.compile cannot make code for this case's device here, or ""."""
    if is_cuda(case.device):
        missing = importlib.util.find_spec("triton") is None
        return "torch.compile needs the package triton for a GPU" if missing else ""
    names = (os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++")
    found = any(name and shutil.which(name) for name in names)
    return "" if found else "torch.compile needs a C++ compiler for a CPU"


@contextlib.contextmanager
def tf32(device: str) -> Iterator[None]:
    """float32 products on a GPU's TF32 units, as published training code asks for; others stay as they are."""
    before = torch.get_float32_matmul_precision()
    if is_cuda(device):
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def generator_of(device: str) -> torch.Generator:
    """Seeded, on the device: every contestant of a case there gets the same values, and a GPU need not wait."""
    return torch.Generator(device).manual_seed(1)


def draw(*size: int, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Normal values, float32, on the generator's device."""
    return torch.randn(*size, generator=generator, device=generator.device) * scale


def place(case: Case, x: Tensor, dtype: torch.dtype) -> Tensor:
    """On the case's device in `dtype`, holding what the case's dtype can hold."""
    return x.to(case.dtype).to(device=case.device, dtype=dtype)


def package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
