"""Choice of candidate pairs among hundreds of tokens, by a sparse fit to a part of the budget.

Coalitions are drawn as in `regression`, and a polynomial with few products of two players is fitted to their
values by forward selection (see `surrogate`). The pairs of largest |SII| of the polynomial are candidates.
Their index is then estimated from new draws alone, so given the choice the estimates are unbiased; a pair that
the fit misses has no value.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np

from flmoe_kernels.explain.games.coalitions import Floats, Ints

from .indices import LINEAR, RG, SII, TERMS
from .linear import table
from .regression import Regression
from .sampling import FOR_SCREENING, TOGGLING, PairSampling, Sampling
from .surrogate import sparse_fit

MOST_PAIRS = 50
_SHARE = 0.375  # of the budget
# Units of the estimates of the candidates; fewer pairs are chosen if the budget does not allow as many.
_LEAST_UNITS = 20
_ROUNDING = 1e-6  # smaller terms of the fit, relative to the largest, are no candidates


@dataclass
class Screening(Regression):
    """The first part of a run: call `plan`, evaluate, call `absorb`, then read `chosen`.

    `sampling` and `indices` are those of the whole run. Raises ValueError: a budget too small for the screening
    and the estimate of a pair.
    """

    design: ClassVar[str] = "screening"
    purpose: ClassVar[int] = FOR_SCREENING
    first: ClassVar[bool] = False

    solved: bool = False  # whether the SII of the chosen pairs needs no estimate

    def __post_init__(self) -> None:
        self.requested, self.whole = tuple(self.indices), self.sampling
        # Exact for pairs that do not depend on other tokens, which are typical among many tokens.
        if self.whole.design is None and {*self.requested} <= {*TERMS}:
            self.whole = replace(self.whole, design=TOGGLING)
        self._require_budget()
        budget = int(_SHARE * self.whole.budget)
        self.indices, self.sampling = (
            (SII,),
            replace(self.whole, budget=budget, tolerance=None),
        )
        super().__post_init__()
        self.chosen = self.pairs[:0]
        self.said: tuple[str, ...] = ()

    def _require_budget(self) -> None:
        own = self.least(self.players, self.whole.antithetic)
        following = max(
            own, PairSampling.least(self.players, self.pairs[:1], self.whole.antithetic)
        )
        if RG in self.requested and {*self.requested} & {*LINEAR}:
            following *= 1 if self.whole.design == TOGGLING else 2
        least = math.ceil(max(own / _SHARE, following / (1.0 - _SHARE)))
        if self.whole.budget < least:
            raise ValueError(
                f"budget: expected at least {least}, got {self.whole.budget}: the screening of {self.players} "
                "players and the estimates of a pair need as many evaluations"
            )

    @property
    def total(self) -> int:
        """Coalitions of the whole budget, including those of the estimates that follow."""
        return self.whole.budget

    @property
    def stopped_by(self) -> str | None:
        return "budget" if self.said else None

    def absorb(self, values: Floats) -> None:
        super().absorb(values)
        fit, explained = sparse_fit(self.data())
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
            f"{self.draws} coalitions, which explains {max(0.0, agreed[-1]):.1%} of the variance of held-out "
            f"coalitions; the largest fitted |SII| of these pairs is {agreed[-2]:.3g}",
        )

    def left(self) -> Sampling:
        """The settings of the estimates that follow."""
        return replace(self.whole, budget=self.whole.budget - self.draws)

    def _affordable(self, order: Ints) -> int:
        """The largest number of pairs with _LEAST_UNITS within the rest of the budget; at least one."""
        for count in range(len(order), 1, -1):
            plan = PairSampling.units_within(self.players, self.pairs[order[:count]], self.left())
            if plan >= _LEAST_UNITS:
                return count
        return min(1, len(order))

    def request(self) -> dict[str, Any]:
        following = {
            "requested": self.requested,
            "solved": self.solved,
            "whole": asdict(self.whole),
        }
        return {"screening": [MOST_PAIRS, _SHARE, _LEAST_UNITS], **following, **super().request()}
