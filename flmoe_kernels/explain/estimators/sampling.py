"""Monte Carlo estimates of pair indices from coalitions that all candidate pairs share.

A draw is one random coalition T of the n players, its size uniform on 0 .. n and T uniform among the sets of that
size. It gives every candidate pair its S: T without i and j. By symmetry S is uniform among the sets of its size
s, which T had if neither of the two is in T; else T had s + 1 or s + 2. Over T these three cases make

    ((n - s)(n - s - 1) + 2 (s + 1)(n - s - 1) + (s + 2)(s + 1)) / ((n + 1) n (n - 1)) = 1 / (n - 1),

so S has exactly the distribution of `indices`, and what is averaged is unbiased for every pair and index.

The corners of every pair are T with neither, one or both of the two toggled (added or removed):

    i, j outside T:  v(S) = v(T),      v(S+i) = v(T+i),  v(S+j) = v(T+j),  v(S+i+j) = v(T+i+j)
    i inside alone:  v(S) = v(T-i),    v(S+i) = v(T),    and so on

One evaluation of T, one for each candidate token and one for each pair: c tokens and all pairs of them cost about
c^2 / 2 for a draw of as many pairs, where four evaluations for each would be twice c^2.

Antithetic draws use the complement of T. S becomes its complement among the players other than i and j, a draw of
the same distribution; where v is monotone in the size of S, errors cancel.

Standard errors come from the means of independent units (a draw and its complement): draws of one unit are not
independent of each other. The number of units that a budget pays for is known before the first draw, so a budget
brings no bias. A tolerance does: a run that stops when its errors look small stops more often when they are
underestimated, so that estimates are biased and standard errors are too small. min_draws limits this effect: for
about normal units the standard error is then known to about 1 / sqrt(2 * units). All pairs share each T, so their
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

OVERHEAD = 2  # evaluations of everybody and of nobody, which every run starts with
_LEAST_UNITS = 2  # for a standard error
# Checkpoints are bound to it: values of other draws must not enter an estimate.
_DESIGN = "toggled coalitions"
# Evaluated between two looks at the stopping rule: fills batches on several ranks.
_STEP_COALITIONS = 4096


@dataclass(frozen=True)
class Sampling:
    """How a Monte Carlo estimate is drawn, and when it stops.

    Attributes:
        budget: the most coalitions that are evaluated per sample. `method="auto"` enumerates all 2^n instead if
            they fit the budget.
        tolerance: stop earlier, when every pair's standard error, in units of v, is at most this. See the module
            for the bias of such a rule.
        min_draws: draws before the tolerance is checked.
        seed: unit u of sample b depends on (seed, b, u) and n alone: not on batches, ranks or interruptions.
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
        # Plain numbers, not numpy's, so that results and checkpoints can be written.
        for name in ("budget", "min_draws", "seed"):
            object.__setattr__(self, name, int(getattr(self, name)))
        if self.tolerance is not None:
            check.require_positive("tolerance", self.tolerance)
            object.__setattr__(self, "tolerance", float(self.tolerance))


def coalition(seed: int, sample: int, unit: int, players: int) -> Bools:
    """T (n,), the same on every machine and with every version of numpy.

    The players of the smallest words, as many as the last word says: raw words of the bit generator, whose stream
    numpy promises never to change, as it does not for those of Generator's methods.
    """
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(sample, unit)))
    words = bits.random_raw(players + 1)
    size = int(words[-1]) * (players + 1) >> 64
    inside = np.zeros(players, dtype=np.bool_)
    inside[np.argsort(words[:-1], kind="stable")[:size]] = True
    return inside


@dataclass(frozen=True)
class Toggles:
    """What every draw does to its coalition T: nothing, toggle each candidate token, toggle each pair.

    Attributes:
        pairs: (p, 2).
        toggled: (1 + c + p, 2): whom a draw's r-th coalition toggles, n for nobody.
        place: (2, p): the row in which one of a pair is toggled alone.
    """

    pairs: Ints
    toggled: Ints
    place: Ints

    @classmethod
    def of(cls, players: int, pairs: Ints) -> Toggles:
        """For pairs (p, 2) of n players."""
        tokens, place = np.unique(pairs, return_inverse=True)
        alone = np.full((1 + len(tokens), 2), players, dtype=np.int64)
        alone[1:, 0] = tokens
        return cls(pairs, np.concatenate([alone, pairs]), 1 + place.reshape(pairs.shape).T)

    def __len__(self) -> int:
        """Evaluations per draw."""
        return len(self.toggled)

    def coalitions(self, drawn: Bools) -> Packed:
        """Those of T (n,), packed."""
        return toggled(drawn, self.toggled)

    def corners(self, drawn: Bools, values: Floats) -> Corners:
        """Those of every pair, from the values (1 + c + p,) of the coalitions of T."""
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
    """A Monte Carlo estimate: plan a step, have it evaluated, absorb the values, until `stopped_by` is set.

    Args:
        players: n.
        pairs: (p, 2).
        indices: names among `indices.INDICES`.
        sampling: see there.
        sample: position of the sample in its batch, of which the draws depend.

    Raises:
        ValueError: the budget does not pay for two units.
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
        # Of the request alone, so that where it stops does not depend on ranks or memory.
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
        """Units done, and those of the whole budget."""
        return self.units, self.units_planned

    @property
    def stopped_by(self) -> str | None:
        """ "budget" or "tolerance"; None while it goes on."""
        if self.units >= self.units_planned:
            return "budget"
        tolerance = self.sampling.tolerance
        if tolerance is None or self.draws < self.sampling.min_draws or self.units < _LEAST_UNITS:
            return None
        return "tolerance" if bool((self._errors() <= tolerance).all()) else None

    def plan(self) -> Packed:
        """The next coalitions, packed."""
        count = min(self._units_per_step, self.units_planned - self.units)
        self._drawn = [self._draw(self.units + k) for k in range(count)]
        every = [drawn for unit in self._drawn for drawn in unit]
        return np.concatenate([self._toggles.coalitions(drawn) for drawn in every])

    def absorb(self, values: Floats) -> None:
        """The values of the coalitions of the last plan, in their order."""
        parts = iter(values.reshape(-1, len(self._toggles)))
        for unit in self._drawn:
            corners = [self._toggles.corners(drawn, next(parts)) for drawn in unit]
            means = np.stack(
                [
                    np.mean([INDICES[index](each) for each in corners], axis=0)
                    for index in self.indices
                ]
            )
            # Welford's update, one unit after the other: the same bits however the steps are cut.
            self.units += 1
            before = means - self._mean
            self._mean += before / self.units
            self._squares += before * (means - self._mean)
        self._drawn = []

    def estimates(self) -> dict[str, tuple[Floats, Floats]]:
        """Values and standard errors, (p,) each, by index."""
        errors = self._errors()
        return {name: (self._mean[k], errors[k]) for k, name in enumerate(self.indices)}

    def request(self) -> dict[str, Any]:
        """What the draws, their order and their end depend on, for a fingerprint."""
        design = [_DESIGN, _STEP_COALITIONS]
        return {"draws": design, "sampling": asdict(self.sampling), "sample": self.sample}

    def _draw(self, unit: int) -> list[Bools]:
        drawn = coalition(self.sampling.seed, self.sample, unit, self.players)
        return [drawn, ~drawn][: self._draws_per_unit]

    def _errors(self) -> Floats:
        if self.units < _LEAST_UNITS:
            return np.full_like(self._mean, math.inf)
        return np.sqrt(self._squares / (self.units * (self.units - 1)))
