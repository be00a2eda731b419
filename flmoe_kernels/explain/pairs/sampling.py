"""Pair indices by random permutations that all candidate pairs share.

One permutation of the n players gives every candidate pair two draws of S. Let P be who comes before i. Taking j
out of the permutation leaves a uniformly random order of n - 1 players, in which i may stand for the pair {i, j};
those before it are P without j. So S = P without j has exactly the distribution of `indices`, whether j comes
before or after i, and the same with i and j exchanged; what is averaged is unbiased for every pair and index.

What has to be evaluated are prefixes P of the permutation and prefixes with one player toggled:

    j after i:   v(S) = v(P),      v(S+i) = v(P+i),      v(S+j) = v(P+j),  v(S+i+j) = v(P+i+j)
    j before i:  v(S) = v(P - j),  v(S+i) = v(P+i - j),  v(S+j) = v(P),    v(S+i+j) = v(P+i)

P + i is the prefix of the player after i, so that its row is shared, too: for all pairs of n players about n^2
evaluations give n (n - 1) draws, one for each, where a draw alone costs four. With c candidates that are seldom
neighbours in the permutation it is two for each.

Antithetic: the reversed permutation. Who comes before i becomes who comes after it, so S becomes its complement
among the players but i and j, a draw of the same distribution: where v grows or sags with the size of S, errors
cancel.

Standard errors come from the means of independent units (a permutation and its reverse): draws of one unit are not
independent of each other. The number of units that a budget pays for is fixed before the first draw, by the
dearest of some units of other permutations, so a budget brings no bias (but for the rare run, about one in a
hundred, whose own units are dearer and which ends some earlier). A tolerance does: a run that stops when the
errors look small stops more often where they came out too small, so that estimates lean, and standard errors are a
little too small. min_draws keeps that little: the standard error is then known to about 1 / sqrt(2 * units).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from ... import validation as check
from ..coalitions.packed import Floats, Ints, Packed, distinct, toggled_prefixes
from .indices import INDICES, Corners

OVERHEAD = 2  # evaluations of everybody and of nobody, which every run starts with
_LEAST_UNITS = 2  # for a standard error
# Units that are planned, not evaluated, to know what one costs: all of so many are seldom cheaper than the mean.
_PILOTS = 8
_STEP_COALITIONS = (
    4096  # evaluated between two looks at the stopping rule: fills batches on several ranks
)


@dataclass(frozen=True)
class Sampling:
    """How a Monte Carlo estimate is drawn, and when it ends.

    Attributes:
        budget: the most coalitions that are evaluated per sample. `method="auto"` enumerates all 2^n instead where
            the budget reaches that far.
        tolerance: end earlier, when every pair's standard error, in units of v, is at most this. See the module
            for the bias that any such rule brings.
        min_draws: permutations before the tolerance is looked at.
        seed: draw d of sample b depends on (seed, b, d) alone: not on batches, ranks or interruptions.
        antithetic: draw permutations in pairs, the second the reverse of the first.
    """

    budget: int = 2**16
    tolerance: float | None = None
    min_draws: int = 32
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


def permutation(seed: int, sample: int, draw: int, players: int, *, pilot: bool = False) -> Ints:
    """A uniformly random order of the players, the same on every machine and numpy version; pilots' are others.

    By sorting raw words of the bit generator, whose stream numpy promises never to change; that of
    Generator.permutation it does not.
    """
    key = (sample, draw, 1) if pilot else (sample, draw)
    words = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key))
    return np.argsort(words.random_raw(players), kind="stable").astype(np.int64)


@dataclass(frozen=True)
class PermutationPlan:
    """The coalitions that one permutation asks for, and where each pair finds its values among them.

    Attributes:
        coalitions: packed, (m, bytes); equal ones may occur, see `coalitions.distinct`.
        corners: (4, 2, p), rows of `coalitions`: v(S), v(S + i), v(S + j), v(S + i + j), with each of the pair as
            the one whose predecessors S are.
    """

    coalitions: Packed
    corners: Ints

    @classmethod
    def of(cls, order: Ints, pairs: Ints) -> PermutationPlan:
        """The plan of one permutation for pairs (p, 2)."""
        players = len(order)
        position = np.empty(players, dtype=np.int64)
        position[order] = np.arange(players)
        anchor, other = pairs.T, pairs.T[::-1]
        # A row (length of the prefix, toggled player or n) as one number.
        plain = position[anchor] * (players + 1) + players
        toggled = position[anchor] * (players + 1) + other
        longer = players + 1
        earlier = position[other] < position[anchor]
        none, with_other = (
            np.where(earlier, toggled, plain),
            np.where(earlier, plain, toggled),
        )
        wanted = np.stack([none, none + longer, with_other, with_other + longer])
        used = np.zeros((players + 1) ** 2, dtype=np.bool_)
        used[wanted] = True
        rows = np.flatnonzero(used)
        coalitions = toggled_prefixes(position, rows // (players + 1), rows % (players + 1))
        place = np.cumsum(used) - 1
        return cls(coalitions, place[wanted])

    def draws(self, values: Floats, index: str) -> Floats:
        """(p,): the mean of each pair's two draws, from the values (m,) of the coalitions."""
        return INDICES[index](Corners(*values[self.corners])).mean(axis=0)


def cost(unit: Sequence[PermutationPlan]) -> int:
    """The distinct coalitions that a unit asks for."""
    return len(distinct(np.concatenate([plan.coalitions for plan in unit]))[0])


@dataclass
class PairSampling:
    """A Monte Carlo estimate in the making: plan a step, evaluate it elsewhere, absorb it, until finished.

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
        self.units, self.asked = 0, 0
        first = sum(cost(self._plan_unit(k)) for k in range(_LEAST_UNITS))
        if first + OVERHEAD > self.sampling.budget:
            raise ValueError(
                f"budget: expected at least {first + OVERHEAD}, which two draws of "
                f"{len(self.pairs)} pairs of {self.players} players cost, got "
                f"{self.sampling.budget}; fewer candidate pairs cost less"
            )
        price = max(cost(self._plan_unit(k, pilot=True)) for k in range(_PILOTS))
        paid = (self.sampling.budget - OVERHEAD) // price if price else _LEAST_UNITS
        self.units_planned = max(_LEAST_UNITS, paid)
        # Of the request alone, so that where it stops does not depend on ranks or memory.
        self._units_per_step = max(1, _STEP_COALITIONS // price) if price else _LEAST_UNITS
        self._mean = np.zeros((len(self.indices), len(self.pairs)))
        self._squares = np.zeros_like(self._mean)  # summed squared deviations from the mean
        self._plans: list[list[PermutationPlan]] = []

    @property
    def _draws_per_unit(self) -> int:
        return 2 if self.sampling.antithetic else 1

    @property
    def draws(self) -> int:
        """Permutations so far."""
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
        self._plans = []
        for k in range(min(self._units_per_step, self.units_planned - self.units)):
            unit = self._plan_unit(self.units + k)
            price = cost(unit)
            if self.asked + price + OVERHEAD > self.sampling.budget:
                self.units_planned = self.units + k
                break
            self._plans.append(unit)
            self.asked += price
        nothing = np.zeros((0, (self.players + 7) // 8), dtype=np.uint8)
        return np.concatenate([nothing, *(p.coalitions for unit in self._plans for p in unit)])

    def absorb(self, values: Floats) -> None:
        """The values of the coalitions of the last plan, in their order."""
        start = 0
        for unit in self._plans:
            means = np.zeros_like(self._mean)
            for plan in unit:
                part = values[start : start + len(plan.coalitions)]
                start += len(plan.coalitions)
                means += np.stack([plan.draws(part, index) for index in self.indices]) / len(unit)
            # Welford's update, one unit after the other: the same bits however the steps are cut.
            self.units += 1
            before = means - self._mean
            self._mean += before / self.units
            self._squares += before * (means - self._mean)
        self._plans = []

    def estimates(self) -> dict[str, tuple[Floats, Floats]]:
        """Values and standard errors, (p,) each, by index."""
        errors = self._errors()
        return {name: (self._mean[k], errors[k]) for k, name in enumerate(self.indices)}

    def request(self) -> dict[str, Any]:
        """What the draws and their end depend on, for a fingerprint."""
        return {"sampling": asdict(self.sampling), "sample": self.sample}

    def state(self) -> dict[str, Any]:
        """What a later run needs to go on; see `restore`."""
        numbers = {"units": np.array(self.units), "asked": np.array(self.asked)}
        return {**numbers, "mean": self._mean, "squares": self._squares}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError: not the state of such an estimate."""
        mean, squares = (np.array(state[name], dtype=np.float64) for name in ("mean", "squares"))
        if mean.shape != self._mean.shape or squares.shape != self._mean.shape:
            raise ValueError(f"expected sums of {self._mean.shape}, got {mean.shape}")
        self.units, self.asked = int(state["units"]), int(state["asked"])
        self._mean, self._squares = mean, squares

    def _plan_unit(self, unit: int, *, pilot: bool = False) -> list[PermutationPlan]:
        order = permutation(self.sampling.seed, self.sample, unit, self.players, pilot=pilot)
        orders = [order, order[::-1]][: self._draws_per_unit]
        return [PermutationPlan.of(each, self.pairs) for each in orders]

    def _errors(self) -> Floats:
        if self.units < _LEAST_UNITS:
            return np.full_like(self._mean, math.inf)
        return np.sqrt(self._squares / (self.units * (self.units - 1)))
