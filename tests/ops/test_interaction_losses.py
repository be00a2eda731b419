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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_of_zero_latents_are_finite_in_half_precision(dtype: torch.dtype) -> None:
    zeros = torch.zeros(4, 3, 2, 6, dtype=dtype, requires_grad=True)
    losses = OPS.interaction_losses(zeros)
    assert torch.equal(losses, torch.tensor([1, 1, 0, 1], dtype=dtype))
    (grad,) = gradients([losses], [zeros])
    assert grad.isfinite().all()
