"""Tests of the layer with routed MLPs: gate losses, drops, random draws."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flmoe_kernels import FusionTransformer
from flmoe_kernels.core.error_budget import assert_outside_budget
from flmoe_kernels.layers.routed_mlp.module import RoutedMLP
from tests.support.inputs import as_dtype, gradients
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


def test_drops_change_the_results() -> None:
    """Negative control of the cases with a capacity: capacity and padding change the results."""
    case = dataclasses.replace(SPARSE_FL, capacity=0.4, masks="partial")
    free, free64 = (
        dataclasses.replace(case, capacity=None).reference(dtype)
        for dtype in (torch.float32, torch.float64)
    )
    x, masks, noise = data(case)
    x64, noise64 = as_dtype(x, torch.float64), as_dtype(noise, torch.float64)
    low = named_outputs(free, free(x, masks, replacements=noise))
    oracle = named_outputs(free64, free64(x64, masks, replacements=noise64))
    found = fast_layer(case)(x, masks, replacements=noise)
    other = fast_layer(dataclasses.replace(case, capacity=None))
    unmasked = named_outputs(other, other(x, None, replacements=noise))
    for name in ("expert_latents", "gate_losses"):
        limited = named_outputs(other, found)[name]
        assert_outside_budget(limited, low[name], oracle[name], name)
        assert_outside_budget(unmasked[name], low[name], oracle[name], name)


@pytest.mark.parametrize("gate", ["GShardGate", *RANDOM_GATES])
@pytest.mark.parametrize("fast", [True, False])
def test_every_modality_contributes_to_the_gate_losses(gate: str, fast: bool) -> None:
    """Without any one modality, the loss and its gradient at the gates' weights change."""
    case = dataclasses.replace(SPARSE_FL, gate=gate, masks="all_valid")
    layer = (fast_layer(case) if fast else case.reference()).eval()
    x, full, noise = data(case)
    weight = [next(gate.parameters()) for gate in gates_of(layer)]

    def losses(masks: Any) -> tuple[Tensor, list[Tensor]]:
        found = named_outputs(layer, layer(x, masks, replacements=noise))["gate_losses"]
        return found.detach(), gradients([found], weight)

    whole, whole_grads = losses(full)
    assert (whole > 0).all()
    assert all(grad.abs().max() > 1e-4 for grad in whole_grads)
    for m in range(len(case.lengths)):
        without = [torch.zeros_like(mask) if n == m else mask for n, mask in enumerate(full)]
        part, part_grads = losses(without)
        assert ((part - whole).abs() > 1e-3).all()
        for grad, without_it in zip(whole_grads, part_grads, strict=True):
            assert (grad - without_it).abs().max() > 1e-4
            assert without_it.abs().max() > 1e-4


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
            losses = named_outputs(layer, found)["gate_losses"].detach()
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
            return named_outputs(layer, layer(x, masks, replacements=noise))["gate_losses"]

    first = losses(layers[0], 1)
    assert torch.equal(first, losses(layers[0], 1))
    assert not torch.equal(first, losses(layers[0], 2))
    drawn = [torch.stack([losses(layer, seed) for seed in range(40)]) for layer in layers]
    means, spreads = ([f(d, 0) for d in drawn] for f in (torch.mean, torch.std))
    deviation = ((spreads[0].square() + spreads[1].square()) / 40).sqrt()
    assert ((means[0] - means[1]).abs() <= 5 * deviation + 1e-6).all()
    assert (spreads[0] > 0).any()


@BOTH
def test_gates_keep_no_losses_that_are_not_returned(case: LayerCase) -> None:
    case = dataclasses.replace(case, sparse=False)
    for layer in (fast_layer(case), case.reference()):
        x, masks, noise = data(case)
        assert len(layer(x, masks, replacements=noise)) == 4 + (case.compat == "fl_i2moe")
        layer.inference(x, masks)
        assert all(gate.get_loss() is None for gate in gates_of(layer))


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
