"""Every Triton kernel compiled for sm_80, sm_90 and sm_100, without a GPU: registers, shared memory, matrix units.

What is compiled is the quick set of bench/aot/cases.py, once for this file; the full set is compiled by
`python -m bench.aot`, which wrote the budget that test_aot_budget.py looks at.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

from bench.aot.architectures import ARCHITECTURES, KIB
from bench.aot.budget import DEFAULT, Limits, load, release
from bench.aot.cases import ALL, CASES, listed
from bench.aot.rows import Row
from bench.aot.run import Request, compile_rows

BUDGET = load(DEFAULT)
EVERY = listed(CASES)
# The launch tables and the budget were written with this; another compiler may use other numbers, within bounds.
SAME = release(triton.__version__) == release(BUDGET.triton)
MMA, WGMMA, TCGEN = "mma.sync", "wgmma.mma_async", "tcgen05.mma"
OWN = {80: MMA, 90: WGMMA, 100: TCGEN}
# Tiles of large products with weights, which have an SM to themselves, see routed_mlp/triton/table.py.
ALONE = ", 128 x 256"
TWO_BLOCKS = {80: 81 * KIB, 90: 113 * KIB, 100: 113 * KIB}


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return compile_rows(Request(tuple(ARCHITECTURES.values()), quick=True), BUDGET)


def of(rows: list[Row], *operators: str) -> Iterator[Row]:
    return (row for row in rows if row.operator in operators)


def named(row: Row) -> str:
    return f"{row.case} on sm_{row.architecture}"


def test_nothing_fails(rows: list[Row]) -> None:
    """Spills beyond those that the budget allows with a reason, products off the matrix units, blocks that fit
    no SM, and with the budget's own version of Triton more registers or shared memory than it says."""
    assert not {named(row): row.failures for row in rows if row.failures}


@pytest.mark.skipif(not SAME, reason=f"the budget was written with Triton {BUDGET.triton}")
def test_the_budget_is_what_kernels_take(rows: list[Row]) -> None:
    stale = {}
    for row in rows:
        found = Limits(row.report.registers, row.report.shared, row.report.spilled)
        if BUDGET.limits[row.case, row.architecture] != found:
            stale[named(row)] = found
    assert not stale, "run python -m bench.aot --write-budget bench/aot_budget.json"


def test_every_kernel_is_compiled_for_some_gpu_and_those_with_products_for_all(
    rows: list[Row],
) -> None:
    kernels = {(case.operator, case.kernel) for case in EVERY.values()}
    here = {number: set() for number in ALL}
    for row in rows:
        here[row.architecture].add((row.operator, row.kernel))
    # Sums of parts that only splits leave are one kernel with the sums of rows.
    assert kernels - set().union(*here.values()) <= {("routed_mlp", "sum_w_in")}
    products = {(row.operator, row.kernel) for row in rows if row.least}
    assert all(products <= found for found in here.values())


def test_products_run_on_matrix_units(rows: list[Row]) -> None:
    for row in rows:
        allowed = {MMA, OWN[row.architecture]} if row.flop else set()
        assert set(row.report.matrix) <= allowed, named(row)
        assert bool(row.report.matrix) == bool(row.flop) == bool(row.least), named(row)
        # Not one by one on the ordinary units: no loop of a kernel is left without its products.
        assert sum(row.report.matrix.values()) >= row.least, named(row)


def test_long_problems_use_the_newest_matrix_units(rows: list[Row]) -> None:
    """Of attention every product, but the scores of a wide "key_gradient", see its launch table."""
    found = 0
    for row in of(rows, "expert_attention"):
        kernel, size = row.tiles.split(", ")[:2]
        if size in ("long", "wide") and row.architecture in (90, 100):
            found += 1
            assert row.report.matrix.get(OWN[row.architecture], 0) >= 4, named(row)
            if (kernel, size) != ("key_gradient", "wide"):
                assert MMA not in row.report.matrix, named(row)
    assert found > 10


@pytest.mark.skipif(not SAME, reason="of another compiler")
def test_products_with_weights_use_the_newest_matrix_units(rows: list[Row]) -> None:
    for row in of(rows, "routed_mlp", "expert_linear"):
        if row.flop:
            assert set(row.report.matrix) == {OWN[row.architecture]}, named(row)


def test_sums_of_biases_run_on_matrix_units(rows: list[Row]) -> None:
    """Where there is a bias, the gradient of a linear layer's weight has a second product."""
    for number in ALL:
        counts = {
            row.variant: sum(row.report.matrix.values())
            for row in of(rows, "expert_linear")
            if (row.kernel, row.shape, row.dtype) == ("grad_weight", "mmimdb", "bfloat16")
            and row.architecture == number
        }
        assert counts["up"] > counts["qkv"]


def test_shared_memory(rows: list[Row]) -> None:
    for row in rows:
        if row.table is not None and SAME:
            assert row.report.shared <= row.table, named(row)
        most = TWO_BLOCKS[row.architecture]
        if row.operator == "routed_mlp" and row.tiles.endswith(ALONE):
            most = ARCHITECTURES[row.architecture].shared - KIB
        assert row.report.shared <= most, named(row)
        if not row.flop:
            assert row.report.shared <= 48 * KIB, named(row)


def test_two_blocks_of_products_with_weights_share_an_sm(rows: list[Row]) -> None:
    """On sm_90 where widths are whole tiles; so do blocks of linear layers on sm_100 and in float32."""
    found = 0
    for row in of(rows, "routed_mlp", "expert_linear"):
        linear = row.operator == "expert_linear"
        device = row.architecture == 90 or (linear and row.architecture == 100)
        device = device and not row.tiles.endswith(ALONE)
        if row.flop and not row.shape.startswith("width") and (device or "float32" in row.tiles):
            found += 1
            assert row.held.blocks >= 2, named(row)
    assert found > 20


# How many operands of a tile's size a kernel by row reads and writes; of views it reads or writes as many more.
READS = {"norm alone": 1, "norm": 2, "norm twice": 1, "norm_gradient": 3, "norm_gradient twice": 3}
READS |= {"gelu": 1, "gelu_gradient": 2, "pool": 2, "pool_gradient": 1, "views": 2}
WRITES = {"norm alone": 1, "norm": 2, "norm twice": 2, "norm_gradient": 2, "norm_gradient twice": 1}
WRITES |= {"gelu": 1, "gelu_gradient": 1, "pool": 0, "pool_gradient": 2, "views_gradient": 2}
# Of one row's values, lengths of segments, sums: what else a thread reads and writes, one by one.
FEW = 12


def accesses(row: Row, kind: str) -> dict[int, int]:
    """Loads ("ld") or stores ("st") of a thread's code by bytes."""
    found = row.report.accesses.items()
    return {int(name[3:]): n for name, n in found if name.startswith(f"{kind}.")}


def test_rows_of_whole_widths_move_in_vectors(rows: list[Row]) -> None:
    """Of 16 bytes, or 8 where a 16-bit gradient of a norm has 16 elements of a tile a thread."""
    for row in of(rows, "encoder_rows"):
        if row.kernel == "norm_sum" or row.shape in ("width 63", "width 300"):
            continue
        launch = EVERY[row.case].built(ARCHITECTURES[row.architecture]).launch
        constants, size = launch.constants, 4 if row.dtype == "float32" else 2
        columns = 4 * constants["PART"] if "PART" in constants else constants["COLUMNS"]
        each = size * constants["ROWS"] * columns // (32 * launch.warps)
        least = 8 if row.kernel.startswith("norm_gradient") and size == 2 else 16
        views = 4 if row.shape == "mimic" else 3
        for kind, operands in (
            ("ld", views if row.kernel == "views_gradient" else READS[row.kernel]),
            ("st", views if row.kernel == "views" else WRITES[row.kernel]),
        ):
            found = accesses(row, kind)
            assert sum(w * n for w, n in found.items() if w >= least) >= operands * each, named(row)
            assert sum(n for w, n in found.items() if w < least) <= FEW, named(row)


def test_rows_of_odd_widths_do_not(rows: list[Row]) -> None:
    """The control of the test above."""
    odd = [row for row in of(rows, "encoder_rows") if row.shape == "width 63"]
    assert odd
    for row in odd:
        assert sum(n for w, n in accesses(row, "ld").items() if w < 8) > FEW, named(row)


def test_strides_of_weights_beyond_32_bits_are_64_bits_wide() -> None:
    """Chunk k of the gradient of x starts k D into a weight: a product of the loop that needs D F elements."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).parents[1] / "support" / "routed_triton_strides.py"
    result = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"PYTHONPATH": str(script.parents[2])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert re.findall(r"(\d+): (\S+)", result.stdout) == [("2048", "i32"), ("65536", "i64")]
