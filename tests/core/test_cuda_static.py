"""Tests of the built CUDA code: registers, atomics and dependencies."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from flmoe_kernels.core.backend import native

ARCHITECTURES, REASON = native().cuda_build()
WITHOUT_CUDA = pytest.mark.skipif(
    not ARCHITECTURES, reason=f"the native module was built without CUDA ({REASON})"
)
# Kernels for more than four experts and for float64 need more registers than there are; narrower chunks would
# compute the gate more often. The named shapes have four experts. The last limit is for nvcc 12.8.
SPILLS = (("(float|B?Float16), 8", 64), ("double, 8", 256), ("double, 4", 8))


@WITHOUT_CUDA
@pytest.mark.skipif(not shutil.which("c++filt"), reason="c++filt is not installed")
def test_registers_do_not_spill() -> None:
    pytest.importorskip(
        "triton", reason="the package triton, which has cuobjdump, is not installed"
    )
    from bench.aot.cuda import kernels

    for kernel in kernels():
        allowed = [most for pattern, most in SPILLS if re.match(pattern, kernel.arguments)]
        assert kernel.spilled <= max(allowed, default=0), kernel


@WITHOUT_CUDA
def test_no_atomics() -> None:
    """Without atomics, results cannot depend on the order of threads."""
    pytest.importorskip(
        "triton", reason="the package triton, which has cuobjdump, is not installed"
    )
    from bench.aot.cuda import dump

    ptx = dump("--dump-ptx")
    assert "match.any" in ptx, "this is not the kernels' PTX"
    assert re.findall(r"\b(?:atom|red)\.\S+", ptx) == []


@WITHOUT_CUDA
@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_module_needs_no_driver_and_exports_no_cuda_symbols() -> None:
    """The runtime is static and hidden, so it needs no driver and cannot conflict with torch's copy."""
    if not shutil.which("readelf"):
        pytest.skip("readelf is not installed")
    module = native().__file__

    def output(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    dynamic = output("readelf", "--wide", "--dynamic", module)
    needed = [line.split("[")[-1] for line in dynamic.splitlines() if "NEEDED" in line]
    assert needed
    assert not [name for name in needed if name.startswith("libcu")]
    symbols = output("readelf", "--wide", "--dyn-syms", module)
    assert "PyInit__native" in symbols
    assert not [
        line for line in symbols.splitlines() if " cuda" in line or "__cudaRegister" in line
    ]
