"""Conditions for reliable standard errors, distinguishable rankings, and groups of ties."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flmoe_kernels.explain.games.coalitions import Floats, Ints
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


def groups(values: Floats, errors: Floats) -> Ints:
    """Number the groups of tied values, 0 for the group of largest values.

    Two values are in one group if they are within two standard errors of their difference, directly or through
    other values. A group is an interval in the order of the values: a value between two tied values is
    tied with one of them.
    """
    order = np.argsort(-values, kind="stable")
    x, s = values[order], np.where(np.isnan(errors), np.inf, errors)[order]
    starts = np.zeros(len(x), dtype=np.int64)
    widest = s.max(initial=0.0)
    last = 0  # of the current group
    for k in range(len(x)):
        if k > last:
            starts[k], last = 1, k
        # No value below this one can be tied with value k.
        lowest = x[k] - TIE_ERRORS * float(np.hypot(s[k], widest))
        later = slice(last + 1, int(np.searchsorted(-x, -lowest, side="right")))
        linked = np.flatnonzero(x[k] - x[later] <= TIE_ERRORS * np.hypot(s[k], s[later]))
        if linked.size:
            last += 1 + int(linked[-1])
    numbers = np.empty_like(starts)
    numbers[order] = starts.cumsum()
    return numbers


def alike(values: Floats, errors: Floats) -> Floats:
    """Values to draw: the mean of each group of values that are tied by their errors.

    A group is drawn at its mean if all its values have one sign and at least one is more than two standard errors
    from 0, else at 0. A value with unknown (NaN) error is drawn at 0 and belongs to no group. NaN stays NaN.
    """
    known = np.isfinite(values) & ~np.isnan(errors)
    drawn = np.where(known | np.isnan(values), values, 0.0)
    x, s = values[known], errors[known]
    if not s.any():
        return drawn
    group = groups(x, s)
    count = np.bincount(group)
    mean = np.bincount(group, weights=x) / count
    sides = (np.bincount(group, weights=side * x > 0) for side in (1, -1))
    clear = np.bincount(group, weights=np.abs(x) > TIE_ERRORS * s) > 0
    sure = np.logical_or(*(side == count for side in sides)) & clear
    drawn[known] = np.where(sure, mean, 0.0)[group]
    return drawn
