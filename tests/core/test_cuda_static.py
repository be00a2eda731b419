"""Tests of the built CUDA code: registers, atomics, dependencies.

They read the machine code with the cuobjdump of the package triton.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

from flmoe_kernels.core.backend import native

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
KIB = 1024
_RESOURCES = re.compile(
    r"Function (\S+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+) "
    r"LOCAL:(?P<local>\d+)"
)
# routing_kernel<256, flmoe::routing::PlaceRows> of a demangled name.
_KERNEL = re.compile(r"(\w+)<(\(int\))?(\d+), (.*)>\(")


@dataclass(frozen=True)
class Kernel:
    """A kernel for an architecture: registers and spilled bytes per thread, shared bytes per block."""

    kernel: str
    threads: int
    architecture: str
    registers: int
    spilled: int
    shared: int


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def dump(option: str) -> str:
    triton, module = pytest.importorskip("triton"), native().__file__
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt is not installed")
    assert module is not None
    return output(triton.knobs.nvidia.cuobjdump.path, option, module)


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """All kernels of the native module, by name and architecture."""
    found = []
    for part in dump("--dump-resource-usage").split("Fatbin elf code:")[1:]:
        label = re.search(r"arch = (sm_\d+)", part)
        assert label is not None
        # Some versions of cuobjdump omit the "a" of sm_90a.
        architecture = f"{label[1]}a" if f"{label[1]}a" in ARCHITECTURES else label[1]
        for match in _RESOURCES.finditer(part):
            name = _KERNEL.search(output("c++filt", match[1]))
            assert name is not None, f"not a kernel of routing: {match[1]}"
            found.append(
                Kernel(
                    re.sub(r"\bflmoe::(\w+::)?", "", name[4]).strip(),
                    int(name[3]),
                    architecture,
                    int(match["registers"]),
                    int(match["stack"]) + int(match["local"]),
                    int(match["shared"]),
                )
            )
    return found


@WITHOUT_CUDA
def test_every_kernel_exists_for_every_architecture(kernels: list[Kernel]) -> None:
    here: dict[str, list[tuple[str, int]]] = {}
    for kernel in kernels:
        here.setdefault(kernel.architecture, []).append((kernel.kernel, kernel.threads))
    assert set(here) == set(ARCHITECTURES.split(",")[0].split())
    for names in here.values():
        assert sorted(names) == sorted(GATES + ROWS)


@WITHOUT_CUDA
def test_registers_do_not_spill(kernels: list[Kernel]) -> None:
    spilled = {(k.kernel, k.threads, k.architecture): k.spilled for k in kernels if k.spilled}
    assert not spilled


@WITHOUT_CUDA
def test_blocks_fit_an_sm(kernels: list[Kernel]) -> None:
    """Every block fits 64 Ki registers and 48 KiB of static shared memory; two small blocks fit together."""
    for kernel in kernels:
        blocks = 1 if kernel.threads == 1024 else 2
        assert kernel.registers * kernel.threads * blocks <= 64 * KIB, kernel
        assert kernel.shared <= 48 * KIB, kernel


@WITHOUT_CUDA
def test_no_atomics() -> None:
    """Without atomics, results cannot depend on the order of threads."""
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
    assert module is not None
    dynamic = output("readelf", "--wide", "--dynamic", module)
    needed = [line.split("[")[-1] for line in dynamic.splitlines() if "NEEDED" in line]
    assert needed
    assert not [name for name in needed if name.startswith("libcu")]
    symbols = output("readelf", "--wide", "--dyn-syms", module)
    assert "PyInit__native" in symbols
    assert not [
        line for line in symbols.splitlines() if " cuda" in line or "__cudaRegister" in line
    ]
