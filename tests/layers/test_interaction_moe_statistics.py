"""Tests of the distribution of the fast layer's outputs with dropout and noise.

One sample is repeated over a large batch, in which every row has its own masks and noise, and over seeds.
Means, variances and covariances must agree with the reference's within six standard errors. Covariances are
between experts, views and columns, so that a mask that is used twice is detected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flmoe_kernels import InteractionMoE
from tests.support.inputs import draw
from tests.support.layers import LayerCase, named_outputs

SIGMAS = 6.0
SEEDS = range(4)
pytestmark = pytest.mark.slow  # many draws
CASES = {
    "fl_i2moe": LayerCase((3, 2), dim=4, heads=2, batch=2500, dropout=0.5),
    "i2moe": LayerCase((2, 2), "i2moe", dim=4, heads=2, batch=2500, dropout=0.5),
    "low rate": LayerCase((2, 1), dim=4, heads=1, layers=2, batch=2500, dropout=0.2),
}
CONTROL_RATES = {"fl_i2moe": 0.44, "i2moe": 0.44, "low rate": 0.27}


def one_sample(case: LayerCase) -> list[Tensor]:
    return [
        draw(1, length, case.dim, seed=m).expand(case.batch, -1, -1)
        for m, length in enumerate(case.lengths)
    ]


def samples(case: LayerCase, make: Callable[[], torch.nn.Module], noise: bool = True) -> Tensor:
    """All random outputs, (seeds * batch, features)."""
    layer, x = make(), one_sample(case)
    fixed = None if noise else [x] * case.experts
    rows = []
    with torch.no_grad():
        for seed in SEEDS:
            torch.manual_seed(seed)
            outputs = named_outputs(layer(x, None, replacements=fixed))
            views = outputs.get("expert_latents", outputs["expert_logits"])
            per_sample = [views.permute(2, 0, 1, 3).flatten(1), outputs["weights"]]
            rows.append(torch.cat([*per_sample, outputs["logits"]], dim=1))
    return torch.cat(rows).double()


def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means and covariances, and the variances of both estimates."""
    n = len(x)
    mean = x.mean(0)
    centred = x - mean
    covariance = centred.T @ centred / n
    fourth = centred.square().T @ centred.square() / n
    return mean, covariance, covariance.diagonal() / n, (fourth - covariance.square()) / n


def largest_deviation(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """Largest differences of means, variances and covariances, in standard errors."""
    (mean_a, cov_a, mean_var_a, cov_var_a), (mean_b, cov_b, mean_var_b, cov_var_b) = (
        moments(a),
        moments(b),
    )
    tiny = 1e-18
    means = (mean_a - mean_b).abs() / (mean_var_a + mean_var_b + tiny).sqrt()
    covariances = (cov_a - cov_b).abs() / (cov_var_a + cov_var_b + tiny).sqrt()
    return float(means.max()), float(covariances.diagonal().max()), float(covariances.max())


@pytest.mark.parametrize("name", CASES)
def test_moments_agree_with_the_reference(name: str) -> None:
    case = CASES[name]
    expected = samples(case, case.reference)
    found = samples(case, lambda: InteractionMoE.adopt(case.reference(), backend="cpu"))
    assert found.shape == expected.shape
    assert max(largest_deviation(found, expected)) < SIGMAS

    # Negative controls: another rate, no noise, the same draw for two views.
    other = dataclasses.replace(case, dropout=CONTROL_RATES[name])
    wrong = samples(case, lambda: InteractionMoE.adopt(other.reference(), backend="cpu"))
    assert largest_deviation(wrong, expected)[1] > SIGMAS
    fixed = samples(case, lambda: InteractionMoE.adopt(case.reference()), noise=False)
    assert largest_deviation(fixed, expected)[1] > SIGMAS
    width = (
        (found.shape[1] - case.experts - case.classes) // case.experts // (len(case.lengths) + 1)
    )
    shared = found.clone()
    shared[:, width : 2 * width] = found[:, :width]
    assert largest_deviation(shared, expected)[2] > SIGMAS


def test_rates_of_single_dropouts() -> None:
    """Each of the five dropouts is tested alone, because the others could hide it."""
    case = dataclasses.replace(CASES["fl_i2moe"], batch=1500)

    def layer(place: str) -> torch.nn.Module:
        reference = case.reference()
        for expert in reference.interaction_experts:
            encoder = expert.fusion_model.network[0]
            places = {
                "attention": encoder.attn.attn_drop,
                "projection": encoder.attn.proj_drop,
                "residual": encoder.dropout1,
                "mlp": encoder.mlp.network[2],
                "output": encoder.dropout2,
            }
            for name, dropout in places.items():
                dropout.p = 0.4 if name == place else 0.0
        return reference

    places = ("attention", "projection", "residual", "mlp", "output")
    expected = {place: samples(case, lambda place=place: layer(place)) for place in places}
    for place in places:
        found = samples(case, lambda place=place: InteractionMoE.adopt(layer(place)))
        assert max(largest_deviation(found, expected[place])) < SIGMAS, place
        other = "mlp" if place == "attention" else "attention"
        assert max(largest_deviation(found, expected[other])) > SIGMAS, place
