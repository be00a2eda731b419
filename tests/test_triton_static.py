"""Every Triton kernel compiled for sm_80, sm_90 and sm_100, without a GPU: registers, shared memory, matrix units.

What is compiled, and with which arguments, is pair_moe_triton_static.py's and routed_triton_static.py's.
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
MATRIX = {80: {"mma.sync"}, 90: {"wgmma.mma_async", "mma.sync"}, 100: {"tcgen05.mma", "mma.sync"}}
# Bytes per thread. 16-bit calls of up to four experts spill nothing; others have more to hold, see launch.py.
SPILLS = {"float32": 400, "8 experts": 400, "8 experts, float32": 2000, "bfloat16, top 2": 32}
KIB = 1024
TWO_BLOCKS = {80: 81 * KIB, 90: 113 * KIB, 100: 113 * KIB}
Report = dict[str, Any]


def compiled(script: str) -> list[Report]:
    """Those that were printed, also where the compiler's process did not end well."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(TESTS / script)],
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
def reports() -> list[Report]:
    return compiled("pair_moe_triton_static.py")


@pytest.fixture(scope="module")
def routed() -> list[Report]:
    return compiled("routed_triton_static.py")


def named(report: Report) -> str:
    return "{case}, {output} on sm_{architecture}".format_map(report) + report.get("reduce", "")


def test_every_output_was_compiled(reports: list[Report]) -> None:
    outputs = {"y", "project", "grad_a", "grad_c", "grad_q", "grad_k", "phi", "keys"}
    for architecture in MATRIX:
        here = [r for r in reports if r["architecture"] == architecture]
        assert {r["output"] for r in here} == outputs
        assert {r["reduce"] for r in here} == {"none", "experts", "pool"}


def test_registers_do_not_spill(reports: list[Report]) -> None:
    spilled = {}
    for report in reports:
        # Another version's compiler may spill a few bytes of a table that was not chosen with it.
        limit = SPILLS.get(report["case"], 0) + (0 if TABLE_WRITTEN_WITH else 64)
        if report["spilled"] > limit:
            spilled[named(report)] = report["spilled"]
    assert not spilled


def test_products_run_on_matrix_units(reports: list[Report]) -> None:
    for report in reports:
        allowed = MATRIX[report["architecture"]] if report["kernel"] else set()
        assert set(report["matrix"]) <= allowed, named(report)
        assert bool(report["matrix"]) == bool(report["kernel"]), named(report)
        # Not one by one on the ordinary units: no loop of a kernel is left without its products.
        least = {"accumulate": 7, "gradient": 12, "map": 9}.get(report["kernel"], 0)
        assert sum(report["matrix"].values()) >= least, named(report)


def test_shared_memory_is_the_tables(reports: list[Report]) -> None:
    largest: dict[tuple[str, ...], tuple[int, int]] = {}
    for report in reports:
        if report["kernel"]:
            assert report["shared"] <= report["expected"], named(report)
            few = "8 experts" not in report["case"]
            kind = (report["kernel"], few, "float32" in report["case"], report["architecture"])
            before = largest.get(kind, (0, 0))[0]
            largest[kind] = max(before, report["shared"]), report["expected"]
    if TABLE_WRITTEN_WITH:
        wrong = {kind: pair for kind, pair in largest.items() if pair[0] != pair[1]}
        assert not wrong, "(compiled, written)"


def test_two_blocks_fit_an_sm(reports: list[Report]) -> None:
    for report in reports:
        if "float32" in report["case"]:
            # Registers of float32 kernels allow one block of eight warps anyway.
            assert report["shared"] <= 99 * KIB, named(report)
        else:
            assert report["shared"] <= TWO_BLOCKS[report["architecture"]], named(report)


def test_every_kernel_of_routing_and_of_the_routed_mlp_was_compiled(routed: list[Report]) -> None:
    products = {"hidden", "rows", "grad_x", "grad_hidden", "grad_w_in", "grad_w_out"}
    others = {"grad_weight", "sum", "gate", "count", "scan", "place", "limit"}
    for architecture in MATRIX:
        here = {r["output"] for r in routed if r["architecture"] == architecture}
        assert here == (products | others if architecture == 90 else products)


def test_registers_of_routed_kernels(routed: list[Report]) -> None:
    for report in routed:
        # Where elements are read and stored one by one, their addresses take more than there is.
        limit = 256 if report["width"] == 63 else 0
        assert report["spilled"] <= limit + (0 if TABLE_WRITTEN_WITH else 64), named(report)
        if report["kernel"] and report["architecture"] == 90 and report["whole"]:
            # 64 Ki registers for two blocks.
            assert report["registers"] * 32 * report["warps"] <= 2**15, named(report)


def test_routed_products_run_on_matrix_units(routed: list[Report]) -> None:
    wanted = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    for report in routed:
        if not report["kernel"]:
            assert not report["matrix"], named(report)
            continue
        assert set(report["matrix"]) <= MATRIX[report["architecture"]], named(report)
        if TABLE_WRITTEN_WITH:
            assert set(report["matrix"]) == {wanted[report["architecture"]]}, named(report)
        # A loop whose body holds a whole chunk: 64 deep in steps of 16, or three products of 32 in steps of 8.
        assert sum(report["matrix"].values()) >= 4, named(report)


def test_routed_shared_memory_is_the_tables(routed: list[Report]) -> None:
    for report in routed:
        if not report["kernel"]:
            assert report["shared"] <= 48 * KIB, named(report)
            continue
        assert report["shared"] <= TWO_BLOCKS[report["architecture"]], named(report)
        if TABLE_WRITTEN_WITH:
            if report["width"] >= 128:
                assert report["shared"] == report["expected"], named(report)
            else:
                assert report["shared"] < report["expected"], named(report)


def test_strides_of_weights_beyond_32_bits_are_64_bits_wide(routed: list[Report]) -> None:
    """Chunk k of the gradient of x starts k D into a weight: a product of the loop that needs D F elements."""
    wanted = {2048: {"i32"}, 65536: {"i64"}}
    found = [r for r in routed if r["output"] == "grad_x" and r["width"] in wanted]
    assert {r["width"] for r in found} == set(wanted)
    for report in found:
        assert set(report["by_width"]) == wanted[report["width"]], named(report)
