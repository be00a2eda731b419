"""Tests of the estimator: bias, games with known indices, standard errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flmoe_kernels.explain import Sampling, probe_game
from flmoe_kernels.explain.estimators.indices import TERMS
from flmoe_kernels.explain.estimators.sampling import Toggles
from flmoe_kernels.explain.games.coalitions import all_pairs, unpack
from tests.support.explain_games import (
    Planted,
    as_array,
    by_definition,
    random_game,
    sampled,
    table,
)

BOTH = ("SII", "RG")


def all_draws(
    game: Planted, pairs: NDArray[np.int64], index: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Terms (2^n, p) of every set T and their weights: of the end sizes, and of all draws between them."""
    players, found, weights = game.players, [], []
    toggles = Toggles.of(players, pairs)
    for drawn in itertools.product((False, True), repeat=players):
        inside = np.array(drawn)
        values = np.asarray(game(unpack(toggles.coalitions(inside), players)))
        found.append(TERMS[index](toggles.corners(inside, values)))
        size = int(inside.sum())
        without = size - inside[pairs].sum(axis=1)
        between = (without > 0) & (without < players - 2) & (0 < size < players)
        # T without players gives S empty, and T of all players gives S of all others.
        ends = np.full(len(pairs), 0.5 * (size in (0, players)))
        weights.append([ends, between / math.comb(players, size)])
    ends, between = np.array(weights).transpose(1, 0, 2)
    share = max(players - 3, 0) / (players - 1)
    return np.array(found), (1 - share) * ends + share * between / np.maximum(
        between.sum(axis=0), 1e-9
    )


@pytest.mark.parametrize("index", BOTH)
@pytest.mark.parametrize("players", [2, 3, 4, 5, 7])
def test_the_mean_over_all_draws_is_the_index(players: int, index: str) -> None:
    """Exactly unbiased: the mean over all draws of a game without structure."""
    game = random_game(players)
    truth = by_definition(table(game, players), players, index)
    pairs = all_pairs(range(players))
    draws, weights = all_draws(game, pairs, index)
    np.testing.assert_allclose(weights.sum(axis=0), 1)
    np.testing.assert_allclose((weights * draws).sum(axis=0), as_array(truth, pairs), atol=1e-13)
    # A subset of the pairs, in another order, has the same draws.
    np.testing.assert_array_equal(all_draws(game, pairs[::-2], index)[0], draws[:, ::-2])
    # Control: the mean without the weights is another index.
    if players > 3:
        assert np.abs(draws.mean(axis=0) - as_array(truth, pairs)).max() > 0.05


@pytest.mark.parametrize("players", [2, 3])
def test_sampling_of_two_or_three_players_is_exact(players: int) -> None:
    """They have no sizes between the end sizes."""
    found = probe_game(
        random_game(players), method="sampling", sampling=Sampling(budget=50, design="toggling")
    )
    for index, values in probe_game(random_game(players), method="exact").items():
        np.testing.assert_allclose(found[index].values, values.values, atol=1e-14)
        assert found[index].exact
        assert not found[index].standard_errors.any()
        assert not found[index].notes


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("count", [1, 6, 45])
@pytest.mark.parametrize("players", [12, 40])
def test_the_budget_is_used_and_never_exceeded(players: int, count: int, antithetic: bool) -> None:
    every = all_pairs(range(players))
    pairs = every[np.random.default_rng(count).permutation(len(every))[:count]]
    price = len(Toggles.of(players, pairs)) * (1 + antithetic)
    for budget in (5 * price, 30 * price + 1):
        game = Planted(players, lambda inside: inside.sum(axis=1) * 1.0)
        options: dict[str, Any] = {"budget": budget, "seed": budget, "antithetic": antithetic}
        found = sampled(game, "toggling", pairs, **options)
        # Equal coalitions of different units are evaluated and counted once.
        assert found.evaluations == game.asked <= budget
        assert found.stopped_by == "budget"
        # v(all) and v(none) take two evaluations, and the end sizes two draws.
        units = (budget - 2 - 2 * len(Toggles.of(players, pairs))) // price
        assert found.draws == units * (1 + antithetic)
        assert found.evaluations > 0.4 * budget
    with pytest.raises(ValueError, match=r"budget: expected at least \d+, got 5"):
        sampled(game, "toggling", pairs, budget=5)


def test_tolerance_stops_early_but_not_before_min_draws() -> None:
    game = random_game(10)
    whole = sampled(game, "toggling")
    loose = Sampling(tolerance=2 * float(whole.standard_errors.max()), design="toggling")
    found = probe_game(game, method="sampling", sampling=loose)
    for index in BOTH:
        assert found[index].stopped_by == "tolerance"
        assert 64 <= found[index].draws < whole.draws / 2
    errors = [found[index].standard_errors.max() for index in BOTH]
    assert max(errors) <= loose.tolerance
    assert 200 <= sampled(game, "toggling", tolerance=1e6, min_draws=200).draws < 300
