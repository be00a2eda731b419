"""Tests of encoder_layers, the dense encoders of all experts as one operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from flmoe_kernels import BackendUnavailable
from tests.support.encoder_cases import FORMS, WIDTH, layers_arguments
from tests.support.operator_cases import OPS


def in_double(call: list[Any]) -> tuple[list[Any], list[Tensor]]:
    """The call in float64, and its leaves."""
    call[0] = call[0].double().requires_grad_()
    call[6] = [weight.double().requires_grad_() for weight in call[6]]
    return call, [call[0], *call[6]]


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("self_residual", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, self_residual: bool, rate: float) -> None:
    call, leaves = in_double(layers_arguments(form, rate, self_residual=self_residual))

    def latents(rows: Tensor, *weights: Tensor) -> Tensor:
        return OPS.encoder_layers(rows, *call[1:6], list(weights), *call[7:])[0]

    assert torch.autograd.gradcheck(latents, leaves, fast_mode=True)


@pytest.mark.parametrize("train_rows", [False, True])
def test_second_derivatives_are_refused(train_rows: bool) -> None:
    """Also if only weights are trained, of which the saved tensors are copies."""
    call, leaves = in_double(layers_arguments("one view"))
    leaves[0].requires_grad_(train_rows)
    out = OPS.encoder_layers(*call)[0].square().sum()
    grads = torch.autograd.grad(out, call[6], create_graph=True)
    penalty = sum(grad.square().sum() for grad in grads)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        torch.autograd.grad(penalty, call[6])


def test_checkpointing() -> None:
    call, leaves = in_double(layers_arguments("views"))
    want = torch.autograd.grad(OPS.encoder_layers(*call)[0].sum(), leaves)
    again = checkpoint(lambda: OPS.encoder_layers(*call)[0], use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(again.sum(), leaves), want))


def test_tangents_of_weights_are_refused() -> None:
    call, _ = in_double(layers_arguments("views", save=False))
    with torch.no_grad(), forward_ad.dual_level():
        call[6][0] = forward_ad.make_dual(call[6][0].detach(), torch.ones(WIDTH).double())
        with pytest.raises(BackendUnavailable, match="forward-mode AD"):
            OPS.encoder_layers(*call)


def test_no_rows_at_all() -> None:
    """Every token is padding."""
    none = torch.zeros(9, dtype=torch.int32)
    call, leaves = in_double(
        layers_arguments("folded views", cu_samples=none[::2], cu_segments=none)
    )
    call[0] = leaves[0] = leaves[0][:, :, :0].detach().requires_grad_()
    call[2] = call[2][:0]
    latents = OPS.encoder_layers(*call)[0]
    assert (latents == 0).all()
    grads = torch.autograd.grad(latents.sum(), leaves)
    assert all((grad == 0).all() for grad in grads)
