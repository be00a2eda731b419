"""Tests of the layer with routed MLPs: gate losses, random draws."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import FusionTransformer
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from tests.support.layers import (
    RANDOM_GATES,
    SPARSE_FL,
    SPARSE_I2,
    LayerCase,
    data,
    fast_layer,
    gates_of,
    named_outputs,
)

BOTH = pytest.mark.parametrize("case", [SPARSE_FL, SPARSE_I2], ids=["fl_i2moe", "i2moe"])


@pytest.mark.parametrize("mode", [True, False])
@BOTH
def test_gate_losses_are_sums_over_layers_and_modalities(case: LayerCase, mode: bool) -> None:
    """The sum is over separate calls of the gates, with and without masks, with and without gradients."""
    case = dataclasses.replace(case, masks="none" if case is SPARSE_I2 else "partial")
    reference, calls = case.reference().train(mode), []
    for e, expert in enumerate(reference.interaction_experts):
        for part in expert.modules():
            if isinstance(part, RoutedMLP):
                part.register_forward_pre_hook(lambda mlp, args, e=e: calls.append((e, mlp, args)))
    x, masks, noise = data(case)
    result = reference(x, masks, replacements=noise)
    views, per_view = len(x) + 1, len(x) * ((case.layers + 1) // 2)
    assert len(calls) == case.experts * views * per_view
    expected = torch.zeros(case.experts, views)
    for number, (e, mlp, (tokens, *mask)) in enumerate(calls):
        flat = tokens.detach().flatten(0, 1)
        valid = mask[0].flatten() if mask and mask[0] is not None else None
        loss = mlp.gate.route(flat, valid, len(flat))[2]
        expected[e, number // per_view % views] += loss.detach()
    assert (expected > 0.9 * per_view).all()
    layer = fast_layer(case).train(mode)
    with torch.no_grad():
        for found in (
            result,
            layer(x, masks, replacements=noise),
            case.reference().train(mode)(x, masks, replacements=noise),
        ):
            losses = named_outputs(found)["gate_losses"].detach()
            torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("gate", RANDOM_GATES)
def test_random_draws_in_training(gate: str) -> None:
    """Draws follow torch's generator; means agree with the reference's within five standard deviations."""
    case = dataclasses.replace(SPARSE_FL, gate=gate, layers=1, batch=2, mlp_experts=3)
    x, masks, noise = data(case)
    layers = [fast_layer(case).train(), case.reference().train()]

    def losses(layer: nn.Module, seed: int) -> Tensor:
        torch.manual_seed(seed)
        with torch.no_grad():
            return named_outputs(layer(x, masks, replacements=noise))["gate_losses"]

    first = losses(layers[0], 1)
    assert torch.equal(first, losses(layers[0], 1))
    assert not torch.equal(first, losses(layers[0], 2))
    drawn = [torch.stack([losses(layer, seed) for seed in range(16)]) for layer in layers]
    means, spreads = ([f(d, 0) for d in drawn] for f in (torch.mean, torch.std))
    deviation = ((spreads[0].square() + spreads[1].square()) / 16).sqrt()
    assert ((means[0] - means[1]).abs() <= 5 * deviation + 1e-6).all()
    assert (spreads[0] > 0).any()


def test_fusion_alone() -> None:
    fusion = FusionTransformer(
        2, 16, 3, 4, mlp_sparse=True, num_experts=3, top_k=2, gate="SwitchGate", num_routers=2
    )
    assert [isinstance(layer.mlp, RoutedMLP) for layer in fusion.network[:-1]] == [
        True,
        False,
        True,
        False,
    ]
    assert {gate.top_k for gate in gates_of(fusion)} == {1}
    fusion(SPARSE_FL.inputs())
    loss = fusion.gate_loss()
    loss.backward()
    assert loss > 0
    assert fusion.gate_loss() == 0
    assert FusionTransformer(2, 16, 3).gate_loss() == 0
    with pytest.raises(ValueError, match="num_experts: mlp_sparse=True expected at least 1"):
        FusionTransformer(2, 16, 3, mlp_sparse=True)
    with pytest.raises(ValueError, match="gate: expected one of"):
        FusionTransformer(2, 16, 3, mlp_sparse=True, num_experts=2, gate="TopGate")
