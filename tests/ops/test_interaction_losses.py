"""Tests of the interaction losses against the reference, and at their kinks."""

from __future__ import annotations

import pytest
import torch

from tests.support.inputs import draw, gradients
from tests.support.operator_cases import DTYPES, OPS, compare, reference_losses


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.05, 1.0, 4.0])
@pytest.mark.parametrize(
    ("modalities", "batch", "width"),
    [(2, 7, 3), (3, 1, 17), (5, 3, 64), (2, 1, 300), (4, 7, 100)],
)
def test_interaction_losses(
    modalities: int, batch: int, width: int, spread: float, dtype: torch.dtype
) -> None:
    """A small spread keeps every triplet inside the margin, a large one puts many outside."""
    latents = draw(modalities + 2, modalities + 1, batch, width, seed=5, scale=spread)
    # A triplet's loss is a difference of distances.
    distance = spread * (2 * width) ** 0.5
    size = distance if dtype == torch.float32 else 0.0
    compare(OPS.interaction_losses, reference_losses, [latents], dtype, magnitude=size)


def test_interaction_losses_of_one_column() -> None:
    """The cosine of two numbers is a sign; its gradient is 0, or only rounding in low precision."""
    latents = draw(5, 4, 7, 1, seed=5)
    compare(OPS.interaction_losses, reference_losses, [latents], torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("active", [True, False])
def test_triplet_margin(active: bool, dtype: torch.dtype) -> None:
    """Inside the margin the loss is distance - distance + 1; outside, it and its gradient are 0."""
    latents = torch.zeros(4, 3, 1, 4)
    latents[:, 1, 0, 0], latents[:, 2, 0, 0] = 1.0, 1.5 if active else 2.5
    result, grad = (
        triple[0] for triple in compare(OPS.interaction_losses, reference_losses, [latents], dtype)
    )
    # Expert 0's negative is view 1 and its positive view 2; expert 1 has them swapped.
    far = 1.5 if active else 2.5
    torch.testing.assert_close(result[0], torch.tensor(far, dtype=dtype), atol=1e-6, rtol=0)
    torch.testing.assert_close(
        result[1], torch.tensor(0.5 if active else 0.0, dtype=dtype), atol=1e-6, rtol=0
    )
    assert bool((grad[1] != 0).any()) == active


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_of_zero_latents_and_identical_views(dtype: torch.dtype) -> None:
    shape = (5, 4, 3, 6)
    zeros = torch.zeros(shape)
    one_zero_view = draw(*shape, seed=1)
    one_zero_view[:, 2] = 0
    zero_anchor = draw(*shape, seed=2)
    zero_anchor[:, 0] = 0
    zero_sample = draw(*shape, seed=3)
    zero_sample[:, :, 1] = 0
    same_views = draw(5, 1, 3, 6, seed=4).expand(shape)
    for latents in (one_zero_view, zero_anchor, zero_sample, same_views, zeros):
        compare(OPS.interaction_losses, reference_losses, [latents], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_of_zero_latents_are_finite_in_half_precision(dtype: torch.dtype) -> None:
    zeros = torch.zeros(4, 3, 2, 6, dtype=dtype, requires_grad=True)
    losses = OPS.interaction_losses(zeros)
    assert torch.equal(losses, torch.tensor([1, 1, 0, 1], dtype=dtype))
    (grad,) = gradients([losses], [zeros])
    assert grad.isfinite().all()
