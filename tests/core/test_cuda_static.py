"""The CUDA part of the native module as it was built: registers, determinism, what it needs to be loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from bench.static_cuda import RESULTS, Kernel, atomics, kernels, lack
from flmoe_kernels.core.backend import native

ARCHITECTURES, REASON = native().cuda_build()
WITHOUT_CUDA = pytest.mark.skipif(
    not ARCHITECTURES, reason=f"the native module was built without CUDA ({REASON})"
)
NO_TOOLS = pytest.mark.skipif(bool(lack()), reason=lack() or "everything is there")
GATES = [
    (f"Gate<{dtype}, {items}>", 256)
    for dtype in ("float", "double", "BFloat16", "Float16")
    for items in (0, 1, 2, 8)
]
ROWS = [("CountRows", 256), ("ScanCounters", 256), ("MaskRows", 256)]
ROWS += [(name, threads) for name in ("KeepRows", "PlaceRows") for threads in (256, 1024)]
KIB = 1024


@pytest.fixture(scope="module")
def found() -> list[Kernel]:
    return kernels()


@NO_TOOLS
def test_every_kernel_is_there_for_every_architecture(found: list[Kernel]) -> None:
    here: dict[str, list[tuple[str, int]]] = {}
    for kernel in found:
        here.setdefault(kernel.architecture, []).append((kernel.kernel, kernel.threads))
    assert set(here) == set(ARCHITECTURES.split(",")[0].split())
    for names in here.values():
        assert sorted(names) == sorted(GATES + ROWS)


@NO_TOOLS
def test_registers_do_not_spill(found: list[Kernel]) -> None:
    spilled = {(k.kernel, k.threads, k.architecture): k.spilled for k in found if k.spilled}
    assert not spilled


@NO_TOOLS
def test_blocks_fit_the_machine(found: list[Kernel]) -> None:
    """Every block can start: 64 Ki registers, 48 KiB of shared memory without asking; small ones in pairs."""
    for kernel in found:
        blocks = 1 if kernel.threads == 1024 else 2
        assert kernel.registers * kernel.threads * blocks <= 64 * KIB, kernel
        assert kernel.shared <= 48 * KIB, kernel


@NO_TOOLS
def test_no_atomics() -> None:
    assert atomics() == []


@NO_TOOLS
def test_results_are_those_of_these_kernels(found: list[Kernel]) -> None:
    """By name and architecture; registers are those of the compiler that the file names."""
    results = json.loads(RESULTS.read_text())
    keys = ("kernel", "threads", "architecture")
    written = {tuple(row[key] for key in keys) for row in results["kernels"]}
    here = {tuple(getattr(k, key) for key in keys) for k in found}
    assert here <= written
    assert {k.architecture for k in found} <= {row["architecture"] for row in results["kernels"]}
    assert not any(row["spilled"] for row in results["kernels"])
    assert results["atomics"] == []


@WITHOUT_CUDA
@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_module_needs_no_driver_and_shows_no_cuda_names() -> None:
    """The runtime is inside and hidden, so that it neither misses a driver nor meets torch's copy."""
    if not shutil.which("readelf"):
        pytest.skip("there is no readelf")
    module = native().__file__
    assert module is not None

    def readelf(option: str) -> str:
        command = ["readelf", "--wide", option, module]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    needed = [line.split("[")[-1] for line in readelf("--dynamic").splitlines() if "NEEDED" in line]
    assert needed
    assert not [name for name in needed if name.startswith("libcu")]
    symbols = readelf("--dyn-syms")
    assert "PyInit__native" in symbols
    assert not [
        line for line in symbols.splitlines() if " cuda" in line or "__cudaRegister" in line
    ]
