"""Choice of candidate pairs among hundreds of tokens, by a sparse fit to a part of the budget.

Coalitions are drawn as in `regression`, and a polynomial with few products of two players is fitted to their
values by forward selection (see `surrogate`). The pairs of largest |SII| of the polynomial are candidates.
Their index is then estimated from new draws alone, so given the choice the estimates are unbiased; a pair that
the fit misses has no value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from flmoe_kernels.explain.games.coalitions import Floats, Ints, Packed

from .indices import SII
from .linear import table
from .regression import Regression
from .sampling import PairSampling, Sampling
from .surrogate import sparse_fit

MOST_PAIRS = 50
_SHARE = 0.375  # of the budget
# Units of the estimates of the candidates; fewer pairs are chosen if the budget does not allow as many.
_LEAST_UNITS = 20
_ROUNDING = 1e-6  # smaller terms of the fit, relative to the largest, are no candidates


@dataclass
class Screening:
    """The first part of a run: call `plan`, evaluate, call `absorb`, then read `chosen`."""

    method: ClassVar[str] = "sampling"
    design: ClassVar[str] = "screening"
    indices: ClassVar[tuple[str, ...]] = ()

    players: int
    pairs: Ints
    sampling: Sampling
    follow: Callable[
        [Ints, Sampling], list[Any]
    ]  # the estimators of chosen pairs, for the rest of the budget
    sample: int = 0
    agree: Callable[[Floats], Floats] = np.asarray

    def __post_init__(self) -> None:
        share = replace(self.sampling, budget=int(_SHARE * self.sampling.budget), tolerance=None)
        self._draws = Regression(self.players, self.pairs, (SII,), share, self.sample, first=False)
        self.chosen: Ints | None = None
        self.said: tuple[str, ...] = ()

    @property
    def ends(self) -> Floats:
        return self._draws.ends

    @ends.setter
    def ends(self, ends: Floats) -> None:
        self._draws.ends = ends

    @property
    def draws(self) -> int:
        return self._draws.draws

    @property
    def total(self) -> int:
        """Coalitions of the whole budget, including those of the estimates that follow."""
        return self.sampling.budget

    @property
    def stopped_by(self) -> str | None:
        return None if self.chosen is None else "budget"

    def plan(self) -> Packed:
        return self._draws.plan()

    def absorb(self, values: Floats) -> None:
        self._draws.absorb(values)
        fit, explained = sparse_fit(self._draws.data())
        [whole] = fit.indices([table(SII, self.players, 2)])
        square = np.broadcast_to(whole, (self.players, self.players))
        size = np.abs(square[tuple(self.pairs.T)])
        order = np.argsort(-size, kind="stable")
        count = min(MOST_PAIRS, int((size > _ROUNDING * size.max(initial=0.0)).sum()))
        count = self._affordable(order[:count])
        # Small integers, which floats represent exactly.
        padded = np.full(MOST_PAIRS, -1.0)
        padded[:count] = order[:count]
        rest = size[order[count]] if count < len(order) else 0.0
        agreed = self.agree(np.concatenate([padded, [rest, explained]]))
        kept = np.sort(agreed[:-2][agreed[:-2] >= 0].astype(np.int64))
        self.chosen = self.pairs[kept]
        self.said = (
            f"screened out: {len(self.pairs) - len(kept)} of {len(self.pairs)} pairs by a sparse fit to "
            f"{self.draws} coalitions, which explains {max(0.0, agreed[-1]):.1%} of the variance of others; its "
            f"largest |SII| among them is {agreed[-2]:.3g}",
        )

    def following(self) -> list[Any]:
        """Return the estimators of the chosen pairs."""
        assert self.chosen is not None
        return self.follow(self.chosen, self.left())

    def estimates(self) -> dict[str, Any]:
        return {}

    def notes(self) -> dict[str, tuple[str, ...]]:
        return {}

    def left(self) -> Sampling:
        """The settings of the estimates that follow."""
        return replace(self.sampling, budget=self.sampling.budget - self.draws)

    def _affordable(self, order: Ints) -> int:
        """The largest number of pairs with _LEAST_UNITS within the rest of the budget; at least one."""
        for count in range(len(order), 1, -1):
            plan = PairSampling.units_within(self.players, self.pairs[order[:count]], self.left())
            if plan >= _LEAST_UNITS:
                return count
        return min(1, len(order))

    def request(self) -> dict[str, Any]:
        return {"screening": [MOST_PAIRS, _SHARE, _LEAST_UNITS], **self._draws.request()}
