"""Coalitions drawn without replacement, a number of each size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flmoe_kernels.explain.games.coalitions import Bools, Floats, Ints, pack

LISTED = 2**17  # at most so many units are listed; among more, repetitions are drawn again


@dataclass
class Stratum:
    """Random units of one size in an order that depends only on the seeds.

    A unit is a coalition, or with `paired` a coalition T of at most n / 2 players and its complement; of two
    complements of n / 2 players, T has player 0.
    """

    players: int
    size: int
    paired: bool
    seeds: tuple[int, ...]
    _units: Bools | None = None
    _seen: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        seed, *key = self.seeds
        self._bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(*key, self.size)))
        self._given = 0

    @property
    def middle(self) -> bool:
        """Whether both coalitions of a unit have the same size."""
        return self.paired and 2 * self.size == self.players

    @property
    def units(self) -> int:
        """Number of units."""
        return math.comb(self.players, self.size) // (2 if self.middle else 1)

    def draw(self, count: int) -> Bools:
        """Return the next units (count, n); raw words of the generator are the same in all versions of numpy."""
        if self.units <= LISTED:
            if self._units is None:
                words = self._bits.random_raw(self.units)
                self._units = self._all()[np.argsort(words, kind="stable")]
            found = self._units[self._given : self._given + count]
            self._given += len(found)
            return found
        found = np.zeros((0, self.players), dtype=np.bool_)
        while len(found) < count:
            more = self._random(count - len(found))
            new = []
            for place, row in enumerate(pack(more)):
                key = row.tobytes()
                if key not in self._seen:
                    self._seen.add(key)
                    new.append(place)
            found = np.concatenate([found, more[new]])
        return found

    def _random(self, count: int) -> Bools:
        words = self._bits.random_raw(count * self.players).reshape(count, self.players)
        inside = np.zeros((count, self.players), dtype=np.bool_)
        chosen = np.argsort(words, axis=1, kind="stable")[:, : self.size]
        np.put_along_axis(inside, chosen, True, axis=1)
        return inside ^ (~inside[:, :1] if self.middle else False)

    def _all(self) -> Bools:
        first = 1 if self.middle else 0
        sets = itertools.combinations(range(first, self.players), self.size - first)
        chosen = np.array(list(sets), dtype=np.int64).reshape(self.units, self.size - first)
        inside = np.zeros((self.units, self.players), dtype=np.bool_)
        np.put_along_axis(inside, chosen, True, axis=1)
        inside[:, :first] = True
        return inside


def allocate(spread: Floats, available: Sequence[int], total: int, least: Ints) -> Ints:
    """Distribute `total` units in proportion to `spread`, at least `least` and at most `available` of each.

    This minimises the sum of spread^2 / units (Neyman 1934). Returns integers that sum to at most `total`.
    """
    most = np.array([min(x, total) for x in available], dtype=np.float64)
    least = np.minimum(least, most)
    spread = np.maximum(spread, 1e-12 * max(float(spread.max(initial=0.0)), 1e-300))
    low, high = 0.0, float((most / spread).max(initial=0.0))
    for _ in range(200):
        scale = 0.5 * (low + high)
        if np.clip(scale * spread, least, most).sum() > total:
            high = scale
        else:
            low = scale
    wanted = np.clip(low * spread, least, most)
    found = np.maximum(np.floor(wanted), least).astype(np.int64)
    left = min(total, int(most.sum())) - int(found.sum())
    for place in np.argsort(found - wanted, kind="stable"):
        if left > 0 and found[place] < most[place]:
            found[place] += 1
            left -= 1
    return found
