"""Tests of pair_map and top_pairs that every backend must pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flmoe_kernels import pair_map, pair_moe, top_pairs
from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from flmoe_kernels.ops.pair_moe.kinds import KINDS
from tests.support.inputs import as_dtype, draw
from tests.support.pair_cases import PairCase

CLASSES = 5
Call = tuple[PairCase, torch.dtype]


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


def valid_pairs(case: PairCase, options: dict[str, Any]) -> Tensor:
    valid = torch.ones(case.batch, case.rows, case.columns, dtype=torch.bool)
    if options["mask_a"] is not None:
        valid &= options["mask_a"][:, :, None]
    if options["mask_b"] is not None:
        valid &= options["mask_b"][:, None, :]
    return valid


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


def assert_sorted(
    found: Any, phi: Tensor, valid: Tensor, count: int, tolerance: float = 0.0
) -> None:
    """The pairs of each expert are those of the sorted map."""
    for e in range(phi.shape[1]):
        values, *places = sorted_pairs(phi[:, e], valid, count)
        assert all(map(torch.equal, (x[:, e] for x in found[1:3]), places))
        torch.testing.assert_close(found.values[:, e], values, rtol=tolerance, atol=tolerance)


class ScoreTests:
    """Subclasses set a backend, its widest dtype, sizes of a call with ties, and the allowed difference of the
    values of both operators; they have a fixture `call`."""

    backend: str
    widest: torch.dtype
    tied: tuple[int, int]
    tolerance = 0.0

    def test_contributions_add_up_to_the_pooled_value(self) -> None:
        """For reduce "pool", the sum of phi over pairs is head . y, so the map explains the operator's result."""
        case = PairCase(20, 33, kinds=KINDS, masks="both")
        tensors, options = arguments(case, self.widest)
        phi = pair_map(*tensors, **options, backend=self.backend)
        target = options.pop("target")
        y = pair_moe(*tensors[:4], **options, reduce="pool", backend=self.backend).y
        weight = tensors[4].permute(2, 0, 1)[target]
        torch.testing.assert_close(phi.sum((2, 3)), (y * weight).sum(2))

    @pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 6, 300])
    def test_top_pairs_are_the_sorted_map(self, call: Call, count: int) -> None:
        case, dtype = call
        tensors, options = arguments(case, dtype)
        phi = pair_map(*tensors, **options, backend=self.backend)
        found = top_pairs(*tensors, **options, n_pairs=count, backend=self.backend)
        valid = valid_pairs(case, options)
        assert_sorted(found, phi, valid, count, self.tolerance)
        total = sorted_pairs(phi.sum(1), valid, count)[0]
        torch.testing.assert_close(found.total_values, total)
        for b in range(case.batch):
            i, j = found.total_i[b], found.total_j[b]
            there = i >= 0
            at = phi[b][:, i[there], j[there]].sum(0)
            torch.testing.assert_close(found.total_values[b][there], at)
            assert len({*zip(i[there].tolist(), j[there].tolist(), strict=True)}) == int(
                there.sum()
            )

    def test_ties_select_the_earlier_pair(self) -> None:
        """Repeated tokens give equal contributions; the first pairs are kept, in order."""
        case = PairCase(*self.tied, kinds=KINDS, masks="both", batch=1)
        tensors, options = arguments(case, torch.float32)
        q, k, a, c, head = tensors
        q, a = (x[:, :, torch.arange(case.rows) % 2] for x in (q, a))
        k, c = (x[:, :, torch.arange(case.columns) % 3] for x in (k, c))
        options["mask_b"] = torch.ones(1, case.columns, dtype=torch.bool)
        phi = pair_map(q, k, a, c, head, **options, backend=self.backend)
        found = top_pairs(q, k, a, c, head, n_pairs=40, **options, backend=self.backend)
        valid = valid_pairs(case, options)
        assert_sorted(found, phi, valid, 40, self.tolerance)
        assert all(values.unique().numel() <= 6 for values in found.values[0])
        assert not found.values[:, 4].any(), "a null expert's contributions are all zero"
        assert torch.equal(found.j[0, 4], torch.arange(40))

    @pytest.mark.parametrize(
        ("values", "valid", "count", "i", "j"),
        [
            ((2.0, math.nan, -math.inf), (True, True, True), 7, [1, 1, 0, 0, 2, 2], [0, 1] * 3),
            ((2.0, 5.0, -math.inf), (True, False, True), 5, [0, 0, 2, 2, -1], [0, 1, 0, 1, -1]),
        ],
    )
    def test_nan_comes_first_then_minus_infinity_and_masked_pairs_last(
        self,
        values: tuple[float, ...],
        valid: tuple[bool, ...],
        count: int,
        i: list[int],
        j: list[int],
    ) -> None:
        a, zeros = torch.tensor(values).view(1, 1, 3, 1), torch.zeros(1, 1, 3, 1)
        options: dict[str, Any] = {"kinds": ("unique_a",), "mask_a": torch.tensor([valid])}
        few = zeros[:, :, :2]
        call = (zeros, few, a, few, torch.ones(1, 1))
        found = top_pairs(*call, n_pairs=count, backend=self.backend, **options)
        assert (found.i[0, 0].tolist(), found.j[0, 0].tolist()) == (i, j)
        assert found.total_i[0].tolist() == i

    def test_equal_totals_select_the_earlier_pair(self) -> None:
        ones = torch.ones(1, 2, 4, 3)
        options: dict[str, Any] = {"kinds": ("unique_a", "synergy"), "backend": self.backend}
        found = top_pairs(*(ones, ones, ones, ones), torch.ones(2, 3), n_pairs=6, **options)
        assert found.total_i[0].tolist() == [0, 0, 0, 0, 1, 1]
        assert found.total_j[0].tolist() == [0, 1, 2, 3, 0, 1]

    def test_near_ties_at_the_cut_are_reported(self) -> None:
        a = torch.tensor([4.0, 3.0, 2.81, 2.5]).view(1, 1, 4, 1)
        zeros = torch.zeros(1, 1, 4, 1)
        call: Any = (zeros, zeros[:, :, :1], a, zeros[:, :, :1], torch.ones(1, 1))
        options: dict[str, Any] = {"kinds": ("unique_a",), "backend": self.backend}
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

    def test_any_integer_is_a_target(self) -> None:
        (q, k, a, c, head), options = arguments(PairCase(5, 4, kinds=KINDS), torch.float32)
        options["target"] = torch.ones(len(q), dtype=torch.int64)
        expected = pair_map(q, k, a, c, head, **options, backend=self.backend)
        several = [1] * len(q)
        for target in (1, np.int64(1), torch.tensor(1), several, np.array(several, dtype=np.int8)):
            options["target"] = target
            found = pair_map(q, k, a, c, head, **options, backend=self.backend)
            assert torch.equal(found, expected)
            top = top_pairs(q, k, a, c, head, n_pairs=1, **options, backend=self.backend)
            assert torch.equal(top.values[:, :, 0], expected.flatten(2).amax(dim=2))


class KernelScoreTests(ScoreTests):
    """Comparisons of kernels with the reference."""

    def test_pair_map(self, call: Call) -> None:
        case, dtype = call
        tensors, options = arguments(case, dtype)
        actual = pair_map(*tensors, **options, backend=self.backend)
        low = pair_map(*tensors, **options, backend="reference")
        wide, wide_options = widened(case, dtype)
        oracle = pair_map(*wide, **wide_options, backend="reference")
        assert_within_budget(actual, low, oracle, f"pair_map of {case}")
        if actual.numel():
            assert_outside_budget(actual.roll(1, 3) + 0.01, low, oracle, "pair_map")
        invalid = ~valid_pairs(case, options)
        assert not actual.masked_select(invalid[:, None]).any()
