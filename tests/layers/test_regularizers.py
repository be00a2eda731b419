"""Tests of the decorrelation regularizers against SPEC's sums over pairs of experts."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels import InteractionMoE, rep_barlow, rep_cka, rep_cos, warmup_scale
from flmoe_kernels.core.dtypes import statistics_dtype
from flmoe_kernels.core.error_budget import assert_outside_budget
from tests.support.inputs import draw
from tests.support.layers import LayerCase
from tests.support.operator_cases import DTYPES, compare


def naive_cos(z: Tensor, f: Tensor, g: Tensor | float = 1.0) -> Tensor:
    return (torch.cosine_similarity(z, f, dim=1, eps=1e-24) * g).square().mean()


def naive_barlow(z: Tensor, f: Tensor) -> Tensor:
    width = z.shape[1]
    z, f = ((x - x.mean(dim=0)) / (x.std(dim=0, correction=0) + 1e-5) for x in (z, f))
    c = z.T @ f / len(z)
    return (c - c.diag().diag()).square().sum() / max(1, width * width - width)


def naive_cka(z: Tensor, f: Tensor) -> Tensor:
    z, f = z - z.mean(dim=0), f - f.mean(dim=0)
    norms = torch.linalg.matrix_norm(z.T @ z) * torch.linalg.matrix_norm(f.T @ f)
    return torch.linalg.matrix_norm(z.T @ f).square() / (norms + 1e-8)


def over_pairs(naive: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The mean of a function of two latents over the pairs of experts, in the dtype of sums."""

    def mean(latents: Tensor, weights: Tensor | None = None) -> Tensor:
        z = latents.to(statistics_dtype(latents.dtype))
        terms = []
        for e, f in itertools.combinations(range(len(z)), 2):
            more = [] if weights is None else [(weights[:, e] + weights[:, f]).to(z.dtype) / 2]
            terms.append(naive(z[e], z[f], *more))
        return torch.stack(terms).mean() if terms else z.new_zeros(())

    return mean


PAIRS: dict[Any, Callable[..., Tensor]] = {
    rep_cos: over_pairs(naive_cos),
    rep_barlow: over_pairs(naive_barlow),
    rep_cka: over_pairs(naive_cka),
}
ALL = pytest.mark.parametrize("regularizer", PAIRS, ids=lambda f: f.__name__)
# B < d, B = d and B > d.
SHAPES = ((4, 5, 12), (3, 6, 6), (5, 13, 4), (2, 40, 2), (4, 32, 512), (3, 130, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@ALL
def test_regularizers_are_the_sums_over_pairs(
    regularizer: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    common = draw(1, *shape[1:], seed=1)
    latents = common + draw(*shape, seed=2)
    arguments = [[latents]]
    if regularizer is rep_cos:
        arguments.append([latents, draw(shape[1], shape[0], seed=3).softmax(dim=1)])
    for each in arguments:
        # The squared diagonal, which rep_barlow subtracts, is about as large as the result.
        oracle = PAIRS[regularizer]
        value, *_ = compare(regularizer, oracle, each, dtype, magnitude=1.0, gradient_magnitude=0.0)
        ours, low, exact = value
        assert_outside_budget(ours * (shape[0] - 1) / shape[0], low, exact, "a wrong mean")


@ALL
def test_gradients_of_special_latents_are_finite(regularizer: Any) -> None:
    for dtype in DTYPES:
        for batch, width in ((3, 8), (9, 4)):
            latents = draw(3, batch, width, dtype=dtype)
            latents[1] = 0
            constant = draw(3, batch, width, dtype=dtype)
            constant[..., 1] = 0.1  # whose mean over the batch may be rounded
            one_sample = constant[:, :1]
            for x in (latents, constant, one_sample, torch.zeros_like(latents)):
                x = x.clone().requires_grad_()
                value = regularizer(x)
                value.backward()
                assert value.dtype == statistics_dtype(dtype)
                assert x.grad.isfinite().all()
            assert value.item() == 0.0


@ALL
def test_gradients_of_second_order(regularizer: Any) -> None:
    for shape in ((3, 4, 5), (3, 6, 2)):
        x = draw(*shape, dtype=torch.float64).requires_grad_()
        assert torch.autograd.gradgradcheck(regularizer, (x,))


@ALL
def test_regularizers_compile_without_a_break(regularizer: Any) -> None:
    compiled = torch.compile(regularizer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (regularizer, compiled):
        experts = [z.requires_grad_() for z in draw(3, 9, 4)]
        loss = call(experts)
        results.append([loss.detach(), *torch.autograd.grad(loss, experts)])
    torch.testing.assert_close(results[1], results[0])


@ALL
def test_autocast_has_no_effect(regularizer: Any) -> None:
    latents = draw(4, 6, 8)
    expected = regularizer(latents)
    with torch.autocast("cpu", torch.bfloat16):
        assert (latents[0] @ latents[1].T).dtype == torch.bfloat16
        assert torch.equal(regularizer(latents), expected)


@ALL
def test_latents_of_the_layer(regularizer: Any) -> None:
    """What forward returns is accepted as it is, and its parameters get gradients."""
    case = LayerCase((5, 4), batch=3, dim=8, heads=2, layers=1)
    layer = InteractionMoE.adopt(case.reference(torch.float32))
    _, weights, *_, latents = layer(case.inputs(torch.float32))
    more = [weights] if regularizer is rep_cos else []
    value = regularizer(latents, *more)
    torch.testing.assert_close(value, regularizer(torch.stack(list(latents)), *more))
    value.backward()
    for expert in layer.interaction_experts:
        gradient = expert.fusion_model.network[0].attn.proj.weight.grad
        assert gradient.abs().max() > 0


Z = draw(2, 3, 4)
MISTAKES: list[tuple[Any, type[Exception], str]] = [
    (3.0, TypeError, "latents: expected a Tensor, got float"),
    ([], ValueError, "latents: expected at least one expert, got none"),
    (
        [Z[0], Z[1, :2]],
        ValueError,
        "latents[1]: expected (B, d) as latents[0] = (3, 4), got (2, 4)",
    ),
    ([Z[0], Z[1].double()], TypeError, "latents[1]: expected dtype torch.float32 as latents[0]"),
    (Z.long(), TypeError, "latents: expected float32, float64, bfloat16 or float16, got"),
    (Z[0], ValueError, "latents: expected (E, B, d), none of them 0, got (3, 4)"),
    (Z[:, :0], ValueError, "latents: expected (E, B, d), none of them 0, got (2, 0, 4)"),
]


@pytest.mark.parametrize(("latents", "error", "message"), MISTAKES)
def test_wrong_latents(latents: Any, error: type[Exception], message: str) -> None:
    for regularizer in PAIRS:
        with pytest.raises(error, match=re.escape(message)):
            regularizer(latents)


def test_wrong_weights() -> None:
    with pytest.raises(ValueError, match=r"weights: expected \(B, E\) = \(3, 2\), got \(2, 3\)"):
        rep_cos(Z, torch.ones(2, 3))
    with pytest.raises(TypeError, match="weights: expected a floating-point dtype"):
        rep_cos(Z, torch.ones(3, 2).long())


def test_warm_up() -> None:
    assert [warmup_scale(epoch, 5) for epoch in range(7)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [warmup_scale(epoch, length) for epoch in (0, 3) for length in (0, 1)] == [1.0] * 4
    assert warmup_scale(-1, 5) == 0.0
    assert warmup_scale(0.5, 2) == 0.5
    with pytest.raises(ValueError, match="epoch: expected a finite number, got nan"):
        warmup_scale(float("nan"), 5)
    with pytest.raises(ValueError, match="warmup_epochs: expected an int from 0, got -1"):
        warmup_scale(0, -1)
