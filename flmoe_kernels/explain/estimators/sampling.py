"""Monte Carlo estimates of pair indices from coalitions shared by all pairs.

A draw is a random coalition T of the n players: its size is uniform on 0 .. n, and T is uniform among the sets of
that size. For every candidate pair, S is T without i and j. By symmetry S is uniform among the sets of its size s.
T has size s, s + 1 or s + 2, depending on how many of i and j it contains. These three cases sum to

    ((n - s)(n - s - 1) + 2 (s + 1)(n - s - 1) + (s + 2)(s + 1)) / ((n + 1) n (n - 1)) = 1 / (n - 1),

so S has exactly the distribution of `indices`, and the average is unbiased for every pair and index.

The corners of every pair are T with neither, one or both of i and j toggled (added or removed):

    i, j outside T:  v(S) = v(T),      v(S+i) = v(T+i),  v(S+j) = v(T+j),  v(S+i+j) = v(T+i+j)
    i inside alone:  v(S) = v(T-i),    v(S+i) = v(T),    and so on

A draw takes one evaluation of T, one for each candidate token and one for each pair. For c tokens and all their
pairs this is about c^2 / 2 evaluations; four evaluations for each pair would be about 2 c^2.

Antithetic draws use the complement of T. S becomes its complement among the players other than i and j, which has
the same distribution; if v is monotone in the size of S, errors cancel.

Standard errors are computed from the means of independent units (a draw and its complement), because the draws of
a unit are not independent. The number of units within a budget is known before the first draw, so a budget causes
no bias. A tolerance does: a run that stops when its errors look small stops more often when they are
underestimated, so estimates are biased and standard errors are too small. min_draws limits this effect: for
nearly normal units the standard error is then known to about 1 / sqrt(2 * units). All pairs share each T, so their
errors are correlated, and a mean over pairs is no more precise than a single pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from flmoe_kernels.core import validation as check
from flmoe_kernels.explain.games.coalitions import Bools, Floats, Ints, Packed, toggled

from .indices import INDICES, Corners

OVERHEAD = 2  # every run starts with the evaluation of all players and of none
_LEAST_UNITS = 2  # for a standard error
# Part of the checkpoints' fingerprint: values of different draws must not enter an estimate.
_DESIGN = "toggled coalitions"
# Coalitions evaluated between two checks of the stopping rule; enough for the batches of several ranks.
_STEP_COALITIONS = 4096


@dataclass(frozen=True)
class Sampling:
    """Settings of a Monte Carlo estimate: budget, stopping rule and seed.

    Attributes:
        budget: the largest number of evaluated coalitions per sample. `method="auto"` enumerates all 2^n instead
            if they fit the budget.
        tolerance: stop earlier, when every pair's standard error, in units of v, is at most this. The module
            docstring describes the bias of this rule.
        min_draws: draws before the tolerance is checked.
        seed: unit u of sample b depends only on (seed, b, u) and n, not on batches, ranks or interruptions.
        antithetic: draw coalitions in pairs, the second the complement of the first.
    """

    budget: int = 2**16
    tolerance: float | None = None
    min_draws: int = 64
    seed: int = 0
    antithetic: bool = True

    def __post_init__(self) -> None:
        check.require_count("budget", self.budget, 1)
        check.require_count("min_draws", self.min_draws, 2)
        check.require_count("seed", self.seed, 0)
        if not isinstance(self.antithetic, bool):
            raise TypeError(f"antithetic: expected a bool, got {type(self.antithetic).__name__}")
        # Plain Python numbers, not numpy scalars, so that results and checkpoints can be written.
        for name in ("budget", "min_draws", "seed"):
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.tolerance is not None:
            check.require_positive("tolerance", self.tolerance)
            object.__setattr__(self, "tolerance", float(self.tolerance))


def coalition(seed: int, sample: int, unit: int, players: int) -> Bools:
    """Draw T (n,), the same on every machine and with every version of numpy.

    The last random word gives the size of T; the players with the smallest words are in it. The words are raw
    output of the bit generator, whose stream numpy promises not to change, unlike that of Generator's methods.
    """
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(sample, unit)))
    words = bits.random_raw(players + 1)
    size = int(words[-1]) * (players + 1) >> 64
    inside = np.zeros(players, dtype=np.bool_)
    inside[np.argsort(words[:-1], kind="stable")[:size]] = True
    return inside


@dataclass(frozen=True)
class Toggles:
    """The coalitions of a draw: T itself, T with each candidate token toggled, T with each pair toggled.

    Attributes:
        pairs: (p, 2).
        toggled: (1 + c + p, 2): players that a draw's r-th coalition toggles; n stands for no player.
        place: (2, p): the row in which only the first or second player of a pair is toggled.
    """

    pairs: Ints
    toggled: Ints
    place: Ints

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

    Args:
        players: n.
        pairs: (p, 2).
        indices: names in `indices.INDICES`.
        sampling: see Sampling.
        sample: position of the sample in its batch; the draws depend on it.

    Raises:
        ValueError: the budget is too small for two units.
    """

    method: ClassVar[str] = "sampling"

    players: int
    pairs: Ints
    indices: Sequence[str]
    sampling: Sampling = field(default_factory=Sampling)
    sample: int = 0

    def __post_init__(self) -> None:
        self.units = 0
        self._toggles = Toggles.of(self.players, self.pairs)
        price = len(self._toggles) * self._draws_per_unit
        check.require_count("budget", self.sampling.budget, OVERHEAD)
        paid = (self.sampling.budget - OVERHEAD) // price if len(self.pairs) else 0
        if len(self.pairs) and paid < _LEAST_UNITS:
            raise ValueError(
                f"budget: expected at least {_LEAST_UNITS * price + OVERHEAD}, which "
                f"{_LEAST_UNITS * self._draws_per_unit} draws of {len(self.pairs)} pairs of "
                f"{self.players} players cost, got {self.sampling.budget}; fewer candidate pairs cost less"
            )
        self.units_planned = paid
        # Depends only on the request, so that the stopping point does not depend on ranks or memory.
        self._units_per_step = max(1, _STEP_COALITIONS // price)
        self._mean = np.zeros((len(self.indices), len(self.pairs)))
        self._squares = np.zeros_like(self._mean)  # summed squared deviations from the mean
        self._drawn: list[list[Bools]] = []

    @property
    def _draws_per_unit(self) -> int:
        return 2 if self.sampling.antithetic else 1

    @property
    def draws(self) -> int:
        """Draws so far."""
        return self.units * self._draws_per_unit

    @property
    def progress(self) -> tuple[int, int]:
        """Units done, and units within the whole budget."""
        return self.units, self.units_planned

    @property
    def stopped_by(self) -> str | None:
        """Reason of the stop, "budget" or "tolerance"; None while the run continues."""
        if self.units >= self.units_planned:
            return "budget"
        tolerance = self.sampling.tolerance
        if tolerance is None or self.draws < self.sampling.min_draws or self.units < _LEAST_UNITS:
            return None
        return "tolerance" if bool((self._errors() <= tolerance).all()) else None

    def plan(self) -> Packed:
        """Return the next coalitions, packed."""
        count = min(self._units_per_step, self.units_planned - self.units)
        self._drawn = [self._draw(self.units + k) for k in range(count)]
        every = [drawn for unit in self._drawn for drawn in unit]
        return np.concatenate([self._toggles.coalitions(drawn) for drawn in every])

    def absorb(self, values: Floats) -> None:
        """Add the values of the coalitions of the last plan, in the same order."""
        parts = iter(values.reshape(-1, len(self._toggles)))
        for unit in self._drawn:
            corners = [self._toggles.corners(drawn, next(parts)) for drawn in unit]
            means = np.stack(
                [
                    np.mean([INDICES[index](corner) for corner in corners], axis=0)
                    for index in self.indices
                ]
            )
            # Welford's update by single units: bitwise equal results for any division into steps.
            self.units += 1
            before = means - self._mean
            self._mean += before / self.units
            self._squares += before * (means - self._mean)
        self._drawn = []

    def estimates(self) -> dict[str, tuple[Floats, Floats]]:
        """Return values (p,) and standard errors (p,), by index."""
        errors = self._errors()
        return {name: (self._mean[k], errors[k]) for k, name in enumerate(self.indices)}

    def request(self) -> dict[str, Any]:
        """Return the settings that determine the draws, for a fingerprint."""
        design = [_DESIGN, _STEP_COALITIONS]
        return {"draws": design, "sampling": asdict(self.sampling), "sample": self.sample}

    def _draw(self, unit: int) -> list[Bools]:
        drawn = coalition(self.sampling.seed, self.sample, unit, self.players)
        return [drawn, ~drawn][: self._draws_per_unit]

    def _errors(self) -> Floats:
        if self.units < _LEAST_UNITS:
            return np.full_like(self._mean, math.inf)
        return np.sqrt(self._squares / (self.units * (self.units - 1)))
