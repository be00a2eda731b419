"""Tests of the verdicts on pairs, on games of known kinds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flmoe_kernels.explain import PairValues, Sampling, probe_game, probe_pairs
from flmoe_kernels.explain.estimators.indices import Estimate
from flmoe_kernels.explain.estimators.kinds import pair_kinds
from tests.support.explain_games import Planted
from tests.support.pair_layers import DIMS, pair_inputs, pair_layer

# The value of the first three players; the others are additive.
GAMES: dict[str, tuple[Any, str]] = {
    "duplicates": (lambda a, b, c: 2.0 * (a | b), "redundancy"),
    "partial duplicates": (lambda a, b, c: 1.0 * a + 1.0 * b - 0.5 * (a & b), "redundancy"),
    "duplicates that lower v": (lambda a, b, c: -2.0 * (a | b), "redundancy"),
    "both are needed": (lambda a, b, c: 2.0 * (a & b), "synergy"),
    "more than the sum": (lambda a, b, c: 1.0 * a + 0.5 * b + 1.5 * (a & b), "synergy"),
    "worse together": (lambda a, b, c: 1.0 * a + 1.0 * b - 3.0 * (a & b), "synergy"),
    "spoils": (lambda a, b, c: 2.0 * (a & ~b), "synergy"),
    "additive": (lambda a, b, c: 1.0 * a + 2.0 * b, "independent"),
    "XOR of two": (lambda a, b, c: 1.0 * (a ^ b), "synergy"),
    "XOR of three": (lambda a, b, c: 1.0 * (a ^ b ^ c), "undecided"),
    "three are needed": (lambda a, b, c: 2.0 * (a & b & c), "synergy"),
}


def game(name: str, players: int) -> Planted:
    value = GAMES[name][0]
    worth = np.linspace(0.2, 0.6, players - 3)
    return Planted(players, lambda x: value(x[:, 0], x[:, 1], x[:, 2]) + x[:, 3:] @ worth)


@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("method", ["exact", "sampling"])
def test_known_kinds(name: str, method: str) -> None:
    found = probe_game(game(name, 8), method=method, sampling=Sampling(budget=6000))
    result = found["SII"]
    assert result.kinds == found["RG"].kinds
    kinds = {
        tuple(pair): kind for pair, kind in zip(result.pairs.tolist(), result.kinds, strict=True)
    }
    assert kinds[0, 1] == GAMES[name][1]
    assert kinds[4, 5] == kinds[0, 7] == "independent"
    mixed = [note for note in result.notes if "the sign of their interaction depends" in note]
    assert bool(mixed) == (name == "XOR of three")
    if mixed:
        assert mixed[0].startswith("3 pairs are undecided with any budget")
        assert np.abs(result.values).max() < 1e-9


@pytest.mark.parametrize(
    ("value", "error", "kind"),
    [
        (-1.4, 0.02, "synergy"),
        (-1.4, 0.2, "undecided"),
        (-1.0, 0.02, "redundancy"),
        (-1.0, 0.1, "undecided"),
        (-0.5, 0.1, "redundancy"),
    ],
)
def test_a_verdict_needs_evidence(value: float, error: float, kind: str) -> None:
    """An overlap of 1, which copies reach and a negative synergy exceeds; redundancy is no default."""
    values = {"SII": value, "RG": 1.0, "RG of -v": -1.0, "squared SII term": value**2}
    found = {name: Estimate(np.array([x]), np.array([error])) for name, x in values.items()}
    assert pair_kinds(found, (0.0, 2.0))[0] == (kind,)


def test_results_keep_the_kinds(tmp_path: Path) -> None:
    result = probe_game(game("both are needed", 6))["SII"]
    best = result.top(1)
    assert best.kinds == ("synergy",)
    assert best.rows()[0]["kind"] == "synergy"
    assert result.table(1).endswith("  synergy")
    result.save(tmp_path / "found.npz")
    assert PairValues.load(tmp_path / "found.npz").kinds == result.kinds
    assert not probe_game(game("additive", 6), indices=["SII"])["SII"].kinds
    # A closed form of SII with an estimate of RG.
    [pair] = probe_pairs(pair_layer(DIMS), [x[:1] for x in pair_inputs((3, 2, 2))])
    assert pair["SII"].method == "closed_form"
    assert pair["SII"].kinds == pair["RG"].kinds
    assert len(pair["SII"].kinds) == len(pair["SII"])
    assert dataclasses.replace(pair["SII"], kinds=()).top(2).kinds == ()
