"""Error budget: the allowed distance of a result from the exact result.

The oracle is the reference in float64 on the same (rounded) inputs. A backend passes if its error is at most twice
that of the reference in the backend's dtype, plus a rounding term, so that a correct backend does not fail if the
error of the reference happens to be small. Both the largest and the root-mean-square error must pass. A budget
that a result of zeros would pass is an error of the test.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

FACTOR = 2.0
# The rounding term in units of the dtype's epsilon and of the largest exact value. Half precision is summed in
# float32 and rounded once, float32 sums differ in order, and in float64 the oracle has the same errors.
ROUNDING = {
    torch.bfloat16: 2.0,
    torch.float16: 2.0,
    torch.float32: 8.0,
    torch.float64: 4096.0,
}


@dataclasses.dataclass(frozen=True)
class Errors:
    """Largest and root-mean-square absolute error, or limits for them."""

    largest: float
    rms: float

    def within(self, limit: Errors) -> bool:
        return self.largest <= limit.largest and self.rms <= limit.rms

    def __str__(self) -> str:
        return f"{self.largest:.3g} (rms {self.rms:.3g})"


def assert_within_budget(
    actual: Tensor,
    reference_low: Tensor,
    oracle64: Tensor,
    name: str,
    *,
    magnitude: float = 0.0,
    may_vanish: bool = False,
) -> None:
    """Fail unless `actual` is as close to the oracle as its dtype allows.

    Args:
        actual: the backend's result.
        reference_low: the reference's result in the same dtype.
        oracle64: the reference's result in float64. Where it is not finite, `actual` must be the same
            NaN or infinity.
        name: name of the compared result, for the message.
        magnitude: size of the terms of the sums, for the rounding term, if it is larger than the largest
            value of the oracle because the terms cancel.
        may_vanish: the terms may cancel completely, so zeros may pass.

    Raises:
        AssertionError: a different shape or dtype, an error above the budget, a different pattern of
            non-finite values, or a budget that zeros would pass.
    """
    assert actual.shape == oracle64.shape, f"{name}: shape {actual.shape}, not {oracle64.shape}"
    assert actual.dtype == reference_low.dtype, (
        f"{name}: dtype {actual.dtype}, not {reference_low.dtype}"
    )
    if actual.numel() == 0:
        return
    problem = _misplaced_nonfinite(actual, oracle64)
    assert not problem, f"{name}: {problem}"
    limit = _budget(reference_low, oracle64, magnitude)
    errors = _errors(actual, oracle64)
    assert errors.within(limit), f"{name}: error {errors} above the budget {limit}"
    if not may_vanish and bool((_finite(oracle64) != 0).any()):
        zeros = _errors(torch.zeros_like(oracle64), oracle64)
        assert not zeros.within(limit), f"{name}: the budget {limit} is so wide that zeros pass"


def assert_outside_budget(
    wrong: Tensor, reference_low: Tensor, oracle64: Tensor, name: str
) -> None:
    """Fail if a wrong result is within the budget: a control that shows that a comparison can fail."""
    if wrong.shape != oracle64.shape or _misplaced_nonfinite(wrong, oracle64):
        return
    limit = _budget(reference_low, oracle64, 0.0)
    errors = _errors(wrong, oracle64)
    assert not errors.within(limit), f"{name}: error {errors} passes the budget {limit}"


def _finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x.double(), 0.0).detach()


def _errors(x: Tensor, oracle: Tensor) -> Errors:
    difference = _finite(x) - _finite(oracle)
    return Errors(float(difference.abs().max()), float(difference.square().mean().sqrt()))


def _budget(reference_low: Tensor, oracle: Tensor, magnitude: float) -> Errors:
    overflow = oracle.isfinite() & ~reference_low.isfinite()
    if bool(overflow.any()):
        raise ValueError("the reference itself overflows in this dtype: choose smaller inputs")
    own = _errors(reference_low, oracle)
    size = _errors(torch.zeros_like(oracle), oracle)
    unit = ROUNDING[reference_low.dtype] * torch.finfo(reference_low.dtype).eps
    return Errors(
        FACTOR * own.largest + unit * max(size.largest, magnitude),
        FACTOR * own.rms + unit * max(size.rms, magnitude),
    )


def _misplaced_nonfinite(actual: Tensor, oracle: Tensor) -> str:
    kinds = (
        ("NaN", torch.isnan),
        ("inf", torch.isposinf),
        ("-inf", torch.isneginf),
    )
    for kind, test in kinds:
        here, there = test(actual), test(oracle)
        if bool((here != there).any()):
            return f"{int((here & ~there).sum())} unexpected, {int((there & ~here).sum())} missing {kind}"
    return ""
