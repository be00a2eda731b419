"""Games with known pair indices, token inputs, and definitions in plain loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flmoe_kernels import InteractionMoE
from flmoe_kernels.explain import PairValues, Sampling, probe_game
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from tests.support.layers import LayerCase

Values = Mapping[tuple[int, int], float]


@dataclass
class Planted:
    """A game of n players with a formula v((m, n) bool) -> (m,); it counts the evaluated coalitions."""

    players: int
    formula: Callable[[NDArray[np.bool_]], NDArray[Any]]
    asked: int = 0
    batches: list[int] = field(default_factory=list)

    def __call__(self, coalitions: NDArray[np.bool_]) -> NDArray[Any]:
        self.asked += len(coalitions)
        self.batches.append(len(coalitions))
        return self.formula(coalitions)


def unanimity(terms: Mapping[tuple[int, ...], float], players: int) -> Planted:
    """v(S) = sum of the terms whose players are all in S; every game is such a sum."""

    def formula(inside: NDArray[np.bool_]) -> NDArray[np.float64]:
        total = np.zeros(len(inside))
        for members, weight in terms.items():
            total += weight * inside[:, list(members)].all(axis=1)
        return total

    return Planted(players, formula)


def random_terms(players: int, count: int, largest: int, seed: int) -> dict[tuple[int, ...], float]:
    draw = np.random.default_rng(seed)
    terms: dict[tuple[int, ...], float] = {(): 0.7}
    for _ in range(count):
        size = int(draw.integers(1, largest + 1))
        members = tuple(sorted(draw.choice(players, size, replace=False).tolist()))
        terms[members] = terms.get(members, 0.0) + float(draw.normal())
    return terms


def random_game(players: int, seed: int = 0) -> Planted:
    """A game with a different value for every coalition."""
    return tabled(np.random.default_rng(seed).normal(size=2**players), players)


def tabled(values: NDArray[np.float64], players: int) -> Planted:
    """A game from the table of its values; bit k stands for player k."""
    bits = 1 << np.arange(players)
    return Planted(players, lambda inside: values[inside @ bits])


def sampled(game: Planted, design: str, pairs: Any = None, **sampling: Any) -> PairValues:
    """An estimate of SII."""
    settings = Sampling(design=design, **sampling)
    found = probe_game(game, pairs, indices=["SII"], method="sampling", sampling=settings)
    return found["SII"]


def deviations(
    game: Planted, pairs: Any, indices: Sequence[str], runs: int, **sampling: Any
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]]:
    """Deviations from the exact index and standard errors (runs, p) over seeds, and units (runs, 1), by index."""
    exact = probe_game(game, pairs, indices=indices, method="exact")
    settings = [Sampling(seed=seed, **sampling) for seed in range(runs)]
    found = [
        probe_game(game, pairs, indices=indices, method="sampling", sampling=each)
        for each in settings
    ]
    return {
        index: (
            np.array([x[index].values for x in found]) - values.values,
            np.array([x[index].standard_errors for x in found]),
            np.array([[x[index].draws // (1 + settings[0].antithetic)] for x in found]),
        )
        for index, values in exact.items()
    }


def table(game: Callable[[NDArray[np.bool_]], NDArray[Any]], players: int) -> NDArray[np.float64]:
    """Values v of all coalitions; bit k stands for player k."""
    codes = np.arange(2**players)
    return np.asarray(game((codes[:, None] >> np.arange(players)) & 1 == 1), dtype=np.float64)


def by_definition(values: NDArray[np.float64], players: int, index: str) -> Values:
    """An index of all pairs."""
    pairs = itertools.combinations(range(players), 2)
    return {pair: float(index_of(values, players, index, pair)) for pair in pairs}


def index_of(values: Any, players: int, index: str, members: tuple[int, ...]) -> Any:
    """The index of a pair or player, from the published definitions; values (2^n,) or (2^n, columns)."""
    n, m, f = players, len(members), math.factorial
    others = subsets([k for k in range(players) if k not in members])

    def term(s: int) -> Any:
        """The derivative, an alternating sum of v(S + L) over the subsets L of the members, or the term of RG."""
        if index == "RG":
            return min(values[s | 1 << member] for member in members) - values[s]
        parts = subsets(list(members))
        return sum((-1.0) ** (m - part.bit_count()) * values[s | part] for part in parts)

    def weight(s: int) -> float:
        if index == "BII":
            return 2.0 ** (m - n)
        if index == "STII":
            return 2 / n / math.comb(n - 1, s) if m == 2 else float(s == 0)
        return f(s) * f(n - s - m) / f(n - m + 1)

    own = sum(weight(s.bit_count()) * term(s) for s in others)
    if index == "k-SII" and m == 1:
        pairs = [tuple(sorted((members[0], j))) for j in range(n) if j != members[0]]
        own = own - sum(index_of(values, n, "SII", pair) for pair in pairs) / 2
    return own


def subsets(players: Sequence[int]) -> list[int]:
    """All subsets of these players as bit sets."""
    found = [0]
    for player in players:
        found += [s | 1 << player for s in found]
    return found


def as_array(values: Values, pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.array([values[int(i), int(j)] for i, j in pairs])


def interaction_layer(
    case: LayerCase, dtype: torch.dtype = torch.float64, backend: str | None = None
) -> ReferenceInteractionMoE:
    """The fast layer in eval mode with the parameters of the case's reference."""
    return InteractionMoE.adopt(case.reference(dtype).eval(), backend=backend)


def first_of(tensors: Any, sample: int = 0) -> Any:
    """A sample of M tensors, with batch 1; None stays None."""
    return tensors and [None if x is None else x[sample : sample + 1] for x in tensors]


def drawn(rows: int, players: int, seed: int = 0) -> NDArray[np.bool_]:
    """Coalitions (rows, players); each player is in with probability 1/2."""
    return np.random.default_rng(seed).random((rows, players)) < 0.5
