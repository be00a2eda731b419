"""Tests of pair_map and top_pairs: contributions of single pairs, dense and streamed."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flmoe_kernels import pair_map, pair_moe, top_pairs
from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.ops.pair_moe.kinds import KINDS
from tests.support.inputs import as_dtype, draw
from tests.support.pair_cases import DTYPES, MANY, PairCase

CLASSES = 5
CASES = (
    PairCase(5, 7, kinds=KINDS),
    PairCase(63, 60, 32, 64, masks="both", top_k=2),
    PairCase(37, 140, 17, 65, kinds=MANY, masks="a", top_k=3),
    PairCase(130, 1, 4, 5, kinds=("synergy",), masks="b"),
    PairCase(1, 130, 3, 40, kinds=("redundancy", "null", "unique_b"), bias=False),
    PairCase(400, 9, 4, 5, batch=1),
    PairCase(0, 3),
    PairCase(3, 0, masks="both"),
    PairCase(4, 3, batch=0),
    PairCase(30, 31, masks="sample", batch=3),
)


def arguments(case: PairCase, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    inputs = case.inputs(dtype)
    head = draw(len(case.kinds), case.width, CLASSES, dtype=dtype, seed=9)
    target = torch.arange(case.batch) * 3 % CLASSES
    bias = inputs[4] if case.bias else None
    return [*inputs[:4], head], {**case.options(), "gate_bias": bias, "target": target}


def widened(case: PairCase, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
    """The same call in float64, with values rounded to dtype."""
    tensors, options = arguments(case, dtype)
    if options["gate_bias"] is not None:
        options["gate_bias"] = options["gate_bias"].double()
    return as_dtype(tensors, torch.float64), options


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pair_map(case: PairCase, dtype: torch.dtype) -> None:
    tensors, options = arguments(case, dtype)
    actual = pair_map(*tensors, **options, backend="cpu")
    low = pair_map(*tensors, **options, backend="reference")
    wide, wide_options = widened(case, dtype)
    oracle = pair_map(*wide, **wide_options, backend="reference")
    assert_within_budget(actual, low, oracle, f"pair_map of {case}")
    if actual.numel():
        assert_outside_budget(actual.roll(1, 3) + 0.01, low, oracle, "pair_map")
    invalid = ~valid_pairs(case, options)
    assert not actual.masked_select(invalid[:, None]).any()


def valid_pairs(case: PairCase, options: dict[str, Any]) -> Tensor:
    valid = torch.ones(case.batch, case.rows, case.columns, dtype=torch.bool)
    if options["mask_a"] is not None:
        valid &= options["mask_a"][:, :, None]
    if options["mask_b"] is not None:
        valid &= options["mask_b"][:, None, :]
    return valid


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_contributions_add_up_to_the_pooled_value(backend: str) -> None:
    """For reduce "pool", the sum of phi over pairs equals head . y, so the map explains the operator's result."""
    case = PairCase(20, 33, kinds=KINDS, masks="both")
    tensors, options = arguments(case, torch.float64)
    phi = pair_map(*tensors, **options, backend=backend)
    target = options.pop("target")
    y = pair_moe(*tensors[:4], **options, reduce="pool", backend=backend).y
    weight = tensors[4].permute(2, 0, 1)[target]
    torch.testing.assert_close(phi.sum((2, 3)), (y * weight).sum(2))


def sorted_pairs(phi: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Definition: the valid pairs of a (B, La, Lb) map, sorted by value, then by (i, j); from 1 to La * Lb."""
    count = min(count, max(phi.shape[1] * phi.shape[2], 1))
    samples: list[list[tuple[float, int, int]]] = []
    for b in range(len(phi)):
        pairs = [(float(phi[b, i, j]), i, j) for i, j in valid[b].nonzero().tolist()]
        pairs.sort(key=lambda pair: (not math.isnan(pair[0]), -pair[0], pair[1], pair[2]))
        pairs += [(-math.inf, -1, -1)] * (count - len(pairs))
        samples.append(pairs[:count])
    values = torch.tensor([[pair[0] for pair in each] for each in samples], dtype=phi.dtype)
    i, j = (
        torch.tensor([[pair[n] for pair in each] for each in samples], dtype=torch.int64)
        for n in (1, 2)
    )
    return tuple(x.view(len(phi), count) for x in (values, i, j))  # type: ignore[return-value]


def assert_sorted(found: Any, phi: Tensor, valid: Tensor, count: int) -> None:
    """The pairs of each expert are those of the sorted map."""
    for e in range(phi.shape[1]):
        expected = sorted_pairs(phi[:, e], valid, count)
        assert all(map(torch.equal, (x[:, e] for x in found[:3]), expected))


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 6, 300])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_top_pairs_are_the_sorted_map(
    case: PairCase, dtype: torch.dtype, count: int, backend: str
) -> None:
    tensors, options = arguments(case, dtype)
    phi = pair_map(*tensors, **options, backend=backend)
    found = top_pairs(*tensors, **options, n_pairs=count, backend=backend)
    valid = valid_pairs(case, options)
    assert_sorted(found, phi, valid, count)
    total = sorted_pairs(phi.sum(1), valid, count)[0]
    torch.testing.assert_close(found.total_values, total)
    for b in range(case.batch):
        i, j = found.total_i[b], found.total_j[b]
        there = i >= 0
        at = phi[b][:, i[there], j[there]].sum(0)
        torch.testing.assert_close(found.total_values[b][there], at)
        assert len({*zip(i[there].tolist(), j[there].tolist(), strict=True)}) == int(there.sum())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_ties_select_the_earlier_pair(backend: str) -> None:
    """Repeated tokens give equal contributions; the first pairs are kept, in order."""
    case = PairCase(90, 260, kinds=KINDS, masks="both", batch=1)
    tensors, options = arguments(case, torch.float32)
    q, k, a, c, head = tensors
    q, a = (x[:, :, torch.arange(90) % 2] for x in (q, a))
    k, c = (x[:, :, torch.arange(260) % 3] for x in (k, c))
    options["mask_b"] = torch.ones(1, 260, dtype=torch.bool)
    phi = pair_map(q, k, a, c, head, **options, backend=backend)
    found = top_pairs(q, k, a, c, head, n_pairs=40, **options, backend=backend)
    valid = valid_pairs(case, options)
    assert_sorted(found, phi, valid, 40)
    assert all(values.unique().numel() <= 6 for values in found.values[0])
    assert not found.values[:, 4].any(), "a null expert's contributions are all zero"
    assert torch.equal(found.j[0, 4], torch.arange(40))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("values", "valid", "count", "i", "j"),
    [
        ((2.0, math.nan, -math.inf), (True, True, True), 7, [1, 1, 0, 0, 2, 2], [0, 1] * 3),
        ((2.0, 5.0, -math.inf), (True, False, True), 5, [0, 0, 2, 2, -1], [0, 1, 0, 1, -1]),
    ],
)
def test_nan_comes_first_then_minus_infinity_and_masked_pairs_last(
    values: tuple[float, ...],
    valid: tuple[bool, ...],
    count: int,
    i: list[int],
    j: list[int],
    backend: str,
) -> None:
    a, zeros = torch.tensor(values).view(1, 1, 3, 1), torch.zeros(1, 1, 3, 1)
    options: dict[str, Any] = {"kinds": ("unique_a",), "mask_a": torch.tensor([valid])}
    few = zeros[:, :, :2]
    call = (zeros, few, a, few, torch.ones(1, 1))
    found = top_pairs(*call, n_pairs=count, backend=backend, **options)
    assert (found.i[0, 0].tolist(), found.j[0, 0].tolist()) == (i, j)
    assert found.total_i[0].tolist() == i


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_equal_totals_select_the_earlier_pair(backend: str) -> None:
    ones = torch.ones(1, 2, 4, 3)
    options: dict[str, Any] = {"kinds": ("unique_a", "synergy"), "backend": backend}
    found = top_pairs(*(ones, ones, ones, ones), torch.ones(2, 3), n_pairs=6, **options)
    assert found.total_i[0].tolist() == [0, 0, 0, 0, 1, 1]
    assert found.total_j[0].tolist() == [0, 1, 2, 3, 0, 1]


GROWTH = """
import re, torch
from flmoe_kernels import pair_map, top_pairs
def peak():
    # Peak of this program only: ru_maxrss would start at the size of the parent process.
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
q, head = torch.randn(1, 2, 4000, 2), torch.ones(2, 2)
top_pairs(*[q[:, :, :9]] * 4, head, n_pairs=9, kinds=("synergy", "null"))
sizes = [peak()]
for call, options in ((top_pairs, {"n_pairs": 1000}), (pair_map, {})):
    call(q, q, q, q, head, kinds=("synergy", "null"), **options)
    sizes.append(peak())
print(sizes[1] - sizes[0], sizes[2] - sizes[1])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_map() -> None:
    """Measured in a new process, because other tests raise the peak; control: the map takes 2 x 61 MiB."""
    result = subprocess.run(
        [sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True
    )
    streamed, dense = map(int, result.stdout.split())  # KiB
    assert streamed < 20 * 1024
    assert dense > 90 * 1024


def test_a_head_without_classes_and_no_gradient() -> None:
    case = dataclasses.replace(CASES[0], bias=False)
    tensors, options = arguments(case, torch.float32)
    options.pop("target")
    head = tensors.pop()[:, :, 2]
    for backend in ("reference", "cpu"):
        with_target = top_pairs(
            *tensors, head[:, :, None], target=torch.zeros(2).long(), n_pairs=4, **options
        )
        leaves = [x.clone().requires_grad_() for x in tensors]
        found = top_pairs(*leaves, head, n_pairs=4, **options, backend=backend)
        torch.testing.assert_close(found.values, with_target.values)
        assert not found.values.requires_grad
    phi = pair_map(*leaves, head, **options, backend="cpu")
    with pytest.raises(NotImplementedError, match="pair_map has no derivative"):
        phi.sum().backward()
    pair_map(*leaves, head, **options, backend="reference").sum().backward()
    assert leaves[0].grad is not None


@settings(max_examples=60)
@given(
    rows=st.integers(0, 60),
    columns=st.integers(0, 140),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=8),
    masks=st.sampled_from(["none", "a", "b", "both", "sample"]),
    count=st.integers(1, 40),
    levels=st.integers(1, 4),
)
def test_any_shape_with_many_ties(
    rows: int, columns: int, kinds: list[str], masks: str, count: int, levels: int
) -> None:
    case = PairCase(rows, columns, 2, 3, tuple(kinds), masks=masks, batch=2)
    (q, k, a, c, head), options = arguments(case, torch.float32)
    # There are few different tokens, so most contributions are ties.
    q, a = (x[:, :, torch.arange(rows) % levels] for x in (q, a))
    k, c = (x[:, :, torch.arange(columns) % levels] for x in (k, c))
    phi = pair_map(q, k, a, c, head, **options, backend="cpu")
    found = top_pairs(q, k, a, c, head, n_pairs=count, **options, backend="cpu")
    valid = valid_pairs(case, options)
    assert_sorted(found, phi, valid, count)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_huge_number_of_pairs_is_that_of_all_pairs(backend: str) -> None:
    (q, k, a, c, head), options = arguments(PairCase(5, 7, kinds=KINDS), torch.float32)
    every = top_pairs(q, k, a, c, head, n_pairs=35, **options, backend=backend)
    for count in (36, 10**9, 10**30):
        found = top_pairs(q, k, a, c, head, n_pairs=count, **options, backend=backend)
        assert found.values.shape == every.values.shape == (*q.shape[:2], 35)
        assert all(map(torch.equal, found, every))
    none = top_pairs(
        q[:, :, :0], k, a[:, :, :0], c, head, n_pairs=10**9, **options, backend=backend
    )
    assert none.total_i.tolist() == [[-1]] * len(q)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_near_ties_at_the_cut_are_reported(backend: str) -> None:
    a = torch.tensor([4.0, 3.0, 2.81, 2.5]).view(1, 1, 4, 1)
    zeros = torch.zeros(1, 1, 4, 1)
    call: Any = (zeros, zeros[:, :, :1], a, zeros[:, :, :1], torch.ones(1, 1))
    options: dict[str, Any] = {"kinds": ("unique_a",), "backend": backend}
    tied = {n: top_pairs(*call, n_pairs=n, **options) for n in range(1, 5)}
    assert [bool(x.near_ties) for x in tied.values()] == [False, True, False, False]
    assert [bool(x.total_near_ties) for x in tied.values()] == [False, True, False, False]
    assert "note: in 2 of 2 lists the last pair is not distinguishable" in repr(tied[2])
    assert "note" not in repr(tied[1])
    # A masked pair is no rival.
    masked = top_pairs(
        *call, n_pairs=2, mask_a=torch.tensor([[True, True, False, True]]), **options
    )
    assert not masked.near_ties.any()


def test_printed_results_are_short() -> None:
    case = PairCase(30, 40, kinds=KINDS)
    (q, k, a, c, head), options = arguments(case, torch.float32)
    found = top_pairs(q, k, a, c, head, n_pairs=100, **options)
    lines = str(found).splitlines()
    assert lines[0].startswith(f"TopPairs(100 pairs for each of {case.batch} samples and 5 experts")
    assert lines[1].split() == ["sample", "expert", "i", "j", "value"]
    total = (found.total_i[0, 0], found.total_j[0, 0])
    assert lines[2].split()[:4] == ["0", "sum", *(str(int(x)) for x in total)]
    assert float(lines[2].split()[4]) == pytest.approx(float(found.total_values[0, 0]), rel=1e-4)
    assert lines[14] == f"... {case.batch * 6 * 100 - 12} more rows"
    options.pop("target")
    assert repr(pair_moe(q, k, a, c, **options)) == (
        f"PairMoEOutput(y {tuple(a.shape)} float32, mass {tuple(a.shape[:3])} float32)"
    )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_any_integer_is_a_target(backend: str) -> None:
    (q, k, a, c, head), options = arguments(PairCase(5, 4, kinds=KINDS), torch.float32)
    options["target"] = torch.ones(len(q), dtype=torch.int64)
    expected = pair_map(q, k, a, c, head, **options, backend=backend)
    for target in (1, np.int64(1), torch.tensor(1), [1] * len(q), np.ones(len(q), dtype=np.int8)):
        options["target"] = target
        found = pair_map(q, k, a, c, head, **options, backend=backend)
        assert torch.equal(found, expected)
        top = top_pairs(q, k, a, c, head, n_pairs=1, **options, backend=backend)
        assert torch.equal(top.values[:, :, 0], expected.flatten(2).amax(dim=2))
