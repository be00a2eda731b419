"""Tests of the built CUDA code: registers, atomics, dependencies.

They read the machine code with the cuobjdump of the package triton.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from flmoe_kernels.core.backend import native

if TYPE_CHECKING:
    from bench.aot.cuda import Kernel

ARCHITECTURES, REASON = native().cuda_build()
WITHOUT_CUDA = pytest.mark.skipif(
    not ARCHITECTURES, reason=f"the native module was built without CUDA ({REASON})"
)
GATES = [
    (f"Gate<{dtype}, {items}>", 256)
    for dtype in ("float", "double", "BFloat16", "Float16")
    for items in (0, 1, 2, 8)
]
ROWS = [("CountRows", 256), ("ScanCounters", 256), ("MaskRows", 256)]
ROWS += [(name, threads) for name in ("KeepRows", "PlaceRows") for threads in (256, 1024)]
ROUTING = [("routing_kernel", f"{threads}, {name}") for name, threads in GATES + ROWS]
TYPES = ("BFloat16", "Float16", "float", "double")
PAIRS = [
    *(
        ("pair_kernel", f"{dtype}, {experts}, {mode}")
        for dtype in TYPES
        for experts in (4, 8)
        for mode in range(3)
    ),
    *(("project_kernel", f"{x}, {'double' if x == 'double' else 'float'}") for x in TYPES),
    *(("sum_kernel", x) for x in ("float", "double")),
]
# Kernels for more than four experts and for float64 need more registers than there are; narrower chunks would
# compute the gate more often. The named shapes have four experts. The last limit is for
# nvcc 12.8.
SPILLS = (("(float|B?Float16), 8", 64), ("double, 8", 256), ("double, 4", 8))
KIB = 1024


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    pytest.importorskip(
        "triton", reason="the package triton, which has cuobjdump, is not installed"
    )
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt is not installed")
    from bench.aot import cuda

    return cuda.kernels()


@WITHOUT_CUDA
def test_every_kernel_exists_for_every_architecture(kernels: list[Kernel]) -> None:
    here: dict[str, list[tuple[str, str]]] = {}
    for kernel in kernels:
        arguments = re.sub(r"\((?:int|PairMode)\)(\d+)", r"\1", kernel.arguments)
        here.setdefault(kernel.architecture, []).append((kernel.kernel, arguments))
    assert set(here) == set(ARCHITECTURES.split(",")[0].split())
    for names in here.values():
        assert sorted(names) == sorted(ROUTING + PAIRS)


@WITHOUT_CUDA
def test_registers_do_not_spill(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        allowed = [most for pattern, most in SPILLS if re.match(pattern, kernel.arguments)]
        assert kernel.spilled <= max(allowed, default=0), kernel


@WITHOUT_CUDA
def test_blocks_fit_an_sm(kernels: list[Kernel]) -> None:
    """Every block fits 64 Ki registers and 48 KiB of static shared memory; two small blocks fit together."""
    for kernel in kernels:
        threads = (
            int(kernel.arguments.split(",")[0].strip("(int)"))
            if "routing" in kernel.kernel
            else 128
        )
        blocks = 1 if threads == 1024 else 2
        assert kernel.registers * threads * blocks <= 64 * KIB, kernel
        assert kernel.shared <= 48 * KIB, kernel


@WITHOUT_CUDA
def test_products_of_16_bits_use_the_matrix_units(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        products = kernel.kernel == "pair_kernel" and "Float16" in kernel.arguments
        assert (kernel.matrix > 0) == products, kernel


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
