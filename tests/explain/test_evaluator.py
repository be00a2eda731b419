"""Tests of the evaluation of games: packed coalitions, batches, memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from flmoe_kernels.explain import (
    Run,
    TokenGame,
    attribute,
    faithfulness,
    probe_game,
    shapley_interactions,
)
from flmoe_kernels.explain.estimators.evaluator import Evaluator
from flmoe_kernels.explain.games.coalitions import pack
from tests.support.explain_games import (
    Planted,
    interaction_layer,
    random_terms,
    unanimity,
)
from tests.support.inputs import draw
from tests.support.layers import LayerCase
from tests.support.refusals import assert_refused

CASE = LayerCase(lengths=(5, 4))


def test_a_game_with_invalid_values() -> None:
    for answer, message in (
        (lambda inside: inside.astype(float), r"game: expected values \(1,\) .* got \(1, 3\)"),
        (
            lambda inside: np.where(inside.all(axis=1), np.nan, 1.0),
            r"game: expected finite values, got nan for a coalition of 3 of 3 tokens",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluator(Planted(3, answer), 1)(pack(np.ones((2, 3), dtype=np.bool_)))
    # The published layer returns NaN if no token is left.
    layer, x = interaction_layer(CASE, backend="reference"), CASE.inputs(torch.float64)
    assert_refused(lambda: shapley_interactions(layer, x), r"nan for a coalition of 0 of 9 tokens")
    assert len(shapley_interactions(layer, x, fill="zero")) == 2


@pytest.mark.parametrize("gate", ["SwitchGate", "GShardGate"])
def test_samples_are_evaluated_alone_if_gates_may_drop_tokens(gate: str) -> None:
    top_k = 1 if gate == "SwitchGate" else 2
    case = LayerCase(lengths=(3, 2), gate=gate, capacity=0.6, top_k=top_k)
    layer, x = interaction_layer(case), case.inputs(torch.float64)
    with torch.no_grad():
        together, alone = (
            torch.cat([layer.inference([m[rows] for m in x])[2] for rows in split])
            for split in ([slice(2)], [slice(1), slice(1, 2)])
        )
    assert not torch.allclose(together, alone), "logits that depend on the batch"
    options: dict[str, Any] = {"target": 0, "fill": "zero"}
    for played in shapley_interactions(layer, x, run=Run(max_batch=7), **options):
        assert played.value == pytest.approx(float(alone[played.sample, 0]), abs=1e-12)
        assert played.batch_size == 1
    options |= {"budgets": [50], "metrics": ["logit"], "n_random": 0, "max_batch": 7}
    drops = faithfulness(layer, x, None, [draw(2, length) for length in case.lengths], **options)
    torch.testing.assert_close(drops.original[0], alone[:, 0])
    integrated = attribute(
        layer, x, method="integrated_gradients", target=0, n_steps=2, max_batch=7
    )
    torch.testing.assert_close(integrated.scores.sum(dim=1), alone[:, 0])
    assert TokenGame(layer, x).batch_size == 1
    without_limit = interaction_layer(dataclasses.replace(case, capacity=4.0 / top_k))
    assert TokenGame(without_limit, x, max_batch=7).batch_size == 7


def test_a_game_gets_batches_of_its_batch_size() -> None:
    game: Any = unanimity(random_terms(7, 20, 3, seed=1), 7)
    game.batch_size = 10
    found = probe_game(game, run=Run(max_batch=50))["SII"]
    assert max(game.batches) == found.batch_size == 10
    assert probe_game(game, run=Run(max_batch=3))["SII"].batch_size == 3
    for wrong, kind in ((0, ValueError), (2.5, TypeError)):
        game.batch_size = wrong
        with pytest.raises(kind, match=r"game\.batch_size: expected an int"):
            probe_game(game)
