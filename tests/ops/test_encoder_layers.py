"""Tests of encoder_layers, the dense encoders of all experts as one operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flmoe_kernels.ops.encoder.inference import layer_shapes
from flmoe_kernels.ops.encoder.layers import PLACES
from tests.support.inputs import draw
from tests.support.operator_cases import OPS

EXPERTS, LAYERS, WIDTH, HIDDEN = 2, 2, 4, 6
FORMS = ("one view", "views", "folded views")


def arguments(form: str, rate: float = 0.25, **changes: Any) -> list[Any]:
    """Two samples of two segments, of 3 and 2 rows."""
    shapes = EXPERTS * LAYERS * layer_shapes(WIDTH, HIDDEN)
    weights = [draw(*shape, seed=i, scale=0.7) for i, shape in enumerate(shapes)]
    segments = torch.tensor([0, 2, 3, 4, 5], dtype=torch.int32)
    modality = torch.tensor([0, 0, 1, 0, 1], dtype=torch.int32)
    source = None
    if form == "folded views":
        # The second view has only the first sample.
        source = torch.tensor([0, 1, 2, 3, 4, 5, 6, 2])
        segments = torch.tensor([0, 2, 3, 4, 5, 7, 8, 8, 8], dtype=torch.int32)
    named: dict[str, Any] = {
        "rows": draw(EXPERTS, 1 if form == "one view" else 2, 5, WIDTH, seed=90),
        "modality": modality if form == "views" else None,
        "source": source,
        "cu_samples": segments[::2].contiguous(),
        "cu_segments": segments,
        "count": None,
        "weights": weights,
        "seeds": torch.arange(4 * LAYERS) if rate else None,
        "rates": [rate, 0.0, rate, rate] * LAYERS,
        "heads": 2,
        "views": 3 if form == "views" else 1,
        "eps": 1e-5,
        "self_residual": False,
        "save": True,
        **changes,
    }
    return list(named.values())


def in_double(call: list[Any]) -> tuple[list[Any], list[Tensor]]:
    """The call in float64, and its leaves."""
    call[0] = call[0].double().requires_grad_()
    call[6] = [weight.double().requires_grad_() for weight in call[6]]
    return call, [call[0], *call[6]]


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("self_residual", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, self_residual: bool, rate: float) -> None:
    call, leaves = in_double(arguments(form, rate, self_residual=self_residual))

    def latents(rows: Tensor, *weights: Tensor) -> Tensor:
        return OPS.encoder_layers(rows, *call[1:6], list(weights), *call[7:])[0]

    assert torch.autograd.gradcheck(latents, leaves, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str) -> None:
    call = arguments(form)
    torch.library.opcheck(OPS.encoder_layers.default, tuple(arguments(form, save=False)))
    call[0].requires_grad_()
    call[6] = [weight.requires_grad_() for weight in call[6]]
    torch.library.opcheck(OPS.encoder_layers.default, tuple(call))
    latents, saved = OPS.encoder_layers(*call)
    wants = [True] * (1 + LAYERS * len(PLACES))
    torch.library.opcheck(
        OPS.encoder_layers_backward.default,
        (latents.detach(), call[0].detach(), *call[1:6], call[7], saved, *call[8:13], wants),
    )


@pytest.mark.parametrize("form", FORMS)
def test_any_subset_of_gradients(form: str) -> None:
    """Gradients that are not wanted are not computed, and the others stay the same bits."""
    call, leaves = in_double(arguments(form))
    latents = OPS.encoder_layers(*call)[0]
    everything = torch.autograd.grad(latents.square().sum(), leaves, retain_graph=True)
    generator = torch.Generator().manual_seed(1)
    subsets = [torch.rand(len(leaves), generator=generator) < 0.05 for _ in range(40)]
    subsets += [torch.arange(len(leaves)) == i for i in range(len(leaves))]
    for subset in subsets:
        chosen = subset.nonzero().flatten().tolist()
        if not chosen:
            continue
        frozen, others = in_double(arguments(form))
        for i, leaf in enumerate(others):
            leaf.requires_grad_(i in chosen)
        again = OPS.encoder_layers(*frozen)[0]
        grads = torch.autograd.grad(again.square().sum(), [others[i] for i in chosen])
        for i, grad in zip(chosen, grads, strict=True):
            assert torch.equal(grad, everything[i]), f"leaf {i} of {chosen}"


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
        OPS.encoder_layers(*arguments("one view", **changes))


def test_differentiation_needs_what_is_saved() -> None:
    call, _ = in_double(arguments("views", save=False))
    with pytest.raises(ValueError, match="save: expected True"):
        OPS.encoder_layers(*call)
