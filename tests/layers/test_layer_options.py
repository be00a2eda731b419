"""Tests of the options of InteractionMoE that are published ablations, and of InteractionMoERegression."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from flmoe_kernels import InteractionMoE, InteractionMoERegression, swap
from flmoe_kernels.layers.interaction_moe.reference import ReferenceInteractionMoE
from flmoe_kernels.layers.parts import UnsupportedLayer
from tests.support.inputs import as_dtype, draw, draw_masks, draw_replacements
from tests.support.layers import (
    LayerCase,
    assert_all_within_budget,
    fast_layer,
    outputs_and_gradients,
)

FL = LayerCase((5, 3, 4), dim=12, batch=3, layers=2, masks="padded_modality")
I2 = LayerCase((4, 4), "i2moe", dim=12, batch=3, layers=2)
SPARSE = dataclasses.replace(FL, sparse=True, gate="GShardGate", masks="partial")
OPTIONS: tuple[dict[str, Any], ...] = (
    *({"replacement": "zero"}, {"replacement": "mean"}),
    *(
        {"num_perturbed": 1},
        {"interaction_loss": False},
        {"uniqueness": False},
        {"reweighting": "average"},
    ),
    {"replacement": "zero", "num_perturbed": 2, "uniqueness": False, "reweighting": "average"},
)
CASES = [
    *(dataclasses.replace(FL, options=tuple(x.items())) for x in OPTIONS),
    *(dataclasses.replace(I2, options=tuple(x.items())) for x in (OPTIONS[1], OPTIONS[-1])),
    dataclasses.replace(SPARSE, options=tuple(OPTIONS[2].items())),
]


class ReferenceRegression(ReferenceInteractionMoE):
    regression = True


def results(case: LayerCase, layer: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Outputs and gradients; the modalities with a view are drawn from the same seed."""
    options = dict(case.options)
    rounded = case.inputs(torch.float32)
    inputs = as_dtype(rounded, dtype)
    masks = draw_masks(case.masks, case.batch, case.lengths)
    noise, given = None, {}
    if options.get("replacement", "noise") == "noise":
        noise = as_dtype(draw_replacements(rounded, case.experts), dtype)
    if options.get("replacement") == "mean":
        shapes = [(case.dim,), *((length, case.dim) for length in case.lengths[1:])]
        given["mean_vectors"] = as_dtype([draw(*s, seed=7) for s in shapes], dtype)
    torch.manual_seed(3)
    outputs, grads = outputs_and_gradients(layer.to(dtype), inputs, masks, noise, **given)
    return {**outputs, **grads}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_match_the_reference(case: LayerCase) -> None:
    layer = fast_layer(case)
    found = results(case, layer, torch.float32)
    low, exact = (results(case, case.reference(), d) for d in (torch.float32, torch.float64))
    assert_all_within_budget(found, low, exact, f"of {case}")
    plain = dataclasses.replace(case, options=())
    other = results(plain, plain.reference(), torch.float64)
    same = other.keys() == exact.keys() and all(
        other[name].shape == x.shape and torch.allclose(other[name], x) for name, x in exact.items()
    )
    assert not same, "the option has no effect"


@pytest.mark.parametrize("case", [FL, I2], ids=str)
def test_regression_matches_the_reference(case: LayerCase) -> None:
    reference = case.reference()
    reference.__class__ = ReferenceRegression
    layer = InteractionMoERegression.adopt(reference, backend="cpu")
    double = case.reference()
    double.__class__ = ReferenceRegression
    found = results(case, layer, torch.float32)
    assert_all_within_budget(
        found, results(case, reference, torch.float32), results(case, double, torch.float64), "r"
    )
    plain = results(case, case.reference(), torch.float64)
    assert not torch.allclose(plain["losses"], found["losses"].double(), rtol=0.1)


def test_views_that_are_not_perturbed_cost_nothing_and_have_latent_0() -> None:
    case = dataclasses.replace(FL, masks="none", options=(("num_perturbed", 1),))
    layer = fast_layer(case)
    outputs = layer(case.inputs())[0]
    zero = [[bool((latent == 0).all()) for _, latent in views] for views in outputs]
    assert all(row == zero[0] for row in zero)
    assert sorted(zero[0]) == [False, False, True, True]
    blank = outputs[0][1 + zero[0][1:].index(True)][0]
    head = layer.interaction_experts[0].fusion_model.network[-1].fc
    torch.testing.assert_close(blank, head.bias.expand_as(blank))


def test_options_of_a_reference_layer_are_kept_by_adopt() -> None:
    case = dataclasses.replace(FL, options=tuple(OPTIONS[-1].items()))
    layer = InteractionMoE.adopt(case.reference())
    assert layer.replacement == "zero"
    assert layer.num_perturbed == 2
    assert len(layer.interaction_experts) == 2
    assert layer.reweight.weights.shape == (2,)
    assert "replacement='zero', num_perturbed=2, uniqueness=False" in repr(layer)


def test_published_variants_are_named_not_replaced() -> None:
    reference = I2.reference()
    reference.__class__ = type("ZeroVectorInteractionMoE", (ReferenceInteractionMoE,), {})
    with pytest.raises(UnsupportedLayer, match='replacement="zero"'):
        InteractionMoE.adopt(reference)
    model = nn.ModuleDict({"ablation": nn.Module()})
    model["ablation"].__class__ = type("LatentContrastiveInteractionMoE", (nn.Module,), {})
    [entry] = swap(model).left
    assert (entry.name, entry.class_name) == ("ablation", "LatentContrastiveInteractionMoE")
    assert "no counterpart" in entry.reason
    reference.__class__ = ReferenceRegression
    with pytest.raises(UnsupportedLayer, match=r"use InteractionMoERegression\.adopt"):
        InteractionMoE.adopt(reference)


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"replacement": "median"}, None, "replacement: expected one of noise, zero, mean"),
        ({"reweighting": "sum"}, None, "reweighting: expected one of mlp, average"),
        ({"num_perturbed": 4}, None, "num_perturbed: expected an int from 1 to 3, got 4"),
        ({"modality_dropout": 1.5}, None, "modality_dropout: expected a probability"),
        ({"uniqueness": "no"}, None, "uniqueness: expected a bool, got 'no'"),
        ({"replacement": "mean"}, {}, "mean_vectors: expected tensors"),
        ({}, {"mean_vectors": [torch.zeros(12)] * 3}, "mean_vectors: expected None"),
        (
            {"replacement": "mean"},
            {"mean_vectors": [torch.zeros(12), torch.zeros(2, 12), torch.zeros(12)]},
            r"mean_vectors\[1\]: expected \(12,\) or \(3, 12\), got \(2, 12\)",
        ),
        (
            {"replacement": "zero"},
            {"replacements": draw_replacements(FL.inputs(), 5)},
            "replacements: expected None",
        ),
    ],
)
def test_errors_name_the_argument(
    options: dict[str, Any], given: dict[str, Any] | None, message: str
) -> None:
    fusion = FL.reference().interaction_experts[0].fusion_model
    with pytest.raises((TypeError, ValueError), match=message):
        InteractionMoE(3, fusion, hidden_dim=12, **options)(FL.inputs(), **(given or {}))


def test_options_changed_later_are_checked() -> None:
    for name, value, message in (
        ("modality_dropout", float("nan"), "modality_dropout: expected a probability"),
        ("replacement", "banana", "replacement: expected one of"),
        ("uniqueness", False, "expected 2 experts"),
    ):
        layer = fast_layer(FL)
        setattr(layer, name, value)
        for call in (layer, layer.inference):
            with pytest.raises(ValueError, match=message):
                call(FL.inputs())
