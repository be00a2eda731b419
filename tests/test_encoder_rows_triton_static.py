"""The encoder's row-wise Triton kernels compiled for sm_80, sm_90 and sm_100, without a GPU.

What is compiled, and with which arguments, is encoder_rows_triton_static.py's.
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
# How many operands of a tile's size a kernel reads and writes; a view of expand_views is one.
READS = {"norm alone": 1, "norm": 2, "norm twice": 1, "norm_gradient": 3, "norm_gradient twice": 3}
READS |= {
    "gelu": 1,
    "gelu_gradient": 2,
    "pool": 2,
    "pool, short": 2,
    "pool_gradient": 1,
    "views": 2,
}
WRITES = {"norm alone": 1, "norm": 2, "norm twice": 2, "norm_gradient": 2, "norm_gradient twice": 1}
WRITES |= {"gelu": 1, "gelu_gradient": 1, "pool": 0, "pool, short": 0, "pool_gradient": 2}
WRITES |= {"views_gradient": 2}
OUTPUTS = {*READS, *WRITES, "norm_sum"}
# Of one row's values, lengths of segments, sums: what else a thread reads and writes, one by one.
FEW = 12
KIB = 1024
TWO_BLOCKS = {80: 81 * KIB, 90: 113 * KIB, 100: 113 * KIB}
Report = dict[str, Any]


@pytest.fixture(scope="module")
def reports() -> list[Report]:
    """Those that were printed, also where the compiler's process did not end well."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, str(TESTS / "encoder_rows_triton_static.py")],
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
    return "{case}: {output} on sm_{architecture}".format_map(report)


def test_every_kernel_was_compiled(reports: list[Report]) -> None:
    for architecture in (80, 90, 100):
        here = [r for r in reports if r["architecture"] == architecture]
        assert {r["output"] for r in here} == OUTPUTS


def test_registers_do_not_spill(reports: list[Report]) -> None:
    assert not {named(r): r["spilled"] for r in reports if r["spilled"]}


def accesses(report: Report, kind: str) -> list[tuple[int, int]]:
    """(bytes, how many) of a thread's loads, "ld", or stores, "st"."""
    found = [(*name.split("."), n) for name, n in report["accesses"].items()]
    return [(int(size), n) for name, size, n in found if name == kind]


def vectors(report: Report, kind: str, least: int) -> int:
    """Bytes that a thread moves in accesses of at least so many."""
    return sum(size * n for size, n in accesses(report, kind) if size >= least)


def narrow(report: Report, kind: str, least: int) -> int:
    return sum(n for size, n in accesses(report, kind) if size < least)


def test_whole_widths_move_in_vectors(reports: list[Report]) -> None:
    """Of 16 bytes, or 8 where a 16-bit gradient of a norm has 16 elements of a tile a thread."""
    for report in reports:
        output = report["output"]
        if not report["whole"] or output == "norm_sum":
            continue
        least = 8 if report["kernel"] == "norm_gradient" and not report["float32"] else 16
        reads = report["views"] if output == "views_gradient" else READS[output]
        writes = report["views"] if output == "views" else WRITES[output]
        assert vectors(report, "ld", least) >= reads * report["bytes"], named(report)
        assert vectors(report, "st", least) >= writes * report["bytes"], named(report)
        for kind in ("ld", "st"):
            assert narrow(report, kind, least) <= FEW, named(report)


def test_odd_widths_do_not(reports: list[Report]) -> None:
    """The control of the test above."""
    odd = [r for r in reports if r["case"] == "width 63" and r["output"] != "norm_sum"]
    assert odd
    for report in odd:
        assert narrow(report, "ld", 8) > FEW, named(report)


def test_no_matrix_instructions(reports: list[Report]) -> None:
    assert not {named(r): r["matrix"] for r in reports if r["matrix"]}


def test_shared_memory_is_the_tables(reports: list[Report]) -> None:
    largest: dict[tuple[Any, ...], tuple[int, int]] = {}
    for report in reports:
        assert report["shared"] <= TWO_BLOCKS[report["architecture"]], named(report)
        if "width" in report["case"]:
            continue
        kind = (report["kernel"], report["float32"], report["architecture"])
        before = largest.get(kind, (0, 0))[0]
        largest[kind] = max(before, report["shared"]), report["expected"]
    if TABLE_WRITTEN_WITH:
        wrong = {kind: pair for kind, pair in largest.items() if pair[0] != pair[1]}
        assert not wrong, "(compiled, written)"
