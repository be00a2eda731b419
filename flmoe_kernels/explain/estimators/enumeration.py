"""Pair indices by definition: the value of every coalition, and weighted sums over them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from flmoe_kernels.explain.games.coalitions import Floats, Ints, Packed, from_integers, unpack

from .indices import LINEAR, TERMS, Corners, Estimate
from .linear import sums, table

MAX_PLAYERS = 16  # 65536 coalitions
_STEP_COALITIONS = 4096


@dataclass
class Enumeration:
    """Exact indices of a game of at most MAX_PLAYERS players; same interface as PairSampling."""

    method: ClassVar[str] = "exact"
    design: ClassVar[str] = ""
    draws: ClassVar[int] = 0

    players: int
    pairs: Ints
    indices: Sequence[str]

    def __post_init__(self) -> None:
        if self.players > MAX_PLAYERS:
            raise ValueError(
                f"method: expected 'sampling' or 'auto' for {self.players} tokens; 'exact' "
                f"enumerates the coalitions of at most {MAX_PLAYERS}"
            )
        self._values = np.zeros(2**self.players)  # bit k of the position: player k
        self._known = 0

    @property
    def total(self) -> int:
        """Coalitions to evaluate."""
        return len(self._values)

    @property
    def stopped_by(self) -> str | None:
        return "exact" if self._known == len(self._values) else None

    @property
    def ends(self) -> Floats:
        """(2,): v(none) and v(all)."""
        return self._values[[0, -1]]

    def plan(self) -> Packed:
        stop = min(self._known + _STEP_COALITIONS, len(self._values))
        return from_integers(np.arange(self._known, stop), self.players)

    def absorb(self, values: Floats) -> None:
        self._values[self._known : self._known + len(values)] = values
        self._known += len(values)

    def estimates(self) -> dict[str, Estimate]:
        return {
            name: self._linear(name) if name in LINEAR else self._of_terms(name)
            for name in self.indices
        }

    def _linear(self, index: str) -> Estimate:
        """Sum over all coalitions, see `linear`."""
        n, found = self.players, []
        if not len(self.pairs):
            return Estimate(np.zeros(0), np.zeros(0))
        inside = unpack(from_integers(np.arange(len(self._values)), n), n)
        size = inside.sum(axis=1)
        value = self._values / np.array([math.comb(n, s) for s in range(n + 1)])[size]
        for count in (2, 1):
            found.append(sums(inside, table(index, n, count)[size] * value[:, None]))
        pairs = found[0][tuple(self.pairs.T)]
        return Estimate(pairs, np.zeros_like(pairs), found[1], np.zeros(n))

    def _of_terms(self, index: str) -> Estimate:
        """Weighted mean of a term over S, by definition."""
        exact, codes = np.zeros(len(self.pairs)), np.arange(len(self._values))
        size = ((codes[:, None] >> np.arange(self.players)) & 1).sum(axis=1)
        for p, (i, j) in enumerate(self.pairs):
            first, second = 1 << int(i), 1 << int(j)
            without = codes[(codes & (first | second)) == 0]
            weight = _weights(self.players)[size[without]]
            places = (without, without | first, without | second, without | first | second)
            exact[p] = weight @ TERMS[index](Corners(*(self._values[place] for place in places)))
        return Estimate(exact, np.zeros_like(exact))

    def notes(self) -> dict[str, tuple[str, ...]]:
        return dict.fromkeys(self.indices, ())

    def request(self) -> dict[str, Any]:
        return {"draws": _STEP_COALITIONS}


def _weights(players: int) -> Floats:
    """P(S) by the size of S: uniform over sizes 0 .. n - 2, and uniform over the sets of equal size."""
    return np.array([1 / ((players - 1) * math.comb(players - 2, s)) for s in range(players - 1)])
