"""The Triton kernels of expert_attention compiled for sm_80, sm_90 and sm_100, without a GPU.

What is compiled, and with which arguments, is attention_triton_static.py's.
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
WGMMA, TCGEN = "wgmma.mma_async", "tcgen05.mma"
MATRIX = {80: {"mma.sync"}, 90: {WGMMA, "mma.sync"}, 100: {TCGEN, "mma.sync"}}
OWN = {90: WGMMA, 100: TCGEN}
# Bytes per thread that may spill.
SPILLS = {
    "mmimdb, float16": 8,
    "width 256": 32,
    "width 128, float32": 112,
    "width 256, float32": 112,
}
# How many products a kernel has.
PRODUCTS = {"attend": 2, "query_gradient": 3, "key_gradient": 4}
KIB = 1024
TWO_BLOCKS = {80: 81 * KIB, 90: 113 * KIB, 100: 113 * KIB}
Report = dict[str, Any]


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """Those that were printed, also where the compiler's process did not end well."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(TESTS / "attention_triton_static.py")],
        env=environment | {"PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0, f"after {len(found)} kernels:\n{result.stderr[-4000:]}"
    return found


def named(report: Report) -> str:
    return "{case}: {kernel} on sm_{architecture}".format_map(report)


def test_every_kernel_was_compiled(reports: list[Report]) -> None:
    classes = {"long", "float32"}
    for size in ("wide", "chunked", "short"):
        classes |= {size, f"float32, {size}"}
    for architecture in MATRIX:
        here = {(r["class"], r["kernel"]) for r in reports if r["architecture"] == architecture}
        assert here == {(size, kernel) for size in classes for kernel in PRODUCTS}


def test_registers_do_not_spill(reports: list[Report]) -> None:
    spilled = {}
    for report in reports:
        # Another version's compiler may spill a few bytes of a table that was not chosen with it.
        limit = SPILLS.get(report["case"], 0) + (0 if TABLE_WRITTEN_WITH else 128)
        if report["spilled"] > limit:
            spilled[named(report)] = report["spilled"]
    assert not spilled


def test_products_run_on_matrix_units(reports: list[Report]) -> None:
    for report in reports:
        assert set(report["matrix"]) <= MATRIX[report["architecture"]], named(report)
        # Not one by one on the ordinary units: no product of a loop is without its own.
        assert sum(report["matrix"].values()) >= 4 * PRODUCTS[report["kernel"]], named(report)


def test_long_problems_use_the_newest_matrix_units(reports: list[Report]) -> None:
    """Every product, but the scores of a wide "key_gradient", see launch.py."""
    for report in reports:
        if report["class"] in ("long", "wide") and report["architecture"] in OWN:
            assert report["matrix"].get(OWN[report["architecture"]], 0) >= 4, named(report)
            if (report["class"], report["kernel"]) != ("wide", "key_gradient"):
                assert "mma.sync" not in report["matrix"], named(report)


def test_shared_memory_is_the_tables(reports: list[Report]) -> None:
    largest: dict[tuple[str, ...], tuple[int, int]] = {}
    for report in reports:
        kind = (report["kernel"], report["class"], report["architecture"])
        before = largest.get(kind, (0, 0))[0]
        largest[kind] = max(before, report["shared"]), report["expected"]
        if TABLE_WRITTEN_WITH:
            assert report["shared"] <= report["expected"], named(report)
    if TABLE_WRITTEN_WITH:
        wrong = {kind: pair for kind, pair in largest.items() if pair[0] != pair[1]}
        assert not wrong, "(compiled, written)"


def test_two_blocks_fit_an_sm(reports: list[Report]) -> None:
    for report in reports:
        assert report["shared"] <= TWO_BLOCKS[report["architecture"]], named(report)
