"""Every tensor that a layer returns owns its memory and can be changed in place before the backward pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from flmoe_kernels import PairInteractionMoE
from tests.support.inputs import draw
from tests.support.layers import FL, I2, SPARSE_FL, SPARSE_I2, LayerCase, data, fast_layer
from tests.support.routed_layers import D, every_gate, make


def tensors_of(result: Any) -> list[Tensor]:
    """All tensors of a result, each once; the published layer returns some latents twice."""
    unique = {id(x): x for x in pytree.tree_leaves(result) if x is not None}
    return list(unique.values())


def assert_independent(layer: nn.Module, call: Any) -> None:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    first = tensors_of(call())
    for x in first:
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
    storages = {x.untyped_storage().data_ptr() for x in first}
    assert len(storages) == len(first)
    differentiable = [x for x in first if x.requires_grad]
    expected = torch.autograd.grad(
        sum(x.sum() for x in differentiable), parameters, allow_unused=True
    )
    changed = tensors_of(call())
    for x in changed:
        x += 1
    actual = torch.autograd.grad(
        sum(x.sum() for x in changed if x.requires_grad), parameters, allow_unused=True
    )
    torch.testing.assert_close(actual, expected)


CASES = [FL, I2, *(dataclasses.replace(case, gate="NaiveGate") for case in (SPARSE_FL, SPARSE_I2))]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_interaction_moe(case: LayerCase, training: bool) -> None:
    layer = fast_layer(case).train(training)
    x, masks, noise = data(case)
    assert_independent(layer, lambda: layer(x, masks, replacements=noise))
    assert_independent(layer, lambda: layer.inference(x, masks))


def test_the_sum_of_the_losses_in_place() -> None:
    """As training scripts do it: the first loss collects the others."""
    layer = fast_layer(FL)
    x, masks, noise = data(FL)
    total, *rest = layer(x, masks, replacements=noise)[3]
    for loss in rest:
        total += loss
    total.backward()
    want = torch.stack(layer(x, masks, replacements=noise)[3]).sum()
    torch.testing.assert_close(total, want)


@pytest.mark.parametrize("token_outputs", [False, True])
@pytest.mark.parametrize("losses", [False, True])
def test_pair_interaction_moe(token_outputs: bool, losses: bool) -> None:
    torch.manual_seed(0)
    layer = PairInteractionMoE((6, 4), num_classes=3, token_outputs=token_outputs)
    x = [draw(2, 5, 6), draw(2, 3, 4)]
    noise = [draw(2, 5, 6, seed=1), draw(2, 3, 4, seed=1)] if losses else None
    assert_independent(layer, lambda: layer(x, interaction_losses=losses, replacements=noise))


@every_gate
def test_routed_mlp(gate: str) -> None:
    mlp, x = make(gate).eval(), draw(6, D)
    assert_independent(mlp, lambda: (mlp(x), mlp.gate_loss()))
