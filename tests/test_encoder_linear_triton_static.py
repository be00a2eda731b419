"""The Triton kernels of expert_linear compiled for sm_80, sm_90 and sm_100, without a GPU.

What is compiled, and with which arguments, is encoder_linear_triton_static.py's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parent
try:
    TRITON = version("triton")
except PackageNotFoundError:
    pytest.skip("the package triton is not installed", allow_module_level=True)
# The launch table was chosen with these; another compiler may use other numbers, within the same bounds.
TABLE_WRITTEN_WITH = TRITON.startswith("3.7.")
MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
CLASSES = {"16 bit", "ragged", "float32"}
# Steps of a chunk: 64 deep by 16; half of that; 32 deep by 8, three times.
STEPS = {"16 bit": 4, "ragged": 2, "float32": 12}
KIB = 1024
TWO_BLOCKS = {80: 81 * KIB, 90: 113 * KIB, 100: 113 * KIB}
# Registers of an SM, and columns of tensor memory where it has some.
REGISTERS, TENSOR_MEMORY = 2**16, 512
Report = dict[str, Any]


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """Those that were printed, also where the compiler's process did not end well."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(TESTS / "encoder_linear_triton_static.py")],
        env=environment | {"PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, f"after {len(found)} kernels:\n{result.stderr[-4000:]}"
    return found


@pytest.fixture(scope="module")
def products(reports: list[Report]) -> list[Report]:
    return [report for report in reports if report["kernel"]]


def named(report: Report) -> str:
    return "{case}: {output} on sm_{architecture}".format_map(report)


def test_every_kernel_was_compiled(reports: list[Report], products: list[Report]) -> None:
    every = {(kernel, size) for kernel in ("product", "weight_gradient") for size in CLASSES}
    for architecture in MATRIX:
        here = {(r["kernel"], r["class"]) for r in products if r["architecture"] == architecture}
        assert here == every
    assert {r["output"] for r in reports} == {"out", "grad_x", "grad_weight", "sum"}


def test_registers_do_not_spill(reports: list[Report]) -> None:
    spilled = {}
    for report in reports:
        # Another version's compiler may spill a few bytes of a table that was not chosen with it.
        if report["spilled"] > (0 if TABLE_WRITTEN_WITH else 64):
            spilled[named(report)] = report["spilled"]
    assert not spilled


def test_products_run_on_matrix_units(reports: list[Report]) -> None:
    for report in reports:
        if not report["kernel"]:
            assert not report["matrix"], named(report)
            continue
        own = MATRIX[report["architecture"]]
        if TABLE_WRITTEN_WITH:
            assert set(report["matrix"]) == {own}, named(report)
        assert report["matrix"].get(own, 0) >= STEPS[report["class"]], named(report)


def test_sums_of_biases_run_on_matrix_units(products: list[Report]) -> None:
    """Where there is a bias, the gradient of a weight has a second product."""
    for architecture in MATRIX:
        counts = {
            report["case"]: sum(report["matrix"].values())
            for report in products
            if report["output"] == "grad_weight" and report["architecture"] == architecture
        }
        assert counts["mmimdb, up"] > counts["mmimdb, qkv"]


def test_shared_memory_is_the_tables(reports: list[Report], products: list[Report]) -> None:
    largest: dict[tuple[str, ...], tuple[int, int]] = {}
    for report in products:
        kind = (report["kernel"], report["class"], report["architecture"])
        before = largest.get(kind, (0, 0))[0]
        largest[kind] = max(before, report["shared"]), report["expected"]
    if TABLE_WRITTEN_WITH:
        wrong = {kind: pair for kind, pair in largest.items() if pair[0] != pair[1]}
        assert not wrong, "(compiled, written)"
    for report in reports:
        if not report["kernel"]:
            assert report["shared"] == 0, named(report)


def test_two_blocks_fit_an_sm(products: list[Report]) -> None:
    for report in products:
        architecture, size = report["architecture"], report["class"]
        assert report["shared"] <= TWO_BLOCKS[architecture], named(report)
        assert 2 * report["tensor_memory"] <= TENSOR_MEMORY, named(report)
        # "ragged", and 16 bit on sm_80, have an SM to themselves, see linear_launch.py.
        if size == "float32" or (size == "16 bit" and architecture >= 90):
            threads = 32 * report["warps"]
            assert 2 * threads * report["registers"] <= REGISTERS, named(report)
