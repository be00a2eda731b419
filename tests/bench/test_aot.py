"""Tests of all Triton kernels, compiled without a GPU: registers, memory, matrix units.

By default about one case per kernel is compiled, for sm_90, and a few for an AMD GPU; the others are marked slow.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import pytest

pytest.importorskip("triton")


from bench.aot.cases import ARCHITECTURES, Built, Case, cases
from bench.aot.compile import KIB, SAME_RELEASE, Report, Row, compile_case, failures
from flmoe_kernels.core.triton.launches import Launch
from flmoe_kernels.core.triton.target import Architecture

CASES = {case.name: case for case in cases()}
MMA = "mma.sync"
# The newest matrix instruction of each architecture.
NEWEST = {80: MMA, 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Shared memory of an SM; a block takes one KiB more than it requests.
OF_AN_SM = {80: 164 * KIB, 90: 228 * KIB, 100: 228 * KIB}
# Tiles of large products with weights: one block per SM, see routed_mlp/triton/table.py and fused_launch.py.
ALONE = (", 128 x 256", ", wide")
# All cases are compiled for gfx942 and the quick ones for gfx90a. These few, by default, have what differs on AMD:
# float32 products, inline assembly, and tiles of their own.
AMD = ("gfx90a", "gfx942")
FEW_ON_AMD = (
    "pair_moe/y/pair_base/float32/none",
    "expert_attention/attend/mmimdb/bfloat16/heads 2",
    "expert_linear/grad_weight/mmimdb/float32/up",
    "encoder_fused/mlp_gradient/mmimdb/bfloat16/count",
)


def quick(case: Case, architecture: Architecture) -> bool:
    if architecture == AMD[1]:
        return case.name in FEW_ON_AMD
    return case.quick and architecture == 90


def select(
    *operators: str, without: tuple[str, ...] = (), more: tuple[Architecture, ...] = ()
) -> Any:
    """Parameters (name, architecture) of these operators, or of all; cases outside the quick set are slow.

    without: kernels and shapes to exclude. more: architectures beyond ARCHITECTURES.
    """
    return pytest.mark.parametrize(
        ("name", "architecture"),
        [
            pytest.param(case.name, n, marks=() if quick(case, n) else pytest.mark.slow)
            for case in CASES.values()
            for n in (*ARCHITECTURES, *more)
            if not operators or case.operator in operators
            if n != AMD[0] or case.quick
            if case.kernel not in without and case.shape not in without
        ],
    )


@functools.cache
def compiled(name: str, architecture: Architecture) -> Row:
    return compile_case(CASES[name], architecture)


def report_of(name: str, architecture: Architecture) -> Report:
    return compiled(name, architecture).report


@select(more=AMD)
def test_no_case_fails(name: str, architecture: Architecture) -> None:
    """No forbidden spills, no products without matrix units, no blocks larger than an SM."""
    row = compiled(name, architecture)
    assert not row.failures, row


@select("expert_attention")
def test_attention_uses_the_newest_matrix_units(name: str, architecture: Architecture) -> None:
    """Holds for all 16-bit products of long problems, except the scores of a wide "key_gradient"."""
    kernel, size = CASES[name].built(architecture).tiles.split(", ")[:2]
    matrix = report_of(name, architecture).matrix
    if size in ("long", "wide"):
        assert matrix.get(NEWEST[architecture], 0) >= 4
        if (kernel, size) != ("key_gradient", "wide"):
            assert set(matrix) == {NEWEST[architecture]}
    else:
        assert set(matrix) <= {MMA, NEWEST[architecture]}


@pytest.mark.skipif(not SAME_RELEASE, reason="the launch tables are for another compiler")
@select("routed_mlp", "expert_linear", "encoder_fused")
def test_products_with_weights_use_the_newest_matrix_units(
    name: str, architecture: Architecture
) -> None:
    products = CASES[name].built(architecture).least > 0
    expected = {NEWEST[architecture]} if products else set()
    assert set(report_of(name, architecture).matrix) == expected


@select()
def test_blocks_share_an_sm(name: str, architecture: Architecture) -> None:
    """An SM's shared memory fits two blocks, more without products, but only one with the largest tiles.

    Its registers fit two blocks of products with weights in float32. In 16 bits they do if the launch table limits
    registers: on sm_90, and for linear layers on sm_100.
    """
    built, report = CASES[name].built(architecture), report_of(name, architecture)
    operator, shape = name.split("/")[0], name.split("/")[2]
    with_weights = operator in ("routed_mlp", "expert_linear") and built.least > 0
    alone = operator in ("routed_mlp", "encoder_fused") and built.tiles.endswith(ALONE)
    assert (2 * (report.shared + KIB) > OF_AN_SM[architecture]) == alone
    if not built.least:
        assert report.shared <= 48 * KIB
    limited = architecture == 90 or (architecture == 100 and operator == "expert_linear")
    limited = limited or "float32" in built.tiles
    if with_weights and limited and not alone and not shape.startswith("width"):
        assert 2 * 32 * report.warps * report.registers <= 64 * KIB


# Scalar accesses of a thread: values of one row, lengths of segments, sums.
SINGLE = 12


def accesses(report: Report, kind: str) -> dict[int, int]:
    """Number of loads ("ld") or stores ("st") in a thread's code, by bytes."""
    return {int(k[3:]): n for k, n in report.accesses.items() if k.startswith(f"{kind}.")}


@select("encoder_rows", without=("norm_sum", "width 300"))
def test_rows_move_in_vectors(name: str, architecture: Architecture) -> None:
    """Accesses have 16 bytes, or 8 in 16-bit norm gradients, where a thread has 16 elements of a tile."""
    case, report = CASES[name], report_of(name, architecture)
    if case.shape == "width 63":
        # Negative control: rows of odd widths do not move in vectors.
        assert sum(n for w, n in accesses(report, "ld").items() if w < 8) > SINGLE
        return
    least = 8 if case.kernel.startswith("norm_gradient") and case.dtype != "float32" else 16
    for kind in ("ld", "st"):
        assert sum(n for w, n in accesses(report, kind).items() if w < least) <= SINGLE
    assert max(accesses(report, "ld")) >= least


@pytest.mark.parametrize(
    ("shape", "width", "kind"),
    [("routed_large", 2048, "i32"), ("widths 65536, 32768", 65536, "i64")],
)
def test_strides_of_weights_beyond_32_bits_are_64_bits_wide(
    shape: str, width: int, kind: str
) -> None:
    """Chunk k of x's gradient starts at k D in a weight: the loop computes this offset, up to D F elements."""
    launch = CASES[f"routed_mlp/grad_x/{shape}/bfloat16"].built(90).launch
    ttir = launch.compile(90).asm["ttir"]
    kinds = set()
    for bits in ("i32", "i64"):
        constants = re.findall(rf"(%\S+) = arith\.constant {width} : {bits}\b", ttir)
        pairs = re.findall(rf"arith\.muli (%[^\s,]+), (%\S+) : {bits}\b", ttir)
        if any(set(pair) & set(constants) for pair in pairs):
            kinds.add(bits)
    assert kinds == {kind}


@pytest.mark.slow
@pytest.mark.skipif(not SAME_RELEASE, reason="the launch tables are for another compiler")
def test_launch_tables_state_the_shared_memory_of_their_largest_case() -> None:
    """Needs all cases; the tests above have compiled them in the same process."""
    largest: dict[tuple[str, str, int], int] = {}
    stated: dict[tuple[str, str, int], int] = {}
    for name, case in CASES.items():
        for number in ARCHITECTURES:
            built = case.built(number)
            if built.table is not None:
                # The losses' table has the same number for all architectures.
                place = 0 if case.operator == "interaction_moe" else number
                key = (case.operator, built.tiles, place)
                largest[key] = max(largest.get(key, 0), report_of(name, number).shared)
                stated[key] = built.table
    assert largest == stated


def test_cases_include_every_gpu_shape_and_kernel() -> None:
    shapes = {case.shape for case in CASES.values() if case.dtype == "bfloat16"}
    named = {"mmimdb", "enrico", "mimic", "pair_base", "pair_512", "pair_long"}
    named |= {"decor_mimic", "mmhs150k", "tokens_24"}
    assert named | {"routed_small_e4", "routed_small_e16", "routed_large"} <= shapes
    assert len(CASES) == len(list(cases())), "two cases have the same name"
    kernels = {case.built(90).launch.kernel for case in CASES.values()}
    of_quick = {case.built(90).launch.kernel for case in CASES.values() if case.quick}
    assert of_quick == kernels


# ---- negative controls: failures are reported


def empty(_architecture: int = 80, **limits: Any) -> Built:
    return Built(Launch(None, 1, {}, {}, 4, 1), **limits)


OVER_TABLE = "takes 36865 bytes of shared memory, its launch table states 36864"


@pytest.mark.parametrize(
    ("changed", "least", "message"),
    [
        ({}, 4, ""),
        ({"spilled": 256}, 4, "spills 256 bytes per thread, allowed: 0"),
        ({"shared": 36 * KIB + 1}, 4, OVER_TABLE if SAME_RELEASE else ""),
        (
            {"shared": 164 * KIB},
            4,
            "takes 167936 bytes of shared memory, above the limit of a block",
        ),
        ({"matrix": {}}, 4, "has 0 matrix instructions, expected at least 4"),
        ({}, 0, "has 4 matrix instructions, but its case states no products"),
    ],
    ids=str,
)
def test_failures_are_reported(changed: dict[str, Any], least: int, message: str) -> None:
    report = dataclasses.replace(Report(64, 0, 36 * KIB, 4, {MMA: 4}, {}), **changed)
    found = failures("test", empty(least=least, table=36 * KIB), report, 80)
    assert found == ([message] if message else [])
