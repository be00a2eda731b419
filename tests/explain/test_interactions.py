"""Tests of pair indices: manual coalitions, the closed form, callables, pruning."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flmoe_kernels.explain import (
    PairValues,
    probe_pairs,
    shapley_interactions,
)
from tests.support.explain_games import as_array, by_definition, first_of, interaction_layer
from tests.support.explain_masking import masked_logits
from tests.support.inputs import draw_masks
from tests.support.layers import LayerCase
from tests.support.pair_layers import DIMS, pair_inputs, pair_layer

BOTH = ("SII", "RG")


@pytest.mark.parametrize("fill", ["drop", "zero", "mean", "mean by position"])
@pytest.mark.parametrize("expert", [None, "synergy", 0])
def test_interaction_moe(fill: str, expert: str | int | None) -> None:
    """Enumeration of a layer's sample against manual coalitions on the reference layer."""
    case = LayerCase(lengths=(3, 4), masks="partial")
    layer, oracle = interaction_layer(case), case.reference(torch.float64).eval()
    x, masks = case.inputs(torch.float64), draw_masks("partial", 2, case.lengths)
    means = [each.mean(dim=0 if fill == "mean by position" else (0, 1)) for each in x]
    found = probe_pairs(
        layer,
        x,
        masks,
        target=2,
        expert=expert,
        fill=fill.split()[0],
        baseline=means if fill.startswith("mean") else None,
    )
    place = {None: None, "synergy": 2, 0: 0}[expert]
    for sample in range(2):
        own, own_masks = first_of(x, sample), first_of(masks, sample)
        tokens = [(m, i) for m in range(2) for i in range(case.lengths[m]) if own_masks[m][0, i]]
        result = found[sample]["SII"]
        assert result.tokens.tolist() == [list(token) for token in tokens]

        def logits_of(given: Any, valid: Any) -> torch.Tensor:
            # The published layer is not defined without tokens; its expert's latent is 0 in this case.
            chosen = oracle if any(mask.any() for mask in valid) else layer
            experts, _, mixed = chosen.inference(given, valid)
            return (mixed if place is None else experts[place]).detach()

        values = np.empty(2 ** len(tokens))
        for code in range(len(values)):
            absent = {token for k, token in enumerate(tokens) if not code >> k & 1}
            how = means if fill.startswith("mean") else fill
            values[code] = masked_logits(logits_of, own, own_masks, absent, how)[2]
        assert result.value == pytest.approx(values[-1], abs=1e-10)
        assert result.baseline == pytest.approx(values[0], abs=1e-10)
        for index in BOTH:
            truth = as_array(by_definition(values, len(tokens), index), result.pairs)
            np.testing.assert_allclose(found[sample][index].values, truth, atol=1e-10)
            assert float(np.abs(truth).max()) > 1e-3
        assert result.method == "exact"


def test_pair_layers_are_routed_to_the_closed_form() -> None:
    lengths = (3, 2, 2)
    layer, x = pair_layer(DIMS), pair_inputs(lengths)
    masks = draw_masks("partial", 2, lengths)
    for expert in (None, "synergy", 1):
        closed = shapley_interactions(layer, x, masks, expert=expert)
        assert all(each.method == "closed_form" and each.evaluations == 1 for each in closed)
        options: dict[str, Any] = {"expert": expert, "method": "exact"}
        exact = shapley_interactions(layer, x, masks, **options)
        found = layer.explain(x, masks)
        for sample, (one, other) in enumerate(zip(closed, exact, strict=True)):
            np.testing.assert_allclose(one.values, other.values, atol=1e-12)
            assert (one.value, one.baseline) == pytest.approx((other.value, other.baseline))
            assert one.game["target"] == int(found.target[sample])
            maps = found.pair_map(0, 2)[sample]
            place = None if expert is None else [*found.experts].index("synergy")
            place = expert if isinstance(expert, int) else place
            mine = maps.sum(dim=0) if place is None else maps[place]
            valid = ~np.isnan(one.between(0, 2))
            np.testing.assert_allclose(one.between(0, 2)[valid], mine.numpy()[valid], atol=1e-14)
            assert valid.any()
            assert float(np.abs(one.values).max()) > 1e-3
    # Other value functions have no closed form.
    assert shapley_interactions(layer, x, fill="zero")[0].method == "exact"
    assert shapley_interactions(layer, x, output="log_prob")[0].method == "exact"
    with pytest.raises(ValueError, match=r"method: .*has a closed form, got 'closed_form'"):
        shapley_interactions(layer, x, fill="zero", method="closed_form")
    both = probe_pairs(layer, x)[0]
    assert (both["SII"].method, both["RG"].method) == ("closed_form", "exact")


def test_pruning_keeps_the_index_and_says_so() -> None:
    case = LayerCase(lengths=(4, 5))
    layer, x = interaction_layer(case), case.inputs(torch.float64)
    scores = [torch.tensor([[0.1, -3.0, 2.0, 0.0]] * 2), torch.tensor([[1.0, 0, 5, 5, 0.5]] * 2)]
    pruned = shapley_interactions(layer, x, scores=scores, top=2, pairs="across")
    every = shapley_interactions(layer, x)
    for one, other in zip(pruned, every, strict=True):
        assert [[*map(tuple, one.tokens[pair].tolist())] for pair in one.pairs] == [
            [(0, 1), (1, 2)],
            [(0, 1), (1, 3)],
            [(0, 2), (1, 2)],
            [(0, 2), (1, 3)],
        ]
        kept = ~np.isnan(one.between())
        np.testing.assert_allclose(one.between()[kept], other.between()[kept], atol=1e-13)
        assert one.candidates == (
            "pairs across modalities of the 2 tokens of largest |score| in each modality"
        )
        assert other.candidates == "all pairs"
    assert {type(each) for each in pruned} == {PairValues}


def test_too_few_tokens() -> None:
    case = LayerCase(lengths=(3, 2))
    layer, x = interaction_layer(case), case.inputs(torch.float64)
    masks = [torch.tensor([[True, False, False], [False] * 3]), torch.zeros(2, 2, dtype=torch.bool)]
    for method in ("exact", "sampling"):
        one, none = probe_pairs(layer, x, masks, target=0, method=method)
        assert len(one["SII"]) == len(none["RG"]) == 0
        assert (one["RG"].players, none["RG"].players) == (1, 0)
        assert none["SII"].value == none["SII"].baseline == one["SII"].baseline
        assert one["SII"].value != one["SII"].baseline
