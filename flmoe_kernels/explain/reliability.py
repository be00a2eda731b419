"""Conditions for reliable standard errors and distinguishable rankings."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flmoe_kernels.explain.games.coalitions import Floats
from flmoe_kernels.ops.pair_moe.results import NEAR_TIE

# Observations below which a mean has no standard error: with fewer, the deviations of skewed values exceed it
# several times.
LEAST_COUNT = 16
# Values whose difference is at most this many of its standard errors are tied.
TIE_ERRORS = 2.0
CONFIDENCE_95 = 1.96  # standard errors from the mean to the ends of a 95% interval
RULE = f"{NEAR_TIE:.0%} of the largest magnitude"


def error_of_mean(squares: Any, count: Any) -> Any:
    """Standard error of a mean of `count` > 3 independent values, whose squared deviations sum to `squares`.

    (mean - expectation) / (s / sqrt(count)) of normal values has Student's t distribution, whose standard
    deviation is sqrt((count - 1) / (count - 3)). The error includes this factor, so that deviation / error has
    the root mean square 1 also for few values.
    """
    return (squares / (count * (count - 3.0))) ** 0.5


def tied(values: Floats, errors: Floats, place: int) -> NDArray[np.bool_]:
    """Whether each value (n,) is tied with the one at `place`, that is, not distinguishable from it.

    Tied: within TIE_ERRORS standard errors of their difference, or within NEAR_TIE of the largest magnitude. NaN
    errors are unknown and distinguish nothing; NaN values are tied with none. Errors count as independent; those
    of pairs that share draws are not exactly so.
    """
    known = np.where(np.isnan(errors), np.inf, errors)
    reach = np.maximum(
        TIE_ERRORS * np.hypot(known, known[place]),
        NEAR_TIE * np.nanmax(np.abs(values), initial=0.0),
    )
    close: NDArray[np.bool_] = np.abs(values - values[place]) <= reach
    return close


def near_ties(keys: Floats, kept: int, errors: Floats | None = None) -> int:
    """Number of keys (n,), the best first, after the first `kept` that are tied with the last kept one."""
    if not 0 < kept < len(keys):
        return 0
    return int(tied(keys, np.zeros_like(keys) if errors is None else errors, kept - 1)[kept:].sum())
