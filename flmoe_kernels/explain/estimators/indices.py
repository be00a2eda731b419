"""Definitions of the pair indices.

    SII(i, j) = E_S[ v(S + i + j) - v(S + i) - v(S + j) + v(S) ]
    RG(i, j)  = E_S[ min(v(S + i), v(S + j)) - v(S) ]

In both, S has the distribution of the Shapley interaction index of n players: its size s is uniform on
0 .. n - 2, S is uniform among the sets of that size, P(S) = s! (n - s - 2)! / (n - 1)!. S are the players before
the pair in a random order that treats the pair as one player. Both indices share S, so one run gives both.

RG is the value that a single token of the pair keeps: w for two copies of a token of value w; 0 if a token has no
effect, or if only both together have an effect; below 0 if a token alone lowers v. For two additive tokens it is
min(w_i, w_j), so substitutes are the pairs whose RG is large *and* whose SII is negative.

Sources: SII, Grabisch and Roubens (1999). RG is named in arXiv 2603.13326; the formula is this package's
interpretation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flmoe_kernels.explain.games.coalitions import Floats

SII = "SII"
RG = "RG"


class Corners(NamedTuple):
    """Values of one shape: v(S), v(S + i), v(S + j), v(S + i + j)."""

    none: Floats
    first: Floats
    second: Floats
    both: Floats


def second_difference(v: Corners) -> Floats:
    # Grouped so that exchanging i and j gives a bitwise equal result.
    return (v.both + v.none) - (v.first + v.second)


def kept_by_either(v: Corners) -> Floats:
    return np.minimum(v.first, v.second) - v.none


def lost_by_either(v: Corners) -> Floats:
    """The term of RG in the game -v."""
    return v.none - np.maximum(v.first, v.second)


def squared_difference(v: Corners) -> Floats:
    return second_difference(v) ** 2


class Estimate(NamedTuple):
    """Values and standard errors of pairs (p,), and of players (n,) where the index has them."""

    values: Floats
    errors: Floats
    player_values: Floats | None = None
    player_errors: Floats | None = None

    @classmethod
    def exact(cls, values: Floats) -> Estimate:
        """An estimate without error."""
        return cls(values, np.zeros_like(values))


# Terms of RG in the game -v, and squares of the terms of SII; only for `kinds`.
LOSS, SQUARE = "RG of -v", "squared SII term"
KIND_INDICES = (RG, LOSS, SQUARE)
# Indices that are means of a term over S.
TERMS: dict[str, Callable[[Corners], Floats]] = {
    SII: second_difference,
    RG: kept_by_either,
    LOSS: lost_by_either,
    SQUARE: squared_difference,
}
KSII, STII, BII = "k-SII", "STII", "BII"
# Indices that are linear in v, see `linear`.
LINEAR = (SII, KSII, STII, BII)
INDICES = (*LINEAR, RG)


def require_indices(indices: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple. Raises ValueError: no name, an unknown name, or a duplicate."""
    names = tuple(indices) if isinstance(indices, Iterable) else ()
    known_once = all(name in INDICES and names.count(name) == 1 for name in names)
    if not names or not known_once:
        known = ", ".join(INDICES)
        raise ValueError(
            f"indices: expected distinct names of {known}, such as ('SII',), got {indices!r}"
        )
    return names
