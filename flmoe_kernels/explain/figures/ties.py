"""Groups of tied values, which figures draw alike."""

from __future__ import annotations

import numpy as np

from flmoe_kernels.explain.games.coalitions import Floats, Ints
from flmoe_kernels.explain.reliability import TIE_ERRORS


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

    A group is tied across 0, and drawn at 0, unless all its values are on one side of 0 and some of them more than
    two standard errors from it. So is a value of unknown (NaN) error, which links no others. NaN stays NaN.
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
