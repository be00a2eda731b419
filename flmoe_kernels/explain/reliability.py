"""When a standard error holds, and when a ranking is distinguishable."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flmoe_kernels.ops.pair_moe.results import NEAR_TIE

# Observations below which a mean has no standard error: with fewer, the deviations of skewed values exceed it
# several times.
LEAST_COUNT = 16
_ERRORS = 2.0  # values whose difference is at most this many of its standard errors are not distinguishable
RULE = f"{NEAR_TIE:.0%} of the largest magnitude"


def error_of_mean(squares: Any, count: Any) -> Any:
    """Standard error of a mean of `count` > 3 independent values, whose squared deviations sum to `squares`.

    (mean - expectation) / (s / sqrt(count)) of normal values has Student's t distribution, whose standard
    deviation is sqrt((count - 1) / (count - 3)). The error includes this factor, so that deviation / error has
    the root mean square 1 also for few values.
    """
    return (squares / (count * (count - 3.0))) ** 0.5


def near_ties(
    keys: NDArray[np.float64],
    kept: int,
    errors: NDArray[np.float64] | None = None,
    largest: float | None = None,
) -> int:
    """Number of keys (n,), the best first, after the first `kept` that are not distinguishable from the last
    kept one.

    Two keys are not distinguishable if they differ by at most NEAR_TIE of the largest magnitude (of all keys,
    unless given), or two standard errors of their difference; NaN errors distinguish nothing. Keys of one
    estimate share draws, so the error of a difference is taken as if they were independent.
    """
    if not 0 < kept < len(keys):
        return 0
    if largest is None:
        largest = float(np.nanmax(np.abs(keys), initial=0.0))
    margin: Any = NEAR_TIE * largest
    if errors is not None:
        margin = np.maximum(margin, _ERRORS * np.hypot(errors[kept - 1], errors[kept:]))
    return int((~(keys[kept - 1] - keys[kept:] > margin)).sum())
