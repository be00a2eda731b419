"""Tests of the error budget: rounding passes, larger errors fail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flmoe_kernels.core.error_budget import assert_outside_budget, assert_within_budget
from tests.support.inputs import draw

EXACT = draw(40, 7, dtype=torch.float64)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def rounded(dtype: torch.dtype) -> Tensor:
    return EXACT.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_passes_and_larger_errors_fail(dtype: torch.dtype) -> None:
    low, eps = rounded(dtype), torch.finfo(dtype).eps
    assert_within_budget(low, low, EXACT, "itself")
    assert_within_budget((EXACT * (1 + eps)).to(dtype), low, EXACT, "one unit away")
    far = 2 * 4096 if dtype == torch.float64 else 32
    one_element = low.clone()
    one_element[3, 3] += far * eps * float(EXACT.abs().max())
    everywhere = (EXACT * (1 + far * eps)).to(dtype)
    for wrong in (one_element, everywhere, torch.zeros_like(low), -low, low.flip(0)):
        assert_outside_budget(wrong, low, EXACT, "wrong")
        with pytest.raises(AssertionError, match="above the budget"):
            assert_within_budget(wrong, low, EXACT, "wrong")
    with pytest.raises(AssertionError, match="passes the budget"):
        assert_outside_budget(low, low, EXACT, "right")


def test_a_small_error_everywhere_fails_by_its_root_mean_square() -> None:
    """A large error of the reference in one element does not allow errors in all elements."""
    low = rounded(torch.float32).clone()
    low[0, 0] += 1e-3
    shifted = rounded(torch.float32) + 1e-3
    with pytest.raises(AssertionError, match="above the budget"):
        assert_within_budget(shifted, low, EXACT, "shifted")


def test_shapes_and_dtypes_must_agree() -> None:
    low = rounded(torch.float32)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(low[:1], low, EXACT, "one row")
    with pytest.raises(AssertionError, match="dtype"):
        assert_within_budget(EXACT, low, EXACT, "too precise")
    assert_within_budget(low[:0], low[:0], EXACT[:0], "nothing")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_must_match_the_oracle(value: float) -> None:
    low, exact = rounded(torch.float32).clone(), EXACT.clone()
    low[1, 1] = value
    with pytest.raises(AssertionError, match="1 unexpected, 0 missing"):
        assert_within_budget(low, rounded(torch.float32), EXACT, "unexpected")
    with pytest.raises(ValueError, match="the reference itself overflows"):
        assert_within_budget(rounded(torch.float32), low, EXACT, "reference")
    exact[1, 1] = value
    assert_within_budget(low, low, exact, "both")
    with pytest.raises(AssertionError, match="0 unexpected, 1 missing"):
        assert_within_budget(rounded(torch.float32), low, exact, "missing")


def test_a_budget_that_accepts_zeros_is_an_error() -> None:
    poor = torch.zeros_like(EXACT).float()
    with pytest.raises(AssertionError, match="so wide that zeros pass"):
        assert_within_budget(rounded(torch.float32), poor, EXACT, "poor reference")
    with pytest.raises(AssertionError, match="so wide that zeros pass"):
        assert_within_budget(*[rounded(torch.float32)] * 2, EXACT, "magnitude", magnitude=1e7)
    noise = EXACT * 1e-9
    assert_within_budget(*[noise.float()] * 2, noise, "cancels", magnitude=1.0, may_vanish=True)
