"""Tests of pair_moe's CPU kernels against the reference, and of the reference."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flmoe_kernels import pair_moe
from flmoe_kernels.ops.pair_moe.kinds import (
    COEFFICIENTS,
    DEFAULT_KINDS,
    KINDS,
    swap_sides,
)
from tests.support.pair_cases import (
    DTYPES,
    KIND_LISTS,
    NAMES,
    REDUCTIONS,
    SIZES,
    PairCase,
    check,
    run,
)
from tests.support.pair_tests import PairTests

BASE = PairCase(9, 14)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(case: PairCase, dtype: torch.dtype, masks: str, reduce: str) -> None:
    check(dataclasses.replace(case, masks=masks, reduce=reduce), dtype, "cpu")


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("kinds", KIND_LISTS, ids=lambda kinds: "-".join(kinds))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kinds_and_top_k(kinds: tuple[str, ...], dtype: torch.dtype, reduce: str) -> None:
    for top_k in (None, *range(1, len(kinds) + 1)):
        check(dataclasses.replace(BASE, kinds=kinds, top_k=top_k, reduce=reduce), dtype, "cpu")


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("masks", ["a", "b", "both", "sample"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_masks(masks: str, top_k: int | None, reduce: str) -> None:
    case = PairCase(33, 150, masks=masks, top_k=top_k, reduce=reduce, batch=3)
    for dtype in DTYPES:
        y, mass = check(case, dtype, "cpu")[0][:2]
        valid = case.options()["mask_a"]
        if valid is not None:
            assert not mass.transpose(1, 2)[~valid].any()
            if reduce == "experts":
                assert not y[~valid].any()


def test_temperature_and_bias() -> None:
    for temperature, bias in itertools.product((0.3, 1.0, 4.0), (False, True)):
        check(dataclasses.replace(BASE, temperature=temperature, bias=bias), torch.float32, "cpu")
    plain = run(BASE, BASE.inputs(torch.float32), "cpu")[0]
    hot = dataclasses.replace(BASE, temperature=4.0)
    assert not torch.allclose(run(hot, BASE.inputs(torch.float32), "cpu")[0], plain, rtol=1e-2)


class TestCpu(PairTests):
    backend, widest, columns = "cpu", torch.float64, 140
    calls = tuple(itertools.product(REDUCTIONS, (None, 2)))


def pair_by_pair(case: PairCase, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Definition of reduce "none", one pair at a time."""
    q, k, a, c, bias = inputs
    masks = [case.options()[name] for name in ("mask_a", "mask_b")]
    batch, experts, rows, rank = q.shape
    y, mass = torch.zeros_like(a), torch.zeros(batch, experts, rows, dtype=q.dtype)
    for b, i, j in itertools.product(range(batch), range(rows), range(k.shape[2])):
        if not all(mask is None or mask[b, n] for mask, n in zip(masks, (i, j), strict=True)):
            continue
        logits = [
            float(q[b, e, i] @ k[b, e, j]) / rank**0.5 / case.temperature + float(bias[e])
            for e in range(experts)
        ]
        order = sorted(range(experts), key=lambda e: (-logits[e], e))
        kept = order[: case.top_k]
        total = sum(math.exp(logits[e]) for e in kept)
        for e in kept:
            p = math.exp(logits[e]) / total
            s1, s2, s3 = COEFFICIENTS[case.kinds[e]]
            left, right = a[b, e, i], c[b, e, j]
            y[b, e, i] += p * (s1 * left + s2 * right + s3 * left * right)
            mass[b, e, i] += p
    return y, mass


@pytest.mark.parametrize("masks", ["none", "both"])
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_reference_is_the_definition(top_k: int | None, masks: str) -> None:
    case = PairCase(3, 4, 2, 3, kinds=KINDS, top_k=top_k, temperature=0.7, masks=masks)
    inputs = case.inputs(torch.float64)
    expected, expected_mass = pair_by_pair(case, inputs)
    sums = {"none": expected, "experts": expected.sum(1), "pool": expected.sum(2)}
    for reduce, want in sums.items():
        y, mass = run(dataclasses.replace(case, reduce=reduce), inputs, "reference")[:2]
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mass, expected_mass, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_sides_swap(backend: str) -> None:
    """Both sides have the same pairs, so their pooled sums agree."""
    q, k, a, c, bias = BASE.inputs(torch.float64)
    kinds = (*DEFAULT_KINDS[1:], "unique_a")
    one = pair_moe(q, k, a, c, kinds=kinds, gate_bias=bias, reduce="pool", backend=backend)
    other = pair_moe(
        k, q, c, a, kinds=swap_sides(kinds), gate_bias=bias, reduce="pool", backend=backend
    )
    torch.testing.assert_close(one.y, other.y)
    torch.testing.assert_close(one.mass.sum(2), other.mass.sum(2))
    assert swap_sides(KINDS) == ("unique_b", "unique_a", "synergy", "redundancy", "null")


def test_extreme_logits() -> None:
    case = dataclasses.replace(BASE, temperature=1e-3)
    found, expected = (run(case, case.inputs(torch.float32), b) for b in ("cpu", "reference"))
    for got, want in zip(found, expected, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-2 * float(want.abs().max() + 1))


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("rows", "columns"), [(900, 5), (5, 900), (700, 130), (300, 300)], ids=str)
def test_sides_of_any_proportion(rows: int, columns: int, reduce: str) -> None:
    """The rounds of the backward: one side much shorter, several chunks on both sides."""
    for batch in (1, 3):
        case = PairCase(rows, columns, 3, 4, kinds=KINDS, reduce=reduce, batch=batch, masks="b")
        check(case, torch.float32, "cpu")


def test_pooled_sums_do_not_overflow_half_precision() -> None:
    a, c = (torch.full((1, 1, 512, 4), 2.0, dtype=torch.float16) for _ in range(2))
    zeros = torch.zeros(1, 1, 512, 1, dtype=torch.float16)
    for backend in ("reference", "cpu"):
        y = pair_moe(zeros, zeros, a, c, kinds=["synergy"], reduce="pool", backend=backend).y
        assert torch.equal(y, torch.full((1, 1, 4), 512.0 * 512 * 4)), backend


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_autocast(backend: str) -> None:
    """Operands of mixed dtypes are cast to autocast's dtype; the gate and mass stay in float32."""
    q, k, a, c, bias = BASE.inputs(torch.float32)
    half = [x.bfloat16() for x in (q, k, a, c)]
    expected = pair_moe(*half, gate_bias=bias, kinds=DEFAULT_KINDS, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pair_moe(half[0], k, a, half[3], gate_bias=bias, kinds=KINDS[:4], backend=backend)
    assert found.mass.dtype == torch.float32
    assert torch.equal(found.y, expected.y)
    assert torch.equal(found.mass, expected.mass)


@settings(max_examples=80)
@given(
    rows=st.integers(0, 50),
    columns=st.integers(0, 150),
    rank=st.integers(1, 40),
    width=st.integers(1, 70),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=8),
    reduce=st.sampled_from(REDUCTIONS),
    masks=st.sampled_from(["none", "a", "b", "both", "sample"]),
    batch=st.integers(1, 3),
    share=st.floats(0.0, 1.0),
)
def test_any_shape(
    rows: int,
    columns: int,
    rank: int,
    width: int,
    kinds: list[str],
    reduce: str,
    masks: str,
    batch: int,
    share: float,
) -> None:
    top_k = 1 + int(share * (len(kinds) - 1))
    case = PairCase(rows, columns, rank, width, tuple(kinds), reduce, top_k, masks, batch)
    inputs = case.inputs(torch.float64)
    found, oracle = run(case, inputs, "cpu"), run(case, inputs, "reference")
    size = max((float(x.abs().max()) for x in oracle if x.numel()), default=1.0)
    for name, got, want in zip(NAMES, found, oracle, strict=True):
        assert got.shape == want.shape, name
        assert ((got - want).abs() <= 1e-11 * size).all(), name
