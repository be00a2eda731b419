"""Tests of integrated gradients: loops, known attributions, the completeness axiom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels import PairInteractionMoE
from flmoe_kernels.explain.attribution.attribute import attribute
from flmoe_kernels.explain.attribution.integrated import quadrature
from tests.support.explain_games import first_of
from tests.support.explain_layers import CASES, Weighted, call_of
from tests.support.inputs import draw, draw_masks
from tests.support.layers import LayerCase


@pytest.mark.parametrize("rule", ["midpoint", "gauss_legendre"])
@pytest.mark.parametrize("steps", [1, 4])
def test_integrated_gradients_of_a_linear_model_are_exact(rule: str, steps: int) -> None:
    model = Weighted((5, 3), 4, 3).eval()
    inputs = [draw(6, length, 4, dtype=torch.float64, seed=m) for m, length in enumerate((5, 3))]
    masks = draw_masks("mixed", 6, (5, 3))
    starts = [draw(4, dtype=torch.float64, seed=5), draw(3, 4, dtype=torch.float64, seed=6)]
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    options: dict[str, Any] = {"method": "integrated_gradients", "rule": rule, "n_steps": steps}
    found = attribute(model, inputs, masks, target=target, baseline=starts, max_batch=4, **options)
    assert found.experts == ("model",)
    assert float(found.completeness_error.abs().max()) < 1e-12  # type: ignore[union-attr]
    for m, values in enumerate(found.values):
        weight = model.weights[m][:, :, target].permute(2, 0, 1)
        expected = (weight * (inputs[m] - starts[m])).sum(dim=2).masked_fill(~found.valid[m], 0)
        torch.testing.assert_close(values[:, 0], expected)
    sizes = attribute(model, inputs, masks, target=target, magnitude=True, **options)
    expected = (model.weights[0][:, :, target].permute(2, 0, 1) * inputs[0]).abs().mean(dim=2)
    torch.testing.assert_close(sizes.values[0][:, 0], expected)


def test_the_nodes_of_half_precision_inputs_are_not_rounded() -> None:
    """The rule integrates a cubic exactly; control: nodes rounded to bfloat16 do not."""
    inputs = [(draw(1, 64, 64).abs() + 0.5).to(torch.bfloat16)]

    def cubes(x: Any, masks: Any) -> Tensor:
        return x[0].float().pow(3).flatten(1).sum(dim=1, keepdim=True)

    found = attribute(cubes, inputs, method="integrated_gradients", n_steps=8)
    nodes, weights = quadrature("gauss_legendre", 8)
    rounded = float(weights @ (3 * nodes.to(torch.bfloat16).double().square())) - 1
    assert abs(rounded) > 1e-3
    assert abs(float(found.completeness_error / found.scores)) < 0.2 * abs(rounded)


def looped_gradients(score: Any, inputs: list[Tensor], rule: str, steps: int) -> list[Tensor]:
    """Definition with baseline zero, one sample and step at a time: M x (B, L_m)."""
    found = [torch.zeros(x.shape[:2], dtype=torch.float64) for x in inputs]
    for t, w in zip(*(x.tolist() for x in quadrature(rule, steps)), strict=True):
        for b in range(len(inputs[0])):
            points = [(t * x[b : b + 1]).requires_grad_() for x in inputs]
            for m, grad in enumerate(torch.autograd.grad(score(points, b), points)):
                found[m][b] += w * (grad * inputs[m][b : b + 1]).sum(dim=2)[0]
    return found


def test_the_published_rule() -> None:
    """Steps s / n for s = 1 to n from zero, the mean of magnitudes over features; control: the midpoints."""
    case, steps = CASES[0], 4
    layer, inputs, masks = call_of(case, torch.float64)
    reference = case.reference(torch.float64).eval()
    target = reference.inference(inputs, masks)[2].argmax(dim=1)
    sums = [torch.zeros_like(x) for x in inputs]
    for s in range(1, steps + 1):
        points = [(s / steps * x).requires_grad_() for x in inputs]
        logits = reference.inference(points, masks)[2]
        score = logits.gather(1, target[:, None]).sum()
        for total, gradient in zip(sums, torch.autograd.grad(score, points), strict=True):
            total += gradient
    options: dict[str, Any] = {"method": "integrated_gradients", "magnitude": True}
    found, other = (
        attribute(layer, inputs, masks, rule=rule, n_steps=steps, **options)
        for rule in ("right", "midpoint")
    )
    for m, ok in enumerate(found.valid):
        expected = (inputs[m] * sums[m] / steps).abs().mean(dim=2).masked_fill(~ok, 0)
        torch.testing.assert_close(found.of()[m], expected, rtol=1e-10, atol=1e-14)
        assert not torch.allclose(other.of()[m], expected, rtol=1e-3)


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
def test_integrated_gradients_of_the_layer(case: LayerCase) -> None:
    layer, inputs, masks = call_of(case, torch.float64)
    reference = case.reference(torch.float64).eval()
    target = torch.arange(case.batch) % case.classes

    options: dict[str, Any] = {"method": "integrated_gradients", "target": target, "n_steps": 3}
    own = attribute(layer, inputs, masks, explains="expert", max_batch=5, **options)
    again = attribute(layer, inputs, masks, explains="expert", max_batch=2, **options)
    torch.testing.assert_close(own.values, again.values)
    for e in range(case.experts):
        expected = looped_gradients(
            lambda x, b, e=e: reference.interaction_experts[e].fusion_model(x, first_of(masks, b))[
                0, target[b]
            ],
            *(inputs, "gauss_legendre", 3),
        )
        torch.testing.assert_close(own.of(e), expected)
    expected = looped_gradients(
        lambda x, b: reference.inference(x, first_of(masks, b))[2][0, target[b]],
        *(inputs, "midpoint", 3),
    )
    whole = attribute(layer, inputs, masks, rule="midpoint", **options)
    torch.testing.assert_close(whole.of(), expected)
    assert not torch.allclose(own.of()[0], expected[0], rtol=1e-3)


def test_completeness_is_reached_and_reported() -> None:
    case = CASES[0]
    layer, inputs, masks = call_of(case, torch.float64)
    zeros = [torch.zeros_like(x) for x in inputs]
    experts = case.reference(torch.float64).eval().interaction_experts
    at_zero = torch.stack([expert(zeros, masks)[0][:, 1] for expert in experts], dim=1).detach()
    options: dict[str, Any] = {"method": "integrated_gradients", "explains": "expert", "target": 1}
    errors = {}
    for rule, steps in (("midpoint", 4), ("midpoint", 16), ("gauss_legendre", 64)):
        found = attribute(layer, inputs, masks, rule=rule, n_steps=steps, **options)
        sums = torch.stack([x.sum(dim=2) for x in found.values]).sum(dim=0)
        torch.testing.assert_close(
            found.completeness_error, found.scores - at_zero - sums, rtol=0, atol=1e-12
        )
        errors[rule, steps] = float(found.completeness_error.abs().max())
    assert errors["gauss_legendre", 64] < 1e-7
    assert 8 < errors["midpoint", 4] / errors["midpoint", 16] < 32, "second order"


def test_integrated_gradients_of_a_pair_layer() -> None:
    """Per expert, and with a missing modality; the experts' parts sum to the logit."""
    torch.manual_seed(3)
    layer = PairInteractionMoE((6, 4), num_classes=3, rank=4, value_dim=5, normalizer=8.0)
    layer = layer.double().eval()
    inputs = [draw(2, 5, 6, dtype=torch.float64), draw(2, 7, 4, dtype=torch.float64)]
    masks = draw_masks("partial", 2, (5, 7))
    options: dict[str, Any] = {"method": "integrated_gradients", "n_steps": 64, "target": 1}
    means = [draw(6, dtype=torch.float64, seed=3), draw(4, dtype=torch.float64, seed=4)]
    found = attribute(layer, inputs, masks, baseline=means, **options)
    assert found.experts == layer.experts
    assert float(found.completeness_error.abs().max()) < 1e-3  # type: ignore[union-attr]
    assert float(found.scores.abs().max()) > 0.05
    ends = [
        layer(x, masks).logits[:, 1]
        for x in (inputs, [m.expand_as(x) for m, x in zip(means, inputs, strict=True)])
    ]
    total = torch.stack([x.sum(dim=1) for x in found.of()]).sum(dim=0)
    torch.testing.assert_close(total, (ends[0] - ends[1]).detach(), rtol=0, atol=1e-3)
    alone = attribute(layer, [inputs[0], None], [masks[0], None], **options)  # type: ignore[index]
    assert alone.values[1].shape == (2, 4, 0)
    assert alone.values[0].any()
