"""Definitions of the pair indices.

    SII(i, j) = E_S[ v(S + i + j) - v(S + i) - v(S + j) + v(S) ]
    RG(i, j)  = E_S[ min(v(S + i), v(S + j)) - v(S) ]

S has, for both, the distribution of the Shapley interaction index of n players: its size s is uniform on
0 .. n - 2 and S is uniform among the sets of that size, P(S) = s! (n - s - 2)! / (n - 1)!. These are the players
before the pair in a random order in which the pair is one player. Both indices share S, so one run gives both.

RG is the value that remains with one token alone: w for two copies of a token of value w, 0 if one of them has
no effect or only both together have one, below 0 if one alone lowers v. For two additive tokens it is
min(w_i, w_j), so substitutes are the pairs whose RG is large *and* whose SII is negative.

Sources: SII, Grabisch and Roubens (1999). RG is named in arXiv 2603.13326; the formula is this package's own
reading of it.
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
    # Grouped so that exchanging i and j changes no bit.
    return (v.both + v.none) - (v.first + v.second)


def kept_by_either(v: Corners) -> Floats:
    return np.minimum(v.first, v.second) - v.none


INDICES: dict[str, Callable[[Corners], Floats]] = {SII: second_difference, RG: kept_by_either}


def require_indices(indices: Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError: none, an unknown one, or one twice."""
    names = tuple(indices) if isinstance(indices, Iterable) else ()
    known_once = all(name in [*INDICES] and names.count(name) == 1 for name in names)
    if not names or not known_once:
        known = ", ".join(INDICES)
        raise ValueError(f"indices: expected one or more of {known}, each once, got {indices!r}")
    return names
