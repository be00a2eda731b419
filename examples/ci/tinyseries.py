"""Functions of time series and labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np


def moving_average(x: np.ndarray, width: int) -> np.ndarray:
    """Means of all windows of this width, from one cumulative sum."""
    sums = np.cumsum(np.concatenate([[0.0], x]))
    return (sums[width:] - sums[:-width]) / width


def one_hot(labels: np.ndarray, classes: int) -> np.ndarray:
    """Rows with a 1 at the label, without a product or a comparison."""
    rows = np.zeros((len(labels), classes))
    rows[np.arange(len(labels)), labels] = 1.0
    return rows


def count_pairs(words: Iterable[str]) -> dict[tuple[str, str], int]:
    """How often a word follows another."""
    return Counter(pairwise(words))
