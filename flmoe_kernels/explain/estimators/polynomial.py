"""Polynomials of membership variables, and their exact indices."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flmoe_kernels.explain.games.coalitions import Bools, Floats, Ints

from .linear import log_binomial

LARGEST_ORDER = 4
PRODUCT, AND = "product", "and"
_STEP_ELEMENTS = 2**22


@dataclass(frozen=True, eq=False)
class Terms:
    """Features of coalitions: functions of the players in a set A, times a power of the size.

    With x = +1 for a player in T and -1 otherwise, and z = 2 |T| / n - 1:

    "product": z^degree * product of x over A
    "and": 1 if A is in T, plus `parity` if no player of A is in T

    `parity` is +1 or -1 for games that are even or odd under the complement of T, 0 for other games.
    """

    kind: str
    players: int
    parity: int
    sets: Ints  # (P, LARGEST_ORDER), filled up with n, which stands for no player
    degree: Ints  # (P,), 0 for "and"

    def __len__(self) -> int:
        return len(self.sets)

    def __getitem__(self, chosen: Ints) -> Terms:
        return Terms(self.kind, self.players, self.parity, self.sets[chosen], self.degree[chosen])

    @property
    def order(self) -> Ints:
        return (self.sets < self.players).sum(axis=1)

    def features(self, inside: Bools) -> Floats:
        """Return (m, P) of coalitions (m, n)."""
        one = np.ones((len(inside), 1))
        widest = int(self.order.max(initial=0))
        if self.kind == AND:
            x = np.concatenate([inside.astype(np.float64), one], axis=1)
            found = _product(x, self.sets[:, :widest])
            if self.parity:
                x[:, :-1] = 1.0 - x[:, :-1]
                found += self.parity * _product(x, self.sets[:, :widest])
            return found
        found = _product(np.concatenate([inside * 2.0 - 1.0, one], axis=1), self.sets[:, :widest])
        if self.degree.any():
            z = 2.0 * inside.sum(axis=1) / max(self.players, 1) - 1.0
            found *= (z[:, None] ** np.arange(self.degree.max() + 1))[:, self.degree]
        return found

    def predict(self, inside: Bools, weights: Floats) -> Floats:
        """Return (m,) of coalitions (m, n), in parts of bounded memory."""
        step = max(1, _STEP_ELEMENTS // max(len(self), 1))
        parts = [self.features(inside[k : k + step]) @ weights for k in range(0, len(inside), step)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def indices(self, weights: Floats, tables: list[Floats]) -> list[Floats]:
        """Sum the polynomial over all coalitions, with coefficients that depend on size and membership.

        tables: (n + 1, |K| + 1), coefficients times C(n, s), of single players, whose result is (n,), or of
        pairs, whose result is (n, n).
        """
        n, order = self.players, self.order
        results = [np.zeros((n,) * (t.shape[1] - 1)) for t in tables]
        for o in np.unique(order):
            for j in np.unique(self.degree[order == o]):
                chosen = (order == o) & (self.degree == j)
                sets, own = self.sets[chosen, :o], weights[chosen]
                total, single = own.sum(), np.zeros(n)
                pair = np.zeros((n, n))
                for a in range(o):
                    single += np.bincount(sets[:, a], own, minlength=n)
                    for b in range(a + 1, o):
                        codes = np.bincount(sets[:, a] * n + sets[:, b], own, minlength=n * n)
                        pair += codes.reshape(n, n)
                pair += pair.T
                for result, coefficients in zip(results, tables, strict=True):
                    value = self._sums(coefficients, int(o), int(j))
                    if result.ndim == 1:
                        result += value[0] * (total - single) + value[1] * single
                        continue
                    both = single[:, None] + single
                    result += value[0] * (total - both + pair)
                    result += value[1] * (both - 2.0 * pair) + value[2] * pair
        return results

    def _sums(self, coefficients: Floats, order: int, degree: int) -> Floats:
        """Sum a term with q of its `order` players in K over all coalitions, for q = 0 .. |K|."""
        n, inside = self.players, coefficients.shape[1] - 1
        s = np.arange(n + 1)
        z = (2.0 * s / max(n, 1) - 1.0) ** degree
        found = np.zeros(inside + 1)
        for q in range(min(inside, order) + 1):
            for k in range(inside + 1):
                used = coefficients[:, k] != 0
                ways = self._ways(n - inside, s[used] - k, order - q, log_binomial(n, s[used]))
                pattern = self._patterns(inside, k, q)
                terms = coefficients[used, k] * z[used] * (pattern[:, None] * ways).sum(axis=0)
                found[q] += terms.sum()
        return found

    def _patterns(self, inside: int, k: int, q: int) -> Floats:
        """Sum over the parts of K with k players of the term's factor, given q of its players in K: (2,)."""
        shares = np.exp(
            log_binomial(q, np.arange(q + 1)) + log_binomial(inside - q, k - np.arange(q + 1))
        )
        shares = np.round(shares)
        if self.kind == AND:
            return np.array([shares[q], self.parity * shares[0]])
        signs = (-1.0) ** (q - np.arange(q + 1))
        return np.array([(signs * shares).sum(), 0.0])

    def _ways(self, others: int, size: Floats, members: int, scale: Floats) -> Floats:
        """Sum the factor of `members` players over the sets of `size` among the others, relative to exp(scale)."""
        if self.kind == AND:
            both = [
                log_binomial(others - members, size - members),
                log_binomial(others - members, size),
            ]
            return np.exp(np.stack(both) - scale)
        total = np.zeros((2, len(size)))
        for there in range(members + 1):
            count = log_binomial(members, there) + log_binomial(others - members, size - there)
            total[0] += (-1.0) ** (members - there) * np.exp(count - scale)
        return total


def _product(x: Floats, sets: Ints) -> Floats:
    """Return the product over each set's columns of x (m, n + 1)."""
    found = x[:, sets[:, 0]] if sets.shape[1] else np.ones((len(x), len(sets)))
    for column in sets.T[1:]:
        found *= x[:, column]
    return found
