"""Tests of the estimator: bias, games with known indices, standard errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import t as student

from flmoe_kernels.explain import Sampling, probe_game
from flmoe_kernels.explain.estimators.indices import TERMS
from flmoe_kernels.explain.estimators.sampling import Toggles
from flmoe_kernels.explain.games.coalitions import all_pairs, unpack
from tests.support.explain_games import (
    Planted,
    as_array,
    by_definition,
    deviations,
    either,
    random_game,
    table,
    unanimity,
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
    # Control: drawing S uniformly from all subsets gives another index.
    if players > 3:
        values = table(game, players)
        half = banzhaf(values, players, index)
        assert np.abs(as_array(half, pairs) - as_array(truth, pairs)).max() > 0.05


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


def banzhaf(values: NDArray[np.float64], players: int, index: str) -> dict[tuple[int, int], float]:
    found = {}
    for i, j in itertools.combinations(range(players), 2):
        codes = np.arange(2**players)
        s = codes[(codes & (1 << i | 1 << j)) == 0]
        v = [values[s | added] for added in (0, 1 << i, 1 << j, 1 << i | 1 << j)]
        terms = v[3] - v[1] - v[2] + v[0] if index == "SII" else np.minimum(v[1], v[2]) - v[0]
        found[i, j] = float(terms.mean())
    return found


def test_redundancy_gap_of_duplicates_independents_and_synergies() -> None:
    players, sampling = 6, Sampling(budget=20_000, design="toggling")

    def gaps(game: Planted) -> tuple[float, NDArray[np.float64]]:
        exact = probe_game(game, method="exact")["RG"]
        sampled = probe_game(game, method="sampling", sampling=sampling)["RG"]
        assert (np.abs(sampled.values - exact.values) <= 5 * sampled.standard_errors + 1e-12).all()
        planted = (exact.pairs == (1, 3)).all(axis=1)
        return float(exact.values[planted][0]), exact.values[~planted]

    gap, others = gaps(either(1, 3, worth=2.5, players=players))
    assert gap == pytest.approx(2.5)
    assert (others == 0).all(), "tokens without information"
    gap, others = gaps(unanimity({(1, 3): 2.0}, players))
    assert gap == 0
    assert (np.abs(others) < 1e-12).all()
    # Each token alone lowers the value; both together raise it.
    gap, _ = gaps(unanimity({(1, 3): 2.0, (1,): -0.5, (3,): -0.25}, players))
    assert gap == pytest.approx(-0.5)
    # By the formula, the gap of two additive tokens is the smaller of their values, though they are not redundant.
    # SII distinguishes them from duplicates: it is 0 here and negative there.
    additive = unanimity({(1,): 2.0, (3,): 0.75}, players)
    gap, _ = gaps(additive)
    assert gap == pytest.approx(0.75)
    sii = [probe_game(game, [(1, 3)])["SII"].values[0] for game in (additive, either(1, 3, 1.0, 6))]
    assert sii == pytest.approx([0.0, -1.0])


@pytest.mark.slow
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("index", BOTH)
def test_coverage_and_no_bias(index: str, antithetic: bool) -> None:
    """In 250 runs of 99 units, 95% intervals of Student's t have the stated coverage, and there is no bias.

    For few units and other games, see test_reliability.
    """
    game, pairs, budget = (
        random_game(6, seed=5),
        all_pairs(range(6))[::2],
        3000 if antithetic else 1500,
    )
    options: dict[str, Any] = {"budget": budget, "antithetic": antithetic, "design": "toggling"}
    deviation, errors, units = deviations(game, pairs, [index], 250, **options)[index]
    reach = student.ppf(0.975, units - 1)
    covered = (np.abs(deviation) <= reach * errors).mean(axis=0)
    assert 0.93 < covered.mean() < 0.97
    assert covered.min() > 0.88
    spread = deviation.std(axis=0, ddof=1)
    np.testing.assert_allclose(np.sqrt((errors**2).mean(axis=0)), spread, rtol=0.15)
    assert (np.abs(deviation.mean(axis=0)) < 4 * spread / math.sqrt(250)).all()
    # Control: intervals of half the width cover far less.
    assert (np.abs(deviation) <= reach / 2 * errors).mean() < 0.8


def test_antithetic_draws_help_where_v_grows_with_the_coalition() -> None:
    players = 8
    game = Planted(players, lambda inside: inside.sum(axis=1) ** 3.0)
    errors = [
        probe_game(
            game,
            method="sampling",
            sampling=Sampling(budget=6000, antithetic=antithetic, design="toggling"),
        )["SII"].standard_errors.max()
        for antithetic in (True, False)
    ]
    # A cube's second difference grows linearly with the size of S, and falls for its complement.
    assert errors[0] < 1e-12 < 0.1 < errors[1]


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("count", [1, 6, 45])
@pytest.mark.parametrize("players", [12, 40])
def test_the_budget_is_used_and_never_exceeded(players: int, count: int, antithetic: bool) -> None:
    every = all_pairs(range(players))
    pairs = every[np.random.default_rng(count).permutation(len(every))[:count]]
    price = len(Toggles.of(players, pairs)) * (1 + antithetic)
    for budget in (5 * price, 30 * price + 1):
        game = Planted(players, lambda inside: inside.sum(axis=1) * 1.0)
        sampling = Sampling(budget=budget, seed=budget, antithetic=antithetic, design="toggling")
        found = probe_game(game, pairs, method="sampling", sampling=sampling)["SII"]
        # Equal coalitions of different units are evaluated and counted once.
        assert found.evaluations == game.asked <= budget
        assert found.stopped_by == "budget"
        # v(all) and v(none) take two evaluations, and the end sizes two draws.
        units = (budget - 2 - 2 * len(Toggles.of(players, pairs))) // price
        assert found.draws == units * (1 + antithetic)
        assert found.evaluations > 0.4 * budget
    with pytest.raises(ValueError, match=r"budget: expected at least \d+, got 5"):
        probe_game(game, pairs, method="sampling", sampling=Sampling(budget=5, design="toggling"))


def test_tolerance_stops_early_but_not_before_min_draws() -> None:
    game, pairs = random_game(10), all_pairs(range(10))
    options = {"design": "toggling"}
    whole = probe_game(game, pairs, method="sampling", sampling=Sampling(**options))["SII"]
    loose = Sampling(tolerance=2 * float(whole.standard_errors.max()), **options)
    found = probe_game(game, pairs, method="sampling", sampling=loose)
    for index in BOTH:
        assert found[index].stopped_by == "tolerance"
        assert 64 <= found[index].draws < whole.draws / 2
    errors = [found[index].standard_errors.max() for index in BOTH]
    assert max(errors) <= loose.tolerance
    patient = Sampling(tolerance=1e6, min_draws=200, **options)
    found = probe_game(game, pairs, method="sampling", sampling=patient)
    assert 200 <= found["SII"].draws < 300
