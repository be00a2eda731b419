"""Tests of the regression estimator: bias, coverage, linear indices, allocation, budgets."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flmoe_kernels.explain import Sampling, TokenGame, probe_game
from flmoe_kernels.explain.estimators import regression, surrogate
from flmoe_kernels.explain.estimators.indices import LINEAR
from flmoe_kernels.explain.estimators.kernel import Kernel
from flmoe_kernels.explain.estimators.polynomial import AND, PRODUCT
from flmoe_kernels.explain.games.coalitions import all_pairs, unpack
from tests.support.explain_games import (
    Planted,
    deviations,
    index_of,
    interaction_layer,
    random_game,
    random_terms,
    sampled,
    table,
    tabled,
    unanimity,
)
from tests.support.layers import LayerCase


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("method", ["exact", "sampling"])
@pytest.mark.parametrize("players", [2, 3, 6, 7])
def test_indices_by_definition(players: int, method: str, antithetic: bool) -> None:
    """A budget for all coalitions makes the estimate exact; efficient indices leave no residual."""
    game = random_game(players)
    values = table(game, players)
    sampling = Sampling(budget=2**players, antithetic=antithetic, design="regression")
    found = probe_game(game, indices=LINEAR, method=method, sampling=sampling)
    for index, result in found.items():
        assert result.exact
        assert result.evaluations <= 2**players
        pairs = [index_of(values, players, index, tuple(p)) for p in result.pairs.tolist()]
        single = [index_of(values, players, index, (i,)) for i in range(players)]
        np.testing.assert_allclose(result.values, pairs, atol=1e-12)
        np.testing.assert_allclose(result.player_values, single, atol=1e-12)
        assert not result.standard_errors.any()
        if index == "BII":
            assert math.isnan(result.efficiency_residual)
        else:
            assert abs(result.efficiency_residual) < 1e-12
    assert np.abs(found["BII"].values - found["SII"].values).max() > 0.01 or players < 4


@pytest.mark.parametrize("index", LINEAR)
def test_indices_agree_with_shapiq(index: str) -> None:
    shapiq = pytest.importorskip("shapiq")
    case = LayerCase(lengths=(3, 3))
    game = TokenGame(interaction_layer(case), case.inputs(torch.float64), target=1)
    found = probe_game(game, indices=[index])[index]
    expected = shapiq.ExactComputer(game, n_players=6)(index, order=2)
    for pair in itertools.combinations(range(6), 2):
        assert found.to_shapiq()[pair] == pytest.approx(expected[pair], abs=1e-9)
    assert float(np.abs(found.values).max()) > 1e-3


@pytest.mark.parametrize(("antithetic", "budget", "rows"), [(True, 60, 20), (False, 60, 16384)])
def test_no_bias_for_a_game_without_structure(
    antithetic: bool, budget: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over seeds, with a first part; control: the fitted polynomial alone is biased."""
    monkeypatch.setattr(regression, "_ROWS_FIT", rows)  # also fits to a part of the units
    game, pairs, runs = random_game(7, seed=5), [(0, 1), (2, 5), (3, 6)], 25
    monkeypatch.setattr(regression, "_LEAST_FIRST", 4)
    monkeypatch.setattr(surrogate, "_dictionaries", lambda data: iter(()))  # to save time
    monkeypatch.setattr(surrogate, "_fits_kernel", lambda data: False)
    options: dict[str, Any] = {"budget": budget, "antithetic": antithetic, "design": "regression"}

    def scores() -> NDArray[np.float64]:
        found = deviations(game, pairs, ["SII", "STII"], runs, **options)
        deviation = np.concatenate([x[0] for x in found.values()], axis=1)
        return deviation.mean(axis=0) / (deviation.std(axis=0) / math.sqrt(runs))

    assert np.abs(scores()).max() < 3.5
    weights = regression.Regression._row_weights
    monkeypatch.setattr(regression.Regression, "_row_weights", lambda *given: 0.0 * weights(*given))
    assert np.abs(scores()).max() > 5


def layered(players: int, seed: int) -> Planted:
    """A smooth function of random sums, as a model's logit."""
    draw = np.random.default_rng(seed)
    first, last = draw.normal(size=(players, 6)) / math.sqrt(players), draw.normal(size=6)
    game = Planted(players, lambda x: np.tanh((2.0 * x - 1.0) @ first + 0.3) @ last)
    return tabled(table(game, players), players)


@pytest.mark.parametrize(
    "game",
    [layered(10, 1), unanimity(random_terms(10, 40, 6, seed=1), 10)],
    ids=["layered", "unanimity"],
)
def test_intervals_cover(game: Planted) -> None:
    """95% intervals of pairs and players; control: intervals of a third of the width do not."""
    options: dict[str, Any] = {"budget": 150, "design": "regression"}
    deviation, error, _ = deviations(game, None, ["SII"], 8, **options)["SII"]
    assert (np.abs(deviation) <= 1.96 * error).mean() >= 0.9
    assert (np.abs(deviation) <= 1.96 / 3 * error).mean() < 0.75
    exact = probe_game(game, indices=["SII"])["SII"].player_values
    single = sampled(game, **options)
    assert (np.abs(single.player_values - exact) <= 4 * single.player_errors).all()
    assert abs(single.efficiency_residual) < 1e-9


def test_the_error_is_a_fraction_of_that_of_toggling() -> None:
    game = layered(10, 3)
    errors = {}
    for design in ("regression", "toggling"):
        found = deviations(game, None, ["SII"], 2, budget=512, design=design)["SII"][0]
        errors[design] = math.sqrt((found**2).mean())
    assert errors["regression"] < 0.4 * errors["toggling"]


@pytest.mark.parametrize("antithetic", [True, False])
def test_games_in_the_span_of_the_fit_are_exact(antithetic: bool) -> None:
    """Few terms among many players, and products of three players, are found."""
    sparse = unanimity({**{(i,): 0.1 * i for i in range(40)}, (3, 17): 2.0, (5, 30): -1.0}, 40)
    xor = Planted(12, lambda x: (x[:, [1, 4, 7]].sum(axis=1) % 2) * 1.0 + (x[:, 0] ^ x[:, 2]))
    for game, budget in ((sparse, 1200), (xor, 600)):
        found = sampled(game, "regression", budget=budget, antithetic=antithetic)
        expected = np.zeros((game.players, game.players))
        if game is sparse:
            expected[3, 17], expected[5, 30] = 2.0, -1.0
        else:
            expected[0, 2] = -2.0  # every second difference; the three-way XOR has none on average
        np.testing.assert_allclose(found.values, expected[tuple(found.pairs.T)], atol=1e-6)
        assert found.draws < 2 ** min(game.players, 12)


def test_tolerance_and_notes() -> None:
    game = random_game(10, seed=2)
    whole = sampled(game, "regression", budget=800)
    assert whole.stopped_by == "budget"
    tolerance = 4 * float(whole.standard_errors.max())
    early = sampled(game, "regression", budget=800, tolerance=tolerance)
    assert early.stopped_by == "tolerance"
    assert early.draws < 0.6 * whole.draws
    assert early.standard_errors.max() <= tolerance
    # 60 coalitions are too few for a game without structure.
    poor = sampled(game, "regression", budget=60)
    assert any("the budget is too small: zeros" in note for note in poor.notes)
    assert not sampled(layered(10, 0), "regression", budget=800).notes
    with pytest.raises(ValueError, match=r"budget: expected at least \d+, got 12"):
        sampled(game, "regression", budget=12)
    with pytest.raises(ValueError, match=r"design: expected None or another design for RG"):
        probe_game(game, method="sampling", sampling=Sampling(budget=60, design="regression"))
    with pytest.raises(ValueError, match=r"design: expected one of regression, toggling"):
        Sampling(design="other")


def test_half_of_the_budget_is_for_each_design() -> None:
    game = layered(12, 3)
    found = probe_game(game, sampling=Sampling(budget=1500))
    assert (found["SII"].design, found["RG"].design) == ("regression", "toggling")
    assert found["SII"].evaluations + found["RG"].evaluations == game.asked <= 1500
    assert found["SII"].evaluations > 700
    options: dict[str, Any] = {"indices": ["SII"], "sampling": Sampling(budget=1500)}
    # Two units of every size of 1000 players are more than the budget.
    row = probe_game(unanimity({(0, 1): 1.0}, 1000), [(0, j) for j in range(1, 96)], **options)
    assert row["SII"].design == "toggling"


@pytest.mark.parametrize(
    ("constant", "slope", "players"), [(0.1, 0.0, 12), (0.0, 1.0, 20), (1e4, 1.0, 12)]
)
def test_games_without_interactions(constant: float, slope: float, players: int) -> None:
    """Fits without residuals give no spread; their rounding errors are no sign of a small budget."""
    worth = slope * np.linspace(0.1, 3.0, players)
    found = sampled(Planted(players, lambda x: constant + x @ worth), "regression", budget=1100)
    assert np.abs(found.values).max() < 1e-8 * max(constant, 1.0)
    assert not found.notes


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("players", [3, 4])
def test_smallest_budgets(players: int, antithetic: bool) -> None:
    game = random_game(players)
    exact = probe_game(game, indices=["SII"], method="exact")["SII"].values
    for budget in range(regression.Regression.least(players, antithetic), 2**players):
        found = sampled(game, "regression", budget=budget, antithetic=antithetic)
        assert np.abs(found.values - exact).max() < 10
        json.dumps(found.to_dict(), allow_nan=False)


def test_ranks_agree_when_a_tolerance_is_reached() -> None:
    """The errors of the first rank decide, which others may round differently."""

    def stopped(largest: float) -> str | None:
        def agree(numbers: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.array([largest]) if len(numbers) == 1 else numbers

        sampling = Sampling(budget=900, tolerance=1e-9)
        run = regression.Regression(10, all_pairs(range(10)), ["SII"], sampling, 0, agree)
        while run.stopped_by is None:
            run.absorb(random_game(10)(unpack(run.plan(), 10)))
        return run.stopped_by

    assert stopped(0.0) == "tolerance"
    assert stopped(1.0) == "budget"


@pytest.mark.parametrize("parity", [1, -1, 0])
@pytest.mark.parametrize("kind", [PRODUCT, AND, "kernel"])
def test_exact_sums_of_surrogates(kind: str, parity: int) -> None:
    """Sums over all coalitions, by the formula and coalition by coalition."""
    n, drawn = 6, np.random.default_rng(1)
    inside = (np.arange(2**n)[:, None] >> np.arange(n)) & 1 == 1
    size, weights = inside.sum(axis=1), drawn.normal(size=4)
    fits: list[Any] = [Kernel(inside[[3, 17, 40, 63]], 0.3, parity)]
    if kind == "kernel":
        # The product over players by definition.
        x, y = inside * 2.0 - 1.0, fits[0].points * 2.0 - 1.0
        product, other = (np.prod(1 + 0.3 * sign * x[:, None] * y, axis=2) for sign in (1, -1))
        own = (product + parity * other) / (1.3**n + parity * 0.7**n)
        np.testing.assert_allclose(fits[0].predict(inside, weights), own @ weights, atol=1e-12)
    else:
        sets = [surrogate._sets(n, order)[:4] for order in range(1, 5)]
        fits = [surrogate._terms(kind, n, parity, x, 2 * (kind == PRODUCT)) for x in sets]
    for fit in fits:
        tables = [drawn.normal(size=(n + 1, count)) for count in (2, 3)]
        values = fit.predict(inside, weights) / np.array([math.comb(n, s) for s in size])
        single, pair = fit.indices(weights, tables)
        for i, j in itertools.combinations(range(n), 2):
            one = (tables[0][size, inside[:, i] * 1] * values).sum()
            two = (tables[1][size, inside[:, i] * 1 + inside[:, j]] * values).sum()
            assert single[i] == pytest.approx(one, abs=1e-10)
            assert [pair[i, j], pair[j, i]] == pytest.approx([two, two], abs=1e-10)
