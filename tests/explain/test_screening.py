"""Tests of the choice of candidates among hundreds of tokens."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flmoe_kernels.explain import (
    PairValues,
    Run,
    Sampling,
    TokenGame,
    TwoAdditiveGame,
    probe_game,
    probe_pairs,
)
from flmoe_kernels.explain.estimators import screening
from tests.support.explain_games import Planted, sampled, unanimity
from tests.support.pair_layers import pair_inputs, pair_layer


def planted(
    players: int, pairs: int, triples: int, seed: int
) -> tuple[Planted, NDArray[np.float64]]:
    """A game with planted pairs and triples, and its SII (n, n)."""
    draw = np.random.default_rng(seed)
    terms = {(i,): float(x) for i, x in enumerate(draw.normal(size=players))}
    truth = np.zeros((players, players))
    for order in [2] * pairs + [3] * triples:
        members = tuple(sorted(draw.choice(players, order, replace=False).tolist()))
        terms[members] = float(draw.uniform(0.5, 1.5) * draw.choice([-1, 1]))
        for i, j in itertools.permutations(members, 2):
            truth[i, j] += terms[members] / (order - 1)
    return unanimity(terms, players), truth


def recall(found: PairValues, truth: NDArray[np.float64], count: int) -> float:
    first, second = np.triu_indices(len(truth), 1)
    order = np.argsort(-np.abs(truth[first, second]))[:count]
    best = {*zip(first[order].tolist(), second[order].tolist(), strict=True)}
    ranked = found.pairs[found.ranked(count, "magnitude")].tolist()
    return len(best & {*map(tuple, ranked)}) / count


@pytest.mark.parametrize(("triples", "antithetic"), [(0, False), (6, True)])
def test_the_largest_of_63190_pairs_are_found(triples: int, antithetic: bool) -> None:
    game, truth = planted(356, 30, triples, seed=3)
    sampling = Sampling(budget=8192, antithetic=antithetic)
    found = probe_game(game, "screened", indices=["SII"], sampling=sampling)["SII"]
    assert game.asked <= 8192
    assert len(found) <= 50
    assert recall(found, truth, 20) >= 0.8
    deviation = np.abs(found.values - truth[tuple(found.pairs.T)])
    assert (deviation <= 5 * found.standard_errors + 1e-9).all()
    [note] = [x for x in found.notes if x.startswith("screened out")]
    assert f"{63190 - len(found)} of 63190 pairs by a sparse fit" in note
    assert found.candidates == f"{len(found)} pairs screened from all pairs"


def test_estimates_are_unbiased_given_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of the chosen pairs use no value of the screening."""
    game, _ = planted(24, 12, 20, seed=1)
    fitted = screening.sparse_fit

    def result(noise: float) -> PairValues:
        def fit(data: Any) -> Any:
            surrogate, explained = fitted(data)
            return surrogate, explained + noise

        monkeypatch.setattr(screening, "sparse_fit", fit)
        return probe_game(game, "screened", indices=["SII"], sampling=Sampling(budget=4000))["SII"]

    first, other = result(0.0), result(0.5)
    np.testing.assert_array_equal(first.values, other.values)
    listed = sampled(game, first.design, first.pairs, budget=4000 - 1500 + 2)
    assert np.abs(listed.values - first.values).max() < 6 * listed.standard_errors.max()


def test_small_games_need_no_screening() -> None:
    game, truth = planted(9, 4, 2, seed=0)
    found = probe_game(game, "screened", indices=["SII"])["SII"]
    assert found.exact
    np.testing.assert_allclose(found.values, truth[tuple(found.pairs.T)], atol=1e-12)
    assert not any("screened" in note for note in found.notes)


def test_checkpoints_of_other_requests_are_refused(tmp_path: Path) -> None:
    """Requests with the same screening, but other estimates after it."""
    game, _ = planted(24, 12, 20, seed=1)

    def values(*names: str, budget: int = 3000, **given: Any) -> None:
        sampling, run = Sampling(budget=budget, **given), Run(checkpoint=tmp_path)
        probe_game(game, "screened", indices=names, sampling=sampling, run=run)

    values("STII")
    values("STII")
    others: list[tuple[str, dict[str, Any]]] = [
        ("BII", {}),
        ("SII", {"design": "regression", "budget": 3001}),
        ("SII", {"design": "regression", "tolerance": 1e-6}),
    ]
    for index, options in others:
        with pytest.raises(ValueError, match="belongs to another run"):
            values(index, **options)


@pytest.mark.parametrize("design", ["regression", "toggling"])
def test_the_screening_draws_other_coalitions_than_the_estimates(design: str) -> None:
    game, _ = planted(120, 12, 0, seed=1)
    asked: list[NDArray[np.bool_]] = []

    def formula(inside: NDArray[np.bool_]) -> NDArray[np.float64]:
        asked.append(inside)
        return game(inside)

    recorded = Planted(120, formula)
    sampling = Sampling(budget=3000, design=design)
    found = probe_game(recorded, "screened", indices=["SII"], sampling=sampling)["SII"]
    assert found.evaluations == recorded.asked
    every = np.concatenate(asked)
    # Of the small sizes there are few coalitions.
    middle = every[(every.sum(axis=1) > 2) & (every.sum(axis=1) < 118)]
    assert len(np.unique(middle, axis=0)) == len(middle)


@pytest.mark.parametrize(("indices", "least"), [(("SII",), 1904), (("SII", "RG", "BII"), 2285)])
def test_a_budget_too_small_is_refused_before_the_evaluations(
    indices: tuple[str, ...], least: int
) -> None:
    game, _ = planted(356, 30, 0, seed=3)
    with pytest.raises(ValueError, match=f"budget: expected at least {least}, got {least - 1}"):
        probe_game(game, "screened", indices=indices, sampling=Sampling(budget=least - 1))
    sampling = Sampling(budget=5000, design="toggling")
    with pytest.raises(ValueError, match="design: expected None or another design for"):
        probe_game(game, "screened", indices=[*indices, "STII"], sampling=sampling)
    assert not game.asked
    found = probe_game(game, "screened", indices=indices, sampling=Sampling(budget=least))
    assert len(found) == len(indices)


def test_a_screened_layer_as_black_box(tmp_path: Path) -> None:
    """A 2-additive model, whose pairs all interact; the run continues from its checkpoint."""
    layer, x = pair_layer(), [each[:1] for each in pair_inputs((14, 9))]
    truth = TwoAdditiveGame(layer, x, target=0)
    options: dict[str, Any] = {
        "target": 0,
        "pairs": "screened",
        "method": "sampling",
        "sampling": Sampling(budget=3000),
        "run": Run(checkpoint=tmp_path),
    }
    [first] = probe_pairs(layer, x, **options)
    np.testing.assert_allclose(
        first["SII"].values, truth.interactions(first["SII"].pairs), atol=1e-9
    )
    [again] = probe_pairs(layer, x, **options)
    assert {k: v.to_dict() for k, v in again.items()} == {k: v.to_dict() for k, v in first.items()}
    assert TokenGame(layer, x, target=0).players == 23
