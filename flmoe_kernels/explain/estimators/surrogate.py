"""Polynomials fitted to a game's values, each without the fold that it predicts.

Three kinds of fits are compared: a ridge regression on all products up to an order, with all orders that the data
allows and a few ridges; a sparse fit that adds the terms of largest correlation with the residual, many at a time
(orthogonal matching pursuit); for few players and rows, a kernel ridge regression, which is averaged with the
others if it is about as good. For each fold the choice is made by the error on the next fold, which then
joins the data of the final fit; the fold itself is never used. The fit may be poor: the estimate that uses it
stays unbiased, and only its error grows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flmoe_kernels.explain.games.coalitions import Bools, Floats, Ints
from flmoe_kernels.explain.reliability import LEAST_COUNT

from .kernel import LARGEST_PLAYERS, LARGEST_ROWS, Kernel, fit_kernel
from .polynomial import AND, LARGEST_ORDER, PRODUCT, Terms

FOLDS = 6
ALWAYS = -1  # fold of data that every fit uses
_NO_FOLD = -2
# Columns of the largest ridge regression: the Gram matrix of each fold takes 35 MB, and the fits 0.4 GB in all.
LARGEST_FIT = 2100
_RIDGES = (1e-11, 1e-3, 1e-2, 1e-1, 1.0)  # relative to the diagonal
_FEW_RIDGES = 1000  # columns from which only every second ridge is tried
_MOST_OF_ROWS = 0.8  # columns per row of a fit
# Orders of the products among which the sparse fit selects, by the number of players.
_SPARSE_ORDERS = ((16, 4), (24, 3), (10**9, 2))
_SPARSE_ELEMENTS = (
    2**23
)  # of the features in which the sparse fit searches; more rows are left out of the search
_SPARSE_TERMS = 600
_GROWTH = 0.25  # terms added at a time, relative to those found
_PATIENCE = 3  # steps without improvement
# An error below this, relative to the values, is a rounding error.
_EXACT = 1e-20
_NEARLY_EXACT = 1e-8  # no smoother fit is tried below


@dataclass(frozen=True, eq=False)
class Surrogate:
    """A sum of polynomials and functions of a kernel."""

    parts: tuple[tuple[Terms | Kernel, Floats], ...]

    def predict(self, inside: Bools) -> Floats:
        """Return (m,) of coalitions (m, n)."""
        return np.sum([terms.predict(inside, w) for terms, w in self.parts], axis=0)

    def indices(self, tables: list[Floats]) -> list[Floats]:
        """See `Terms.indices`."""
        found = [terms.indices(w, tables) for terms, w in self.parts]
        return [sum(x[k] for x in found) + np.zeros(()) for k in range(len(tables))]


@dataclass(frozen=True, eq=False)
class Data:
    """Rows of a regression: coalitions (m, n), responses, weights of the squared errors, and folds (m,)."""

    inside: Bools
    response: Floats
    weight: Floats
    fold: Ints
    parity: int  # see `Terms`

    @property
    def players(self) -> int:
        return self.inside.shape[1]

    def rows(self, *without: int) -> Ints:
        """Positions of the rows that are in none of the folds."""
        return np.flatnonzero(~np.isin(self.fold, without))


def fit_folds(data: Data, folds: int = FOLDS, largest: int = LARGEST_FIT) -> list[Surrogate]:
    """Fit a surrogate for each fold, without its rows; ridge regressions have at most `largest` columns."""
    scale = np.sqrt(data.weight)
    dense = _Dense.of(data, scale, folds, largest)
    found = []
    for fold in range(folds):
        error, surrogate = dense.best(fold)
        size = float((data.weight * data.response**2)[data.fold == (fold + 1) % folds].sum())
        for kind in _dictionaries(data):
            if error > _EXACT * size:
                sparse = _Sparse(data, scale, kind, fold, (fold + 1) % folds).best()
                if sparse is not None and sparse[0] < error:
                    error, surrogate = sparse
        if error > _NEARLY_EXACT * size and _fits_kernel(data):
            other, smooth = _smooth(data, fold, (fold + 1) % folds)
            surrogate = _mixed(surrogate, smooth, error, other)
        found.append(surrogate)
    return found


def _mixed(first: Surrogate, second: Surrogate, error: float, other: float) -> Surrogate:
    """The better of two fits, or, if they are about as good, their weighted mean, whose errors partly cancel."""
    if max(error, other) >= 2.0 * min(error, other):
        return first if error < other else second
    share = error / (error + other)
    parts = [(f, w * (1.0 - share)) for f, w in first.parts]
    return Surrogate((*parts, *((f, w * share) for f, w in second.parts)))


def _fits_kernel(data: Data) -> bool:
    return data.players <= LARGEST_PLAYERS and LEAST_COUNT < len(data.response) <= LARGEST_ROWS


def _smooth(data: Data, fold: int, check: int) -> tuple[float, Surrogate]:
    """A constant plus a kernel ridge regression, see `kernel`."""
    rows = [data.rows(fold), data.rows(fold, check), np.flatnonzero(data.fold == check)]
    mean = 0.0
    if data.parity >= 0:
        mean = float(np.average(data.response[rows[0]], weights=data.weight[rows[0]]))
    fit, train, held = ((data.inside[r], data.response[r] - mean, data.weight[r]) for r in rows)
    error, kernel, weights = fit_kernel(fit, train, held, data.parity)
    constant = products(data.players, 0, 0, data.parity)
    return error, Surrogate(((constant, np.full(len(constant), mean)), (kernel, weights)))


def sparse_fit(data: Data) -> tuple[Surrogate, float]:
    """Sparse fit of products of two players, beside single players and powers of the size; fold 0 stops it.

    Returns the products alone, and the explained share of the variance of fold 0.
    """
    n, parity = data.players, data.parity
    base = _joined([products(n, o, j, parity) for o, j in ((0, 0), (0, 2), (0, 4), (1, 0))])
    scale = np.sqrt(data.weight)
    found = _Sparse(data, scale, (PRODUCT, 2), _NO_FOLD, 0, base).best()
    if found is None:
        return Surrogate(()), 0.0
    error, fit = found
    checked = (data.response * scale)[data.fold == 0]
    return Surrogate(fit.parts[1:]), 1.0 - error / max(float(checked.var() * len(checked)), 1e-300)


def products(players: int, order: int, degree: int, parity: int) -> Terms:
    """All products of `order` players times a power of the size; none if they have the other parity."""
    there = not parity or (order + degree) % 2 == (parity < 0)
    sets = _sets(players, order) if there else np.zeros((0, order), dtype=np.int64)
    return _terms(PRODUCT, players, parity, sets, degree)


def _sets(players: int, order: int) -> Ints:
    """All sets of `order` players, (sets, order)."""
    found = list(itertools.combinations(range(players), order))
    return np.array(found, dtype=np.int64).reshape(len(found), order)


def _terms(kind: str, players: int, parity: int, sets: Ints, degree: int = 0) -> Terms:
    filled = np.full((len(sets), LARGEST_ORDER), players, dtype=np.int64)
    filled[:, : sets.shape[1]] = sets
    return Terms(kind, players, parity, filled, np.full(len(sets), degree))


def _joined(parts: list[Terms]) -> Terms:
    first = parts[0]
    sets, degree = (
        np.concatenate([x.sets for x in parts]),
        np.concatenate([x.degree for x in parts]),
    )
    return Terms(first.kind, first.players, first.parity, sets, degree)


def _base(players: int, parity: int) -> Terms:
    """Functions of the size, and single players with a strength that depends on the size."""
    shapes = [(0, j) for j in range(5)] + [(1, j) for j in range(3)]
    return _joined([products(players, o, j, parity) for o, j in shapes])


class _Normal:
    """Normal equations of a ridge regression, scaled to a unit diagonal."""

    def __init__(self, gram: Floats, moment: Floats) -> None:
        square = np.diag(gram)
        # Columns that are zero, up to rounding, get the coefficient 0.
        used = square > 1e-12 * square.max(initial=0.0)
        self._scale = np.where(used, 1.0 / np.sqrt(np.where(used, square, 1.0)), 0.0)
        self._gram = torch.from_numpy(gram * self._scale * self._scale[:, None])
        self._right = torch.from_numpy(moment * self._scale)[:, None]

    def solve(self, penalty: Floats) -> Floats:
        """Return the coefficients; the penalty, relative to the diagonal, grows while the matrix is singular.

        Raises FloatingPointError: the equations are not finite.
        """
        added = torch.from_numpy(penalty)
        for _ in range(20):
            ridged = self._gram.clone()
            ridged.diagonal().add_(added)
            factor, failed = torch.linalg.cholesky_ex(ridged)
            if not int(failed):
                return torch.cholesky_solve(self._right, factor)[:, 0].numpy() * self._scale
            added = added * 10.0 + 1e-12
        raise FloatingPointError("normal equations: expected finite numbers, got NaN or infinity")


@dataclass(frozen=True, eq=False)
class _Dense:
    """Ridge regressions on all products up to an order; sums of squares by fold, ALWAYS last."""

    terms: Terms
    models: list[Ints]  # columns of each order
    grams: Floats  # (folds + 1, P, P)
    moments: Floats  # (folds + 1, P)
    squares: Any  # (folds + 1,)

    @classmethod
    def of(cls, data: Data, scale: Floats, folds: int, largest: int) -> _Dense:
        n, rows = data.players, len(data.response) * (folds - 1) / folds
        blocks, models = [_base(n, data.parity)], [[0]]
        for previous, shapes in (
            (0, [(2, 0)]),
            (1, [(2, 1), (2, 2)]),
            (1, [(3, 0)]),
            (3, [(4, 0)]),
        ):
            count = sum(_count(n, o, j, data.parity) for o, j in shapes)
            known = models[min(previous, len(models) - 1)]
            columns = sum(len(blocks[k]) for k in known) + count
            blocks.append(blocks[0][np.zeros(0, dtype=np.int64)])
            models.append(known)
            if count and columns <= min(largest, _MOST_OF_ROWS * rows):
                blocks[-1] = _joined([products(n, o, j, data.parity) for o, j in shapes])
                models[-1] = [*known, len(blocks) - 1]
        stop = np.cumsum([len(x) for x in blocks])
        ranges = [np.arange(last - len(x), last) for x, last in zip(blocks, stop, strict=True)]
        distinct = [k for k in range(len(models)) if models[k] not in models[:k]]
        terms = _joined(blocks)
        count = folds + 1
        grams, moments = np.zeros((count, len(terms), len(terms))), np.zeros((count, len(terms)))
        step = max(1, 2**22 // max(len(terms), 1))
        for fold in range(ALWAYS, folds):
            mine = np.flatnonzero(data.fold == fold)
            for k in range(0, len(mine), step):
                part = mine[k : k + step]
                x = terms.features(data.inside[part]) * scale[part, None]
                grams[fold] += x.T @ x
                moments[fold] += x.T @ (data.response[part] * scale[part])
        squares = np.bincount(data.fold % count, data.weight * data.response**2, minlength=count)
        columns_of = [np.concatenate([ranges[b] for b in models[k]]) for k in distinct]
        return cls(terms, columns_of, grams, moments, squares)

    def best(self, fold: int) -> tuple[float, Surrogate]:
        """Return the error on the next fold, and the fit to all data but the fold's."""
        check = (fold + 1) % (len(self.grams) - 1)
        gram, moment = self.grams.sum(axis=0) - self.grams[fold], self.moments.sum(axis=0)
        moment = moment - self.moments[fold]
        order = self.terms.order
        best = (np.inf, self.models[0], self._penalty(order[self.models[0]], 1.0))
        least = 1e-13 * float(self.squares[check])  # the error is rounded relative to the squares
        for columns in self.models:
            if best[0] <= least:
                break
            part = np.ix_(columns, columns)
            held, own = self.grams[check][part], self.moments[check][columns]
            equations = _Normal(gram[part] - held, moment[columns] - own)
            for ridge in _RIDGES if len(columns) < _FEW_RIDGES else _RIDGES[::2]:
                penalty = self._penalty(order[columns], ridge)
                w = equations.solve(penalty)
                error = float(self.squares[check] - 2.0 * w @ own + w @ held @ w)
                if max(error, least) < best[0]:
                    best = (max(error, least), columns, penalty)
        error, columns, penalty = best
        w = _Normal(gram[np.ix_(columns, columns)], moment[columns]).solve(penalty)
        return error, Surrogate(((self.terms[columns], w),))

    @staticmethod
    def _penalty(order: Ints, ridge: float) -> Floats:
        return ridge * np.where(order == 0, 1e-6, 1.0 + order**2.0) + 1e-13


def _count(players: int, order: int, degree: int, parity: int) -> int:
    if parity and (order + degree) % 2 != (parity < 0):
        return 0
    count = 1
    for k in range(order):
        count = count * (players - k) // (k + 1)
    return count


def _dictionaries(data: Data) -> Iterator[tuple[str, int]]:
    """Kinds and largest orders of the terms of the sparse fits."""
    order = next(order for players, order in _SPARSE_ORDERS if data.players <= players)
    if order > 2 or data.parity >= 0:
        yield PRODUCT, order
    # For pairs and even games, "and" is a product plus a constant.
    if order > 2:
        yield AND, order


class _Sparse:
    """Forward selection of terms without two folds, checked on the second, fitted without the first."""

    def __init__(
        self,
        data: Data,
        scale: Floats,
        dictionary: tuple[str, int],
        fold: int,
        check: int,
        base: Terms | None = None,
    ) -> None:
        self.data, self.scale = data, scale
        kind, largest = dictionary
        n, parity = data.players, data.parity
        orders = [
            o for o in range(2, largest + 1) if kind == AND or not parity or o % 2 == (parity < 0)
        ]
        none = _terms(kind, n, parity, np.zeros((0, 2), dtype=np.int64))
        self.terms = _joined([none, *(_terms(kind, n, parity, _sets(n, o)) for o in orders)])
        self.base = _base(n, parity) if base is None else base
        self.train = data.rows(fold, check)
        self.check = np.flatnonzero(data.fold == check)
        self._found: Floats | None = None
        most = max(64, _SPARSE_ELEMENTS // max(len(self.terms), 1))
        self._step = max(1, -(-len(self.train) // most))
        self._search = self.train[:: self._step]
        if largest > 2 or len(self._search) == len(self.train):
            self._found = self.terms.features(data.inside[self._search])
            self._found *= scale[self._search, None]
            self._norm = np.sqrt((self._found**2).sum(axis=0))

    def best(self) -> tuple[float, Surrogate] | None:
        """Return the error on the check fold and the fit with all rows but the fold's; None without terms."""
        rows, split, first = (
            np.concatenate([self.train, self.check]),
            len(self.train),
            len(self.base),
        )
        y = (self.data.response * self.scale)[rows]
        chosen, best, waited = np.zeros(0, dtype=np.int64), (np.inf, 0), 0
        x = self._columns(self.base, rows)
        gram, moment = x[:split].T @ x[:split], x[:split].T @ y[:split]
        limit = min(first + _SPARSE_TERMS, int(0.5 * split))
        while waited <= _PATIENCE and x.shape[1] <= limit:
            residual = y - x @ self._solved(gram, moment)
            error = float((residual[split:] ** 2).sum())
            waited += 1
            if error < 0.999 * best[0]:
                best, waited = (error, len(chosen)), 0
            if (residual[:split] ** 2).sum() <= _EXACT * (y[:split] ** 2).sum():
                break
            score = self._scores(residual[:split])
            score[chosen] = -1.0
            count = min(max(2, int(_GROWTH * len(chosen))), len(score) - len(chosen))
            added = np.argpartition(-score, count - 1)[:count] if count > 0 else chosen[:0]
            added = added[score[added] > 0.3 * score.max(initial=0.0)]
            if not len(added):
                break
            chosen = np.concatenate([chosen, added])
            new = self._columns(self.terms[added], rows)
            cross, own = x[:split].T @ new[:split], new[:split].T @ new[:split]
            gram = np.block([[gram, cross], [cross.T, own]])
            moment = np.concatenate([moment, new[:split].T @ y[:split]])
            x = np.concatenate([x, new], axis=1)
        error, count = best
        if not count:
            return None
        x = x[split:, : first + count]
        used = slice(first + count)
        w = self._solved(gram[used, used] + x.T @ x, moment[used] + x.T @ y[split:])
        terms = self.terms[chosen[:count]]
        return error, Surrogate(((self.base, w[:first]), (terms, w[first:])))

    @staticmethod
    def _solved(gram: Floats, moment: Floats) -> Floats:
        return _Normal(gram, moment).solve(np.full(len(moment), 1e-12))

    def _columns(self, terms: Terms, rows: Ints) -> Floats:
        return terms.features(self.data.inside[rows]) * self.scale[rows, None]

    def _scores(self, residual: Floats) -> Floats:
        """|correlation| of each term with the residuals of the training rows."""
        if self._found is not None:
            return np.abs(residual[:: self._step] @ self._found) / np.maximum(self._norm, 1e-12)
        # Products of pairs, for which every column has the same norm.
        x = self.data.inside[self.train] * 2.0 - 1.0
        whole = x.T @ (x * (residual * self.scale[self.train])[:, None])
        return np.abs(whole[self.terms.sets[:, 0], self.terms.sets[:, 1]])
