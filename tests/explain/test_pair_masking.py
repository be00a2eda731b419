"""Tests of pair_masking: tokens of the top pairs, and the random sets."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels import PairInteractionMoE
from flmoe_kernels.explain.estimators.interactions import shapley_interactions
from flmoe_kernels.explain.masking.faithfulness import pair_masking
from tests.support.explain_games import first_of
from tests.support.explain_masking import TokenBits, bits, masked_logits, set_of
from tests.support.inputs import draw, draw_masks


def test_pairs_fill_a_budget_whole() -> None:
    """Pairs are taken in order; a pair that exceeds the budget is skipped, and later pairs may still fit."""
    pairs = [
        [((0, 1), (1, 0)), ((0, 1), (1, 2)), ((0, 3), (1, 3)), ((0, 2), (1, 2)), ((0, 0), (0, 3))],
        [((1, 3), (0, 0)), ((1, 1), (1, 2))],
        [],
    ]
    masks = [torch.ones(3, 4), torch.tensor([[1, 1, 1, 1]] * 3)]
    call: Any = (TokenBits().eval(), bits(3, (4, 4)), masks)
    options: dict[str, Any] = {"metrics": ["logit"], "target": 0, "budgets": (1, 2, 3, 4, 5, 6)}
    found = pair_masking(*call, pairs, **options)
    sets = [[set_of(x) for x in row] for row in found.values(metric="logit")]
    assert sets[0] == [set(), {1, 4}, {1, 4, 6}, {1, 2, 4, 6}, {1, 3, 4, 6, 7}, {1, 2, 3, 4, 6, 7}]
    assert sets[1] == [set(), {0, 7}, {0, 7}, *[{0, 5, 6, 7}] * 3]
    assert sets[2] == [set()] * 6
    assert found.masked.tolist() == [[len(each) for each in row] for row in sets]
    assert found.unit == "tokens"
    rest = found.identified[1, 0]
    assert set_of(rest[0, 3]) == set(range(8)) - sets[0][3]
    for b, k in itertools.product(range(3), range(6)):
        for drawn in found.random[0, 0, :, b, k]:
            ours = [sum(g < 4 for g in each) for each in (set_of(drawn), sets[b][k])]
            assert ours[0] == ours[1]
            assert len(set_of(drawn)) == len(sets[b][k])
    assert len(found.random[0, 0, :, 0, 3].unique()) > 5
    exempted = pair_masking(*call, pairs, exempt=[1], **options)
    assert set_of(exempted.values(metric="logit")[0, 1]) == {1, 6}
    assert all(4 not in set_of(x) for x in exempted.identified[:, 0].flatten())


def test_pairs_of_an_index() -> None:
    """Exact interactions of a pair layer, in three orders, against direct calls of the layer."""
    torch.manual_seed(0)
    layer = PairInteractionMoE((6, 4), num_classes=3, rank=4, value_dim=5, normalizer=4.0)
    layer = layer.double().eval()
    inputs = [draw(2, 5, 6, dtype=torch.float64), draw(2, 7, 4, dtype=torch.float64, seed=1)]
    masks = draw_masks("partial", 2, (5, 7))
    pairs = shapley_interactions(layer, inputs, masks, target=1, pairs="across")
    options: dict[str, Any] = {"target": 1, "budgets": [2], "fill": "drop", "metrics": ["logit"]}
    drops = {}
    for by in ("largest", "smallest", "magnitude"):
        found = pair_masking(layer, inputs, masks, pairs, by=by, **options)
        assert found.settings["by"] == f"{by} SII"
        for b, each in enumerate(pairs):
            top = each.top(1, by).rows()[0]
            hidden = {(0, top["token_i"]), (1, top["token_j"])}

            def logits_of(x: Any, m: Any) -> Tensor:
                return layer(x, m).logits.detach()

            one, mask = first_of(inputs, b), first_of(masks, b)
            ends = [
                float(masked_logits(logits_of, one, mask, gone, "drop")[1])
                for gone in (set(), hidden)
            ]
            assert float(found.identified[0, 0, b, 0]) == pytest.approx(ends[0] - ends[1])
        drops[by] = found.identified
    assert not torch.allclose(drops["largest"], drops["smallest"])
