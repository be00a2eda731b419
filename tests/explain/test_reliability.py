"""Tests of standard errors of few observations, and of rankings that are not distinguishable."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flmoe_kernels.explain import (
    MaskingDrops,
    PairValues,
    TokenGame,
    faithfulness,
    probe_game,
)
from flmoe_kernels.explain.estimators import sampling as estimator
from flmoe_kernels.explain.games.coalitions import all_pairs
from flmoe_kernels.explain.masking import drops as masking
from flmoe_kernels.explain.reliability import LEAST_COUNT
from tests.support.explain_games import (
    Planted,
    deviations,
    first_of,
    interaction_layer,
    random_game,
    random_terms,
    sampled,
    table,
    tabled,
    unanimity,
)
from tests.support.explain_masking import TokenBits, bits
from tests.support.explain_results import masking_drops
from tests.support.layers import LayerCase


def layer_game() -> Planted:
    case = LayerCase(lengths=(5, 4))
    x = first_of(case.inputs(torch.float64))
    return tabled(table(TokenGame(interaction_layer(case), x, target=1), 9), 9)


def empty_is_different() -> Planted:
    """A mean of the present tokens, and another value without tokens, as models often give."""
    worth = np.random.default_rng(1).normal(size=10)
    return Planted(
        10,
        lambda inside: np.where(
            inside.any(axis=1), inside @ worth / np.maximum(inside.sum(axis=1), 1), 20.0
        ),
    )


GAMES = {
    "layer": layer_game,
    "random": lambda: random_game(8, seed=5),
    "empty is different": empty_is_different,
    "large terms": lambda: tabled(table(unanimity(random_terms(9, 40, 6, seed=1), 9), 9), 9),
}


def ratios(game: Planted, units: int, antithetic: bool, runs: int) -> NDArray[np.float64]:
    """Deviation / standard error of SII and RG of all pairs, over seeds; without pairs that have no error."""
    pairs = all_pairs(range(game.players))
    row = 1 + game.players + len(pairs)
    options = {
        "budget": 2 + 2 * row + units * (1 + antithetic) * row,
        "antithetic": antithetic,
        "design": "toggling",
    }
    found: list[NDArray[np.float64]] = []
    for deviation, error, _ in deviations(game, pairs, ("SII", "RG"), runs, **options).values():
        there = ~np.isnan(error) & ~((np.abs(deviation) < 1e-12) & (error < 1e-12))
        with np.errstate(divide="ignore"):
            found.append(deviation[there] / error[there])
    return np.concatenate(found)


def rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt((values**2).mean()))


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("name", GAMES)
def test_deviations_are_as_large_as_the_errors(name: str, antithetic: bool) -> None:
    """In games with known indices, over seeds, deviation / error has a root mean square near 1."""
    game = GAMES[name]()
    for units in (20, 42):
        found = ratios(game, units, antithetic, runs=40)
        assert len(found) > 1000
        assert 0.85 < rms(found) < 1.25
        assert 0.9 < (np.abs(found) <= 2).mean() < 0.98
        # Control: intervals of half the width cover far less.
        assert (np.abs(found) <= 1).mean() < 0.8


@pytest.mark.parametrize("name", GAMES)
def test_control_errors_of_four_units_do_not_hold(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the corrections, the same measurement finds that errors of four units are far too small."""
    assert len(ratios(GAMES[name](), 4, True, runs=5)) == 0, "there are none"
    monkeypatch.setattr(estimator, "LEAST_COUNT", 2)
    monkeypatch.setattr(estimator, "_COMMON_UNITS", 0)
    monkeypatch.setattr(
        estimator, "error_of_mean", lambda squares, k: (squares / (k * (k - 1))) ** 0.5
    )
    assert rms(ratios(GAMES[name](), 4, True, runs=40)) > 1.5


def test_missing_errors_have_a_reason(tmp_path: Path) -> None:
    game = random_game(8, seed=5)
    few = sampled(game, "toggling", budget=400)
    assert np.isnan(few.standard_errors).all()
    assert np.isfinite(few.values).all()
    reason = "no standard error for 28 of 28 pairs: fewer than 16 independent units"
    assert [note[: len(reason)] for note in few.notes] == [reason]
    assert f"note: {reason}" in repr(few)
    few.save(tmp_path / "few.npz")
    assert PairValues.load(tmp_path / "few.npz").notes == few.notes
    # Without a tolerance that NaN would meet.
    loose = sampled(game, "toggling", budget=400, tolerance=1e6, min_draws=2)
    assert loose.stopped_by == "budget"
    assert not sampled(game, "toggling").notes
    # A value of the full coalition only, and of a set that draws hardly meet.
    rare = unanimity({tuple(range(10)): 1.0, tuple(range(9)): 1.0}, 10)
    found = sampled(rare, "toggling", budget=2 + 56 * 2 * 31)
    exact = probe_game(rare, method="exact")["SII"]
    wrong = np.abs(found.values - exact.values) > 1e-12
    assert wrong.any()
    assert not (found.standard_errors[wrong] == 0).any()
    assert any("all draws agree" in note for note in found.notes)


def normal_drops(samples: int, seed: int) -> MaskingDrops:
    """Drops of samples with the mean 1."""
    draw = torch.Generator().manual_seed(seed)
    values = 1 + torch.randn(2, 2, samples, 3, generator=draw, dtype=torch.float64)
    drops = masking_drops(1, samples)
    return dataclasses.replace(drops, identified=values, random=values.unsqueeze(2))


def test_errors_of_mean_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(samples: int) -> float:
        found = []
        for seed in range(200):
            curve = normal_drops(samples, seed).curve()
            found.append(((curve.identified - 1) / curve.standard_error).numpy())
        return rms(np.concatenate(found))

    for samples in (LEAST_COUNT, 40):
        assert 0.9 < measured(samples) < 1.1
        assert not normal_drops(samples, 0).notes
    few = normal_drops(15, 0)
    assert few.curve().standard_error.isnan().all()
    assert few.aopc().standard_error.isnan()
    assert "note: no standard errors: expected at least 16 samples" in few.table()
    # Control: the usual error of four samples.
    monkeypatch.setattr(masking, "LEAST_COUNT", 2)
    monkeypatch.setattr(
        masking, "error_of_mean", lambda squares, n: (squares / (n * (n - 1))) ** 0.5
    )
    assert measured(4) > 1.4


def test_pairs_among_near_ties_are_noted() -> None:
    terms = {(0, 1): 3.0, (1, 2): 2.0, (2, 3): 1.86, (0, 3): 1.0}
    found = probe_game(unanimity(terms, 4), indices=["SII"])["SII"]
    assert [found.near_ties(count) for count in range(1, 5)] == [0, 1, 0, 0]
    assert found.near_ties(1, "smallest") > 0, "two pairs are 0"
    # Estimates differ by less than their errors.
    game = random_game(8, seed=5)
    exact, noisy = probe_game(game, indices=["SII"])["SII"], sampled(game, "toggling", budget=1500)
    assert noisy.near_ties(3) > exact.near_ties(3)


def test_identified_tokens_among_near_ties_are_noted(tmp_path: Path) -> None:
    values = [torch.tensor([[4.0, 3.0, 2.81, 1.0]] * 2 + [[4.0, 3.0, 2.0, 1.0]])]
    options: dict[str, Any] = {"metrics": ["logit"], "target": 0, "n_random": 1}
    call: Any = (TokenBits().eval(), bits(3, (4,)), None)
    found = faithfulness(*call, values, budgets=[25, 50, 100], **options)
    assert found.near_ties.tolist() == [[False, True, False]] * 2 + [[False] * 3]
    assert "not distinguishable for 2 of 3 samples: tokens left out" in repr(found)
    found.save(tmp_path / "found.npz")
    loaded = MaskingDrops.load(tmp_path / "found.npz")
    assert torch.equal(loaded.near_ties, found.near_ties)
    clear = faithfulness(*call, [values[0][2:].repeat(3, 1)], budgets=[50], **options)
    assert "distinguishable" not in clear.table()
    # A token that may not be masked is no rival.
    masks = [torch.tensor([[True, True, False, True]] * 3)]
    assert not faithfulness(*call[:2], masks, values, budgets=[50], **options).near_ties.any()


def test_gap_intervals_are_paired() -> None:
    """Samples differ more than the gap; control: the error of unpaired means does not show the gap."""
    draw = torch.Generator().manual_seed(0)
    level = 5 * torch.randn(2, 2, 40, 1, generator=draw, dtype=torch.float64)
    noise = torch.randn(2, 2, 3, 40, 3, generator=draw, dtype=torch.float64)
    random = level.unsqueeze(2) + noise
    drops = dataclasses.replace(
        masking_drops(1, 40), identified=level.expand(2, 2, 40, 3) + 1.0, random=random
    )
    for kind, sign in (("comprehensiveness", 1), ("sufficiency", -1)):
        found = drops.aopc(kind)
        low, high = found.gap_interval()
        assert float(low) < sign < float(high)
        assert float(high - low) < 0.6
        assert float(found.standard_error) > 0.5
    few = dataclasses.replace(masking_drops(1, 15), identified=drops.identified[:, :, :15])
    assert dataclasses.replace(few, random=random[:, :, :, :15]).aopc().gap_error.isnan()
