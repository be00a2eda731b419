"""Tests of routing on the CPU kernels and the reference against the definitions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flmoe_kernels.ops.routing.api import dispatch, gate
from tests.support.inputs import SPECIAL_LOGITS, draw, gradients
from tests.support.routed_cases import DTYPES

OPS = torch.ops.flmoe
BACKENDS = ("reference", "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate_chooses_the_largest(dtype: torch.dtype, backend: str) -> None:
    logits = draw(50, 7, dtype=dtype)
    for over, top_k in itertools.product(("selected", "all"), (1, 3, 7)):
        index, weight = gate(logits, top_k, over=over, backend=backend)
        for n, row in enumerate(logits.double().tolist()):
            order = sorted(range(7), key=lambda e, row=row: (-row[e], e))[:top_k]
            assert index[n].tolist() == order
            below = sum(math.exp(row[e]) for e in (order if over == "selected" else range(7)))
            for got, e in zip(weight[n].tolist(), order, strict=True):
                assert got == pytest.approx(
                    math.exp(row[e]) / below, rel=4 * torch.finfo(dtype).eps
                )


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_select_the_expert_with_the_lower_index(backend: str) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 1.0, 2.0], [0.0] * 5])
    assert gate(logits, 4, backend=backend).index.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinite_and_nan_logits_act_as_in_torch(dtype: torch.dtype) -> None:
    logits = torch.tensor(SPECIAL_LOGITS, dtype=dtype)
    for over, top_k in itertools.product(("selected", "all"), (1, 2, 4)):
        results = []
        for backend in BACKENDS:
            leaf = logits.clone().requires_grad_()
            index, weight = gate(leaf, top_k, over=over, backend=backend)
            results.append([weight.detach(), *gradients([weight], [leaf])])
            assert torch.equal(index, gate(logits, top_k, backend="reference").index)
        assert results[0][0].isnan().any()
        unit = 4 * torch.finfo(dtype).eps
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=unit, atol=unit, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_capacity_keeps_the_first_tokens(backend: str) -> None:
    logits = draw(40, 4, dtype=torch.float64)
    mask = torch.arange(40) % 3 != 1
    free = gate(logits, 2, backend=backend).index
    found = gate(logits, 2, capacity=5, mask=mask, backend=backend)
    taken = [0] * 4
    for n, k in itertools.product(range(40), range(2)):
        e = int(free[n, k])
        kept = bool(mask[n]) and taken[e] < 5
        assert int(found.index[n, k]) == (e if kept else -1)
        taken[e] += int(kept)
    sums = found.weight.sum(1)
    assert not found.weight[found.index < 0].any()
    torch.testing.assert_close(sums, (found.index >= 0).any(1).to(sums.dtype))
    raw = gate(logits, 2, capacity=5, mask=mask, renormalize=False, backend=backend).weight
    expected = torch.where(found.index < 0, 0.0, gate(logits, 2, backend=backend).weight)
    assert torch.equal(raw, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dispatch_groups_rows_in_order(backend: str) -> None:
    index = torch.tensor([[2, 0], [-1, 2], [0, -1], [2, 1]])
    counts, offsets, permutation = dispatch(index, 4, backend=backend)
    assert counts.tolist() == [2, 1, 3, 0]
    assert offsets.tolist() == [0, 2, 3, 6, 6]
    assert permutation.tolist() == [1, 4, 7, 0, 3, 6, 2, 5]
    assert {x.dtype for x in (counts, offsets, permutation)} == {torch.int32}
