"""Inputs that the published layers accept: low precision, missing masks, any value in the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flmoe_kernels import InteractionMoE, PairInteractionMoE
from tests.support.inputs import draw_masks
from tests.support.layers import FL, SPARSE_FL, fusion_of


def layers_of(backend: str) -> dict[str, Any]:
    """Layers for two modalities of width 16, by name; all return logits as the last of these forms."""
    pairs = PairInteractionMoE([16, 16], num_classes=3, backend=backend)
    moe = InteractionMoE.adopt(FL.reference(), backend=backend)
    sparse = InteractionMoE.adopt(SPARSE_FL.reference(), backend=backend)
    return {
        "InteractionMoE": lambda x, m: moe.eval().inference(x, m)[2],
        "sparse InteractionMoE": lambda x, m: sparse.eval()(x, m)[2],
        "FusionTransformer": fusion_of(FL, backend),
        "sparse FusionTransformer": fusion_of(SPARSE_FL, backend),
        "PairInteractionMoE": lambda x, m: pairs(x, m).logits,
        "reweight": lambda x, m: moe.eval().reweight(x, m),
    }


LAYERS = pytest.mark.parametrize("name", list(layers_of("cpu")))
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


@BACKENDS
@LAYERS
def test_inputs_of_lower_precision_are_cast(name: str, backend: str) -> None:
    call = layers_of(backend)[name]
    for dtype in (torch.bfloat16, torch.float16):
        x = [each.requires_grad_() for each in FL.inputs(dtype)]
        logits = call(x, None)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, call([each.float() for each in x], None))
        logits.sum().backward()
        assert all(each.grad is not None and each.grad.dtype == dtype for each in x)
    if name != "reweight":
        with pytest.raises(TypeError, match=r"inputs\[0\]: expected dtype torch.float32 .*float64"):
            call(FL.inputs(torch.float64), None)
        with pytest.raises(TypeError, match=r"inputs\[0\]: expected dtype torch.float32 .*float8"):
            call([x.to(torch.float8_e4m3fn) for x in FL.inputs()], None)


@BACKENDS
@LAYERS
def test_missing_masks_count_as_valid(name: str, backend: str) -> None:
    call, x = layers_of(backend)[name], FL.inputs()
    first = draw_masks("partial", 3, FL.lengths)
    assert first is not None
    assert torch.equal(call(x, first[:1]), call(x, [first[0], None]))
    assert not torch.equal(call(x, first[:1]), call(x, None))
    assert torch.equal(call(x, []), call(x, [None, None]))


@BACKENDS
@LAYERS
def test_masked_values_reach_no_result(name: str, backend: str) -> None:
    call, masks = layers_of(backend)[name], draw_masks("partial", 3, FL.lengths)
    assert masks is not None
    found = []
    for value in (0.0, float("nan"), float("inf")):
        x = [
            torch.where(mask.unsqueeze(-1), each, value).requires_grad_()  # type: ignore[union-attr]
            for each, mask in zip(FL.inputs(), masks, strict=True)
        ]
        logits = call(x, masks)
        found.append([logits, *torch.autograd.grad(logits.square().sum(), x)])
    for other in found[1:]:
        for actual, expected in zip(other, found[0], strict=True):
            assert torch.equal(actual, expected)
    assert bool(found[0][0].isfinite().all())
    assert any(bool((gradient != 0).any()) for gradient in found[0][1:])
