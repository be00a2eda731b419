"""Tests of routing's Triton kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flmoe_kernels.ops.routing import triton as kernels
from flmoe_kernels.ops.routing.api import dispatch, gate
from tests.support.inputs import draw, gradients

TRITON = "triton"
OPS = torch.ops.flmoe
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN, INF = float("nan"), float("inf")
SIZES = ((0, 3), (1, 1), (7, 5), (150, 4), (40, 64), (12, 300))


@pytest.mark.parametrize("over", ["selected", "all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gate(dtype: torch.dtype, over: str) -> None:
    """Choices equal the CPU's, and weights agree up to rounding; coarse logits give ties in most rows."""
    for tokens, experts in SIZES:
        for top_k in sorted({1, min(2, experts), min(experts, 8)}):
            for step in (1e-3, 1.0):
                logits = (draw(tokens, experts) / step).round().mul(step).to(dtype)
                found, want = (gate(logits, top_k, over=over, backend=b) for b in (TRITON, "cpu"))
                assert torch.equal(found.index, want.index)
                unit = 4 * torch.finfo(dtype).eps
                torch.testing.assert_close(found.weight, want.weight, rtol=unit, atol=unit)
                assert found.weight.dtype == dtype


def test_gate_orders_nan_infinities_and_zeros() -> None:
    values = (NAN, INF, 1.0, 0.0, -0.0, -1.0, -INF, -NAN)
    rows = [[values[(n * 5 + e * (n % 7 + 1)) % 8] for e in range(6)] for n in range(56)]
    for dtype in DTYPES:
        logits = torch.tensor(rows, dtype=dtype)
        for over, top_k in (("selected", 1), ("selected", 6), ("all", 4)):
            found, want = (gate(logits, top_k, over=over, backend=b) for b in (TRITON, "cpu"))
            assert torch.equal(found.index, want.index)
            unit = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                found.weight, want.weight, rtol=unit, atol=unit, equal_nan=True
            )


def index_of(tokens: int, choices: int, experts: int, dropped: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(experts, (tokens, choices), generator=generator)
    return index.masked_fill(torch.rand((tokens, choices), generator=generator) < dropped, -1)


# Several blocks of rows and of groups in the scan; one expert; no tokens.
ROUTED = ((0, 2, 3), (1, 1, 1), (40, 2, 4), (300, 4, 5), (700, 1, 40), (150, 4, 300))


@pytest.mark.parametrize("dropped", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sizes", ROUTED, ids=str)
def test_dispatch(sizes: tuple[int, int, int], dropped: float) -> None:
    index = index_of(*sizes, dropped)
    found, want = (dispatch(index, sizes[2], backend=b) for b in (TRITON, "cpu"))
    for name, got, expected in zip(want._fields, found, want, strict=True):
        assert torch.equal(got, expected), name
        assert got.dtype == torch.int32


@pytest.mark.parametrize("capacity", [None, 0, 1, 20, 2**40])
@pytest.mark.parametrize("masked", [False, True])
def test_limit(masked: bool, capacity: int | None) -> None:
    for tokens, choices, experts in ROUTED[:-1]:
        index = index_of(tokens, choices, experts, 0.2)
        mask = torch.arange(tokens) % 3 != 1 if masked else None
        found, want = (
            OPS.routing_limit(index, mask, experts, capacity, b) for b in (TRITON, "cpu")
        )
        assert torch.equal(found, want)
        assert found.data_ptr() != index.data_ptr() or not tokens
        nowhere = torch.zeros(tokens, dtype=torch.bool)
        assert (OPS.routing_limit(index, nowhere, experts, capacity, TRITON) == -1).all()


def test_many_blocks_are_scanned_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "_HELD", 32)
    monkeypatch.setattr(kernels, "_SCAN", (4, 2))
    index = index_of(50, 4, 5, 0.1)
    found, want = (dispatch(index, 5, backend=b) for b in (TRITON, "cpu"))
    assert all(map(torch.equal, found, want))
    found_limit, want_limit = (OPS.routing_limit(index, None, 5, 7, b) for b in (TRITON, "cpu"))
    assert torch.equal(found_limit, want_limit)


def test_an_index_out_of_range_is_dropped() -> None:
    """Values are not checked on a GPU: indices without an expert are handled like -1."""
    index = index_of(60, 3, 5, 0.1)
    wild = index.clone()
    for place, value in ((4, 5), (50, -2), (77, 2**40), (100, -(2**63)), (179, 2**63 - 1)):
        index.view(-1)[place], wild.view(-1)[place] = -1, value
    found, want = (kernels.dispatch(x, 5) for x in (wild, index))
    assert all(map(torch.equal, found, want))
    for capacity in (None, 4):
        found_limit, want_limit = (kernels.limit(x, None, 5, capacity) for x in (wild, index))
        assert torch.equal(found_limit, want_limit)


def test_gate_with_capacity_and_mask_and_its_gradient() -> None:
    mask = torch.arange(40) % 4 != 2
    for over, renormalize in (("selected", True), ("all", False)):
        found = []
        for backend in (TRITON, "reference"):
            logits = draw(40, 5).requires_grad_()
            index, weight = gate(
                *(logits, 3),
                **{"over": over, "capacity": 9, "mask": mask, "renormalize": renormalize},
                backend=backend,
            )
            found.append((index, weight, *gradients([weight], [logits])))
        assert torch.equal(found[0][0], found[1][0])
        for got, want in zip(found[0][1:], found[1][1:], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
