"""Tests of plans: repeated calls, whose launches were recorded, have the same results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels.core.triton import plans
from flmoe_kernels.ops.interaction_losses.api import interaction_losses
from flmoe_kernels.ops.pair_moe.api import pair_moe
from flmoe_kernels.ops.reweighting import api as reweighting
from tests.support.encoder_cases import layers_arguments
from tests.support.inputs import draw
from tests.support.operator_cases import OPS

TRITON = "triton"


def encoder(form: str, **changes: Any) -> tuple[list[Tensor], Callable[..., Tensor]]:
    call = layers_arguments(form, **changes)

    def latents(rows: Tensor, *weights: Tensor) -> Tensor:
        return OPS.encoder_layers(rows, *call[1:6], list(weights), *call[7:], TRITON)[0]

    return [call[0], *call[6]], latents


def pairs(reduce: str) -> tuple[list[Tensor], Callable[..., Tensor]]:
    mask, kinds = torch.arange(36).view(2, 18) % 5 != 0, ["unique_a", "synergy", "redundancy"]
    inputs = [
        draw(2, 3, n, w, seed=i) for i, (n, w) in enumerate([(18, 4), (7, 4), (18, 5), (7, 5)])
    ]

    def y_and_mass(q: Tensor, k: Tensor, a: Tensor, c: Tensor, bias: Tensor) -> Tensor:
        options: Any = {"mask_a": mask, "reduce": reduce, "backend": TRITON, "gate_bias": bias}
        y, mass = pair_moe(q, k, a, c, kinds=kinds, **options)
        return y.sum() + mass.square().sum()

    return [*inputs, draw(3, seed=5)], y_and_mass


def mixture() -> tuple[list[Tensor], Callable[..., Tensor]]:
    def losses(tokens: Tensor, latents: Tensor, scores: Tensor) -> Tensor:
        features = reweighting.reweighting_features(
            [tokens[:, :3], tokens[:, 3:]], None, [True, False], tokens, None, TRITON
        )
        weights, mixed = reweighting.mix_experts(scores, latents[:, 0], 0.5, TRITON)
        several = (features, weights, mixed, interaction_losses(latents, TRITON))
        return torch.stack([x.square().sum() for x in several])

    return [draw(2, 5, 6), draw(4, 3, 2, 6, seed=1), draw(2, 4, seed=2)], losses


CASES = {
    "one view": (lambda: encoder("one view"), 2),
    "views, padded": (
        lambda: encoder("views", count=torch.tensor([5], dtype=torch.int32), self_residual=True),
        2,
    ),
    "pair_moe": (lambda: pairs("none"), 2),
    "pair_moe, pooled": (lambda: pairs("pool"), 2),
    "mixture and losses": (mixture, 6),
}


def results_of(case: str, scale: float, *frozen: int) -> list[Tensor]:
    inputs, function = CASES[case][0]()
    leaves = [(scale * x).requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
    out = function(*leaves)
    wanted = [x for x in leaves if x.requires_grad]
    return [out, *torch.autograd.grad(out.square().sum(), wanted)]


@pytest.mark.parametrize("case", CASES)
def test_repeated_calls(case: str) -> None:
    """The first two calls launch as usual."""
    direct = [results_of(case, scale) for scale in (1.0, 0.5)]
    made: list[Any] = list(plans._plans.values())
    assert len(made) == CASES[case][1]
    assert all(type(plan) is plans.Plan for plan in made)
    assert all(map(torch.equal, results_of(case, 1.0), direct[0]))
    if case == "one view":  # control: all tensors between the launches in one place
        for places, scratch in [(plan._places, plan._scratch) for plan in made]:
            between = [key for key, place in places.items() if place[0] == scratch]
            places.update(dict.fromkeys(between, (scratch, 0)))
        assert not all(map(torch.equal, results_of(case, 1.0), direct[0]))


def test_other_gradients_have_their_own_plans() -> None:
    everything = results_of("one view", 1.0)
    for _ in range(3):
        some = results_of("one view", 1.0, 0, 5)
        assert all(map(torch.equal, some, [x for i, x in enumerate(everything) if i not in (1, 6)]))


def test_inputs_that_are_copied_are_not_recorded() -> None:
    q, k, a, c = (draw(1, 2, 4, 3, seed=i).transpose(2, 3) for i in range(4))
    call: Any = {"kinds": ["unique_a", "synergy"], "backend": TRITON}
    found = [pair_moe(q, k, a, c, **call).y for _ in range(3)]
    assert list(plans._plans.values()) == [False]
    assert torch.equal(found[0], found[2])


def test_tensors_without_elements() -> None:
    """A plan without memory for other tensors has no place for them."""
    empty = torch.zeros(2, 0, 4)
    found = [
        reweighting.reweighting_features([empty], None, [False], empty, None, TRITON)
        for _ in range(4)
    ]
    assert type(*plans._plans.values()) is plans.Plan
    assert all(torch.equal(found[0], x) for x in found)
