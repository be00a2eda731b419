"""Tests of the interaction losses against the reference, and at their kinks."""

from __future__ import annotations

import pytest
import torch

from tests.support.inputs import draw, gradients
from tests.support.operator_cases import DTYPES, OPS, compare, loss_arguments, reference_losses


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
    for arguments in loss_arguments(latents):
        compare(OPS.interaction_losses, reference_losses, arguments, dtype, magnitude=size)


def test_interaction_losses_of_one_column() -> None:
    """The cosine of two numbers is a sign; its gradient is 0, or only rounding in low precision."""
    latents = draw(5, 4, 7, 1, seed=5)
    compare(OPS.interaction_losses, reference_losses, [latents, None], torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_losses_of_zero_latents_are_finite_in_half_precision(dtype: torch.dtype) -> None:
    zeros = torch.zeros(4, 3, 2, 6, dtype=dtype, requires_grad=True)
    losses = OPS.interaction_losses(zeros, None)
    assert torch.equal(losses, torch.tensor([1, 1, 0, 1], dtype=dtype))
    (grad,) = gradients([losses], [zeros])
    assert grad.isfinite().all()


def test_losses_without_some_views() -> None:
    """Means over what exists, by hand; what does not exist has no effect and gradient 0, even if it is NaN."""
    latents = draw(4, 3, 3, 5, seed=1, dtype=torch.float64)
    exists = torch.tensor([[True, True], [True, False], [False, False]])
    dirty = latents.clone()
    for m in range(2):
        dirty[:, 1 + m, ~exists[:, m]] = float("nan")
    dirty[:, 0, 2] = float("nan")  # the full view of a sample without views
    leaf = dirty.requires_grad_()
    found = OPS.interaction_losses(leaf, exists)
    # Sample 0 has both views, sample 1 the first.
    full = torch.nn.functional.normalize(latents[:, 0, :2], dim=2)
    views = torch.nn.functional.normalize(latents[:, 1:, :2], dim=3)
    cos = [(full[e, b] * views[e, m, b]).sum() for e in (2, 3) for b, m in ((0, 0), (0, 1), (1, 0))]
    torch.testing.assert_close(found[2], torch.stack(cos[:3]).mean())
    torch.testing.assert_close(found[3], 1 - torch.stack(cos[3:]).mean())
    only = OPS.interaction_losses(latents[:, :, :1].contiguous(), None)
    torch.testing.assert_close(found[:2], only[:2])
    (grad,) = gradients([found], [leaf])
    assert grad.isfinite().all()
    assert not grad[:, :, 2].any()
    assert not grad[:, 2, 1].any()
    empty = (latents[:, :, :0], torch.ones(0, 2, dtype=torch.bool))
    assert OPS.interaction_losses(*empty).isnan().all()
    assert reference_losses(*empty).isnan().all()
    none = OPS.interaction_losses(latents, torch.zeros(3, 2, dtype=torch.bool))
    assert torch.equal(none, torch.zeros(4, dtype=torch.float64))
