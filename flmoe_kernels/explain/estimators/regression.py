"""Estimates of linear indices from coalitions of every size, with a fitted polynomial as control variate.

1. Coalitions are drawn without replacement, in numbers proportional to the spread of the estimate's terms (see
   `strata`). Small sizes are evaluated completely. A first part of the budget gives the spread of the residuals
   by size, from which the other part is allocated.
2. Polynomials are fitted to the values (see `surrogate`), each without one fold of the second part.
3. For every fold the index is the exact index of its polynomial, plus the exact sum of the residuals of the other
   coalitions that are known, plus the fold's mean residual of each size for the coalitions that are not known.
   Given all other data, the fold is a uniform sample of what is not known, so this is unbiased for every game,
   whatever the fit; the mean over folds is the estimate.

With complements (`Sampling.antithetic`), v is split into its even part (v(T) + v(not T)) / 2 and its odd part,
which are fitted separately. SII depends only on the even part.

Standard errors are computed from the residuals of the folds, without centring them, which makes them slightly too
large. The squares of a pair's residuals are moderated: for each size and number of players of the pair, they are
averaged with the squares of all coalitions of the size, which count as a few (Smyth 2004, doi
10.2202/1544-6115.1027), because few coalitions contain both players of a pair if the size is small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from flmoe_kernels.explain.games.coalitions import Bools, Floats, Ints, Packed, pack
from flmoe_kernels.explain.reliability import LEAST_COUNT

from .indices import Estimate
from .linear import share, sums, table
from .sampling import FOR_REGRESSION, OVERHEAD, REGRESSION, Sampling
from .strata import Stratum, allocate
from .surrogate import ALWAYS, FOLDS, LARGEST_FIT, Data, Surrogate, fit_folds

# Share of the budget for the allocation of the rest; none if that is fewer units than _LEAST_FIRST.
_FIRST_SHARE = 0.125
_LEAST_FIRST = 64
_FIRST_FOLDS = 4
# Shares of the budget after which a tolerance is checked.
_CHECKS = (0.25, 0.5)
# Pseudo-counts, in units: of the mean over sizes in a size's spread, of all coalitions in a pair's squares.
_COMMON_UNITS = 8
_COMMON_SQUARES = 4
_ROWS_FIT = 16384  # most units used in a fit; the residual means use all units
# Part of the checkpoints' fingerprint: values of different draws must not enter an estimate.
_DESIGN = "strata of sizes, first part 1/8, seeds by purpose"


class _Channel(NamedTuple):
    """A part of v: all of it, or its even or odd part; see `Terms.parity`."""

    parity: int
    # By index: coefficients of players and pairs, (strata, |K| + 1), times the number of coalitions of the size.
    tables: dict[str, list[Floats]]


@dataclass
class Regression:
    """An estimate of linear indices: call `plan`, evaluate, call `absorb`, until `stopped_by` is set.

    `ends` are v(none) and v(all), which are evaluated before. Raises ValueError: a budget too small for two units
    of every size.
    """

    method: ClassVar[str] = "sampling"
    design: ClassVar[str] = REGRESSION
    purpose: ClassVar[int] = FOR_REGRESSION
    first: ClassVar[bool] = True  # whether a first part gives the allocation of the rest

    players: int
    pairs: Ints
    indices: Sequence[str]
    sampling: Sampling = field(default_factory=Sampling)
    sample: int = 0
    # Makes the numbers identical on all ranks and in later runs, see `Evaluator.agree`.
    agree: Callable[[Floats], Floats] = np.asarray

    def __post_init__(self) -> None:
        n, paired = self.players, self.sampling.antithetic
        self._sizes = np.arange(1, n // 2 + 1 if paired else n)
        seeds = (self.sampling.seed, self.purpose, self.sample)
        self._strata = [Stratum(n, int(s), paired, seeds) for s in self._sizes]
        self._units = np.array([float(min(x.units, 10**300)) for x in self._strata])
        # Units of the middle size count once for two coalitions of the size.
        self._half = np.array([0.5 if x.middle else 1.0 for x in self._strata])
        self._cost = 2 if paired else 1
        self.ends = np.zeros(2)
        least = self.least(n, paired)
        if self.sampling.budget < least:
            raise ValueError(
                f"budget: expected at least {least}, got {self.sampling.budget}: coalitions of all "
                f"sizes of {n} players need as many evaluations"
            )
        self._channels = self._split() if len(self.pairs) else []
        self._known = np.zeros(len(self._strata), dtype=np.int64)  # units of each stratum
        self._first = self._known.copy()  # of them, units of the first part
        self._inside = np.zeros((0, n), dtype=np.bool_)
        self._values = np.zeros((0, self._cost))
        self._stratum = np.zeros(0, dtype=np.int64)
        self._stages, self._main = self._plan_stages(), False
        self._spread = self._design_spread() if len(self.pairs) else np.zeros(0)
        self._found: dict[str, Estimate] | None = None
        self._within = False  # whether all errors are within the tolerance

    @staticmethod
    def least(players: int, antithetic: bool) -> int:
        """The smallest budget: two units of every size, or all coalitions."""
        sizes = 2 * (players // 2) if antithetic else players - 1
        return min(2**players, OVERHEAD + 2 * sizes)

    @property
    def draws(self) -> int:
        """Coalitions drawn."""
        return len(self._inside) * self._cost

    @property
    def _budget(self) -> int:
        """Units of the whole budget."""
        every = sum(x.units for x in self._strata)
        return min((self.sampling.budget - OVERHEAD) // self._cost, every)

    @property
    def total(self) -> int:
        """Coalitions of the whole budget."""
        return self._budget * self._cost if len(self.pairs) else 0

    @property
    def stopped_by(self) -> str | None:
        """Reason of the stop, "exact", "budget" or "tolerance"; None while the run continues."""
        if not len(self.pairs) or bool((self._known == self._units).all()):
            return "exact"
        if not self._stages:
            return "budget"
        return "tolerance" if self._within else None

    def plan(self) -> Packed:
        """Return the next coalitions, packed."""
        total, self._main = self._stages.pop(0)
        if self._main and len(self._inside) and not (self._known > self._first).any():
            self._spread = self.agree(self._measured_spread())
        least = np.maximum(self._known, np.minimum(self._first + 1, self._units))
        wanted = allocate(self._spread, [x.units for x in self._strata], total, least)
        new = [x.draw(int(c)) for x, c in zip(self._strata, wanted - self._known, strict=True)]
        counts = [len(x) for x in new]
        self._known = self._known + counts
        if not self._main:
            self._first = self._known.copy()
        units = np.concatenate(new)
        self._inside = np.concatenate([self._inside, units])
        self._stratum = np.concatenate([self._stratum, np.repeat(np.arange(len(new)), counts)])
        return np.concatenate([pack(units), pack(~units)][: self._cost])

    def absorb(self, values: Floats) -> None:
        """Add the values of the coalitions of the last plan, in the same order."""
        # The indices do not depend on a constant; the fits would lose digits to it.
        centred = values - self.ends.mean()
        self._values = np.concatenate([self._values, centred.reshape(self._cost, -1).T])
        self._found = None
        tolerance = self.sampling.tolerance
        if (
            tolerance is not None
            and self._stages
            and self._main
            and self.draws >= self.sampling.min_draws
        ):
            largest = np.max([x.errors.max() for x in self.estimates().values()])
            self._within = bool(self.agree(np.array([largest]))[0] <= tolerance)

    def estimates(self) -> dict[str, Estimate]:
        """Return the estimates by index."""
        if self._found is None:
            self._found = self._estimate() if len(self.pairs) else self._nothing()
        return self._found

    def notes(self) -> dict[str, tuple[str, ...]]:
        """Return the reason for missing errors, by index."""
        missing = any(bool(np.isnan(x.errors).any()) for x in self.estimates().values())
        note = (
            f"no standard errors: fewer than {LEAST_COUNT} units of sizes that are not complete; "
            "raise the budget"
        )
        return dict.fromkeys(self.indices, (note,) if missing else ())

    def data(self) -> Data:
        """Values for a fit, of the even part with complements; every fifth unit is in fold 0."""
        fold = np.where(np.arange(len(self._inside)) % 5, ALWAYS, 0)
        values, channel = self._parts(self._values)[0], self._channels[0]
        return Data(self._inside, values, np.ones(len(values)), fold, channel.parity)

    def request(self) -> dict[str, Any]:
        """Return the settings that determine the draws, for a fingerprint."""
        return {"draws": _DESIGN, "sampling": asdict(self.sampling), "sample": self.sample}

    def _plan_stages(self) -> list[tuple[int, bool]]:
        """Numbers of units after each stage, and whether the stage's units enter the residual means."""
        whole, first = self._budget, int(_FIRST_SHARE * self._budget)
        shares = _CHECKS if self.sampling.tolerance is not None else ()
        checks = [x for x in (int(k * whole) for k in shares) if x >= 2 * len(self._strata)]
        stages = [(x, True) for x in (*checks, whole)]
        enough = self.first and first >= max(_LEAST_FIRST, len(self._strata))
        return [(first, False), *stages] if enough else stages

    def _split(self) -> list[_Channel]:
        whole = {
            name: [table(name, self.players, inside) for inside in (1, 2)] for name in self.indices
        }
        own = {name: [t[self._sizes] for t in ts] for name, ts in whole.items()}
        if not self.sampling.antithetic:
            return [_Channel(0, own)]
        other = {
            name: [t[self.players - self._sizes, ::-1] for t in ts] for name, ts in whole.items()
        }
        return [
            _Channel(
                sign,
                {
                    name: [a + sign * b for a, b in zip(own[name], other[name], strict=True)]
                    for name in own
                },
            )
            for sign in (1, -1)
        ]

    def _parts(self, values: Floats) -> list[Floats]:
        """Values (m,) of each channel."""
        if len(self._channels) == 1:
            return [values[:, 0]]
        return [(values[:, 0] + c.parity * values[:, 1]) / 2.0 for c in self._channels]

    def _design_spread(self) -> Floats:
        """Root mean square over pairs of the coefficients of each stratum, equally for all indices."""
        found = np.zeros(len(self._strata))
        for name in self.indices:
            squares = sum(self._mean_square(c.tables[name][1], 2) for c in self._channels)
            found += squares / max(float(np.sum(squares)), 1e-300)
        return np.sqrt(found) * self._half

    def _mean_square(self, coefficients: Floats, inside: int) -> Floats:
        """Mean over coalitions of a size of the squared coefficient, (strata,)."""
        return (self._membership(inside) * coefficients**2).sum(axis=1)

    def _membership(self, inside: int) -> Floats:
        """Probability (strata, |K| + 1) that k players of K are in a coalition of the size."""
        ways = np.array([math.comb(inside, k) for k in range(inside + 1)])
        return ways * share(self.players, inside)[self._sizes]

    def _measured_spread(self) -> Floats:
        """The spread of the residuals of polynomials fitted to the first part, by stratum."""
        count = np.maximum(self._known, 1)
        fold = np.arange(len(self._inside)) % _FIRST_FOLDS
        residual = []
        every = self._fits(np.ones(len(fold)), fold, _FIRST_FOLDS)
        for values, fits in zip(self._parts(self._values), every, strict=True):
            own = np.zeros(len(values))
            for f, fit in enumerate(fits):
                own[fold == f] = fit.predict(self._inside[fold == f])
            residual.append(values - own)
        ratio = np.zeros(len(self._strata))
        for name in self.indices:
            terms = sum(
                c.tables[name][1][self._stratum] * r[:, None]
                for c, r in zip(self._channels, residual, strict=True)
            )
            squares = (self._membership(2)[self._stratum] * terms**2).sum(axis=1)
            expected = sum(self._mean_square(c.tables[name][1], 2) for c in self._channels)
            mean = np.bincount(self._stratum, squares, minlength=len(count)) / count
            own = mean / np.maximum(expected, 1e-300)
            common = float((own * self._known).sum() / self._known.sum())
            own = (own * self._known + common * _COMMON_UNITS) / (self._known + _COMMON_UNITS)
            ratio += own / max(float(own.mean()), 1e-300)
        found = self._design_spread() * np.sqrt(ratio)
        # An exact fit leaves no residuals, whose spread says nothing.
        return found if 0.0 < float(found.max()) < math.inf else self._design_spread()

    def _estimate(self) -> dict[str, Estimate]:
        # Strata with coalitions that are not known.
        sampled: Bools = np.array(self._known < self._units)
        fold = self._folds(sampled)
        counts = np.zeros((len(self._strata), FOLDS))
        np.add.at(counts, (self._stratum[fold >= 0], fold[fold >= 0]), 1.0)
        values, fits = self._parts(self._values), self._fit(fold, sampled)
        whole, own = [], []
        weight = self._row_weights(fold, counts)
        for y, surrogates in zip(values, fits, strict=True):
            if not surrogates:
                whole.append(y * weight.sum(axis=1))
                own.append(0.0 * y)
                continue
            residual = np.stack([y - x.predict(self._inside) for x in surrogates], axis=1)
            known = ~sampled[self._stratum]
            residual[known] = y[known, None]
            whole.append((residual * weight).sum(axis=1))
            own.append(residual[np.arange(len(y)), np.maximum(fold, 0)])
        exact = self._exact_parts(fits, counts)
        return {
            name: self._of_index(name, exact[name], whole, own, fold, counts)
            for name in self.indices
        }

    def _folds(self, sampled: Bools) -> Ints:
        """Folds of the units, in equal numbers of each size; ALWAYS for the first part and complete sizes."""
        fold = np.zeros(len(self._inside), dtype=np.int64)
        for k in range(len(self._strata)):
            mine = np.flatnonzero(self._stratum == k)
            order = np.arange(len(mine)) - self._first[k]
            free = (order >= 0) & bool(sampled[k])
            fold[mine] = np.where(free, (order + k) % FOLDS, ALWAYS)
        return fold

    def _fit(self, fold: Ints, sampled: Bools) -> list[list[Surrogate]]:
        """Surrogates of each channel, without one of the folds; none if all is known."""
        if not sampled.any():
            return [[] for _ in self._channels]
        # The squared errors have the weights with which they enter the variance of the estimate.
        by_size = (self._spread / self._spread.max() / self._known) ** 2
        by_size = np.where(sampled, by_size, by_size[sampled].min())
        weight = (by_size / by_size.max())[self._stratum]
        return self._fits(weight, fold, FOLDS)

    def _fits(self, weight: Floats, fold: Ints, folds: int) -> list[list[Surrogate]]:
        # Among many units the fits use the same share of every size and fold.
        rows = np.lexsort((fold, self._stratum))
        count = min(len(rows), _ROWS_FIT)
        rows = np.sort(rows[np.arange(count) * len(rows) // max(count, 1)])
        found = []
        for y, channel in zip(self._parts(self._values), self._channels, strict=True):
            data = Data(self._inside[rows], y[rows], weight[rows], fold[rows], channel.parity)
            # Fewer columns if only the values of single players need the channel.
            pairs = any(np.any(t[1]) for t in channel.tables.values())
            found.append(fit_folds(data, folds, LARGEST_FIT if pairs else LARGEST_FIT // 3))
        return found

    def _row_weights(self, fold: Ints, counts: Floats) -> Floats:
        """Weights (m, folds) of residuals in the sum over all coalitions, see the module docstring."""
        k = self._stratum
        units, main = self._units[k, None], np.maximum(counts.sum(axis=1), 1.0)[k, None]
        known = self._known[k, None] - counts[k]  # without the fold
        mine = fold[:, None] == np.arange(FOLDS)
        weight = np.where(mine, (1.0 - known / units) / main, counts[k] / main / units)
        complete: Bools = np.equal(counts.sum(axis=1), 0.0)
        weight = np.where(complete[k, None], 1.0 / (FOLDS * units), weight)
        return weight * self._half[k, None]

    def _exact_parts(self, fits: list[list[Surrogate]], counts: Floats) -> dict[str, list[Floats]]:
        """The part of v(none) and v(all), and of the surrogates, of each index: players (n,), pairs (n, n)."""
        n = self.players
        tables = [table(name, n, inside) for name in self.indices for inside in (1, 2)]
        # One coalition each of size 0 and n, without any and with all players of K.
        none, every = self.ends - self.ends.mean()
        total = [t[0, 0] * none + t[n, -1] * every for t in tables]
        parts = [np.full((n,) * (t.shape[1] - 1), x) for t, x in zip(tables, total, strict=True)]
        share_of = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
        for channel, surrogates in zip(self._channels, fits, strict=True):
            for f, surrogate in enumerate(surrogates):
                weighted = []
                for name in self.indices:
                    for own in channel.tables[name]:
                        full = np.zeros((n + 1, own.shape[1]))
                        full[self._sizes] = own * (self._half * share_of[:, f])[:, None]
                        weighted.append(full)
                for part, added in zip(parts, surrogate.indices(weighted), strict=True):
                    part += added
        return {name: parts[2 * k : 2 * k + 2] for k, name in enumerate(self.indices)}

    def _of_index(
        self,
        name: str,
        exact: list[Floats],
        whole: list[Floats],
        own: list[Floats],
        fold: Ints,
        counts: Floats,
    ) -> Estimate:
        tokens, place = np.unique(self.pairs, return_inverse=True)
        i, j = place.reshape(self.pairs.shape).T
        found: list[Floats] = []
        for inside, columns in ((1, slice(None)), (2, tokens)):
            coefficients = [c.tables[name][inside - 1] for c in self._channels]
            terms: Floats = np.sum(
                [t[self._stratum] * r[:, None] for t, r in zip(coefficients, whole, strict=True)],
                axis=0,
            )
            values = sums(self._inside[:, columns], terms)
            squares = self._squares(coefficients, own, fold, counts, columns, inside)
            if inside == 2:
                values = values[i, j] + exact[1][tuple(self.pairs.T)]
                squares = squares[i, j]
            else:
                values = values + exact[0]
            found += [values, np.sqrt(np.maximum(squares, 0.0))]
        if 0 < int(counts.sum()) < LEAST_COUNT:
            found[1], found[3] = found[1] * np.nan, found[3] * np.nan
        return Estimate(found[2], found[3], found[0], found[1])

    def _squares(
        self,
        coefficients: list[Floats],
        own: list[Floats],
        fold: Ints,
        counts: Floats,
        columns: Any,
        inside: int,
    ) -> Floats:
        """Squared standard errors of players or pairs, see the module docstring."""
        n = self._inside[:, columns].shape[1]
        total = np.zeros((n,) * inside)
        chance = self._membership(inside)
        one = np.eye(inside + 1)
        for k in np.flatnonzero(counts.any(axis=1)):
            rows = np.flatnonzero((self._stratum == k) & (fold >= 0))
            x = self._inside[rows][:, columns]
            square = sum(t[k] * r[rows, None] for t, r in zip(coefficients, own, strict=True)) ** 2
            mean = square.mean(axis=0)
            moderated = 0.0
            for c in range(inside + 1):
                if chance[k, c] > 0:
                    count = sums(x, np.broadcast_to(one[c], square.shape))
                    cell = sums(x, square * one[c]) + _COMMON_SQUARES * mean[c]
                    moderated = moderated + chance[k, c] * cell / (count + _COMMON_SQUARES)
            # Of the N units outside the first part, W are unknown. The mean of the main units estimates the mean
            # over N; the error is W / N * (sum over N) - (sum over W).
            left = 1.0 - (self._known[k] - counts[k].sum()) / self._units[k]
            factor = (1.0 - self._known[k] / self._units[k]) * left / counts[k].sum()
            factor *= self._half[k] ** 2
            total = total + factor * moderated
        return total

    def _nothing(self) -> dict[str, Estimate]:
        return {name: Estimate(np.zeros(0), np.zeros(0)) for name in self.indices}
