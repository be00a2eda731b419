"""Emulated CUDA C++ kernels: backend "cuda" runs nvcc's PTX and the host's launches on CPU tensors, without a GPU.

The sources of pair_moe are compiled for sm_80, with a CUDA runtime whose launches call the emulator.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import pybind11
import pytest
import torch
from torch import Tensor

from flmoe_kernels.core import backend
from flmoe_kernels.ops.pair_moe import cuda, native_call

from .arithmetic import Array
from .machine import run
from .memory import Access, Findings, GlobalMemory, Owners, Region, region_of
from .program import Program

ROOT = Path(__file__).resolve().parents[3]
SOURCES = sorted((ROOT / "csrc/cuda").glob("pair_moe*.cu"))
_RUNTIME = Path(__file__).with_name("cuda_runtime.cpp")
_BINDINGS = ROOT / "csrc/bindings/pair_moe_cuda.cpp"
_ARCHITECTURE = "arch=compute_80,code=compute_80"
_HEADER = """#pragma once
namespace flmoe {
inline constexpr int kCudaOldest = 80;
}
"""


class HostMemory(GlobalMemory):
    """Tensors at their addresses in the host's memory."""

    def _locate(
        self, access: Access, address: Array, size: int
    ) -> Iterator[tuple[Region, Array, Array]]:
        access.report("misaligned", address % size != 0)
        left = address % size == 0
        for tensor in self.tensors:
            offset = address - tensor.data.ctypes.data
            inside = left & (offset >= tensor.low) & (offset + size <= tensor.high)
            left = left & ~inside
            if inside.any():
                yield tensor, np.flatnonzero(inside), offset[inside]
        access.report("out of bounds", left)


@cache
def build() -> Path:
    """Folder with the PTX of each source and the module flmoe_emulated; skips the test without nvcc."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    headers = (path for kind in ("*.h", "*.cuh") for path in (ROOT / "csrc").rglob(kind))
    inputs = [*SOURCES, _RUNTIME, _BINDINGS, *sorted(headers)]
    text = b"".join(path.read_bytes() for path in inputs)
    key = hashlib.sha256(text + sys.version.encode()).hexdigest()[:16]
    folder = ROOT / "build" / f"emulated-{key}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        built = Path(temporary) / folder.name
        built.mkdir()
        _compile(nvcc, built)
        # Another process may have built it meanwhile, and loaded its module, which stays.
        with suppress(OSError):
            built.rename(folder)
    return folder


def _compile(nvcc: str, folder: Path) -> None:
    (folder / "cuda_build.h").write_text(_HEADER)
    includes = [f"-I{path}" for path in (ROOT / "csrc", folder)]
    flags = ["-std=c++17", "-O1", *includes]

    def kernels(source: Path) -> None:
        own = folder / source.stem
        own.mkdir()
        command = [nvcc, *flags, "-c", "-Xcompiler", "-fPIC", "-gencode", _ARCHITECTURE]
        command += ["--keep", "--keep-dir", str(own), str(source)]
        _run([*command, "-o", str(folder / f"{source.stem}.o")])
        shutil.move(own / f"{source.stem}.ptx", folder / f"{source.stem}.ptx")
        shutil.rmtree(own)

    def host(source: Path) -> None:
        # -x c++: nvcc only adds the folders of CUDA's headers.
        paths = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
        command = [nvcc, "-x", "c++", *flags, *paths, "-DFLMOE_HAVE_CUDA=1", "-Xcompiler", "-fPIC"]
        _run([*command, "-c", str(source), "-o", str(folder / f"{source.stem}.o")])

    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(
                lambda f: f[0](f[1]),
                [*((kernels, x) for x in SOURCES), (host, _RUNTIME), (host, _BINDINGS)],
            )
        )
    module = folder / f"flmoe_emulated{sysconfig.get_config_var('EXT_SUFFIX')}"
    objects = map(str, sorted(folder.glob("*.o")))
    _run([nvcc, "-shared", "-cudart", "none", *objects, "-o", str(module)])
    for file in folder.glob("*.o"):
        file.unlink()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@cache
def _module() -> ModuleType:
    (path,) = build().glob("flmoe_emulated*.so")
    spec = importlib.util.spec_from_file_location("flmoe_emulated", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _program(name: str) -> Program:
    return Program(_kernel(name), name)


@cache
def _kernel(name: str) -> str:
    """The PTX of one kernel."""
    for path in build().glob("*.ptx"):
        text = path.read_text()
        place = text.find(f".entry {name}(")
        if place >= 0:
            shared = "".join(line for line in text.splitlines(True) if ".extern .shared" in line)
            return shared + text[place : text.index("\n}", place) + 3]
    raise AssertionError(f"no kernel {name}")


@contextmanager
def emulated_cuda(shared_kib: int = 99) -> Iterator[Findings]:
    """Within the `with` block backend "cuda" takes CPU tensors, and pair_moe's kernels are emulated.

    Args:
        shared_kib: shared memory that a block may have; 99 is the least among the supported GPUs.

    Yields:
        The findings so far: mistakes that the kernels made.
    """
    findings, module = Findings(), _module()
    tensors: dict[tuple[int, ...], Tensor] = {}

    def address(x: Tensor | None) -> int:
        if x is None or not x.numel():
            return 0
        tensors[(x.data_ptr(), *x.shape, *x.stride())] = x
        return x.data_ptr()

    def launch(name: str, grid: int, threads: int, shared: int, arguments: int) -> None:
        program = _program(name)
        places = (ctypes.c_void_p * len(program.parameters)).from_address(arguments)
        parameters = np.zeros(sum(program.parameters[-1][:2]), np.uint8)
        for (first, size, _), place in zip(program.parameters, places, strict=True):
            data = ctypes.string_at(place, size)
            parameters[first : first + size] = np.frombuffer(data, np.uint8)
        memory, granules = HostMemory(), {}
        for x in tensors.values():
            key = x.untyped_storage().data_ptr()
            granules[key] = min(granules.get(key, 16), 1 if x.dtype == torch.uint8 else x.itemsize)
        owners: dict[int, Owners] = {}
        for x in tensors.values():
            memory.tensors.append(region_of(f"{x.dtype} {tuple(x.shape)}", x, granules, owners))
        run(program, memory, parameters, grid, threads // 32, shared, findings)

    refusal = backend._refusal

    def refused(op: str, name: str, tensor: Tensor) -> str:
        return "" if (op, name) == ("pair_moe", "cuda") else refusal(op, name, tensor)

    module.on_launch(shared_kib << 10, launch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "_refusal", refused)
        patch.setattr(cuda, "native_cuda", lambda: module)
        patch.setattr(cuda, "cuda_queue", lambda _device: nullcontext((0, 0)))
        for user in (cuda, native_call):
            patch.setattr(user, "address", address)
        yield findings
