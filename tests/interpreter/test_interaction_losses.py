"""Tests of the Triton kernels of the interaction losses."""

from __future__ import annotations

import pytest
import torch

from tests.support.inputs import draw, gradients
from tests.support.operator_cases import (
    OPS,
    compare,
    evaluate,
    loss_arguments,
    on_triton,
    reference_losses,
)

TRITON = "triton"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# All shapes in float32, few in half precision, which only adds casts of inputs and outputs.
SPREADS = (0.05, 4.0)
LOSSES = [
    *(
        (s, x, torch.float32)
        for s in ((2, 7, 3), (3, 1, 17), (4, 3, 64), (2, 17, 63))
        for x in SPREADS
    ),
    *(((2, 2, 700), spread, dtype) for spread in SPREADS for dtype in DTYPES),
]

losses = on_triton("interaction_losses")


@pytest.mark.parametrize(("shape", "spread", "dtype"), LOSSES, ids=str)
def test_losses(shape: tuple[int, int, int], spread: float, dtype: torch.dtype) -> None:
    """Several chunks of columns and blocks of samples, triplets inside and outside the margin."""
    modalities, batch, width = shape
    latents = draw(modalities + 2, modalities + 1, batch, width, seed=5, scale=spread)
    # A triplet's loss is a difference of distances.
    size = spread * (2 * width) ** 0.5 if dtype == torch.float32 else 0.0
    for arguments in loss_arguments(latents):
        compare(losses, reference_losses, arguments, dtype, magnitude=size)


def test_losses_of_one_column() -> None:
    """The cosine of two numbers is a sign, so its gradient is only rounding; the distances have a gradient."""
    latents = draw(5, 4, 7, 1, seed=5).requires_grad_()
    pair = [evaluate(function, [latents, None], 1) for function in (losses, reference_losses)]
    for (out, grad), (want, want_grad) in [pair]:
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(grad[:3], want_grad[:3])


def test_nan_and_infinity_reach_only_their_own_expert() -> None:
    for value in (float("nan"), float("inf")):
        latents = draw(4, 3, 5, 7, seed=3)
        latents[1, 0, 2, 4] = latents[2, 1, 4, 0] = value
        leaf = latents.requires_grad_()
        found = losses(leaf, None)
        want = reference_losses(leaf.detach())
        assert torch.equal(found.isfinite(), want.isfinite())
        assert found.isfinite().tolist() == [True, False, False, True]
        (grad,) = gradients([found], [leaf])
        assert grad[0].isfinite().all()
        assert grad[1, :, [0, 1, 3, 4]].isfinite().all()
        assert not grad[1, :, 2].isfinite().all()


def test_views_that_do_not_exist_may_be_nan() -> None:
    latents = draw(4, 3, 2, 8, seed=3)
    exists = torch.tensor([[True, True], [True, False]])
    latents[:, 2, 1] = float("nan")
    leaf = latents.requires_grad_()
    found = losses(leaf, exists)
    (grad,) = gradients([found], [leaf])
    assert found.isfinite().all()
    assert grad.isfinite().all()
    assert not grad[:, 2, 1].any()


def test_empty_batches() -> None:
    assert losses(torch.empty(4, 3, 0, 5), None).isnan().all()
    grad = OPS.interaction_losses_backward(torch.ones(4), torch.empty(4, 3, 0, 5), None, TRITON)
    assert grad.shape == (4, 3, 0, 5)
