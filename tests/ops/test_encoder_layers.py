"""Tests of encoder_layers, the dense encoders of all experts as one operator."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._vmap_internals import _vmap
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from flmoe_kernels import BackendUnavailable
from flmoe_kernels.ops.encoder.layers import PLACES
from tests.support.encoder_cases import EXPERTS, FORMS, LAYERS, WIDTH, layers_arguments
from tests.support.inputs import draw
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": []}, "weights: expected"),
        ({"count": torch.ones(1, dtype=torch.int32)}, "count: expected None"),
        ({"rows": draw(EXPERTS, 1, 5, 3, seed=1)}, r"weights\[0\]: expected"),
        ({"rows": draw(3, 1, 5, WIDTH, seed=1)}, "weights: expected"),
        ({"cu_samples": torch.tensor([0, 5])}, "cu_seqlens: expected"),
        ({"cu_segments": torch.tensor([0, 2, 3, 4, 5])}, "cu_segments: expected"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPS.encoder_layers(*layers_arguments("one view", **changes))


def test_checkpointing() -> None:
    call, leaves = in_double(layers_arguments("views"))
    want = torch.autograd.grad(OPS.encoder_layers(*call)[0].sum(), leaves)
    again = checkpoint(lambda: OPS.encoder_layers(*call)[0], use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(again.sum(), leaves), want))


def test_batches_of_gradients_in_another_thread() -> None:
    """The backward of a GPU runs in a thread of its own."""
    call, _ = in_double(layers_arguments("views"))
    latents, saved = OPS.encoder_layers(*call)
    wants = [True] * (1 + LAYERS * len(PLACES))
    rest = [call[0].detach(), *call[1:6], call[7], saved, *call[8:13], wants]
    grads = torch.stack([latents.detach(), 2 * latents.detach()])
    with ThreadPoolExecutor(1) as pool:

        def run(grad: Tensor) -> tuple[Tensor, ...]:
            return tuple(pool.submit(OPS.encoder_layers_backward, grad, *rest).result())

        got = _vmap(run, 0, 0)(grads)
        nested = _vmap(_vmap(run, 0, 0), 0, 0)(grads.unsqueeze(1))
    for i, grad in enumerate(grads):
        want = OPS.encoder_layers_backward(grad, *rest)
        assert all(torch.equal(x[i], y) for x, y in zip(got, want, strict=True))
        assert all(torch.equal(x[i, 0], y) for x, y in zip(nested, want, strict=True))


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


def test_differentiation_needs_what_is_saved() -> None:
    call, _ = in_double(layers_arguments("views", save=False))
    with pytest.raises(ValueError, match="save: expected True"):
        OPS.encoder_layers(*call)
