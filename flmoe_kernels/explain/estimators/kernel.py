"""Kernel ridge regression of a game's values: products of all orders, whose strength falls with the order.

With x = +1 for a player in T and -1 otherwise, the kernel of two coalitions is the product over players of
1 + rate x x', which depends only on the number of players in which they differ. Its sum with its value at the
complement is for even games, the difference for odd games.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from flmoe_kernels.explain.games.coalitions import Bools, Floats

from .linear import sums

LARGEST_PLAYERS = 20
LARGEST_ROWS = 2500
_RATES = (0.1, 0.2, 0.35)
_RIDGES = (1e-6, 1e-3, 1e-1)
_SEARCH_ROWS = 700  # rows for the choice of rate and ridge

Sample = tuple[Bools, Floats, Floats]  # coalitions, responses, weights of squared errors


@dataclass(frozen=True, eq=False)
class Kernel:
    """Functions of coalitions: the kernel with each of the points (m, n). Same interface as `Terms`."""

    points: Bools
    rate: float
    parity: int  # see `Terms`

    def by_distance(self) -> Floats:
        """Values (n + 1,) of two coalitions that differ in d players, 1 for d = 0."""
        n = self.points.shape[1]
        d = np.arange(n + 1)
        values = (1.0 + self.rate) ** (n - d) * (1.0 - self.rate) ** d
        values = values + self.parity * values[::-1]
        return np.asarray(values / values[0])

    def matrix(self, inside: Bools) -> Floats:
        """Return (k, m), the kernel of coalitions (k, n) with the points."""
        x, y = inside * 2.0 - 1.0, self.points * 2.0 - 1.0
        distance = (x.shape[1] - x @ y.T) / 2.0
        return self.by_distance()[np.rint(distance).astype(np.int64)]

    def predict(self, inside: Bools, weights: Floats) -> Floats:
        """Return (k,) of coalitions (k, n)."""
        return self.matrix(inside) @ weights

    def indices(self, weights: Floats, tables: list[Floats]) -> list[Floats]:
        """See `Terms.indices`."""
        size = self.points.sum(axis=1)
        return [sums(self.points, self._sums(t)[size] * weights[:, None]) for t in tables]

    def _sums(self, coefficients: Floats) -> Floats:
        """Sum a point of size s with k players in K over all coalitions: (n + 1, |K| + 1)."""
        n, inside = self.points.shape[1], coefficients.shape[1] - 1
        values, others = self.by_distance(), n - inside
        found = np.zeros((n + 1, inside + 1))
        for own in range(inside + 1):
            for there in range(inside + 1):
                for both in range(max(0, own + there - inside), min(own, there) + 1):
                    ways = math.comb(own, both) * math.comb(inside - own, there - both)
                    near = own + there - 2 * both
                    counts = _overlaps(others, values[near : near + others + 1])
                    sizes = np.arange(there, others + there + 1)
                    scaled = coefficients[sizes, there] / [math.comb(n, s) for s in sizes]
                    found[own : own + others + 1, own] += ways * (counts @ scaled)
        return found


def _overlaps(players: int, values: Floats) -> Floats:
    """Sum values[d] over the sets of size b at distance d from a set of size a: (players + 1, players + 1)."""
    total = np.zeros((players + 1, players + 1))
    for a in range(players + 1):
        for b in range(players + 1):
            for both in range(max(0, a + b - players), min(a, b) + 1):
                ways = math.comb(a, both) * math.comb(players - a, b - both)
                total[a, b] += ways * values[a + b - 2 * both]
    return total


def fit_kernel(
    fit: Sample, train: Sample, check: Sample, parity: int
) -> tuple[float, Kernel, Floats]:
    """Choose rate and ridge by the error on `check` of fits to a part of `train`.

    Returns the error on `check` of the fit to `train`, and the fit to all of `fit`.
    """
    step = -(-len(train[0]) // _SEARCH_ROWS)
    few = train[0][::step], train[1][::step], train[2][::step]
    best = (np.inf, _RATES[0], _RIDGES[0])
    for rate in _RATES:
        for ridge in _RIDGES:
            best = min(best, (_error(few, check, rate, ridge, parity), rate, ridge))
    _, rate, ridge = best
    error = _error(train, check, rate, ridge, parity)
    return error, Kernel(fit[0], rate, parity), _solved(fit, rate, ridge, parity)


def _error(train: Sample, check: Sample, rate: float, ridge: float, parity: int) -> float:
    weights = _solved(train, rate, ridge, parity)
    residual = check[1] - Kernel(train[0], rate, parity).predict(check[0], weights)
    return float((check[2] * residual**2).sum())


def _solved(data: Sample, rate: float, ridge: float, parity: int) -> Floats:
    inside, response, weight = data
    matrix = Kernel(inside, rate, parity).matrix(inside)
    matrix[np.diag_indices(len(matrix))] += ridge / np.maximum(weight, 1e-6) + 1e-10
    factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
    if int(failed):  # singular, up to rounding
        return np.zeros(len(matrix))
    return torch.cholesky_solve(torch.from_numpy(response)[:, None], factor)[:, 0].numpy()
