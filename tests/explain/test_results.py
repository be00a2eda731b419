"""Tests of pair results: tables, maps, types of other packages."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from flmoe_kernels.explain import PairValues, Sampling, probe_game, probe_pairs
from tests.support.explain_games import first_of, interaction_layer, random_terms, unanimity
from tests.support.explain_results import pair_values
from tests.support.layers import LayerCase
from tests.support.refusals import assert_refused

CASE = LayerCase(lengths=(4, 3))


@pytest.fixture(scope="module")
def sampled() -> PairValues:
    """A sample with a padded token, so that players and positions differ."""
    x = first_of(CASE.inputs(torch.float64), 1)
    masks = [torch.tensor([[True, False, True, True]]), None]
    sampling = Sampling(budget=3000, seed=4, design="toggling")
    [found] = probe_pairs(
        interaction_layer(CASE), x, masks, pairs="across", method="sampling", sampling=sampling
    )
    return found["SII"]


def made_up(values: list[float]) -> PairValues:
    """Three players in modalities of 1 and 4 tokens."""
    return pair_values(
        values=np.array(values),
        standard_errors=np.array([0.5, 0.25, 0.125]),
        pairs=np.array([[0, 1], [0, 2], [1, 2]]),
        tokens=np.array([[0, 0], [1, 0], [1, 3]]),
        lengths=(1, 4),
        **{"method": "exact", "stopped_by": "exact", "candidates": "all pairs", "evaluations": 8},
    )


def test_maps() -> None:
    found = made_up([3.0, -4.0, 1.0])
    matrix = found.matrix()
    np.testing.assert_array_equal(matrix, matrix.T)
    assert np.isnan(np.diag(matrix)).all()
    assert matrix[0].tolist()[1:] == [3.0, -4.0]
    assert found.matrix(errors=True)[2, 1] == 0.125
    across = found.between(0, 1)
    assert across.shape == (1, 4)
    np.testing.assert_array_equal(across, [[3.0, np.nan, np.nan, -4.0]])
    np.testing.assert_array_equal(found.between(1, 0), across.T)
    np.testing.assert_array_equal(found.between(1, 1)[[0, 3], [3, 0]], [1.0, 1.0])
    np.testing.assert_array_equal(found.between(0, 1, errors=True)[0, [0, 3]], [0.5, 0.25])
    for call, message in (
        (lambda: found.between(0, 2), r"n: expected an int from 0 to 1, got 2"),
        (lambda: found.top(0), r"count: expected an int from 1, got 0"),
        (lambda: found.ranked(by="best"), r"by: expected one of largest, smallest, magnitude"),
    ):
        assert_refused(call, message)


def test_ranks_and_rows() -> None:
    found = made_up([3.0, -4.0, 3.0])
    assert found.ranked().tolist() == [0, 2, 1], "ties keep the order of the pairs"
    assert found.ranked(by="smallest").tolist() == [1, 0, 2]
    assert found.ranked(2, by="magnitude").tolist() == [1, 0]
    best = found.top(2, by="magnitude")
    columns = ("modality_i", "token_i", "modality_j", "token_j", "value", "standard_error")
    assert best.rows() == [
        dict(zip(columns, row, strict=True))
        for row in ((0, 0, 1, 3, -4.0, 0.25), (0, 0, 1, 0, 3.0, 0.5))
    ]
    text = found.table(2, by="magnitude").splitlines()
    assert text[0] == "PairValues(SII of 3 pairs (all pairs) of 3 tokens; exact; 8 evaluations)"
    # The third value equals the second.
    assert text[1].startswith(
        "note: the choice of the first 2 pairs is not distinguishable: 1 left out"
    )
    assert text[2].split() == ["i", "j", "SII", "std.", "error"]
    assert text[3].split() == ["0:0", "1:3", "-4", "0.25"]
    assert len(text) == 5


def test_fields_describe_the_method(sampled: PairValues) -> None:
    assert sampled.index == "SII"
    assert not sampled.exact
    assert sampled.tokens.tolist() == [[0, 0], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2]]
    assert sampled.lengths == (4, 3)
    assert len(sampled) == 9
    assert sampled.sampling == {
        "budget": 3000,
        "tolerance": None,
        "min_draws": 64,
        "seed": 4,
        "antithetic": True,
        "design": "toggling",
    }
    assert sampled.game["of"] == "InteractionMoE"
    assert sampled.game["fill"] == "drop"
    assert (sampled.standard_errors > 0).all()
    assert np.isnan(sampled.between(0, 1)[1]).all(), "padding"
    assert not np.isnan(sampled.between(0, 1)[[0, 2, 3]]).any()
    written = json.loads(json.dumps(sampled.to_dict()))
    assert written["values"] == sampled.values.tolist()
    assert written["lengths"] == [4, 3]


def test_conversion_to_shapiq(sampled: PairValues) -> None:
    shapiq = pytest.importorskip("shapiq")
    mine = probe_game(unanimity(random_terms(6, 25, 4, seed=9), 6), method="exact")
    theirs = mine["SII"].to_shapiq()
    assert isinstance(theirs, shapiq.InteractionValues)
    assert (theirs.index, theirs.min_order, theirs.max_order, theirs.n_players) == ("SII", 2, 2, 6)
    assert (theirs.estimated, theirs.estimation_budget) == (False, 64)
    assert theirs.baseline_value == pytest.approx(0.7)
    part = sampled.to_shapiq()
    assert part.estimated
    for (i, j), value in zip(sampled.pairs.tolist(), sampled.values, strict=True):
        assert part[(i, j)] == value
    assert part[(0, 1)] == 0.0, "no candidate"
    assert_refused(lambda: mine["RG"].to_shapiq(), r"to_shapiq: expected an index of SII.* got RG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, r"budget: expected an int from 1, got 0"),
        ({"min_draws": 1}, r"min_draws: expected an int from 2, got 1"),
        ({"seed": -1}, r"seed: expected an int from 0, got -1"),
        ({"tolerance": 0.0}, r"tolerance: expected a positive number"),
    ],
)
def test_settings_of_sampling(options: dict[str, Any], message: str) -> None:
    assert_refused(partial(Sampling, **options), message)
    with pytest.raises(TypeError, match=r"antithetic: expected a bool, got int"):
        Sampling(antithetic=1)  # type: ignore[arg-type]
