"""Estimates of SII and RG from draws of single pairs ("toggling"), which share coalitions.

The index of a pair is the mean over the sizes s = 0 .. n - 2 of S. The two end sizes have one set each, S empty
and S everybody else. They are evaluated first, for all pairs, and only the sizes between are sampled: a model
often treats an input without tokens differently from all others, and few draws would miss it.

A draw is a random coalition T of the n players: its size is uniform on 1 .. n - 1, and T is uniform among the sets
of that size. For every candidate pair, S is T without i and j. By symmetry S is uniform among the sets of its size
s. T has size s, s + 1 or s + 2, depending on how many of i and j it contains. For s from 1 to n - 3 these three
cases sum to

    ((n - s)(n - s - 1) + 2 (s + 1)(n - s - 1) + (s + 2)(s + 1)) / ((n - 1) n (n - 1)) = (n + 1) / (n - 1)^2,

the same for every s, so S given that its size is no end size has the distribution of `indices`. A draw that
gives a pair an end size is not used for this pair; it is rare for many players. The mean of the others is
unbiased for every pair and index.

The corners of every pair are T with neither, one or both of i and j toggled (added or removed):

    i, j outside T:  v(S) = v(T),      v(S+i) = v(T+i),  v(S+j) = v(T+j),  v(S+i+j) = v(T+i+j)
    i inside alone:  v(S) = v(T-i),    v(S+i) = v(T),    and so on

A draw takes one evaluation of T, one for each candidate token and one for each pair. For c tokens and all their
pairs this is about c^2 / 2 evaluations; four evaluations for each pair would be about 2 c^2.

Antithetic draws use the complement of T. S becomes its complement among the players other than i and j, which has
the same distribution; if v is monotone in the size of S, errors cancel.

Standard errors are computed from the means of k independent units (a draw and its complement), because the
draws of a unit are not independent, see `reliability.error_of_mean`. The variance of a pair's units is moderated:
it is averaged with the mean variance of all pairs, which counts as a few units, because few units may miss rare,
large terms (Smyth 2004, doi 10.2202/1544-6115.1027). A pair of fewer than LEAST_COUNT units has no error
(NaN), nor has a pair whose units are all equal although an end size differs: its draws have missed something.

The number of units within a budget is known before the first draw, so a budget causes no bias. A tolerance does: a
run that stops when its errors look small stops more often when they are underestimated, so estimates are biased
and standard errors are too small. min_draws limits this effect: for nearly normal units the standard error is
then known to about 1 / sqrt(2 * units). All pairs share each T, so their errors are correlated, and a mean over
pairs is no more precise than a single pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.games.coalitions import Bools, Floats, Ints, Packed, toggled
from flmoe_kernels.explain.reliability import LEAST_COUNT, error_of_mean

from .indices import INDICES, TERMS, Corners, Estimate

REGRESSION, TOGGLING = "regression", "toggling"
OVERHEAD = 2  # every run starts with the evaluation of all players and of none
_LEAST_UNITS = 2  # within a budget; a single one might give some pair no value
# Weight of the pairs' mean variance, in units: on small games (tests/explain/test_reliability.py), 4 keeps
# deviation / error near 1 also for pairs whose draws missed rare, large terms.
_COMMON_UNITS = 4
# Units are equal if they differ by less than this, relative to the largest of them and the end sizes.
_EQUAL = 1e-9
# First number of the seeds' spawn keys: parts of a run draw independently.
FOR_TOGGLING, FOR_REGRESSION, FOR_SCREENING = range(3)
# Part of the checkpoints' fingerprint: values of different draws must not enter an estimate.
_DESIGN = "toggled coalitions, end sizes apart, tolerance agreed, seeds by purpose"
# Coalitions evaluated between two checks of the stopping rule; enough for the batches of several ranks.
_STEP_COALITIONS = 4096


@dataclass(frozen=True)
class Sampling:
    """Settings of a Monte Carlo estimate: budget, stopping rule and seed.

    Attributes:
        budget: the largest number of evaluated coalitions per sample. `method="auto"` enumerates all 2^n instead
            if they fit the budget.
        tolerance: stop earlier, when every pair has a standard error, in units of v, of at most this. The module
            docstring describes the bias of this rule.
        min_draws: draws before the tolerance is checked.
        seed: unit u of sample b depends only on (seed, b, u) and n, not on batches, ranks or interruptions.
        antithetic: draw coalitions in pairs, the second the complement of the first.
        design: "regression", for SII, k-SII, STII and BII, see `regression`; "toggling", for SII and RG, see
            `sampling`; None: as in `run.choose`.
    """

    budget: int = 2**16
    tolerance: float | None = None
    min_draws: int = 64
    seed: int = 0
    antithetic: bool = True
    design: str | None = None

    def __post_init__(self) -> None:
        check.require_count("budget", self.budget, 1)
        check.require_count("min_draws", self.min_draws, 2)
        check.require_count("seed", self.seed, 0)
        if self.design is not None:
            check.require_choice("design", self.design, (REGRESSION, TOGGLING))
        if not isinstance(self.antithetic, bool):
            raise TypeError(f"antithetic: expected a bool, got {type(self.antithetic).__name__}")
        # Plain Python numbers, not numpy scalars, so that results and checkpoints can be written.
        for name in ("budget", "min_draws", "seed"):
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.tolerance is not None:
            check.require_positive("tolerance", self.tolerance)
            object.__setattr__(self, "tolerance", float(self.tolerance))


def coalition(seed: int, sample: int, unit: int, players: int) -> Bools:
    """Draw T (n,), of 1 to n - 1 players, the same on every machine and with every version of numpy.

    The last random word gives the size of T; the players with the smallest words are in it. The words are raw
    output of the bit generator, whose stream numpy promises not to change, unlike that of Generator's methods.
    """
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(FOR_TOGGLING, sample, unit)))
    words = bits.random_raw(players + 1)
    size = 1 + (int(words[-1]) * (players - 1) >> 64)
    inside = np.zeros(players, dtype=np.bool_)
    inside[np.argsort(words[:-1], kind="stable")[:size]] = True
    return inside


@dataclass(frozen=True)
class Toggles:
    """The coalitions of a draw: T itself, T with each candidate token toggled, T with each pair toggled."""

    pairs: Ints  # (p, 2)
    toggled: (
        Ints  # (1 + c + p, 2): players that a draw's r-th coalition toggles; n stands for no player
    )
    place: Ints  # (2, p): the row in which only the first or second player of a pair is toggled

    @classmethod
    def of(cls, players: int, pairs: Ints) -> Toggles:
        """Build the toggles for pairs (p, 2) of n players."""
        tokens, place = np.unique(pairs, return_inverse=True)
        alone = np.full((1 + len(tokens), 2), players, dtype=np.int64)
        alone[1:, 0] = tokens
        return cls(pairs, np.concatenate([alone, pairs]), 1 + place.reshape(pairs.shape).T)

    def __len__(self) -> int:
        """Evaluations per draw."""
        return len(self.toggled)

    def coalitions(self, drawn: Bools) -> Packed:
        """Return the coalitions of a draw T (n,), packed."""
        return toggled(drawn, self.toggled)

    def corners(self, drawn: Bools, values: Floats) -> Corners:
        """Return the corners of every pair, from the values (1 + c + p,) of the coalitions of T."""
        count = len(self.pairs)
        whole = np.zeros(count, dtype=np.int64)
        both = np.arange(len(self) - count, len(self))
        # Rows by what is toggled: [i, j], each 0 or 1.
        rows = np.array([[whole, self.place[1]], [self.place[0], both]])
        i, j = drawn[self.pairs].T.astype(np.int64)
        every = np.arange(count)
        return Corners(
            none=values[rows[i, j, every]],
            first=values[rows[1 - i, j, every]],
            second=values[rows[i, 1 - j, every]],
            both=values[rows[1 - i, 1 - j, every]],
        )


@dataclass
class PairSampling:
    """A Monte Carlo estimate: call `plan`, evaluate, call `absorb`, until `stopped_by` is set.

    The draws depend on `sample`, the position in the batch. Raises ValueError: a budget too small for two units.
    """

    method: ClassVar[str] = "sampling"
    design: ClassVar[str] = TOGGLING

    players: int
    pairs: Ints
    indices: Sequence[str]
    sampling: Sampling = field(default_factory=Sampling)
    sample: int = 0
    # Makes the numbers identical on all ranks and in later runs, see `Evaluator.agree`.
    agree: Callable[[Floats], Floats] = np.asarray

    @classmethod
    def least(cls, players: int, pairs: Ints, antithetic: bool) -> int:
        """The smallest budget."""
        row, units = len(Toggles.of(players, pairs)), _LEAST_UNITS * (1 + antithetic)
        if not len(pairs):
            return OVERHEAD
        # Two draws for the end sizes; without sizes between, they are all.
        return OVERHEAD + 2 * row + (units * row if players > 3 else 0)

    @classmethod
    def units_within(cls, players: int, pairs: Ints, sampling: Sampling) -> int:
        """Number of units that the budget allows, below 0 if it is too small for the end sizes."""
        row = len(Toggles.of(players, pairs))
        return (sampling.budget - OVERHEAD - 2 * row) // (row * (1 + sampling.antithetic))

    def __post_init__(self) -> None:
        self.units = 0
        self._toggles = Toggles.of(self.players, self.pairs)
        least = self.least(self.players, self.pairs, self.sampling.antithetic)
        if self.sampling.budget < least:
            raise ValueError(
                f"budget: expected at least {least}, got {self.sampling.budget}: "
                f"{2 + _LEAST_UNITS * self._draws_per_unit} draws of {len(self.pairs)} pairs of "
                f"{self.players} players need as many evaluations; raise the budget or use fewer candidate pairs"
            )
        self.units_planned = 0
        if len(self.pairs) and self._between:
            self.units_planned = self.units_within(self.players, self.pairs, self.sampling)
        price = len(self._toggles) * self._draws_per_unit
        # Depends only on the request, so that the stopping point does not depend on ranks or memory.
        self._units_per_step = max(1, _STEP_COALITIONS // price)
        shape = (len(self.indices), len(self.pairs))
        self._ends: Floats | None = None if len(self.pairs) else np.zeros((2, *shape))
        self._used = np.zeros(len(self.pairs), dtype=np.int64)  # units of each pair
        self._mean = np.zeros(shape)
        self._squares = np.zeros(shape)  # summed squared deviations from the mean
        self._drawn: list[list[Bools]] = []
        self._within = False  # whether all errors are within the tolerance

    @property
    def _draws_per_unit(self) -> int:
        return 2 if self.sampling.antithetic else 1

    @property
    def _between(self) -> int:
        """Number of sizes of S between the end sizes 0 and n - 2."""
        return max(0, self.players - 3)

    @property
    def draws(self) -> int:
        """Draws so far, without those of the end sizes."""
        return self.units * self._draws_per_unit

    @property
    def total(self) -> int:
        """Coalitions of the whole budget, with those that units share."""
        ends = 2 if len(self.pairs) else 0
        return (ends + self.units_planned * self._draws_per_unit) * len(self._toggles)

    @property
    def stopped_by(self) -> str | None:
        """Reason of the stop, "exact", "budget" or "tolerance"; None while the run continues."""
        if self._ends is None:
            return None
        if self.units >= self.units_planned:
            return "budget" if self._between else "exact"
        return "tolerance" if self._within else None

    def plan(self) -> Packed:
        """Return the next coalitions, packed."""
        if self._ends is None:
            none = np.zeros(self.players, dtype=np.bool_)
            self._drawn = [[none, ~none]]
        else:
            count = min(self._units_per_step, self.units_planned - self.units)
            drawn = [
                coalition(self.sampling.seed, self.sample, self.units + k, self.players)
                for k in range(count)
            ]
            self._drawn = [[x, ~x][: self._draws_per_unit] for x in drawn]
        every = [drawn for unit in self._drawn for drawn in unit]
        return np.concatenate([self._toggles.coalitions(drawn) for drawn in every])

    def absorb(self, values: Floats) -> None:
        """Add the values of the coalitions of the last plan, in the same order."""
        parts = iter(values.reshape(-1, len(self._toggles)))
        for unit in self._drawn:
            corners = [self._toggles.corners(drawn, next(parts)) for drawn in unit]
            terms = np.array([[TERMS[index](x) for index in self.indices] for x in corners])
            if self._ends is None:
                self._ends = terms
            else:
                self._add(unit[0], terms.mean(axis=0))
        self._drawn = []
        tolerance = self.sampling.tolerance
        if tolerance is not None and self.draws >= self.sampling.min_draws:
            asked = [name in INDICES for name in self.indices]
            within = float((self._errors()[asked] <= tolerance).all())
            self._within = bool(self.agree(np.array([within]))[0])

    def estimates(self) -> dict[str, Estimate]:
        """Return the estimates by index; NaN where there is none."""
        assert self._ends is not None
        # Two players have one size, which is both end sizes.
        ends = self._ends.mean(axis=0)
        sampled = np.where(self._used > 0, self._mean, np.nan) if self._between else self._mean
        share = self._between / max(1, self.players - 1)
        values, errors = ends * (1.0 - share) + sampled * share, self._errors()
        return {name: Estimate(values[k], errors[k]) for k, name in enumerate(self.indices)}

    def notes(self) -> dict[str, tuple[str, ...]]:
        """Return the reasons for missing values and errors, by index."""
        notes: dict[str, tuple[str, ...]] = {}
        for name, (values, errors, *_) in self.estimates().items():
            few = (self._used < LEAST_COUNT) & (self._between > 0)
            reasons = (
                (np.isnan(values), "value", "no draw fell between the pair's end sizes"),
                (
                    few,
                    "standard error",
                    f"fewer than {LEAST_COUNT} independent units; raise the budget or choose fewer pairs",
                ),
                (
                    np.isnan(errors) & ~few,
                    "standard error",
                    "all draws agree, but the empty or the full coalition differs",
                ),
            )
            notes[name] = tuple(
                f"no {what} for {int(where.sum())} of {len(values)} pairs: {reason}"
                for where, what, reason in reasons
                if where.any()
            )
        return notes

    def request(self) -> dict[str, Any]:
        """Return the settings that determine the draws, for a fingerprint."""
        design = [_DESIGN, _STEP_COALITIONS]
        return {"draws": design, "sampling": asdict(self.sampling), "sample": self.sample}

    def _add(self, drawn: Bools, unit: Floats) -> None:
        """Add a unit's values (indices, p) to the pairs whose S has no end size.

        A complement's S has size n - 2 - s, so both draws of a unit have one or neither has.
        """
        size = drawn.sum() - drawn[self.pairs].sum(axis=1)
        used = (size > 0) & (size < self.players - 2)
        # Welford's update by single units: bitwise equal results for any division into steps.
        self.units += 1
        self._used += used
        before = np.where(used, unit - self._mean, 0.0)
        self._mean += before / np.maximum(self._used, 1)
        self._squares += before * (unit - self._mean)

    def _errors(self) -> Floats:
        """Standard errors (indices, p), see the module docstring."""
        if not self._between or self._ends is None:
            return np.zeros_like(self._mean)
        k = self._used
        counted = np.maximum(k, 4)
        variance = self._squares / (counted - 1)
        common = np.zeros((len(self.indices), 1))
        if bool((k >= LEAST_COUNT).any()):
            common = variance[:, k >= LEAST_COUNT].mean(axis=1, keepdims=True)
        moderated = ((counted - 1) * variance + _COMMON_UNITS * common) / (
            counted - 1 + _COMMON_UNITS
        )
        errors = error_of_mean((counted - 1) * moderated, counted)
        errors *= self._between / (self.players - 1)
        ends = self._ends.mean(axis=0, keepdims=True) if self.sampling.antithetic else self._ends
        scale = np.maximum(np.abs(ends).max(axis=0), np.abs(self._mean))
        missed = np.sqrt(self._squares) <= _EQUAL * scale
        missed &= np.abs(ends - self._mean).max(axis=0) > _EQUAL * scale
        return np.where(missed | (k < LEAST_COUNT), np.nan, errors)
