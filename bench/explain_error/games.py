"""Games with a known Shapley interaction index; numpy only, so that every environment can play them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Game:
    """A set function of coalitions (m, n) bool -> (m,), and its SII (n, n), symmetric with a zero diagonal."""

    players: int
    values: Callable[[NDArray[np.bool_]], Floats]
    index: Floats


def of_terms(players: int, terms: Mapping[tuple[int, ...], float]) -> Game:
    """A sum of unanimity games: each term counts if all its players are present."""
    index = np.zeros((players, players))
    for members, weight in terms.items():
        for i, j in itertools.permutations(members, 2):
            index[i, j] += weight / (len(members) - 1)

    def values(inside: NDArray[np.bool_]) -> Floats:
        total = np.zeros(len(inside))
        for members, weight in terms.items():
            total += weight * inside[:, list(members)].all(axis=1)
        return total

    return Game(players, values, index)


def random_terms(
    players: int, counts: Mapping[int, int], seed: int
) -> dict[tuple[int, ...], float]:
    """Random terms, a number of each order, with normal weights."""
    draw = np.random.default_rng(seed)
    terms: dict[tuple[int, ...], float] = {}
    for order, count in counts.items():
        for _ in range(count):
            members = tuple(sorted(draw.choice(players, order, replace=False).tolist()))
            terms[members] = terms.get(members, 0.0) + float(draw.normal())
    return terms


def two_additive(players: int, seed: int) -> Game:
    draw = np.random.default_rng(seed)
    sets = [s for o in (1, 2) for s in itertools.combinations(range(players), o)]
    return of_terms(players, dict(zip(sets, draw.normal(size=len(sets)).tolist(), strict=True)))


def parities(players: int, seed: int) -> Game:
    """A sum of XORs of two to four players."""
    draw = np.random.default_rng(seed)
    sets = [draw.choice(players, o, replace=False) for o in (2, 2, 2, 3, 3, 4, 4, 4)]
    weights = draw.normal(size=len(sets))
    return tabled(
        players, lambda x: sum(w * (x[:, s].sum(1) % 2) for w, s in zip(weights, sets, strict=True))
    )


def network(players: int, seed: int, scale: float = 1.5) -> Game:
    """A tanh network of one hidden layer with random weights."""
    draw = np.random.default_rng(seed)
    first = scale * draw.normal(size=(players, 12)) / math.sqrt(players)
    bias, last = draw.normal(size=12) / 2, draw.normal(size=12)
    return tabled(players, lambda x: np.tanh((2.0 * x - 1.0) @ first * 2 + bias) @ last)


def saturating(players: int, seed: int) -> Game:
    """The probability of a class whose evidence saturates as players are added."""
    draw = np.random.default_rng(seed)
    weights = np.abs(draw.normal(size=players)) + 0.3
    pair = np.triu(draw.normal(size=(players, players)) * 0.5, 1)
    return tabled(
        players,
        lambda x: 1 / (1 + np.exp(3.0 - x @ weights - np.einsum("mi,ij,mj->m", x, pair, x))),
    )


def tabled(players: int, values: Callable[[Any], Floats]) -> Game:
    """A game of at most 16 players, whose index is computed from all coalitions."""
    codes = np.arange(2**players)
    inside = (codes[:, None] >> np.arange(players)) & 1
    table = np.asarray(values(inside.astype(np.float64)), dtype=np.float64)
    bits = 1 << np.arange(players)
    return Game(players, lambda x: table[x.astype(np.int64) @ bits], sii(table, players))


def sii(table: Floats, players: int) -> Floats:
    """The SII (n, n) by definition, from the values of all coalitions; bit k is player k."""
    codes = np.arange(len(table))
    size = ((codes[:, None] >> np.arange(players)) & 1).sum(axis=1)
    weight = np.array([1 / ((players - 1) * math.comb(players - 2, s)) for s in range(players - 1)])
    found = np.zeros((players, players))
    for i, j in itertools.combinations(range(players), 2):
        a, b = 1 << i, 1 << j
        s = codes[(codes & (a | b)) == 0]
        found[i, j] = weight[size[s]] @ (table[s | a | b] - table[s | a] - table[s | b] + table[s])
    return found + found.T


def planted_pairs(players: int, seed: int) -> Game:
    """30 pairs of weights from 0.5 to 1.5 and both signs, and a normal weight of each player."""
    draw = np.random.default_rng(seed)
    every = [*itertools.combinations(range(players), 2)]
    pairs = [every[k] for k in draw.choice(len(every), 30, replace=False)]
    weights = draw.uniform(0.5, 1.5, 30) * draw.choice([-1, 1], 30)
    terms: dict[tuple[int, ...], float] = dict(zip(pairs, weights.tolist(), strict=True))
    terms |= {(i,): x for i, x in enumerate(draw.normal(size=players).tolist())}
    return of_terms(players, terms)


def games(tables: Path | None = None) -> dict[str, Callable[[], Game]]:
    """All games by name; `tables` is a folder of values of trained layers, NAME.npy."""
    found: dict[str, Callable[[], Game]] = {
        "2-additive 12": lambda: two_additive(12, 0),
        "unanimity 13": lambda: of_terms(13, random_terms(13, {1: 10, 2: 20, 3: 20, 4: 20}, 1)),
        "unanimity 16": lambda: of_terms(16, random_terms(16, {1: 10, 2: 20, 3: 20, 4: 20}, 2)),
        "XOR 14": lambda: parities(14, 3),
        "network 15": lambda: network(15, 4),
        "saturating 13": lambda: saturating(13, 5),
        "unanimity 64": lambda: of_terms(64, random_terms(64, {1: 64, 2: 40, 3: 20, 4: 10}, 6)),
        "planted pairs 356": lambda: planted_pairs(356, 7),
    }
    for path in sorted(tables.glob("*.npy")) if tables else []:
        found[path.stem] = lambda path=path: _loaded(path)  # type: ignore[misc]
    return found


def _loaded(path: Path) -> Game:
    values = np.load(path)
    players = len(values).bit_length() - 1
    bits = 1 << np.arange(players)
    return tabled(players, lambda x: values[x.astype(np.int64) @ bits])


def errors(found: Floats, game: Game) -> dict[str, float]:
    """Error of an estimate (n, n), relative to the size of the index, and the recall of the 10 and 20 largest."""
    i, j = np.triu_indices(game.players, 1)
    truth, own = game.index[i, j], found[i, j]
    result = {"error": math.sqrt(((own - truth) ** 2).mean() / (truth**2).mean())}
    for count in (10, 20):
        best = np.argsort(-np.abs(truth), kind="stable")[:count]
        mine = np.argsort(-np.abs(own), kind="stable")[:count]
        result[f"recall_{count}"] = len(np.intersect1d(best, mine)) / count
    return result
